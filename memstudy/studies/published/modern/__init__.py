"""Fine-tuning as others measured it in 2024 and 2025, predicted: the rows of ``modern_memory.csv``, a module a source.

`OUTSIDE` names the rows that are not predicted, each with the cause.
"""

from __future__ import annotations

from memstudy.studies.published import Figures
from memstudy.studies.published.modern import fms
from memstudy.studies.published.modern.table import published

# The rows of class A that are not predicted: a query, and the cause.
OUTSIDE = {
    "source.str.contains('fsdp_qlora') and method == 'QLoRA'": (
        "the profiler does not follow bitsandbytes' Params4bit yet"
    ),
    "source.str.contains('fsdp_qlora') and method != 'QLoRA'": (
        "transformers of early 2024, version unknown: 35 MB of buffers beside the weights, no rule for them yet"
    ),
    "source.str.contains('litgpt')": "lit-gpt's own models and adapters are not installed",
    "source.str.contains('torchtune')": "torchtune's own models are not installed",
}


__all__ = ["OUTSIDE", "figures", "published"]


def figures() -> Figures:
    yield from fms.figures()
