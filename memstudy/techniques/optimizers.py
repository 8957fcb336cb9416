"""Optimizers with less state than AdamW's two fp32 moments of every weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from memstudy.techniques import torchao_rules
from memstudy.techniques.base import Technique, check_rank


@dataclass(frozen=True)
class Optimizer(Technique):
    """Base of the optimizers."""

    exact = False
    group = "optimizer"


@dataclass(frozen=True)
class AdamW8bit(Optimizer):
    """AdamW with block-wise 8-bit states (Dettmers et al. 2022), by bitsandbytes; embeddings keep 32-bit states."""

    summary = "AdamW with 8-bit states (bitsandbytes)"

    def flags(self):
        return {"optim": "adamw_bnb_8bit"}


_PAGED_FROM = 100_000  # elements (bitsandbytes/optim/optimizer.py, ``get_state_buffer``)


@dataclass(frozen=True)
class PagedAdamW8bit(Optimizer):
    """``adamw_8bit`` with large states in managed memory, which the driver moves to the host when the GPU is full.

    PyTorch's allocator does not serve that memory, and a prediction does not count it. On a CPU nothing is paged.
    """

    summary = "AdamW with 8-bit states that the driver pages to the host (bitsandbytes); not counted on a GPU"

    def flags(self):
        return {"optim": "paged_adamw_8bit"}

    def as_on_a_gpu(self, optimizer):
        def buffer(parameter, dtype=torch.float32):
            if parameter.numel() < _PAGED_FROM:
                return torch.zeros_like(parameter, dtype=dtype)
            return torch.zeros(1, dtype=dtype).expand(parameter.shape)  # one element for all

        optimizer.get_state_buffer = buffer


@dataclass(frozen=True)
class TorchaoAdamW(Optimizer):
    """Base of torchao's AdamW with states of few ``bits``."""

    bits: ClassVar[int]
    rounds_stochastically = True
    packages = ("torchao",)
    predicted_by_rules = True

    def flags(self):
        return {"optim": f"adamw_torch_{self.bits}bit"} if torchao_rules.INSTALLED else {}

    def optimizer(self, model):
        return None if torchao_rules.INSTALLED else (torchao_rules.AdamW, {"bits": self.bits})


@dataclass(frozen=True)
class TorchaoAdamW8bit(TorchaoAdamW):
    """AdamW with block-wise 8-bit states, also for embeddings, by torchao; one compiled kernel per parameter."""

    summary = "AdamW with 8-bit states (torchao); goes with bf16_weights"
    bits = 8


@dataclass(frozen=True)
class TorchaoAdamW4bit(TorchaoAdamW):
    """AdamW with block-wise 4-bit states (Li et al. 2023, arXiv:2309.01507), by torchao."""

    summary = "AdamW with 4-bit states (torchao); goes with bf16_weights"
    bits = 4


@dataclass(frozen=True)
class Adafactor(Optimizer):
    """A row and a column of second moments per matrix, no first moments (Shazeer & Stern 2018, arXiv:1804.04235)."""

    summary = "Adafactor: a row and a column of second moments per matrix, no first moments"

    def flags(self):
        return {"optim": "adafactor"}


@dataclass(frozen=True)
class Sgd(Optimizer):
    """Stochastic gradient descent without momentum: no state, the least memory that an optimizer can take."""

    summary = "SGD without momentum: no state; needs another learning rate"
    takes_shards = True

    def flags(self):
        return {"optim": "sgd"}


@dataclass(frozen=True)
class Muon(Optimizer):
    """One orthogonalised momentum for the blocks' matrices (Jordan et al. 2024), AdamW for the rest.

    By pytorch_optimizer. Updates have the size of AdamW's (Liu et al. 2025, arXiv:2502.16982), so both use
    one learning rate.
    """

    summary = "Muon for the blocks' matrices: one moment instead of two; AdamW for the rest"
    one_count_of_steps = True
    takes_shards = True
    packages = ("pytorch_optimizer",)

    def optimizer(self, model):
        from pytorch_optimizer import Muon as Orthogonalised

        return Orthogonalised, {"params": _groups(model, use_muon=(True, False), use_adjusted_lr=(True, False))}

    def attach(self, model, optimizer):
        matrices, others = optimizer.param_groups
        others["lr"] = matrices["lr"]  # pytorch_optimizer gives AdamW's group 0.0003, whatever rate is asked for


@dataclass(frozen=True)
class LowRank(Optimizer):
    """Base of the optimizers that keep moments of the blocks' gradients at a low ``rank``; by pytorch_optimizer."""

    rank: int = 64
    one_count_of_steps = True
    packages = ("pytorch_optimizer",)

    def __post_init__(self):
        check_rank(self.rank)


@dataclass(frozen=True)
class GaLore(LowRank):
    """AdamW with moments of gradients projected to ``rank`` rows or columns (Zhao et al. 2024, arXiv:2403.03507).

    The projection, on the gradient's singular vectors, is recomputed every 200 updates. By pytorch_optimizer.
    """

    summary = "AdamW with moments of the blocks' gradients at a low rank (=64), projected on singular vectors"

    def optimizer(self, model):
        from pytorch_optimizer import GaLore as Projected

        return Projected, {"params": _projected(model, self.rank, scale=0.25)}


@dataclass(frozen=True)
class Apollo(LowRank):
    """SGD with step sizes from AdamW's moments at a low ``rank`` (Zhu et al. 2024, arXiv:2412.05270).

    The projection is random, drawn again every 200 updates. By pytorch_optimizer.
    """

    summary = "AdamW's step sizes from moments at a low rank (=64), by a random projection"

    def optimizer(self, model):
        from pytorch_optimizer import APOLLO

        return APOLLO, {"params": _projected(model, self.rank, scale=1.0)}


def _projected(model: torch.nn.Module, rank: float, scale: float) -> list[dict]:
    matrices, others = _groups(model)
    settings = {"rank": int(rank), "update_proj_gap": 200, "scale": scale, "projection_type": "std"}
    return [matrices | settings, others]


def _groups(model: torch.nn.Module, **settings: tuple) -> list[dict]:
    """Two groups of parameters, the blocks' matrices and all others; each setting has one value per group."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    inside = {id(weight) for weight in model.base_model.parameters()} - embeddings
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    of_blocks = [weight for weight in trained if weight.ndim == 2 and id(weight) in inside]
    known = {id(weight) for weight in of_blocks}
    parts = of_blocks, [weight for weight in trained if id(weight) not in known]
    return [
        {"params": part, **{name: values[number] for name, values in settings.items()}}
        for number, part in enumerate(parts)
    ]
