"""Training memory, measured: what is alive when, to the byte, from the allocator's own events.

The source of truth is PyTorch's profiler with ``profile_memory=True``: every allocation and release of the
CPU allocator and of the CUDA caching allocator, with address, size and time. Resident-set size is not
used: it misses what the allocator reuses. The same event stream carries what tells the phases apart
(autograd's ``evaluate_function`` ranges, ``Optimizer.step``), so the measured step needs no change.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_parameter_registration_hook,
)
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, record_function
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from memstudy.memory.report import Event, MemoryReport, account

Step = Callable[[], object]

_ITERATION, _MODULE, _MARK = "memstudy.iteration", "memstudy.module:", "memstudy.mark"
_BACKWARD, _OPTIMIZER = "autograd::engine::evaluate_function", "Optimizer."


def measure(build: Callable[[], Step], *, iterations: int = 2) -> MemoryReport:
    """Run ``step = build()`` and then ``step()`` ``iterations`` times, and report what they allocated.

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
        ``kind="measured"``; of the CUDA device when one is present and was used, else of the CPU.

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
            with record_function(_ITERATION):
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


class Roles:
    """Learns, through PyTorch's hooks, which storages are parameters, gradients and optimizer state.

    Each time it learns something it calls ``mark()`` and appends ``(category, storages)`` to ``told``, so
    the n-th mark in the event stream belongs to the n-th entry. Storages are known by ``key``.
    """

    def __init__(
        self,
        mark: Callable[[], None],
        key: Callable[[torch.Tensor], int] = lambda tensor: tensor.untyped_storage().data_ptr(),
    ):
        self.told: list[tuple[str, list[int]]] = []
        self._mark, self._key = mark, key
        # Modules, not parameters: a module cast under fake tensors refuses weakly referenced parameters.
        self._modules: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        self._handles: list = []

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Note every parameter registered and every optimizer step taken in the block."""
        self._handles += [
            register_module_parameter_registration_hook(self._on_parameter),
            register_optimizer_step_post_hook(self._on_optimizer_step),
        ]
        try:
            yield
        finally:
            for handle in self._handles:
                handle.remove()

    def watch_gradients(self) -> None:
        """Hook the parameters that came to need gradients only after they were registered."""
        for parameter in self._alive():
            self._hook_gradient(parameter)

    def tell_parameters(self) -> None:
        """Say which storages are parameters now: modules may have been cast or moved since."""
        self._tell("parameters", self._alive())

    def _alive(self) -> list[torch.nn.Parameter]:
        parameters = (p for module in self._modules for p in module._parameters.values())
        return list({id(p): p for p in parameters if p is not None}.values())

    def _on_parameter(self, module, name, parameter) -> None:
        self._modules.add(module)
        if parameter is not None:
            # At registration, so that this hook runs before one that steps and drops the gradient.
            self._hook_gradient(parameter)

    def _hook_gradient(self, parameter: torch.nn.Parameter) -> None:
        if parameter.requires_grad and getattr(parameter, "_memstudy_hooked", None) != id(self):
            parameter._memstudy_hooked = id(self)
            self._handles.append(parameter.register_post_accumulate_grad_hook(self._on_gradient))

    def _on_gradient(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None and not parameter.grad.is_sparse:
            self._tell("gradients", [parameter.grad])

    def _on_optimizer_step(self, optimizer, args, kwargs) -> None:
        states = (value for state in optimizer.state.values() for value in state.values())
        self._tell("optimizer", list(states))

    def _tell(self, category: str, kept: list[object]) -> None:
        self.told.append((category, [self._key(tensor) for each in kept for tensor in _tensors_of(each)]))
        self._mark()


def _tensors_of(kept: object) -> Iterator[torch.Tensor]:
    """The plain tensors of what is kept: itself, a wrapper's or a sparse one's parts, or what a projector has."""
    if is_traceable_wrapper_subclass(kept):
        for name in kept.__tensor_flatten__()[0]:
            yield from _tensors_of(getattr(kept, name))
    elif isinstance(kept, torch.Tensor):
        is_csr = kept.layout is torch.sparse_csr
        yield from (kept.crow_indices(), kept.col_indices(), kept.values()) if is_csr else (kept,)
    elif hasattr(kept, "__dict__"):
        yield from (value for value in vars(kept).values() if isinstance(value, torch.Tensor))


def _mark() -> None:
    with record_function(_MARK):
        pass


@contextmanager
def watch_modules(enter: Callable[[str], None], leave: Callable[[], None]) -> Iterator[None]:
    """Call ``enter(path from the root)`` and ``leave()`` around every module's forward in the block."""
    depth = 0
    paths: dict[int, str] = {}

    def before(module, args):
        nonlocal depth
        if not depth:
            paths.update({id(m): path for path, m in module.named_modules()})
        depth += 1
        enter(paths.get(id(module)) or type(module).__name__)

    def after(module, args, output):
        nonlocal depth
        depth -= 1
        leave()

    handles = [
        register_module_forward_pre_hook(before),
        register_module_forward_hook(after, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
    """``(time [ns], serial, kind, payload)`` of what matters in the profiler's tree; not yet sorted."""
    serial = 0
    # (node, the phase it is surely in, the module whose forward it is in, building or stepping)
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
        if name == _ITERATION:
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
