"""The projections in the attention of each known family of Hugging Face models, and their replacement."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from memstudy.attention import AttentionConfig


@dataclass(frozen=True)
class Family:
    """One family's attention.

    Parameters
    ----------
    projections : dict of str to str
        The submodule that computes query, key, value or output, keyed by their letters: "q", "k", "v", "o", "qkv".
    head_dim : str
        The attribute of ``op`` that holds the size of a head.
    op : str
        The submodule that calls the attention function, "" for the attention itself.
    score_bias : bool
        Whether the attention adds a bias to the scores.
    """

    projections: dict[str, str]
    head_dim: str
    op: str = ""
    score_bias: bool = False


_BERT = Family(
    {"q": "self.query", "k": "self.key", "v": "self.value", "o": "output.dense"}, "attention_head_size", op="self"
)
FAMILIES = {  # by class name
    "BertAttention": _BERT,
    "RobertaAttention": _BERT,
    "DistilBertSelfAttention": Family(
        {"q": "q_lin", "k": "k_lin", "v": "v_lin", "o": "out_lin"}, "attention_head_size"
    ),
    "GPT2Attention": Family({"qkv": "c_attn", "o": "c_proj"}, "head_dim"),
    "LlamaAttention": Family({"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}, "head_dim"),
    "BartAttention": Family({"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}, "head_dim"),
    "T5Attention": Family({"q": "q", "k": "k", "v": "v", "o": "o"}, "key_value_proj_dim", score_bias=True),
}


def ops(model: nn.Module) -> list[nn.Module]:
    """Give the modules that call transformers' `AttentionInterface`."""
    with_config = [m for m in model.modules() if isinstance(getattr(m, "config", None), PreTrainedConfig)]
    return [m for m in with_config if hasattr(m, "is_causal")]


def attends_elsewhere(op: nn.Module) -> bool:
    """Tell whether a module of `ops` attends from one sequence to another (cross-attention)."""
    of_decoder = getattr(op, "is_decoder", False) and not op.is_causal  # BART and T5 use one class for both
    return of_decoder or getattr(op, "is_cross_attention", False) or "CrossAttention" in type(op).__name__


def known_attentions(model: nn.Module) -> list[tuple[nn.Module, Family]]:
    """Give every attention of a model with its family.

    Raises
    ------
    ValueError
        If an attention is of no known family.
    """
    # GPT-2 uses one class for self- and cross-attention, but cross-attention has other projections (q_attn).
    found = [
        (module, FAMILIES[type(module).__name__])
        for module in model.modules()
        if type(module).__name__ in FAMILIES and not hasattr(module, "q_attn")
    ]
    known = {module.get_submodule(family.op) for module, family in found}
    unknown = {type(op).__name__ for op in ops(model) if op not in known}
    if unknown or not found:
        raise ValueError(
            f"the attention projections of {' and '.join(sorted(unknown)) or type(model).__name__} are not known; "
            f"known are those of {', '.join(FAMILIES)}"
        )
    return found


class _Fused(nn.ModuleList):
    """Separate projections, concatenated, in place of one fused projection."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.cat([projection(hidden_states) for projection in self], dim=-1)


def replace_projections(model: nn.Module, config: AttentionConfig, layers: Sequence[int] | None = None) -> None:
    """Replace each projection of ``layers`` (None: all) by ``config.factor(part, projection)``, in place.

    Raises
    ------
    ValueError
        If the attention is of no known family, a projection is not a plain linear layer, or a layer doesn't exist.
    """
    attentions = known_attentions(model)
    chosen = range(len(attentions)) if layers is None else layers
    if any(layer not in range(len(attentions)) for layer in chosen):
        raise ValueError(f"layers={list(chosen)}: the model has {len(attentions)} attentions, counted from 0")
    for attention, family in (attentions[layer] for layer in chosen):
        for parts, name in family.projections.items():
            whole = _linear(attention.get_submodule(name), f"{type(attention).__name__}.{name}")
            pieces = _split(whole, len(parts))
            factored = [config.factor(part, piece) for part, piece in zip(parts, pieces, strict=True)]
            if any(new is not old for new, old in zip(factored, pieces, strict=True)):
                attention.set_submodule(name, factored[0] if len(parts) == 1 else _Fused(factored))


def _linear(projection: nn.Module, name: str) -> nn.Linear:
    """Return a projection as a linear layer; GPT-2's Conv1D, whose weight is (d_in, d_out), is transposed."""
    if type(projection) is nn.Linear:
        return projection
    if type(projection) is not Conv1D:
        raise ValueError(
            f"{name} is a {type(projection).__name__}, not a linear layer with plain weights; convert the model as it "
            "was trained: not twice, and before adapters or quantization"
        )
    return _with_weights(projection.weight.t(), projection.bias)


def _split(linear: nn.Linear, parts: int) -> list[nn.Linear]:
    if parts == 1:
        return [linear]
    return [_with_weights(*both) for both in zip(linear.weight.chunk(parts), linear.bias.chunk(parts), strict=True)]


def _with_weights(weight: torch.Tensor, bias: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(*weight.shape[::-1], device="meta")
    for name, tensor in (("weight", weight), ("bias", bias)):
        # A copy, so that the model's own tensor, (d_in, d_out) or fused, can be freed.
        copy = nn.Parameter(tensor.detach().clone(memory_format=torch.contiguous_format), tensor.requires_grad)
        setattr(linear, name, copy)
    return linear
