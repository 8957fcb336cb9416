"""The base class of the techniques."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Technique:
    """Base of all techniques.

    Attributes
    ----------
    summary : str
        One sentence for ``memstudy list techniques``.
    exact : bool
        Whether the loss stays the baseline's up to rounding.
    group : str
        Two techniques of the same group exclude each other.
    requires : str
        ``"cuda"`` if the technique needs a GPU, otherwise empty.
    capability : tuple of int
        The least compute capability of the GPU.
    in_training, at_inference : bool
        Whether the technique is for training, for inference, or both.
    rounds_stochastically : bool
        For an optimizer: whether it can round updates stochastically, as bf16 weights need.
    one_count_of_steps : bool
        For an optimizer: whether it counts steps for all parameters together, so that it can't update them one by one.
    takes_shards : bool
        For an optimizer: whether parameters may be divided among processes.
    prepared : int
        When `prepare` runs: techniques of lower numbers are prepared first.
    weights_dtype : torch.dtype or None
        The format that the model's weights are made in; None for fp32.
    several_processes : bool
        Whether the technique is only for runs in several processes.
    one_process : bool
        Whether the technique is only for runs in one process.
    in_bf16 : bool
        Whether products are computed in bfloat16, which some machines emulate.
    in_pytorch : bool
        Whether PyTorch's allocator serves all memory of the technique.
    more_tokens : int
        Number of tokens that the technique adds to each sequence.
    packages : tuple of str
        Packages to install besides memstudy's own dependencies.
    needs_compiler : bool
        Whether it takes a C++ compiler to carry the technique out.
    predicted : bool
        Whether a prediction can follow the technique.
    predicted_by_rules : bool
        Whether a prediction for a GPU needs none of ``packages``.
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
    prepared = 0
    weights_dtype = None
    several_processes = False
    one_process = False
    in_bf16 = False
    in_pytorch = True
    more_tokens = 0
    packages = ()
    needs_compiler = False
    predicted = True
    predicted_by_rules = False

    def flags(self) -> dict[str, object]:
        """Flags for ``transformers.TrainingArguments``."""
        return {}

    def prepare(self, model: torch.nn.Module) -> torch.nn.Module | None:
        """Change ``model`` in place, before its optimizer is made; return the model to train if it is another."""

    def optimizer(self, model: torch.nn.Module) -> tuple[type[torch.optim.Optimizer], dict[str, object]] | None:
        """Class and keywords, except the learning rate, of an optimizer that no flag selects; None otherwise."""
        return None

    def around_loss(self) -> AbstractContextManager:
        """A context around the forward pass, in which autograd saves its tensors."""
        return nullcontext()

    def forward_pass(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], object] | None:
        """A function that runs ``model`` on ``batch`` at inference; None for eager PyTorch."""
        return None

    def as_on_a_gpu(self, optimizer: torch.optim.Optimizer) -> None:
        """Change the new optimizer, for a prediction, where it behaves on a GPU as it does not on a CPU."""

    def attach(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Connect the new optimizer to the model."""


def check_rank(rank: float) -> None:
    """Raise ValueError unless ``rank`` is a whole number from 1."""
    if rank < 1 or not float(rank).is_integer():
        raise ValueError(f"rank {rank}: a whole number from 1 is needed")


_DTYPES = {"": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_dtype(name: str) -> torch.dtype | None:
    """The number format ``name``, None for an empty one; ValueError for an unknown one."""
    if name not in _DTYPES:
        raise ValueError(f"number format {name!r}: {', '.join(filter(None, _DTYPES))} are known")
    return _DTYPES[name]
