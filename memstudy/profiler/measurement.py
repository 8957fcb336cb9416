"""Training memory, measured: the live blocks at each moment, to the byte, from the allocator's own events.

The source of truth is PyTorch's profiler with ``profile_memory=True``: every allocation and release of the
CPU allocator and of the CUDA caching allocator, with address, size and time. Resident-set size is not
used: it misses memory that the allocator reuses. The event stream also has the ranges that separate the phases
(autograd's ``evaluate_function``, ``Optimizer.step``), so the measured step needs no change.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import torch
from torch.profiler import ProfilerActivity, record_function

from memstudy.profiler.accounting import account
from memstudy.profiler.events import Event
from memstudy.profiler.report import MemoryReport
from memstudy.profiler.roles import ITERATION, Roles, Step, watch_modules

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
    on_cuda = torch.cuda.is_available()
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    gc.collect()
    roles = Roles(mark=_mark)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_cuda
    profile = torch.profiler.profile(activities=activities, profile_memory=True)
    ranges: list[record_function] = []

    def enter(path):
        ranges.append(record_function(_MODULE + path))
        ranges[-1].__enter__()

    with ExitStack() as stack:
        stack.enter_context(roles.watch())
        stack.enter_context(watch_modules(enter, lambda: ranges.pop().__exit__(None, None, None)))
        stack.enter_context(profile)
        step = build()
        roles.watch_gradients()
        for _ in range(iterations):
            with record_function(ITERATION):
                roles.tell_parameters()
                step()
            if on_cuda:
                torch.cuda.synchronize()
    device = "cuda" if on_cuda else "cpu"
    return account(
        _events(profile, roles.told, device),
        device=torch.cuda.get_device_name() if on_cuda else "cpu",
        kind="measured",
        peak_reserved_bytes=torch.cuda.max_memory_reserved() if on_cuda else None,
    )


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
