"""A whole GPU in one forward pass of Reformer and GPT-2, batch 16 (2020), predicted."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pandas as pd
import torch
from transformers import AutoConfig, ReformerModelWithLMHead

from memstudy.huggingface.catalogue import hub_models
from memstudy.profiler import predict
from memstudy.studies.published import GPUS, HERE, Figures, eras, frame_of

NAMES = {
    "Reformer C/P, no axial": "reformer-crime-and-punishment-learned-positions",
    "Reformer C/P, axial": "reformer-crime-and-punishment",
    "Reformer en8, no axial": "reformer-enwik8-learned-positions",
}


def model_of(system: str) -> torch.nn.Module:
    if system == "GPT2 base":
        return eras.gpt2()
    return ReformerModelWithLMHead(AutoConfig.for_model(**hub_models()[NAMES[system]].config))


def forward(system: str, batch_size: int, seq_len: int) -> Callable[[], None]:
    model = model_of(system).eval()
    tokens = torch.randint(model.config.vocab_size, (batch_size, seq_len))

    @torch.no_grad()
    def step():
        model(tokens)

    return step


def figures() -> Figures:
    """One forward pass.

    "Reformer en8, no axial" 2048 is predicted 2 MB low, one segment for small tensors: 1.7 MiB of the predicted
    segment's 2 MiB are full. CUDA's sort takes scratch beyond 2,048 elements a row, which is not predicted.
    """
    rows = pd.read_csv(HERE / "reformer.csv").query("metric == 'inference_memory' and value == value")
    for row in rows.itertuples():
        build = partial(forward, row.system, int(row.batch_size), int(row.seq_len))
        yield f"{row.system}, {row.seq_len:.0f}", row.value, partial(_whole_gpu_of_2020, build)


def _whole_gpu_of_2020(build: Callable) -> float:
    report = predict(build, gpu=GPUS["inference"], iterations=1, semantics=eras.FORWARD_OF_2020)
    return report.peak_reserved_mib + eras.INFERENCE_CONTEXT_MIB


def length_differences(rows: pd.DataFrame) -> pd.DataFrame:
    """Increase in memory from each length to the next, in the table ``inference``."""
    system = rows.row.str.rpartition(", ")[0]
    steps = rows.groupby(system)[["published_mib", "predicted_mib"]].diff().dropna()
    names = rows.row.shift() + " to " + rows.row.str.rpartition(", ")[2]
    return frame_of("inference, differences", zip(names[steps.index], *steps.to_numpy().T, strict=True))
