"""Put an attention variant into any Hugging Face model: the one place that touches its internals.

A parameter-free variant is an attention function in transformers' sense, registered with
`AttentionInterface` (and `AttentionMaskInterface`, so that it gets the padding as (batch, key_len)
booleans, or None when nothing is padded) under ``memstudy_<variant>``. Importing this module
registers them, so ``from_pretrained(..., attn_implementation="memstudy_window")`` works.

The variant's settings stand in ``model.config.memstudy_attention`` and are saved with the config;
without them the variant's defaults hold. transformers doesn't save the name of the implementation:
give ``attn_implementation`` again when loading.

Keys and values in the model's own cache stay complete; a window only reads its part of them.
"""

from functools import partial

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from memstudy.attention import ATTENTION, AttentionConfig


def convert_attention(model: PreTrainedModel, config: AttentionConfig, *, seed: int = 0) -> PreTrainedModel:
    """Replace the attention of a model, in place; its weights stay as they are.

    Parameters
    ----------
    model : PreTrainedModel
        Any whose attention goes through transformers' `AttentionInterface` (tried: BERT, RoBERTa,
        DistilBERT, GPT-2, Llama).
    config : AttentionConfig
        The variant, parameter-free.
    seed : int
        For the weights of variants that have some; no effect on parameter-free ones.

    Returns
    -------
    PreTrainedModel
        The same model.

    Raises
    ------
    ValueError
        For a variant with parameters of its own, or a model that can't change its attention.
    """
    if not config.parameter_free:
        raise ValueError(
            f"{config.name} has weights of its own, which can't be put into a model yet; "
            f"take one of {[name for name, c in ATTENTION.items() if c.parameter_free]}"
        )
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    for part in models:
        if not part._can_set_attn_implementation():
            raise ValueError(
                f"{type(part).__name__} doesn't dispatch its attention through transformers' "
                "AttentionInterface, so it can't be converted"
            )
    for part in models:
        part.config.memstudy_attention = config.settings()
    model.set_attn_implementation(f"memstudy_{config.name}")
    return model


def _attend(
    variant: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Answer a call of `AttentionInterface`; (batch, heads, seq, head_dim) in, heads third out."""
    for name in ("position_bias", "softcap", "s_aux", "sliding_window", "output_attentions"):
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ValueError(
                f"{type(module).__name__} passes {name}, which memstudy_{variant} doesn't do; "
                "take another model, or its own attention"
            )
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"memstudy_{variant} got an attention mask of shape {tuple(attention_mask.shape)}; "
            "give the model a (batch, seq) mask of padding"
        )
    output = _settled(variant, module.config).attend(
        query,
        key,
        value,
        is_causal=module.is_causal if is_causal is None else is_causal,
        key_padding_mask=attention_mask,
        scale=scaling,
        dropout=dropout,
    )
    return output.transpose(1, 2).contiguous(), None


def _settled(variant: str, model_config) -> AttentionConfig:
    """Read the variant's settings from a model's config."""
    settings = dict(getattr(model_config, "memstudy_attention", None) or {"variant": variant})
    if (found := settings.pop("variant")) != variant:
        raise ValueError(
            f"the model's config has settings for {found!r}, but its attention is "
            f"memstudy_{variant}; call convert_attention to change the variant"
        )
    return ATTENTION[variant](**settings)


def _padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor | None:
    """Answer `AttentionMaskInterface` with (batch, kv_length) booleans, None without padding.

    Raises
    ------
    ValueError
        For patterns that the padding alone doesn't tell: packed sequences, a model's own window,
        a cache longer than what it holds (static).
    """
    if mask_function not in (causal_mask_function, bidirectional_mask_function):
        raise ValueError(
            "memstudy attention knows causal and bidirectional models with padding; this call asks "
            "for another pattern (packed sequences or the model's own window)"
        )
    if mask_function is causal_mask_function and kv_offset + kv_length != q_offset + q_length:
        raise ValueError(
            f"{kv_length} keys for {q_offset + q_length} tokens: memstudy attention needs a cache "
            "that holds just the tokens seen (DynamicCache)"
        )
    if attention_mask is None or attention_mask.all():
        return None
    return attention_mask


for _name, _config in ATTENTION.items():
    if _config.parameter_free:
        AttentionInterface.register(f"memstudy_{_name}", partial(_attend, _name))
        AttentionMaskInterface.register(f"memstudy_{_name}", _padding_mask)
