"""Training memory, predicted: the real step on fake tensors, which have shapes but no bytes.

The step runs under PyTorch's ``FakeTensorMode``, so it takes no memory and no arithmetic; a dispatch mode
sees each new storage once and, by a weak reference, its release. What a kernel allocates inside itself is
seen where it is written in Python (a ``torch.library.custom_op``), and else said by rules: `cpu` for this machine,
`cuda` for a GPU, for which the step also runs with CUDA's semantics and its requests go through the caching allocator
(`allocator`). The events go through the same accounting as the measured ones (`report`).
"""

from __future__ import annotations

import functools
import gc
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import NamedTuple
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
from torch.utils._pytree import tree_map_only

from memstudy.memory import cpu, cuda
from memstudy.memory.allocator import replay
from memstudy.memory.catalogue import Gpu, find_gpu
from memstudy.memory.report import MIB, Event, MemoryReport, account
from memstudy.memory.results import Results, tensors
from memstudy.memory.trace import Roles, Step, watch_modules
from memstudy.memory.values import Values

_ON_CUDA = "build() asks for a CUDA device: leave everything on the CPU, where predict(gpu=...) stands in for one"
# What a CPU build of PyTorch says to it where no tensor is made.
_NO_CUDA = ("not compiled with CUDA", "not linked with support for cuda", "Cannot get CUDA generator")


def predict(
    build: Callable[[], Step],
    *,
    gpu: str | Gpu | None = None,
    iterations: int = 2,
    expandable_segments: bool = False,
    processes: int = 1,
) -> MemoryReport:
    """Predict what :func:`~memstudy.memory.measure` would report, without running the step.

    Parameters
    ----------
    build : callable
        Makes model, optimizer and inputs, and returns ``step``; runs on fake tensors. It makes everything on the CPU,
        also for a GPU; ``torch.autocast("cuda")`` and ``GradScaler("cuda")`` may be used.
    gpu : str or Gpu, optional
        The GPU to predict for: a name of the catalogue (`gpus`), or the path of a YAML file that describes one. None
        predicts this CPU.
    iterations : int
        How many steps to follow; at least 1.
    expandable_segments : bool
        Whether the GPU's allocator runs with ``PYTORCH_ALLOC_CONF=expandable_segments:True``.
    processes : int
        How many processes share the step, each with such a GPU. ``torch.distributed`` is set up in ``build``, as
        ``torchrun`` and ``init_process_group`` leave it in the first of them, which is the one that is predicted.

    Returns
    -------
    MemoryReport
        ``kind="predicted"``. For a GPU allocated bytes are those of the caching allocator's blocks, and the report says
        what is reserved, what the whole GPU shows, and which request would fail if the step does not fit.

    Raises
    ------
    ValueError
        When ``iterations`` or ``processes`` is below 1, the GPU is unknown, the step trains what ``build`` has not
        made, ``build`` asks for a CUDA device, or this process is one of several already.
    """
    if iterations < 1:
        raise ValueError(f"iterations={iterations}: at least 1 step must run")
    if processes < 1:
        raise ValueError(f"processes={processes}: at least 1 process must run the step")
    card = find_gpu(gpu) if isinstance(gpu, str) else gpu
    recorder, _step = _follow(build, iterations, card, processes)  # when the step goes, so does what it holds
    if card is None:
        return account(recorder.events, device="cpu", kind="predicted")
    replayed = replay(recorder.events, capacity=card.capacity_bytes, expandable_segments=expandable_segments)
    return account(
        replayed.events,
        device=card.name,
        kind="predicted",
        peak_reserved_bytes=replayed.peak_reserved,
        requested_bytes=recorder.requested_bytes,
        context_bytes=int(card.context_mib * MIB),
        memory_bytes=int(card.memory_mib * MIB),
        out_of_memory=replayed.out_of_memory,
        unverified=(*sorted(recorder.below.unverified), *["NCCL's buffers (not counted)"] * (processes > 1)),
    )


def _follow(build: Callable[[], Step], iterations: int, card: Gpu | None, processes: int) -> tuple[_Recorder, Step]:
    """Run everything on fake tensors under a recorder; also gives the step."""
    if "transformers" in sys.modules:
        # It imports its models when they are asked for, and must not look for flash-attn while a stand-in is there.
        import transformers.modeling_utils  # noqa: F401
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    recorder = _Recorder(fake, card)
    if processes > 1:
        from torch.distributed.tensor import DTensor

        from memstudy.memory.processes import first_of, on_fake_tensors

        recorder.wrapper = DTensor
    roles = Roles(mark=lambda: recorder.mark(roles.told[-1]), key=_key)
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # a Trainer counts so
        stack.enter_context(roles.watch())
        stack.enter_context(recorder.watch_optimizer())
        stack.enter_context(watch_modules(recorder.modules.append, recorder.modules.pop))
        stack.enter_context(patch("torch.cuda.empty_cache", recorder.empty_cache))
        stack.enter_context(patch("torch.compile", recorder.compiled))
        # Else lists of fake parameters are taken one by one where real ones are taken together.
        types = [torch.Tensor, torch.nn.Parameter, FakeTensor]
        for module in ("torch.optim.optimizer", "torch.utils._foreach_utils"):
            stack.enter_context(patch(f"{module}._foreach_supported_types", types))
        if card is not None:
            stack.enter_context(cuda.semantics(card))
        else:
            # Its tensor is made below dispatch; checkpointing keeps one for each block.
            stack.enter_context(patch("torch.get_rng_state", recorder.noting(torch.get_rng_state)))
        stack.enter_context(patch("torch.utils.swap_tensors", partial(_swap, fake)))
        stack.enter_context(fake)
        stack.enter_context(recorder)
        if processes > 1:
            stack.enter_context(first_of(processes))
            stack.enter_context(on_fake_tensors())
            stack.enter_context(patch("torch.UntypedStorage.resize_", recorder.resizing(torch.UntypedStorage.resize_)))
        if "transformers" in sys.modules:
            # Told that it traces a graph, it would make every mask that data might call for.
            stack.enter_context(patch("transformers.utils.import_utils.is_fake_tensor", lambda tensor: False))
        # Cycles must go between steps, or when their memory is released is chance. Only the step's own need a look.
        gc.freeze()
        stack.callback(gc.unfreeze)
        try:
            step = build()
            recorder.end_build()
            roles.watch_gradients()
            for _ in range(iterations):
                gc.collect()
                recorder.begin_step()
                roles.tell_parameters()
                step()
        except (AssertionError, RuntimeError) as error:
            if not any(text in str(error) for text in _NO_CUDA):
                raise
            raise ValueError(_ON_CUDA) from error
    return recorder, step


def _swap(fake: FakeTensorMode, one: torch.Tensor, other: torch.Tensor, swap=torch.utils.swap_tensors) -> None:
    """A module that is cast or moved swaps its parameters, which refuse while the mode remembers how it made them."""
    memo = fake.fake_tensor_converter.meta_converter.tensor_memo
    for key in [key for key, made in memo.items() if made is one or made is other]:
        del memo[key]
    swap(one, other)


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _sums_in_place(gradient: torch.Tensor, other: object) -> bool:
    """Whether autograd's engine asks for the sum of two gradients, and nobody else has the first one's storage.

    It then adds in place, except to fake tensors (``can_accumulate_inplace``, torch/csrc/autograd/input_buffer.cpp).
    """
    # Up from here: __torch_dispatch__, and who called the op.
    engine_asks = sys._getframe(2).f_code is _engine_run_backward.__code__
    alike = isinstance(other, torch.Tensor) and (gradient.shape, gradient.dtype) == (other.shape, other.dtype)
    # One user is the tensor, the other the object that Python has made to be asked.
    return engine_asks and alike and torch._C._storage_Use_Count(_key(gradient)) == 2


class _Op(NamedTuple):
    """What is asked of each op, and costs too much to ask each time."""

    name: str
    queries: bool  # only where a tensor is
    computes: bool


@functools.cache
def _traits(func: torch._ops.OpOverload) -> _Op:
    return _Op(func._schema.name, func is torch.ops.prim.device.default, func.namespace != "profiler")


class _Recorder(TorchDispatchMode):
    """Tells each storage that an op makes, and its release, as :class:`Event` s.

    With a GPU also what CUDA's kernels allocate besides (`cuda`); ``requested_bytes`` is the peak of the tensors alone.
    """

    def __init__(self, fake: FakeTensorMode, card: Gpu | None):
        super().__init__()
        self.events: list[Event] = []
        self.modules: list[str] = []  # whose forward runs, outermost first
        self.requested_bytes = 0
        self.wrapper: type[torch.Tensor] | None = None  # of tensors of which each process has a part
        self._fake, self._card = fake, card
        self._alive: dict[int, weakref.ref] = {}
        self._live_bytes = 0
        self._phase = "build"
        self._in_optimizer = self._in_one_kernel = False
        self.below = cpu.BelowDispatch(self._tell) if card is None else cuda.BelowDispatch(self._tell, card)
        self._values = Values()
        self._results = Results(fake)
        self._corrected = cpu.corrected if card is None else cuda.corrected

    def end_build(self) -> None:
        """Forget what building made and dropped: a model is built on the host, and what is left moves to the GPU."""
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

    def noting(self, make: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """``make``, whose tensor counts although no dispatch mode sees it."""

        def noted():
            made = make()
            self._note(made.untyped_storage())
            return made

        return noted

    def resizing(self, resize: Callable[[torch.UntypedStorage, int], None]) -> Callable:
        """``resize``, after which a storage has other memory: FSDP takes and gives back whole layers so."""

        def resized(storage, size):
            known = self._alive.pop(storage._cdata, None)
            if known is not None and known() is not None and storage.nbytes():
                self._release(storage._cdata, storage.nbytes())
            resize(storage, size)
            if size:
                self._note(storage)

        return resized

    def compiled(self, function: Callable | None = None, **options) -> Callable:
        """Stands for ``torch.compile``, which follows no fake tensors: of what it makes the results alone count.

        Its kernels hold the rest in registers. True of functions of elements, as of an optimizer's; a reduction between
        them has a buffer that is not counted.
        """
        if function is None:
            return partial(self.compiled, **options)

        @wraps(function)
        def run(*args, **kwargs):
            outer, self._in_one_kernel = self._in_one_kernel, True
            try:
                result = function(*args, **kwargs)
            finally:
                self._in_one_kernel = outer
            for tensor in tensors(result if isinstance(result, (tuple, list)) else (result,)):
                self._alive.pop(_key(tensor), None)
                self._note(tensor.untyped_storage())
            return result

        return run

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch._dynamo is imported, and stands between each op and this mode

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.wrapper in types:
            return NotImplemented  # it asks for the same of its part
        op = _traits(func)
        if not op.queries:
            self.below.before(func)
        if self._phase != "build" and not self._in_optimizer and op.computes:
            in_backward = torch._C._current_autograd_node() is not None
            self._enter("backward" if in_backward else "forward")
        if op.queries and type(args[0]) is FakeTensor:
            return args[0].device
        key = self._results.key(func, args, kwargs)
        if key is None:  # only then may one be real
            real = any(not isinstance(tensor, FakeTensor) for tensor in tensors((*args, *kwargs.values())))
            if real and func is not torch.ops.aten.lift_fresh.default:  # its tensor has just been made, by torch.tensor
                args, kwargs = tree_map_only(torch.Tensor, self._faked, (args, kwargs))
        if func is torch.ops.aten._local_scalar_dense.default and args[0].constant is None:
            return self._values.answer(args[0])
        if func is torch.ops.aten.add.Tensor and _sums_in_place(*args[:2]):
            return args[0]
        if op.name in OPDEFS:  # a kernel written in Python: what it allocates can be seen
            with self:
                return OPDEFS[op.name]._init_fn(*args, **kwargs)
        if self._card is None and op.name.startswith("bitsandbytes::optimizer_update"):  # as are these
            with self:
                return func._op_dk(torch._C.DispatchKey.CPU, *args, **kwargs)
        known, result = self._results.recall(key, args) if key else (False, None)
        if not known:
            result = self._corrected(func, args, func(*args, **kwargs))
            if key:
                self._results.remember(key, func, args, kwargs, result)
        self._values.follow(func, args, kwargs, result)
        if self._card is not None and self._in_optimizer and func is torch.ops.aten.lift_fresh.default:
            self._ignore(result)  # a count of steps, which stays on the host
            return result
        for tensor in tensors(result if isinstance(result, (tuple, list)) else (result,)):
            if not known and tensor.is_cuda:
                raise ValueError(_ON_CUDA)
            if self._in_one_kernel:
                self._ignore_new(tensor)
            else:
                self._note(tensor.untyped_storage())
        if self._in_one_kernel:
            return result
        if self._card is None or self._phase != "build":  # for a GPU, building happens on the host
            self.below.after(func, args, result)
        return result

    def _faked(self, tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        if tensor.requires_grad:
            raise ValueError(
                f"a parameter of shape {tuple(tensor.shape)} was made before build() was called: make the model in it"
            )
        faked = self._fake.from_tensor(tensor)
        self._ignore(faked)  # memory from before
        return faked

    def _ignore(self, tensor: torch.Tensor) -> None:
        """Neither count the tensor's storage nor its release."""
        storage = tensor.untyped_storage()
        self._alive[storage._cdata] = weakref.ref(storage)

    def _ignore_new(self, tensor: torch.Tensor) -> None:
        known = self._alive.get(_key(tensor))
        if known is None or known() is None:
            self._ignore(tensor)

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        known = self._alive.get(key)
        if known is None or known() is None:
            self._alive[key] = weakref.ref(storage, lambda _: self._release(key, size))
            stream = torch.cpu.current_stream()  # FSDP's code runs on streams on a CPU too, where they are idle objects
            self._tell(
                "alloc",
                block=key,
                size=size,
                label=self.modules[-1] if self.modules else "",
                stream=0 if stream is torch.cpu._default_cpu_stream else id(stream),
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

    def _tell(self, kind: str, *, block: int = 0, size: int = 0, label: str = "", stream: int = 0) -> None:
        self.events.append(Event(kind, time.perf_counter() * 1e3, block, size, label, stream))
