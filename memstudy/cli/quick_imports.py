"""The imports of every run and prediction, in two thirds of the time of plain imports."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable
from unittest.mock import patch


def import_step() -> None:
    """Import `trainers.hub_model`, with Hugging Face's Trainer and its dependencies, before any other module does.

    Three costs are avoided. On import, bitsandbytes calls torch.compile on four functions, which imports torch's
    compiler: here each function is compiled when first called. The object detection losses, which no run uses, import
    scipy's optimizers: here they see no scipy. Python's garbage collector would scan all modules about thirty times:
    here it is off meanwhile.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        import torch
        import transformers.utils

        compiled_when_called = functools.partial(_compiled_when_called, torch.compile)
        # bitsandbytes is not for every platform.
        with patch("torch.compile", compiled_when_called), contextlib.suppress(ImportError):
            import bitsandbytes  # noqa: F401
        with patch.object(transformers.utils, "is_scipy_available", lambda: False):
            import transformers.loss.loss_for_object_detection
        import memstudy.trainers.hub_model  # noqa: F401
    finally:
        if collects:
            gc.enable()


def _compiled_when_called(compile: Callable, function: Callable | None = None, **options) -> Callable:
    if function is None:
        return functools.partial(_compiled_when_called, compile, **options)
    compiled = functools.cache(lambda: compile(function, **options))

    @functools.wraps(function)
    def call(*args, **kwargs):
        return compiled()(*args, **kwargs)

    return call
