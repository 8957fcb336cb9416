"""The table's rows of class A."""

from __future__ import annotations

import pandas as pd

from memstudy.studies.published import HERE


def published() -> pd.DataFrame:
    """The rows of class A: configuration public, lengths exact, an allocator's counter."""
    return pd.read_csv(HERE / "modern_memory.csv").query("`class` == 'A'")
