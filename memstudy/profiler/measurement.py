"""Training memory, measured: the live blocks at each moment, to the byte, from the allocator's own events.

The source of truth is PyTorch's profiler with ``profile_memory=True``: every allocation and release of the
CPU allocator and of the CUDA caching allocator, with address, size and time. Resident-set size is not
used: it misses memory that the allocator reuses. The event stream also has the ranges that separate the phases
(autograd's ``evaluate_function``, ``Optimizer.step``), so the measured step needs no change.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch.profiler import ProfilerActivity, record_function

from memstudy.profiler.accounting import account
from memstudy.profiler.allocator import ROUND
from memstudy.profiler.events import Event
from memstudy.profiler.report import MemoryReport
from memstudy.profiler.roles import ITERATION, Roles, Step, plain_tensors, watch_modules

_MODULE, _MARK = "memstudy.module:", "memstudy.mark"
_BACKWARD, _OPTIMIZER = "autograd::engine::evaluate_function", "Optimizer."


def measure(build: Callable[[], Step], *, iterations: int = 2) -> MemoryReport:
    """Run ``step = build()`` and then ``step()`` ``iterations`` times, and report the memory allocated.

    Everything that ``build`` makes counts (model, optimizer, inputs). Two iterations are the least that
    shows optimizer state and kept gradients at the peak.

    Parameters
    ----------
    build : callable
        Makes model, optimizer and inputs, and returns ``step``, a callable that runs one whole update.
    iterations : int
        How many steps to run; at least 1.

    Returns
    -------
    MemoryReport
        ``kind="measured"``; for the CUDA device when one is available, otherwise for the CPU.

    Raises
    ------
    ValueError
        When ``iterations`` is below 1.
    """
    if iterations < 1:
        raise ValueError(f"iterations={iterations}: at least 1 step must run")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    gc.collect()
    with Recording() as recording:
        step = build()
        recording.roles.watch_gradients()
        for _ in range(iterations):
            with recording.step():
                step()
    return recording.report()


class Recording:
    """Records the allocations of its block, also of a training that has begun.

    Attributes
    ----------
    roles : Roles
        Learns which storages are parameters, gradients and optimizer state.
    """

    def __init__(self):
        self.roles = Roles(mark=_mark)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self._device == "cuda")
        self._profile = torch.profiler.profile(activities=activities, profile_memory=True)
        self._ranges: list[record_function] = []
        self._before: list[Event] = []
        self._stack = ExitStack()

    def __enter__(self) -> Recording:
        with ExitStack() as stack:
            stack.enter_context(self.roles.watch())
            stack.enter_context(watch_modules(self._enter, self._leave))
            stack.enter_context(self._profile)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self._stack.__exit__(*error)

    def know(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, *others: torch.Tensor) -> None:
        """Count the memory of the ``model``, its ``optimizer`` and ``others`` from before the recording."""
        self.roles.watch_model(model)
        beside = [value for parameter in model.parameters() for value in vars(parameter).values()]
        beside += [value.state2 for value in beside if hasattr(value, "state2")]  # the scales of bitsandbytes' scales
        state = [value for values in optimizer.state.values() for value in values.values()]
        others = [*model.buffers(), *others, *beside]
        kept = [("parameters", list(model.parameters())), ("other", others), ("optimizer", state)]
        known: set[int] = set()
        for category, tensors in kept:
            for tensor in (part for each in tensors for part in plain_tensors(each)):
                key = tensor.untyped_storage().data_ptr()
                if tensor.device.type == self._device and key not in known:
                    known.add(key)
                    size = tensor.untyped_storage().nbytes()
                    size = -(-size // ROUND) * ROUND if self._device == "cuda" else size
                    self._before += [Event("alloc", 0.0, key, size), Event("is", 0.0, key, label=category)]

    @contextmanager
    def step(self) -> Iterator[None]:
        """A step of the training."""
        with record_function(ITERATION):
            self.roles.tell_parameters()
            yield
        if self._device == "cuda":
            torch.cuda.synchronize()

    def report(self) -> MemoryReport:
        """The report of the steps recorded, after the block."""
        on_cuda = self._device == "cuda"
        return account(
            [*self._before, *_events(self._profile, self.roles.told, self._device)],
            device=torch.cuda.get_device_name() if on_cuda else "cpu",
            kind="measured",
            peak_reserved_bytes=torch.cuda.max_memory_reserved() if on_cuda else None,
        )

    def _enter(self, path: str) -> None:
        self._ranges.append(record_function(_MODULE + path))
        self._ranges[-1].__enter__()

    def _leave(self) -> None:
        self._ranges.pop().__exit__(None, None, None)


def _mark() -> None:
    with record_function(_MARK):
        pass


def _events(profile, told: list[tuple[str, list[int]]], device: str) -> Iterator[Event]:
    """The profiler's tree as :class:`Event` s in order of time."""
    flat = sorted(_flatten(profile.profiler.kineto_results.experimental_event_tree(), device))
    began = flat[0][0] if flat else 0
    marks = iter(told)
    phase = "build"
    for time_ns, _, kind, payload in flat:
        time_ms = (time_ns - began) / 1e6
        if kind == "memory":
            address, size, module = payload
            yield Event("alloc" if size > 0 else "free", time_ms, address, abs(size), label=module)
        elif kind == "mark":
            category, addresses = next(marks)
            for address in addresses:
                yield Event("is", time_ms, address, label=category)
        elif kind == "iteration":
            yield Event("iteration", time_ms)
        elif payload != phase:
            phase = payload
            yield Event("phase", time_ms, label=phase)


def _flatten(tree, device: str) -> Iterator[tuple[int, int, str, object]]:
    """``(time [ns], serial, kind, payload)`` of each relevant node in the profiler's tree; not yet sorted."""
    serial = 0
    # (node, its phase if known, the module whose forward contains it, whether a step has begun)
    stack = [(node, "", "", False) for node in reversed(tree)]
    while stack:
        node, inside, module, stepping = stack.pop()
        serial += 1
        name, time_ns = node.name, node.start_time_ns
        if node.typed[0].name == "Allocation":
            allocation = node.typed[1]
            if allocation.device.type == device:
                yield time_ns, serial, "memory", (allocation.ptr, allocation.alloc_size, module)
            continue
        if name == ITERATION:
            yield time_ns, serial, "phase", "forward"
            yield time_ns, serial + 1, "iteration", None
            stepping = True
        elif name == _MARK:
            yield time_ns, serial, "mark", None
        elif name.startswith(_MODULE):
            module = name.removeprefix(_MODULE)
        elif name.startswith(_BACKWARD):
            yield time_ns, serial, "phase", "backward"
            inside = "backward"
        elif name.startswith(_OPTIMIZER):
            yield time_ns, serial, "phase", "optimizer"
            if inside:
                yield node.end_time_ns, serial, "phase", inside
            inside = "optimizer"
        elif not inside and stepping:
            yield time_ns, serial, "phase", "forward"
        serial += 1
        stack.extend((child, inside, module, stepping) for child in reversed(node.children))
