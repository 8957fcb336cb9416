"""Fine-tuning in bf16 on an A100-40GB as lit-gpt's table of resources lists it (October 2023).

The scripts put the longest text of Alpaca, whose length the table gives, into the first batch: so the peak is that of
the first passes, before the optimizer has states. The models are lit-gpt's own, of the commit that added the table;
``benchmarks/prediction/of_their_time.sh`` fetches them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from memstudy.profiler import MIB, predict
from memstudy.studies.published import GPUS, Figures
from memstudy.studies.published.modern import qlora
from memstudy.studies.published.modern.table import published

MODELS = {"phi-1.5 1.3 B": "phi-1_5", "StableLM Alpha 3 B": "stablelm-base-alpha-3b", "Llama 2 7 B": "Llama-2-7b-hf"}
METHODS = {"LoRA": "lora", "QLoRA": "lora", "adapter": "adapter", "adapterv2": "adapter_v2"}  # lit-gpt's modules
CHOSEN_ON = {  # rules chosen after the errors on these rows were seen
    "the table's commit, not the one it names": r"lit-gpt: Llama-2-7b-hf, .*",
    "packed from fp16": r"lit-gpt: phi-1_5, lora, 4 bits \(double quantisation\), .*",
}
SOFTWARE = (
    "made with torch 2.1.0, bitsandbytes 0.41.1 and lit-gpt; predicted with lit-gpt 0cc02af, bitsandbytes' code of the "
    "time (modern/qlora.py), and today's PyTorch and Lightning"
)
LORA = {"r": 8, "alpha": 16, "dropout": 0.05, "to_query": True, "to_value": True}  # finetune/lora.py


def fine_tune(model: str, method: str, scales: str, batch: int, seq: int) -> Callable[[], None]:
    """The first step of finetune/lora.py, adapter.py or adapter_v2.py, whose loss is made in chunks of 128 tokens."""
    from lightning.fabric import Fabric
    from lit_gpt.utils import chunked_cross_entropy

    code = importlib.import_module(f"lit_gpt.{method}")
    fabric = Fabric(accelerator="cpu", precision="bf16-true")
    with fabric.init_module():
        made = code.GPT(code.Config.from_name(model, **(LORA if method == "lora" else {})))
    if scales:
        weights = qlora.Weights(scales=scales, keeps_inputs=True)
        for name, layer in list(made.named_modules()):
            if type(layer) is nn.Linear:
                quantised = weights.layer(layer.weight.detach().half())
                quantised.bias = layer.bias
                made.set_submodule(name, quantised)
    getattr(code, f"mark_only_{method}_as_trainable")(made)
    made.max_seq_length = seq
    wrapped = fabric.setup_module(made)

    def step():
        tokens, labels = torch.randint(0, made.config.vocab_size, (2, batch, seq)).unbind()
        logits = wrapped(tokens, lm_head_chunk_size=128)
        logits[-1] = logits[-1][..., :-1, :]
        loss = chunked_cross_entropy(logits, labels[..., 1:])
        (loss / 32).backward()

    return step


def figures() -> Figures:
    """Allocated memory at its peak.

    Lightning packs weights of 4 bits from fp16, so bitsandbytes unpacks them in fp16 and casts the whole weight.
    """
    for row in published().query("source.str.contains('litgpt')").itertuples():
        method = row.method.partition("+")[0]
        scales = {"nf4": "single", "nf4-dq": "double"}.get(str(row.quant).split()[0], "")
        run = MODELS[row.model], METHODS[method], scales, row.batch, int(row.seq)
        text = f", 4 bits ({scales} quantisation)" if scales else ""
        yield f"lit-gpt: {run[0]}, {run[1]}{text}, {row.batch} × {row.seq}", row.bytes / MIB, partial(_mib, *run)


def _mib(*run) -> float:
    return predict(partial(fine_tune, *run), gpu=GPUS["litgpt"], iterations=1).peak_bytes / MIB
