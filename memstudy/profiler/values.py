"""Answers for a step that reads a value from a fake tensor, as by ``.item()``: fake tensors have no values.

The answer is exact for an element of an integer range, such as positions, and for the range's maximum. Otherwise it is
a guess that suits training on whole sequences.
"""

from __future__ import annotations

import torch
from torch.utils.weak import WeakIdKeyDictionary

from memstudy.profiler.internals import FakeTensor, OpOverload

_ATEN = torch.ops.aten


class Values:
    """Follows the origin of values, op by op, and answers reads of them."""

    def __init__(self):
        self._ranges = WeakIdKeyDictionary()  # storage: its first element, and the step between elements

    def follow(self, func: OpOverload, args: tuple, kwargs: dict, result: object) -> None:
        """To be called after ``func``: note the origin of its ``result``."""
        if func.overloadpacket is _ATEN.any:
            result._memstudy_any = True
        elif func.overloadpacket is _ATEN.arange and all(isinstance(bound, int) for bound in args):
            numbers = range(*args)
            self._ranges[result.untyped_storage()] = numbers.start, numbers.step
        elif func is _ATEN.max.default and (largest := self._largest(args[0])) is not None:
            self._ranges[result.untyped_storage()] = largest, 0
        elif func._schema.is_mutable:
            for value in (*args, *kwargs.values()):
                if isinstance(value, torch.Tensor):
                    self._ranges.pop(value.untyped_storage(), None)

    def answer(self, tensor: FakeTensor) -> bool | int | float:
        """The exact or guessed value of the one-element ``tensor``."""
        known = self._largest(tensor)
        if known is not None:
            return known
        # True and 1 mean no padding, one sequence per row, the first update. ``any`` asks for an exception, as in
        # "any padding?", so the answer is False.
        if tensor.dtype is torch.bool:
            return not getattr(tensor, "_memstudy_any", False)
        return 1.0 if tensor.is_floating_point() else 1

    def _largest(self, tensor: torch.Tensor) -> int | None:
        """The largest element of a known range, or of a view of one."""
        if tensor.is_floating_point() or (found := self._ranges.get(tensor.untyped_storage())) is None:
            return None
        first, step = found
        place = tensor.storage_offset()
        if step > 0:
            place += sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return first + step * place
