"""An op as a benchmark script times it: forward, backward or both, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from memstudy.profiler.roles import Step


@dataclass(frozen=True)
class Timed:
    """What a script times.

    Attributes
    ----------
    forward : callable
        Returns the outputs.
    cleared : tuple of Tensor
        The tensors whose gradients it clears before each call.
    gradients : list of Tensor, optional
        The outputs' gradients; None: random ones, which ``full`` makes anew, or of losses 1.
    wanted : tuple of Tensor
        The tensors whose gradients `torch.autograd.grad` returns; none: the gradients of leaves are added up.
    """

    forward: Callable[[], Tensor | tuple[Tensor, ...]]
    cleared: tuple[Tensor, ...] = ()
    gradients: list[Tensor] | None = None
    wanted: tuple[Tensor, ...] = ()

    def step(self, mode: str) -> Step:
        """A call in ``mode``."""
        made = self._made(self.forward()) if mode == "backward" else None

        def step() -> None:
            for tensor in self.cleared:
                tensor.grad = None
            outputs, gradients = made or self._made(self.forward())
            if self.wanted:
                torch.autograd.grad(outputs, self.wanted, gradients, retain_graph=True)
            else:
                torch.autograd.backward(outputs, gradients, retain_graph=True)

        return self.forward if mode == "forward" else step

    def _made(self, outputs: Tensor | tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], list[Tensor | None]]:
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        fresh = (torch.randn_like(output) if output.dim() else None for output in outputs)
        return outputs, self.gradients or list(fresh)
