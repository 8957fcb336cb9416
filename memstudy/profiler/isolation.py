"""Keeps fake tensors out of what outlives a prediction: modules imported meanwhile, and tables of libraries."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import SourceFileLoader
from unittest.mock import patch

import torch

from memstudy.profiler.internals import _disable_current_modes

_BOUNDS = "bitsandbytes.backends.default.ops"


def modules_on_real_tensors():
    """A patch: a module that is imported within its block makes its own tensors without the prediction's modes.

    To be entered before ``torch.compile`` is replaced, which decorates functions of modules.
    """
    execute, compiled = SourceFileLoader.exec_module, torch.compile
    with _disable_current_modes():  # imports what it needs at its first use
        pass

    def exec_module(self, module):
        with _disable_current_modes(), patch("torch.compile", compiled):
            execute(self, module)

    return patch.object(SourceFileLoader, "exec_module", exec_module)


@contextmanager
def tables_of_bitsandbytes(*, anew: bool) -> Iterator[None]:
    """Forget at the end the tables that bitsandbytes makes for its number formats and keeps for the process.

    functional.py, ``name2qmap``; backends/default/ops.py, ``_get_4bit_quantize_bounds``. With ``anew``, the block
    begins without tables, as on a device that has none yet.
    """
    kept = dict(_tables())
    if anew:
        _tables().clear()
    known = _bounds_known()
    try:
        yield
    finally:  # bitsandbytes may have been imported within the block
        _tables().clear()
        _tables().update(kept)
        if _bounds_known() > known:
            sys.modules[_BOUNDS]._get_4bit_quantize_bounds.cache_clear()


def _tables() -> dict[str, torch.Tensor]:
    """bitsandbytes' tables of number formats; empty before bitsandbytes is imported."""
    functional = sys.modules.get("bitsandbytes.functional")
    return {} if functional is None else functional.name2qmap


def _bounds_known() -> int:
    return sys.modules[_BOUNDS]._get_4bit_quantize_bounds.cache_info().currsize if _BOUNDS in sys.modules else 0
