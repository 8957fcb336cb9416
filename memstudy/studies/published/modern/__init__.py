"""Fine-tuning as others measured it in 2024 and 2025, predicted: the rows of ``modern_memory.csv``, a module a source.

`OUTSIDE` names the rows that are not predicted, each with the cause.
"""

from __future__ import annotations

from memstudy.studies.published.modern.table import published

# The rows of class A that are not predicted: a query, and the cause.
OUTSIDE = {
    "source.str.contains('cell 27', regex=False)": (
        "made with transformers 4.38.0 or .1, by its buffer of masks, in other attention than the other cells'"
    ),
    "source.str.contains('litgpt')": (
        "lit-gpt's own code is not installed, and peft is no twin of its adapters: LoRA of a joint q, k, v makes a "
        "tensor of zeros for all three, and the loss is made in chunks"
    ),
    "source.str.contains('torchtune')": (
        "torchtune's own models are not installed; the weights alone are 13.48 GB or 12.55 GiB, and what the "
        "rest of the 13.96 is, is not known"
    ),
}


__all__ = ["OUTSIDE", "published"]
