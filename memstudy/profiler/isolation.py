"""Keeps fake tensors out of what outlives a prediction: modules imported meanwhile, and tables of libraries."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.machinery import SourceFileLoader
from unittest.mock import patch

import torch

from memstudy.profiler.internals import _disable_current_modes

_TABLES = {"bitsandbytes.functional": "name2qmap", "bitsandbytes.backends.utils": "_code_4bit_cache"}
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


def files_on_real_tensors():
    """A patch: safetensors' ``load_file`` reads a file's tensors without the prediction's modes, as an adapter's."""
    if "safetensors.torch" not in sys.modules:
        return nullcontext()
    opened = sys.modules["safetensors.torch"].safe_open

    class File:
        def __init__(self, *args, **kwargs):
            self._file = opened(*args, **kwargs)

        def __enter__(self):
            self._file.__enter__()
            return self

        def __exit__(self, *error):
            self._file.__exit__(*error)

        def get_tensors(self):
            with _disable_current_modes():
                return self._file.get_tensors()

    return patch("safetensors.torch.safe_open", File)


@contextmanager
def tables_of_bitsandbytes(*, anew: bool) -> Iterator[None]:
    """Forget at the end the tables that bitsandbytes makes for its number formats and keeps for the process.

    functional.py, ``name2qmap``; backends/utils.py, ``_code_4bit_cache``; backends/default/ops.py,
    ``_get_4bit_quantize_bounds``. A real weight that is quantised by a fake table has no bytes, and the CPU's kernel
    reads it at address 0: the process would end in a segmentation fault. With ``anew``, the block begins without
    tables, as on a device that has none yet.
    """
    kept = {module: tables.copy() for module, tables in _tables().items()}
    if anew:
        for tables in _tables().values():
            tables.clear()
    known = _bounds_known()
    try:
        yield
    finally:
        for module, tables in _tables().items():
            tables.clear()
            tables.update(kept.get(module, {}))  # bitsandbytes may have been imported within the block
        if _bounds_known() > known:
            sys.modules[_BOUNDS]._get_4bit_quantize_bounds.cache_clear()


def _tables() -> dict[str, dict]:
    """bitsandbytes' tables of number formats by module; none before bitsandbytes is imported."""
    return {module: getattr(sys.modules[module], name) for module, name in _TABLES.items() if module in sys.modules}


def _bounds_known() -> int:
    return sys.modules[_BOUNDS]._get_4bit_quantize_bounds.cache_info().currsize if _BOUNDS in sys.modules else 0
