"""Records the allocations and releases of a step on fake tensors, op by op, as :class:`Event` s."""

from __future__ import annotations

import functools
import gc
import sys
import time
import weakref
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from memstudy.profiler import by_shape, cpu, cuda
from memstudy.profiler.catalogue import Gpu
from memstudy.profiler.compiled import Compiler
from memstudy.profiler.events import Event
from memstudy.profiler.internals import (
    OPDEFS,
    DispatchKey,
    FakeTensor,
    FakeTensorMode,
    OpOverload,
    TorchDispatchMode,
    _current_autograd_node,
    _default_cpu_stream,
    tree_map_only,
)  # fmt: skip
from memstudy.profiler.issued import Issued
from memstudy.profiler.results import IN_PLACE, Results, is_engines_own, sums_in_place, tensors, with_real_strides
from memstudy.profiler.values import MOST_IN_STEP, Values

_ARRAY = "numbers that the step reads by .numpy() (taken at random)"
ON_CUDA = "build() asks for a CUDA device: leave everything on the CPU, where predict(gpu=...) stands in for one"


class CannotFollow(ValueError):
    """What ``build`` does cannot be predicted."""


def key_of(tensor: torch.Tensor) -> int:
    """Key of the tensor's storage in events."""
    return tensor.untyped_storage()._cdata


class _Op(NamedTuple):
    """Properties of an op, too slow to look up at each call."""

    name: str
    queries: bool  # asks only for a tensor's device
    computes: bool


@functools.cache
def _traits(func: OpOverload) -> _Op:
    return _Op(func._schema.name, func is torch.ops.prim.device.default, func.namespace != "profiler")


class Recorder(TorchDispatchMode):
    """Records each storage that an op makes, and its release, as :class:`Event` s.

    `cpu` or `cuda` adds the kernels' internal allocations; ``requested_bytes`` is the peak of the tensors alone.
    """

    def __init__(self, fake: FakeTensorMode, card: Gpu | None, semantics: cuda.Semantics):
        super().__init__()
        self.events: list[Event] = []
        self.modules: list[str] = []  # whose forward runs, outermost first
        self.requested_bytes = 0
        self.wrapper: type[torch.Tensor] | None = None  # class of tensors split over processes
        self._fake, self._card = fake, card
        self._alive: dict[int, weakref.ref] = {}
        self._live_bytes = 0
        self._phase = "build"
        self._in_optimizer = self._in_one_kernel = False
        self.in_kernel(0)
        if card is None:
            self.below = cpu.BelowDispatch(self._tell)
            self._in_python = by_shape.kernels(cuda=False)
        else:
            self.below = cuda.BelowDispatch(self._tell, semantics.workspace_bytes(card))
            self._in_python = by_shape.kernels(cuda=True) | cuda.kernels(semantics.gemm_4bit)
        self.assumed: set[str] = set()  # what only the data or the device can say
        self.issued = Issued()
        self.compiler = Compiler(self, on_gpu=card is not None)
        self._values = Values()
        self._results = Results(fake)
        self._corrected = cpu.corrected if card is None else cuda.corrected

    def end_build(self) -> None:
        """For a GPU, forget the blocks freed while building: a model is built on the host, then moves to the GPU."""
        if self._card is None:
            return
        gc.collect()
        dropped = {e.block: i for i, e in enumerate(self.events) if e.kind == "free"}
        kept = {e.block: i for i, e in enumerate(self.events) if e.kind == "alloc" and dropped.get(e.block, -1) < i}
        self.events = [e for i, e in enumerate(self.events) if kept.get(e.block) == i or e.kind in ("is", "phase")]
        self.requested_bytes = self._live_bytes

    def empty_cache(self) -> None:
        self._tell("empty_cache")

    def begin_step(self) -> None:
        self.issued.begin_step()
        self._values.most = MOST_IN_STEP
        self._enter("forward")
        self._tell("iteration")

    def mark(self, told: tuple[str, list[int]]) -> None:
        category, keys = told
        for key in keys:
            self._tell("is", block=key, label=category)

    def begin_optimizer(self) -> None:
        self._in_optimizer = True
        self._enter("optimizer")

    def end_optimizer(self) -> None:
        self._in_optimizer = False

    def noting(self, make: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """Wrap ``make`` to count its tensor, which no dispatch mode sees."""

        def noted():
            made = make()
            self._note(made.untyped_storage())
            return made

        return noted

    def resizing(self, resize: Callable[[torch.UntypedStorage, int], None]) -> Callable:
        """Wrap ``resize`` to count the storage's new memory: FSDP allocates and frees whole layers by resizing."""

        def resized(storage, size):
            known = self._alive.pop(storage._cdata, None)
            if known is not None and known() is not None and storage.nbytes():
                self._release(storage._cdata, storage.nbytes())
            resize(storage, size)
            if size:
                self._note(storage)

        return resized

    def in_kernel(self, number: int, *, in_registers: bool = False, inlined: bool = False) -> None:
        """From now on, ops are parts of the fused kernel ``number``; of none if that is 0.

        A kernel that a compiler generates allocates nothing but its results, which may stay ``in_registers``, and
        surely do so if ``inlined``.
        """
        self._kernel, self._in_registers, self._inlined = number, in_registers, inlined

    def as_one_kernel(self, function: Callable, args: tuple, kwargs: dict) -> object:
        """Run ``function`` as a compiled kernel, as of an optimizer: only its results count.

        The buffer of a reduction between its elementwise ops is not counted.
        """
        outer, self._in_one_kernel = self._in_one_kernel, True
        try:
            result = function(*args, **kwargs)
        finally:
            self._in_one_kernel = outer
        made = tuple(tensors(result if isinstance(result, (tuple, list)) else (result,)))
        for tensor in made:
            self._alive.pop(key_of(tensor), None)
            self._note(tensor.untyped_storage())
        self.issued.note_compiled(self._phase, tensors((*args, *kwargs.values())), made)
        return result

    def array(self, tensor: FakeTensor) -> np.ndarray:
        """Replaces ``Tensor.numpy``, which fake tensors do not support."""
        if not self._values.knows(tensor):
            self.assumed.add(_ARRAY)
        return self._values.array(tensor)

    def transfer(self, tensor: torch.Tensor, *, to_host: bool) -> None:
        """To be called for each tensor that moves between the GPU and the host."""
        self.issued.note_transfer(self._phase, tensor, to_host=to_host)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise dynamo is imported and runs between each op and this mode

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let Dynamo compile under this mode."""
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.wrapper in types:
            return NotImplemented  # the wrapper then calls the op on its local part
        op = _traits(func)
        if not op.queries:
            self.below.before(func)
        if self._phase != "build" and not self._in_optimizer and op.computes:
            in_backward = _current_autograd_node() is not None
            self._enter("backward" if in_backward else "forward")
        if op.queries and type(args[0]) is FakeTensor:
            return args[0].device
        key = self._results.key(func, args, kwargs)
        if key is None:  # only then may an argument be a real tensor
            real = any(not isinstance(tensor, FakeTensor) for tensor in tensors((*args, *kwargs.values())))
            if real and func is not torch.ops.aten.lift_fresh.default:  # torch.tensor has just made its argument
                args, kwargs = tree_map_only(torch.Tensor, self._faked, (args, kwargs))
        if func is torch.ops.aten._local_scalar_dense.default and args[0].constant is None:
            self._issue(func, args, kwargs, None)
            return self._values.answer(args[0])
        if func is torch.ops.aten.add.Tensor and sums_in_place(*args[:2]):
            self._issue(torch.ops.aten.add_.Tensor, args, kwargs, args[0])
            return args[0]
        if func in IN_PLACE and is_engines_own(args[0], sys._getframe(1)):
            with self:
                return IN_PLACE[func](*args, **kwargs)
        if op.name in OPDEFS:  # a kernel written in Python: its allocations are visible
            with self:
                return OPDEFS[op.name]._init_fn(*args, **kwargs)
        if torch.Tag.dynamic_output_shape in func.tags:
            with self:
                result = self._values.made(func, args, kwargs)
            if result is not None:
                return result
        if kernel := self._in_python.get(op.name):
            before = len(self.issued.now)
            with self:
                result = kernel(*args, **kwargs)
            if result is not NotImplemented:
                if not any(work.kernels for _, work in self.issued.now[before:]):  # it only made the result
                    self._issue(func, args, kwargs, result)
                self.assumed |= by_shape.assumed(kernel) | cuda.assumed(kernel, args)
                return result
        if self._card is None and op.name in cpu.IN_PYTHON:
            on_cpu = func.has_kernel_for_dispatch_key(DispatchKey.CPU)
            with self:
                return func._op_dk(
                    DispatchKey.CPU if on_cpu else DispatchKey.CompositeExplicitAutograd, *args, **kwargs
                )
        known, result = self._results.recall(key, args) if key else (False, None)
        if not known:
            result = with_real_strides(func, args, func(*args, **kwargs))
            result = self._corrected(func, args, result)
            if key:
                self._results.remember(key, func, args, kwargs, result)
        self._values.follow(func, args, kwargs, result)
        self._issue(func, args, kwargs, result, key)
        if self._card is not None and self._in_optimizer and func is torch.ops.aten.lift_fresh.default:
            self._ignore(result)  # the optimizer's step count stays on the host
            return result
        for tensor in tensors(result if isinstance(result, (tuple, list)) else (result,)):
            if not known and tensor.is_cuda:
                raise CannotFollow(ON_CUDA)
            if not known and (tensor.device.type == "meta" or tensor.layout is not torch.strided):
                continue  # has no memory on a real device either, or that of its parts
            if self._in_one_kernel or self._inlined:
                self._ignore_new(tensor)
            else:
                self._note(tensor.untyped_storage())
        if self._in_one_kernel:
            return result
        # For a GPU, building happens on the host. A CPU's own kernels run even where a GPU's are generated.
        if self._card is None or (self._phase != "build" and not self._kernel):
            self.below.after(func, args, result)
        return result

    def _issue(self, func: OpOverload, args: tuple, kwargs: dict, result: object, key: tuple | None = None) -> None:
        if self._phase != "build" and not self._in_one_kernel and self._card is not None:
            self.issued.note(self._phase, func, args, kwargs, result, key)

    def _faked(self, tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        if tensor.requires_grad:
            raise CannotFollow(
                f"a parameter of shape {tuple(tensor.shape)} was made before build(): make the model inside build()"
            )
        faked = self._fake.from_tensor(tensor)
        self._ignore(faked)  # allocated before build()
        self._values.know(faked, tensor)
        return faked

    def _ignore(self, tensor: torch.Tensor) -> None:
        """Count neither the tensor's storage nor its release."""
        storage = tensor.untyped_storage()
        self._alive[storage._cdata] = weakref.ref(storage)

    def _ignore_new(self, tensor: torch.Tensor) -> None:
        known = self._alive.get(key_of(tensor))
        if known is None or known() is None:
            self._ignore(tensor)

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        known = self._alive.get(key)
        if known is None or known() is None:
            self._alive[key] = weakref.ref(storage, lambda _: self._release(key, size))
            stream = torch.cpu.current_stream()  # FSDP selects streams on a CPU too, where they do nothing
            self._tell(
                "alloc",
                block=key,
                size=size,
                label=self.modules[-1] if self.modules else "",
                stream=0 if stream is _default_cpu_stream else id(stream),
                in_register=self._in_registers,
            )
            self._live_bytes += size
            self.requested_bytes = max(self.requested_bytes, self._live_bytes)

    def _release(self, key: int, size: int) -> None:
        self._live_bytes -= size
        self._tell("free", block=key)

    def _enter(self, phase: str) -> None:
        if phase != self._phase:
            self._phase = phase
            self._tell("phase", label=phase)

    def _tell(
        self, kind: str, *, block: int = 0, size: int = 0, label: str = "", stream: int = 0, in_register: bool = False
    ) -> None:
        now, issued = time.perf_counter() * 1e3, len(self.issued.now)
        self.events.append(
            Event(kind, now, block, size, label, stream, issued, in_register=in_register, kernel=self._kernel)
        )
