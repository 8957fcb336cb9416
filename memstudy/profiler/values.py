"""What a step on fake tensors is told when it asks for a value, as by ``.item()``: fake tensors have none.

Where the value needs no data it is the true one: elements of a range of whole numbers, and the largest of them
(positions, say). Else it is a guess that suits training on whole sequences.
"""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakIdKeyDictionary

_ATEN = torch.ops.aten


class Values:
    """Follows where values come from, op by op, and answers for them."""

    def __init__(self):
        self._ranges = WeakIdKeyDictionary()  # storage: its first element, and the step to each next one

    def follow(self, func: torch._ops.OpOverload, args: tuple, kwargs: dict, result: object) -> None:
        """``func`` has been called."""
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
        """The value of ``tensor``, which has one element."""
        known = self._largest(tensor)
        if known is not None:
            return known
        # True and 1 mean no padding, one sequence a row, the first update; of a condition none is the exception, as
        # in "any padding?".
        if tensor.dtype is torch.bool:
            return not getattr(tensor, "_memstudy_any", False)
        return 1.0 if tensor.is_floating_point() else 1

    def _largest(self, tensor: torch.Tensor) -> int | None:
        """The largest element of a range, or of a view of one."""
        if tensor.is_floating_point() or (found := self._ranges.get(tensor.untyped_storage())) is None:
            return None
        first, step = found
        place = tensor.storage_offset()
        if step > 0:
            place += sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return first + step * place
