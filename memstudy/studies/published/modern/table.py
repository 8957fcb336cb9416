"""The table's rows."""

from __future__ import annotations

import pandas as pd

from memstudy.studies.published import HERE


def published(classes: str = "A") -> pd.DataFrame:
    """The rows of ``classes``.

    A: configuration public, lengths exact, an allocator's counter. B: lengths depend on data, or coarser.
    """
    rows = pd.read_csv(HERE / "modern_memory.csv")
    return rows[rows["class"].isin(list(classes))]
