"""Keeps fake tensors out of what outlives a prediction: modules imported meanwhile, and tables of libraries."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import SourceFileLoader
from unittest.mock import patch

from memstudy.profiler.internals import _disable_current_modes


def modules_on_real_tensors():
    """A patch: a module that is imported within its block makes its own tensors without the prediction's modes."""
    execute = SourceFileLoader.exec_module
    with _disable_current_modes():  # imports what it needs at its first use
        pass

    def exec_module(self, module):
        with _disable_current_modes():
            execute(self, module)

    return patch.object(SourceFileLoader, "exec_module", exec_module)


@contextmanager
def tables_of_bitsandbytes(*, anew: bool) -> Iterator[None]:
    """Forget at the end the tables that bitsandbytes makes for its number formats and keeps for the process.

    functional.py, ``name2qmap``; backends/default/ops.py, ``_get_4bit_quantize_bounds``. With ``anew``, the block
    begins without tables, as on a device that has none yet.
    """
    if "bitsandbytes" not in sys.modules:
        yield
        return
    bounds = sys.modules["bitsandbytes.backends.default.ops"]._get_4bit_quantize_bounds
    known = bounds.cache_info().currsize
    with patch.dict("bitsandbytes.functional.name2qmap", clear=anew):
        yield
    if bounds.cache_info().currsize > known:
        bounds.cache_clear()
