"""The storages of parameters, gradients and optimizer state, and the running module, from PyTorch's hooks."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_parameter_registration_hook,
)
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.profiler import record_function

from memstudy.profiler.internals import is_traceable_wrapper_subclass

Step = Callable[[], object]
ITERATION = "memstudy.iteration"  # the range that begins an iteration in a recording of torch's profiler


def next_iteration() -> None:
    """Begin the next iteration within a step that has several, as generation has one for each token.

    To be called as ``roles.next_iteration()``, which a prediction replaces.
    """
    with record_function(ITERATION):
        pass


class Roles:
    """Learns, through PyTorch's hooks, which storages are parameters, gradients and optimizer state.

    Each finding appends ``(category, storage keys)`` to ``told`` and calls ``mark()``, so the n-th mark in the
    event stream belongs to the n-th entry. ``key`` maps a tensor to its storage's key.
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
            for parameter in self._alive():  # the mark holds an id, which may soon be another object's
                vars(parameter).pop("_memstudy_hooked", None)

    def watch_model(self, model: torch.nn.Module) -> None:
        """Note the parameters of a ``model`` made before the block."""
        for module in model.modules():
            self._modules.add(module)
            for parameter in module._parameters.values():
                if parameter is not None:
                    self._hook_gradient(parameter)

    def watch_gradients(self) -> None:
        """Hook the parameters whose ``requires_grad`` was set after registration."""
        for parameter in self._alive():
            self._hook_gradient(parameter)

    def tell_parameters(self) -> None:
        """Tell the current storages of parameters: modules may have been cast or moved since registration."""
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
        self.told.append((category, [self._key(tensor) for each in kept for tensor in plain_tensors(each)]))
        self._mark()


def plain_tensors(kept: object) -> Iterator[torch.Tensor]:
    """The plain tensors in ``kept``: a tensor itself, a wrapper's or sparse tensor's parts, a projector's tensors."""
    if is_traceable_wrapper_subclass(kept):
        for name in kept.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(kept, name))
    elif isinstance(kept, torch.Tensor):
        is_csr = kept.layout is torch.sparse_csr
        yield from (kept.crow_indices(), kept.col_indices(), kept.values()) if is_csr else (kept,)
    elif hasattr(kept, "__dict__"):
        yield from (value for value in vars(kept).values() if isinstance(value, torch.Tensor))


@contextmanager
def watch_modules(enter: Callable[[str], None], leave: Callable[[], None]) -> Iterator[None]:
    """Call ``enter(path from the root)`` and ``leave()`` around every module's forward in the block."""
    depth = 0
    paths: dict[int, str] = {}

    def before(module, args):
        nonlocal depth
        if torch.compiler.is_compiling():
            return
        if not depth:
            paths.update({id(m): path for path, m in module.named_modules()})
        depth += 1
        enter(paths.get(id(module)) or type(module).__name__)

    def after(module, args, output):
        nonlocal depth
        if torch.compiler.is_compiling():
            return
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


@contextmanager
def watch_optimizers(begin: Callable[[], None], end: Callable[[], None]) -> Iterator[None]:
    """Call ``begin()`` and ``end()`` around every optimizer's step in the block."""
    handles = [
        register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: begin()),
        register_optimizer_step_post_hook(lambda optimizer, args, kwargs: end()),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
