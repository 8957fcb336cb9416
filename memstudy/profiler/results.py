"""A cache of op results on fake tensors: a training step repeats equal ops thousands of times.

``FakeTensorMode`` has a cache too, but takes five times as long to find a result and make it again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType

import torch

from memstudy.profiler.internals import (
    FakeTensor,
    FakeTensorMode,
    OpOverload,
    _DisableTorchDispatch,
    _engine_run_backward,
    _set_warn_deprecated_on_mutable_data_ptr,
    _storage_Use_Count,
)

_ATEN = torch.ops.aten
_CPU = torch.device("cpu")
_PLAIN = {
    bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format,
}  # fmt: skip
# Ops whose results depend on data, or that change a tensor's metadata.
_NEVER = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view)
_VIEWS = {_ATEN.view.default, _ATEN._unsafe_view.default}
_CHANGES_STORAGE = {torch.ops.aten.set_, torch.ops.aten.resize_, torch.ops.aten.lift, torch.ops.aten.lift_fresh}


def with_real_strides(func: OpOverload, args: Sequence, result: object) -> object:
    """``result`` with the strides of a real view (TensorUtils.cpp, ``computeStride_impl``).

    A fake view (``_reshape_view_helper``) has other ones where a side is 1, by which ``matmul`` decides
    whether one token of each sequence takes a product of matrices or a batch of products.
    """
    if func not in _VIEWS or 1 not in result.shape:
        return result
    sides, strides = (*result.shape, 1), [*result.stride(), args[0].stride()[-1] if args[0].dim() else 1]
    for place in reversed(range(result.dim())):
        if sides[place] == 1:
            strides[place] = sides[place + 1] * strides[place + 1]
    return args[0].as_strided(result.shape, strides[:-1])


@dataclass(frozen=True)
class _Made:
    """One result: argument number ``given`` itself, a view of it if ``shape`` is set, or a new tensor."""

    given: int | None
    shape: tuple[int, ...] | None = None
    stride: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    offset: int = 0


class Results:
    """Remembers the results of ops on the tensors of one ``FakeTensorMode``."""

    def __init__(self, fake: FakeTensorMode):
        self._fake = fake
        self._remembered: dict[tuple, tuple[type | None, tuple[_Made | None, ...]] | None] = {}
        with fake:
            self._attributes = dict(vars(torch.empty(0)))  # set by FakeTensor's constructor

    def key(self, func: OpOverload, args: Sequence, kwargs: dict) -> tuple | None:
        """Everything that the results of ``func`` depend on; None when it cannot be described."""
        described: list = [func, torch.get_default_dtype()]
        if not _describe(args, described):
            return None
        for name, value in kwargs.items():
            described.append(name)
            if not _describe((value,), described):
                return None
        return tuple(described)

    def recall(self, key: tuple, args: Sequence) -> tuple[bool, object]:
        """Whether the results for ``key`` are known, and the results made anew."""
        found = self._remembered.get(key)
        if found is None:
            return False, None
        container, made = found
        with _DisableTorchDispatch():
            results = [self._make(one, args) for one in made]
        return True, results[0] if container is None else container(results)

    def remember(self, key: tuple, func: OpOverload, args: Sequence, kwargs: dict, result: object) -> None:
        """Remember ``result``, which ``func`` gave for ``key``."""
        if key in self._remembered:
            return
        container = type(result) if isinstance(result, (tuple, list)) else None
        made = _how(result if container else (result,), args, kwargs) if _lasts(func) else None
        self._remembered[key] = None if made is None else (container, made)

    def _make(self, made: _Made | None, args: Sequence) -> FakeTensor | None:
        if made is None:
            return None
        if made.shape is None:
            return args[made.given]
        tensor = torch.empty_strided(
            made.shape if made.given is None else (0,), made.stride if made.given is None else (1,),
            dtype=made.dtype, device="meta",
        )  # fmt: skip
        if made.given is not None:
            tensor.set_(args[made.given].untyped_storage(), made.offset, made.shape, made.stride)
        tensor = torch.Tensor._make_subclass(
            FakeTensor, tensor, False, dispatch_device=True, device_for_backend_keys=_CPU
        )
        _set_warn_deprecated_on_mutable_data_ptr(tensor)
        vars(tensor).update(self._attributes)
        return tensor


def _describe(args: Sequence, described: list) -> bool:
    """Append everything that results may depend on; False when it cannot be described."""
    for arg in args:
        kind = type(arg)
        if kind is FakeTensor:
            if arg.constant is not None or arg._fake_device != _CPU or arg.layout is not torch.strided:
                return False
            described += (arg.shape, arg.stride(), arg.dtype, arg.storage_offset())
        elif kind in _PLAIN:
            described += (kind, arg)  # with the type, since 1 == 1.0 == True
        elif kind is list or kind is tuple:
            described.append(len(arg))
            if not _describe(arg, described):
                return False
        else:
            return False
    return True


def _lasts(func: OpOverload) -> bool:
    return (
        func.namespace == "aten"
        and func.overloadpacket not in _CHANGES_STORAGE
        and not any(tag in func.tags for tag in _NEVER)
    )


def _how(results: Sequence, args: Sequence, kwargs: dict) -> tuple[_Made | None, ...] | None:
    """How to make ``results`` again; None when that is unknown for one of them."""
    storages = [_storage(arg) for arg in args]
    others = {_storage(tensor) for tensor in tensors((*args, *kwargs.values()))}
    made: list[_Made | None] = []
    for result in results:
        if result is None:
            made.append(None)
        elif type(result) is not FakeTensor or result.constant is not None or result._fake_device != _CPU:
            return None
        elif any(result is arg for arg in args):
            made.append(_Made(next(place for place, arg in enumerate(args) if result is arg)))
        elif result.layout is not torch.strided or result.is_complex():
            return None
        elif (storage := _storage(result)) in storages:
            of_it = tuple(result.shape), result.stride(), result.dtype, result.storage_offset()
            made.append(_Made(storages.index(storage), *of_it))
        elif storage in others or not _fills_its_storage(result):
            return None
        else:
            others.add(storage)
            made.append(_Made(None, tuple(result.shape), result.stride(), result.dtype))
    return tuple(made)


def _storage(value: object) -> int | None:
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


def _fills_its_storage(tensor: torch.Tensor) -> bool:
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    elements = 1 + last if tensor.numel() else 0
    return tensor.storage_offset() == 0 and tensor.untyped_storage().nbytes() == elements * tensor.dtype.itemsize


def tensors(values: Iterable) -> Iterator[torch.Tensor]:
    """The tensors among an op's arguments or results, also those in lists and tuples, which do not nest."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (item for item in value if isinstance(item, torch.Tensor))


# What autograd's formulas call out of place for subclasses of tensors, and in place for others
# (torch/csrc/autograd/FunctionsManual.cpp, ``areAnyTensorSubclassLike``).
IN_PLACE = {
    _ATEN.scatter_add.default: _ATEN.scatter_add_.default,
    _ATEN.scatter.src: _ATEN.scatter_.src,
    _ATEN.index_add.default: _ATEN.index_add_.default,
    _ATEN.index_put.default: _ATEN.index_put_.default,
    _ATEN.put.default: _ATEN.put_.default,
}


def sums_in_place(gradient: torch.Tensor, other: object) -> bool:
    """Whether autograd's engine asks for the sum of two gradients, and nothing else uses the first one's storage.

    It adds in place, but not to fake tensors (``can_accumulate_inplace``, torch/csrc/autograd/input_buffer.cpp).
    """
    alike = isinstance(other, torch.Tensor) and (gradient.shape, gradient.dtype) == (other.shape, other.dtype)
    # Frame 1 is __torch_dispatch__, frame 2 the caller of the op.
    return alike and is_engines_own(gradient, sys._getframe(2))


def is_engines_own(tensor: torch.Tensor, caller: FrameType) -> bool:
    """Whether autograd's engine has called the op, and nothing but ``tensor`` uses its storage."""
    # Two users: the tensor, and the Python object that untyped_storage makes.
    return caller.f_code is _engine_run_backward.__code__ and _storage_Use_Count(tensor.untyped_storage()._cdata) == 2
