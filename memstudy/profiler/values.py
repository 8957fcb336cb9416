"""Answers for a step that reads data of a fake tensor, as by ``.item()`` or ``.numpy()``: fake tensors have no values.

Data that the code itself makes, such as positions and masks, are followed on small real tensors, so these answers are
exact. Otherwise the answer is a guess that suits training on whole sequences.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.weak import WeakIdKeyDictionary

from memstudy.profiler.internals import FakeTensor, OpOverload, _DisableTorchDispatch, tree_map_only
from memstudy.profiler.results import tensors

_ATEN = torch.ops.aten
# Ops whose results' values depend on no tensor's values.
_SOURCES = {
    _ATEN.arange, _ATEN.ones, _ATEN.zeros, _ATEN.full, _ATEN.scalar_tensor, _ATEN.randperm,
    _ATEN.ones_like, _ATEN.zeros_like, _ATEN.full_like, _ATEN.new_ones, _ATEN.new_zeros, _ATEN.new_full,
}  # fmt: skip
MOST_IN_BUILD = 2**24  # elements followed: a mask over a weight, from which an adapter picks entries
MOST_IN_STEP = 2**16  # a padding mask, its positions


class Values:
    """Follows known values, op by op, and answers reads of them."""

    def __init__(self):
        self.most = MOST_IN_BUILD
        self._known = WeakIdKeyDictionary()  # storage: a real tensor with its elements

    def know(self, tensor: torch.Tensor, real: torch.Tensor) -> None:
        """Note that ``tensor`` has the values of ``real``."""
        if tensor.numel() > self.most or tensor.layout is not torch.strided:
            return
        with _DisableTorchDispatch():
            buffer = torch.empty(tensor.untyped_storage().nbytes() // tensor.itemsize, dtype=tensor.dtype)
            buffer.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(real)
        self._known[tensor.untyped_storage()] = buffer

    def follow(self, func: OpOverload, args: tuple, kwargs: dict, result: object) -> None:
        """To be called after ``func``: note the values of its ``result``."""
        if func.overloadpacket is _ATEN.any:
            result._memstudy_any = True
        if func is _ATEN.lift_fresh.default:  # torch.tensor has just made its argument
            if not isinstance(args[0], FakeTensor):
                self.know(result, args[0])
            return
        changes = func._schema.is_mutable
        made = [] if changes else [new for new in tensors(_several(result)) if self.read(new) is None]
        if not changes and (not made or any(new.numel() > self.most or new.device.type != "cpu" for new in made)):
            return
        if func.overloadpacket in _SOURCES and not changes:
            args = tree_map_only(torch.Tensor, lambda given: _blank(result.shape, given.dtype), args)
        elif changes and not all(self.knows(given) for given in tensors((*args, *kwargs.values()))):
            for given in tensors((*args, *kwargs.values())):
                if given.layout is torch.strided:
                    self._known.pop(given.untyped_storage(), None)
            return
        real = self.compute(func, args, kwargs)
        if real is not None and not changes:
            for new, values in zip(tensors(_several(result)), tensors(_several(real)), strict=True):
                self.know(new, values)

    def compute(self, func: OpOverload, args: tuple, kwargs: dict) -> object:
        """The result of ``func`` on the values of ``args``, or None if some are not known."""
        source = func.overloadpacket in _SOURCES
        given = [*tensors((*args, *kwargs.values()))]
        if not source and (
            not given or torch.Tag.nondeterministic_seeded in func.tags or not all(map(self.knows, given))
        ):
            return None
        args, kwargs = tree_map_only(FakeTensor, self.read, (args, kwargs))
        with _DisableTorchDispatch():
            if func.overloadpacket is _ATEN.randperm:  # any permutation will do, and this one takes no time
                return torch.arange(args[0], dtype=kwargs.get("dtype"))
            return func(*args, **kwargs)

    def made(self, func: OpOverload, args: tuple, kwargs: dict) -> object:
        """The result of ``func`` as new fake tensors whose values are known, or None if some of ``args`` are not."""

        def like(real):
            new = torch.empty(real.shape, dtype=real.dtype)
            self.know(new, real)
            return new

        return tree_map_only(torch.Tensor, like, self.compute(func, args, kwargs))

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether the values of ``tensor`` are known."""
        return self.read(tensor) is not None

    def read(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """A real tensor with the values of ``tensor``, or None; it shares the memory of all reads of one storage."""
        if tensor.layout is not torch.strided:
            return None
        buffer = self._known.get(tensor.untyped_storage())
        if buffer is None or buffer.dtype != tensor.dtype:
            return None
        with _DisableTorchDispatch():
            return buffer.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def answer(self, tensor: FakeTensor) -> bool | int | float:
        """The exact or guessed value of the one-element ``tensor``."""
        known = self.read(tensor)
        if known is not None:
            with _DisableTorchDispatch():
                return known.item()
        # True and 1 mean no padding, one sequence per row, the first update. ``any`` asks for an exception, as in
        # "any padding?", so the answer is False.
        if tensor.dtype is torch.bool:
            return not getattr(tensor, "_memstudy_any", False)
        return 1.0 if tensor.is_floating_point() else 1

    def array(self, tensor: FakeTensor) -> np.ndarray:
        """The exact values of ``tensor``, or random ones: an adapter that groups a weight's rows finds equal groups."""
        known = self.read(tensor)
        with _DisableTorchDispatch():
            if known is not None:
                return known.numpy()
            values = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
            return values.to(tensor.dtype).numpy()


def _several(result: object) -> tuple | list:
    return result if isinstance(result, (tuple, list)) else (result,)


def _blank(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    with _DisableTorchDispatch():
        return torch.empty(shape, dtype=dtype)
