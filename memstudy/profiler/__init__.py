"""Training memory: measured, predicted for an absent GPU, and the largest batch that fits. Step time: predicted.

This package imports nothing else from memstudy.
"""

import importlib

# Name: its module, imported on first access, since the catalogue of GPUs needs no PyTorch.
_PLACES = {
    "CATEGORIES": "events",
    "MIB": "events",
    "PHASES": "events",
    "MemoryReport": "report",
    "Fit": "search",
    "fit": "search",
    "Gpu": "catalogue",
    "LengthsReport": "lengths",
    "StepShape": "formulas",
    "over_lengths": "lengths",
    "find_gpu": "catalogue",
    "gpus": "catalogue",
    "LargestBatch": "batch_size",
    "compare": "drawing",
    "largest_batch": "batch_size",
    "measure": "measurement",
    "predict": "prediction",
}
__all__ = list(_PLACES)


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
