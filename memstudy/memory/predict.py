"""Training memory, predicted: the real step on fake tensors, which have shapes but no bytes.

The step runs under PyTorch's ``FakeTensorMode``, so it takes no memory and no arithmetic; a dispatch mode
sees each new storage once and, by a weak reference, its release. What a kernel allocates inside itself is
not seen, unless it is a ``torch.library.custom_op``. The events go through the same accounting as the measured
ones (`report`).
"""

from __future__ import annotations

import gc
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import _engine_run_backward
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from memstudy.memory.report import Event, MemoryReport, account
from memstudy.memory.trace import Roles, Step


def predict(build: Callable[[], Step], *, iterations: int = 2) -> MemoryReport:
    """Predict for this CPU what :func:`~memstudy.memory.measure` would report, without running the step.

    Parameters
    ----------
    build : callable
        Makes model, optimizer and inputs, and returns ``step``; runs on fake tensors.
    iterations : int
        How many steps to follow; at least 1.

    Returns
    -------
    MemoryReport
        ``kind="predicted"``.

    Raises
    ------
    ValueError
        When ``iterations`` is below 1, or the step trains what ``build`` has not made.
    """
    if iterations < 1:
        raise ValueError(f"iterations={iterations}: at least 1 step must run")
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    recorder = _Recorder(fake)
    roles = Roles(mark=lambda: recorder.mark(roles.told[-1]), key=_key)
    with ExitStack() as stack:
        stack.enter_context(roles.watch())
        stack.enter_context(recorder.watch_optimizer())
        stack.enter_context(fake)
        stack.enter_context(recorder)
        if "transformers" in sys.modules:
            # Told that it traces a graph, it would make every mask that data might call for.
            stack.enter_context(patch("transformers.utils.import_utils.is_fake_tensor", lambda tensor: False))
        # Cycles must go between steps, or when their memory is released is chance. Only the step's own need a look.
        gc.freeze()
        stack.callback(gc.unfreeze)
        step = build()
        roles.watch_gradients()
        for _ in range(iterations):
            gc.collect()
            recorder.begin_step()
            roles.tell_parameters()
            step()
    return account(recorder.events, device="cpu", kind="predicted")


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _sums_in_place(gradient: torch.Tensor, other: object) -> bool:
    """Whether autograd's engine asks for the sum of two gradients, and nobody else has the first one's storage.

    It then adds in place, except to fake tensors (``can_accumulate_inplace``, torch/csrc/autograd/input_buffer.cpp).
    """
    # Up from here: __torch_dispatch__, two wrappers around it, and who called the op.
    engine_asks = sys._getframe(4).f_code is _engine_run_backward.__code__
    alike = isinstance(other, torch.Tensor) and (gradient.shape, gradient.dtype) == (other.shape, other.dtype)
    # One user is the tensor, the other the object that Python has made to be asked.
    return engine_asks and alike and torch._C._storage_Use_Count(_key(gradient)) == 2


class _Recorder(TorchDispatchMode):
    """Tells each storage that an op makes, and its release, as :class:`Event` s."""

    def __init__(self, fake: FakeTensorMode):
        super().__init__()
        self._fake = fake
        self.events: list[Event] = []
        self._alive: dict[int, weakref.ref] = {}
        self._phase = "build"
        self._in_optimizer = False

    def begin_step(self) -> None:
        self._enter("forward")
        self._tell("iteration")

    def mark(self, told: tuple[str, list[int]]) -> None:
        category, keys = told
        for key in keys:
            self._tell("is", block=key, label=category)

    @contextmanager
    def watch_optimizer(self) -> Iterator[None]:
        def begin(optimizer, args, kwargs):
            self._in_optimizer = True
            self._enter("optimizer")

        def end(optimizer, args, kwargs):
            self._in_optimizer = False

        handles = [register_optimizer_step_pre_hook(begin), register_optimizer_step_post_hook(end)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not torch.ops.aten.lift_fresh.default:  # its tensor has just been made, by torch.tensor
            args, kwargs = tree_map_only(torch.Tensor, self._faked, (args, kwargs))
        if self._phase != "build" and not self._in_optimizer and func.namespace != "profiler":
            in_backward = torch._C._current_autograd_node() is not None
            self._enter("backward" if in_backward else "forward")
        if func is torch.ops.aten._local_scalar_dense.default:
            # The step asks for a value that no fake tensor has. True and 1 mean no padding, one
            # sequence a row, the first update.
            return True if args[0].dtype is torch.bool else 1.0 if args[0].is_floating_point() else 1
        if func is torch.ops.aten.add.Tensor and _sums_in_place(*args[:2]):
            return args[0]
        if func._schema.name in OPDEFS:  # a kernel written in Python: what it allocates can be seen
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        result = func(*args, **kwargs)
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor):
                self._note(value.untyped_storage())
        return result

    def _faked(self, tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        if tensor.requires_grad:
            raise ValueError(
                f"a parameter of shape {tuple(tensor.shape)} was made before build() was called: make the model in it"
            )
        faked = self._fake.from_tensor(tensor)
        storage = faked.untyped_storage()
        self._alive[storage._cdata] = weakref.ref(storage)  # memory from before: neither counted nor freed
        return faked

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        known = self._alive.get(key)
        if known is None or known() is None:
            self._alive[key] = weakref.ref(storage, lambda _: self._tell("free", block=key))
            self._tell("alloc", block=key, size=storage.nbytes())

    def _enter(self, phase: str) -> None:
        if phase != self._phase:
            self._phase = phase
            self._tell("phase", label=phase)

    def _tell(self, kind: str, *, block: int = 0, size: int = 0, label: str = "") -> None:
        self.events.append(Event(kind, time.perf_counter() * 1e3, block, size, label))
