"""Fine-tuning as others measured it in 2024 and 2025, predicted: the rows of ``modern_memory.csv``, a module a source.

`OUTSIDE` names the rows that are not predicted, each with the cause.
"""

from __future__ import annotations

from memstudy.studies.published.modern.table import published

# The rows that are not predicted: a query, and the cause.
OUTSIDE = {
    "source.str.contains('cell 27', regex=False)": (
        "made with transformers 4.38.0 or .1, by its buffer of masks, in other attention than the other cells'"
    ),
    "metric.str.startswith('nvidia-smi')": "class B; a mean over time or GPUs",
    "source.str.contains('torchtune') and method == 'QLoRA'": (
        "class B; torchao's NF4Tensor of 2024 is a wrapper subclass, which predictions do not follow"
    ),
    "source.str.contains('NeMo')": (
        "class B; eight processes are no obstacle, but a step's peak is that of the longest of the first process's "
        "texts, and only the sum of all processes' tokens is published"
    ),
}


__all__ = ["OUTSIDE", "published"]
