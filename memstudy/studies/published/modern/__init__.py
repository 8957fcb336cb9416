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
    "source.str.contains('litgpt')": "lit-gpt's own models and adapters are not installed",
    "source.str.contains('torchtune')": "torchtune's own models are not installed",
}


__all__ = ["OUTSIDE", "published"]
