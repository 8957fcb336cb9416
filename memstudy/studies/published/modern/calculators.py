"""What other calculators say of fms-acceleration's peaks, where their formula is public and knows the method."""

from __future__ import annotations

import functools

import pandas as pd
import torch
from accelerate.commands.estimate import estimate_training_usage
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from memstudy.huggingface.catalogue import model_config
from memstudy.profiler import MIB
from memstudy.studies.published import frame_of
from memstudy.studies.published.modern import fms


def figures() -> pd.DataFrame:
    """The calculators' numbers of Mistral-7B's peaks beside the published ones, as in `published.frame_of`.

    ``accelerate estimate-memory`` knows full training in fp32 on one GPU. training_hub's estimator is given the batch
    of all GPUs, as it asks; its middle estimate counts.
    """
    rows = []
    for row in (
        fms.table().query("model.str.contains('Mistral') and metric.str.startswith('max_allocated')").itertuples()
    ):
        name, (_, method, batch, seq, processes) = fms.name_of(row), fms.run_of(row)
        sizes = _sizes(row.model)
        if method == "full" and processes == 1:
            said = max(estimate_training_usage(4 * sizes["parameters"], "float32").values())
            rows.append((f"accelerate: {name}", row.bytes / MIB, said / MIB))
        rows.append(
            (f"training_hub: {name}", row.bytes / MIB, _training_hub(method, batch * seq, processes, **sizes) / MIB)
        )
    return frame_of("calculators", rows)


def _training_hub(
    method: str, tokens: int, processes: int, parameters: int, head: int, sides: int, hidden: int, vocabulary: int
) -> float:
    """Bytes a GPU: training_hub, src/training_hub/profiling/memory_estimator.py, ``estimate``.

    It leaves out the head, which ``AutoModel`` doesn't make, and puts adapters beside every matrix of the blocks.
    """
    parameters -= head
    if method == "full":
        state = (4 + 4 + 4 * 2) * parameters / processes
        return 1.1 * (state + 4 * tokens * (hidden + vocabulary * 8 / 3))
    adapters, weight = 16 * sides, 2 if method == "LoRA" else 0.5
    gradients, outputs = 2 * adapters / processes, 2 * tokens * vocabulary * 2
    state = (weight * parameters + (4 + 2 * 2) * adapters) / processes
    total = state + 2 * tokens * hidden + max(gradients, outputs)
    if method != "LoRA" and total < parameters:  # quantised on the way to the GPU
        total = parameters / processes
    return 1.1 * total


@functools.cache
def _sizes(model_id: str) -> dict[str, int]:
    config: PretrainedConfig = model_config(model_id)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linear = [module.weight for module in model.base_model.modules() if isinstance(module, nn.Linear)]
    return {
        "parameters": model.num_parameters(),
        "head": model.lm_head.weight.numel(),
        "sides": sum(sum(weight.shape) for weight in linear),
        "hidden": config.num_hidden_layers * config.hidden_size,
        "vocabulary": config.vocab_size,
    }
