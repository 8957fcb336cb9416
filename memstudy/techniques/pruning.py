"""Magnitude pruning: single weights, two of every four weights, whole neurons or whole heads."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import prune
from transformers.pytorch_utils import Conv1D

from memstudy.attention.base import Unavailable
from memstudy.attention.memsizer import MemSizerAttention
from memstudy.huggingface.families import known_attentions
from memstudy.techniques.base import Technique


@dataclass(frozen=True)
class Pruning(Technique):
    """Base of techniques that remove a ``share`` of each matrix of the blocks (Han et al. 2015, arXiv:1506.02626)."""

    share: float = 0.5
    exact = False
    group = "pruning"
    at_inference = True

    def __post_init__(self):
        if not 0 < self.share < 1:
            raise ValueError(f"share {self.share}: a share to remove is needed, between 0 and 1")

    def prepare(self, model):
        for module in _matrices(model):
            prune.l1_unstructured(module, "weight", amount=self.share)
            self.settle(module)

    def settle(self, module: nn.Module) -> None:
        """Keep, apply or convert the new mask of ``module``."""


@dataclass(frozen=True)
class Masks(Pruning):
    """Keep all weights, a mask of equal size, and the masked weights, recomputed in every forward pass."""

    summary = "unstructured pruning with its mask (=0.5 of the weights): takes more memory, not less"

    def prepare(self, model):
        if any(isinstance(module, MemSizerAttention) for module in model.modules()):
            raise ValueError(
                f"masks={self.share:g}: MemSizer reads the weights of its projections past the hook that masks them; "
                "take pruned or narrow"
            )
        super().prepare(model)


@dataclass(frozen=True)
class Pruned(Pruning):
    """Apply and remove the mask: the zeros are stored like any other weight."""

    summary = "unstructured pruning, mask removed (=0.5): zeros are stored too, so nothing is saved"

    def settle(self, module):
        prune.remove(module, "weight")


@dataclass(frozen=True)
class Sparse(Pruned):
    """Store compressed rows without the zeros: each remaining weight and the 64-bit index of its column."""

    summary = "unstructured pruning, stored as compressed rows (=0.5); saves memory above two thirds of zeros"
    in_training = False

    def settle(self, module):
        super().settle(module)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")  # once a process
            rows = module.weight.detach().to_sparse_csr()
        module.weight = nn.Parameter(rows, requires_grad=False)


@dataclass(frozen=True)
class SemiStructured(Pruned):
    """Drop two of every four weights, which a GPU's sparse tensor cores skip (Mishra et al. 2021, arXiv:2104.08378)."""

    summary = "two of every four weights, for sparse tensor cores: 9/16 of the matrices' memory in bf16"
    requires = "cuda"
    capability = (8, 0)
    in_training = False

    def prepare(self, model):
        from torch.sparse import to_sparse_semi_structured

        if not next(model.parameters()).is_cuda:
            raise Unavailable("semi_structured: only a CUDA device can compress the weights, so there is no prediction")
        model.to(torch.bfloat16)
        for module in _matrices(model):
            fours = module.weight.detach().unflatten(-1, (-1, 4))
            least = fours.abs().topk(2, -1, largest=False).indices
            weight = fours.scatter(-1, least, 0.0).flatten(-2)
            module.weight = nn.Parameter(to_sparse_semi_structured(weight), requires_grad=False)


@dataclass(frozen=True)
class Narrow(Pruning):
    """Remove a ``share`` of each feed-forward's neurons, those with the smallest weights in and out.

    Structured pruning (Li et al. 2017, arXiv:1608.08710): matrices, gradients, optimizer state and activations shrink.
    """

    summary = "structured pruning: the feed-forward parts lose a share (=0.5) of their neurons"

    def prepare(self, model):
        parts = list(_feed_forwards(model))
        if not parts:
            raise ValueError(f"narrow={self.share:g}: no feed-forward part is known in {type(model).__name__}")
        for up, down in parts:
            reads, writes = (_by_neuron(layer, reads=layer is down) for layer in (up, down))
            size = reads.square().sum(1) + writes.square().sum(1)
            kept = size.topk(max(1, round(len(size) * (1 - self.share)))).indices.sort().values
            _keep(up, kept, reads=False)
            _keep(down, kept, reads=True)


@dataclass(frozen=True)
class FewerHeads(Pruning):
    """Remove a ``share`` of each attention's heads, those of smallest weights (Michel et al. 2019, arXiv:1905.10650).

    The projections and the heads' activations shrink; at least one head stays.
    """

    summary = "structured pruning: the attentions lose a share (=0.5) of their heads"

    def prepare(self, model):
        for attention, family in known_attentions(model):
            op = attention.get_submodule(family.op)
            head_dim = getattr(op, family.head_dim)
            layers = {parts: attention.get_submodule(name) for parts, name in family.projections.items()}
            if not all(isinstance(layer, (nn.Linear, Conv1D)) for layer in layers.values()):
                raise ValueError(
                    f"fewer_heads={self.share:g}: the projections of this {type(attention).__name__} are not one "
                    "matrix each; take the attention as it was"
                )
            by_head = [
                _by_neuron(layer, reads=parts == "o").unflatten(0, (len(parts), -1, head_dim))
                for parts, layer in layers.items()
            ]  # (parts, heads, head_dim, ...)
            n_heads = by_head[0].shape[1]
            if family.score_bias or any(weights.shape[1] != n_heads for weights in by_head):
                raise ValueError(
                    f"fewer_heads={self.share:g}: the heads of a {type(attention).__name__} share keys or a bias, so "
                    "that no head can be removed alone; take narrow"
                )
            size = sum(weights.square().sum((0, 2, 3)) for weights in by_head)
            heads = size.topk(max(1, round(n_heads * (1 - self.share)))).indices.sort().values
            dims = torch.arange(head_dim, device=heads.device)
            for parts, layer in layers.items():
                starts = n_heads * torch.arange(len(parts), device=heads.device)[:, None] + heads
                _keep(layer, (head_dim * starts.flatten()[:, None] + dims).flatten(), reads=parts == "o")
            if hasattr(op, "split_size"):  # of GPT-2's fused projection of query, key and value
                op.split_size = head_dim * len(heads)


# In a block: the layer that makes the neurons, and the layer that reads them.
_PAIRS = (
    ("mlp.c_fc", "mlp.c_proj"),
    ("intermediate.dense", "output.dense"),
    ("feed_forward.dense.dense", "feed_forward.output.dense"),
    ("fc1", "fc2"),
    ("lin1", "lin2"),
)


def _matrices(model: nn.Module) -> Iterator[nn.Module]:
    """The linear layers of the model's blocks."""
    return (module for module in model.base_model.modules() if isinstance(module, (nn.Linear, Conv1D)))


def _feed_forwards(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    modules = dict(model.named_modules())
    for name in modules:
        for pair in _PAIRS:
            up, down = (modules.get(f"{name}.{part}" if name else part) for part in pair)
            if up is not None and down is not None:
                yield up, down


def _by_neuron(layer: nn.Module, *, reads: bool) -> torch.Tensor:
    """The weight of a layer that makes or ``reads`` neurons, one row per neuron; a Conv1D's weight is transposed."""
    weight = layer.weight.detach()
    return weight if isinstance(layer, Conv1D) == reads else weight.T


def _keep(layer: nn.Module, kept: torch.Tensor, *, reads: bool) -> None:
    """Keep only the neurons ``kept`` of those that ``layer`` makes or ``reads``."""
    along = int(isinstance(layer, Conv1D) != reads)
    layer.weight = nn.Parameter(layer.weight.detach().index_select(along, kept))
    if not reads and layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.detach().index_select(0, kept))
    if isinstance(layer, Conv1D):
        layer.nx, layer.nf = layer.weight.shape
    else:
        layer.out_features, layer.in_features = layer.weight.shape
