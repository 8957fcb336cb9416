"""What a training lever is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Technique:
    """Base of all levers.

    Attributes
    ----------
    summary : str
        One sentence for ``memstudy list techniques``.
    exact : bool
        Whether the loss stays the baseline's up to rounding.
    group : str
        Two techniques of the same group exclude each other.
    requires : str
        ``"cuda"`` where the lever means nothing without a GPU; else empty.
    capability : tuple of int
        The least compute capability of a GPU that it needs.
    in_training, at_inference : bool
        For which of the two it is.
    rounds_stochastically : bool
        Of an optimizer: whether it can, as bf16 weights need it.
    one_count_of_steps : bool
        Of an optimizer: whether it counts steps for all parameters together, so that it cannot update them one by one.
    takes_shards : bool
        Of an optimizer: whether parameters may be divided among processes.
    prepared_last : bool
        Whether it wants the model as the others have left it.
    several_processes : bool
        Whether it is for runs in several processes alone.
    in_bf16 : bool
        Whether products are made in bfloat16, which a machine may have to emulate.
    in_pytorch : bool
        Whether PyTorch's allocator sees all that it takes.
    packages : tuple of str
        What must be installed besides memstudy's own dependencies.
    """

    summary = ""
    exact = True
    group = ""
    requires = ""
    capability = (0, 0)
    in_training = True
    at_inference = False
    rounds_stochastically = False
    one_count_of_steps = False
    takes_shards = False
    prepared_last = False
    several_processes = False
    in_bf16 = False
    in_pytorch = True
    packages = ()

    def flags(self) -> dict[str, object]:
        """Flags for ``transformers.TrainingArguments``."""
        return {}

    def prepare(self, model: torch.nn.Module) -> None:
        """Change ``model`` in place, before its optimizer is made."""

    def optimizer(self, model: torch.nn.Module) -> tuple[type[torch.optim.Optimizer], dict[str, object]] | None:
        """Class and keywords of an optimizer that is no flag; the learning rate is added. None: the flags' one."""
        return None

    def around_loss(self) -> AbstractContextManager:
        """A context for the forward pass; what autograd saves, it saves in here."""
        return nullcontext()

    def forward_pass(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], object] | None:
        """What runs ``model`` on ``batch`` at inference; None: PyTorch, eagerly."""
        return None

    def attach(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Tie the optimizer to the model; it has just been made."""


def check_rank(rank: float) -> None:
    """Raise ValueError for what is no rank of a matrix."""
    if rank < 1 or not float(rank).is_integer():
        raise ValueError(f"rank {rank}: a rank is needed, a whole number from 1")
