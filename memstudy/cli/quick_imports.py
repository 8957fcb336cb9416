"""What every run and every prediction imports, in two thirds of the time that it takes by itself."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable
from unittest.mock import patch


def import_step() -> None:
    """Import `trainers.hub_model`, with Hugging Face's Trainer and all that it brings, before anything else does.

    Among it is bitsandbytes, which has torch compile four functions as it is imported, and so imports torch's compiler:
    here they are compiled when one of them is called. The losses of object detection, which no run has, import scipy's
    optimizers: here they do not. And Python's garbage collector, which would look through all modules some thirty
    times, waits.
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
