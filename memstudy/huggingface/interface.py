"""Register the variants as attention functions of Hugging Face models, with transformers' `AttentionInterface`.

Each variant that is an op on query, key and value is registered under ``memstudy_<variant>``, and with
`AttentionMaskInterface`, which passes the padding as (batch, key_len) booleans, or None when nothing is padded. The
variant's settings are read from the model's config, its weights from the calling module.
"""

from functools import partial

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, flash_attention_mask

from memstudy.attention import ATTENTION, AttentionConfig, SoftmaxConfig, Unavailable
from memstudy.huggingface.families import attends_elsewhere

FLASH = "memstudy_joined"  # transformers would look for a kernel under a name with "flash"
_DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop", "dropout_rate")  # of model configs


def is_function(config: type[AttentionConfig]) -> bool:
    """Tell whether a variant is an op on query, key and value, with or without weights of its own."""
    return config.parameter_free or config.make_weights is not AttentionConfig.make_weights


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
    position_bias: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Answer a call of `AttentionInterface`: (batch, heads, seq, head_dim) in, (batch, seq, heads, head_dim) out."""
    config = _settled(variant, module.config)
    if attends_elsewhere(module) and not config.cross:
        config = SoftmaxConfig()
    options = _options(config, module, dropout)
    if config.score_bias:
        options["score_bias"] = position_bias
    else:
        kwargs["position_bias"] = position_bias
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
    output = config.attend(
        query,
        key,
        value,
        is_causal=module.is_causal if is_causal is None else is_causal,
        key_padding_mask=attention_mask,
        scale=scaling,
        **options,
    )
    return output.transpose(1, 2).contiguous(), None


def _options(config: AttentionConfig, module: torch.nn.Module, dropout: float) -> dict:
    """Return the keywords of `AttentionConfig.attend` that depend on the variant: dropout and weights."""
    if dropout and not config.drops_weights:
        name = next((name for name in _DROPOUTS if hasattr(module.config, name)), "its attention dropout")
        raise ValueError(
            f"{config.name} has no weights to drop, and {type(module).__name__} drops {dropout} of them; make the "
            f"model with {name}=0.0"
        )
    options = {"dropout": dropout}
    if not config.parameter_free:
        if not hasattr(module, "memstudy"):
            raise ValueError(
                f"{config.name} has weights of its own, which this model lacks; call convert_attention, or "
                "load_converted for a saved model"
            )
        options["weights"] = module.memstudy
    return options


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
        For masks that the padding alone doesn't describe: packed sequences, a model's own window,
        a cache with unused slots (static).
    """
    if mask_function not in (causal_mask_function, bidirectional_mask_function):
        raise ValueError(
            "memstudy attention supports causal and bidirectional models with padding; this call asks "
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


def _flash(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """The flash_attn package's kernels, as transformers' ``flash_attention_forward`` calls them, without padding.

    Sequences that share a row are told by ``cu_seq_lens``, as ``DataCollatorWithFlattening`` makes them.
    """
    if attention_mask is not None:
        raise ValueError("attention flash is for batches without padding: flatten or pack them")
    try:
        from flash_attn import flash_attn_func, flash_attn_varlen_func
    except ImportError as error:
        raise Unavailable(f"attention flash needs a GPU and the flash_attn package ({error})") from None
    dtype = query.dtype
    if dtype is torch.float32:  # as positions in fp32 make the query of products in half precision
        autocast = torch.is_autocast_enabled(query.device.type)
        dtype = torch.get_autocast_dtype(query.device.type) if autocast else next(module.parameters()).dtype
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"attention flash needs half precision, and this is {dtype}: add technique bf16")

    query, key, value = (tensor.transpose(1, 2).to(dtype) for tensor in (query, key, value))
    options = {
        "dropout_p": dropout,
        "softmax_scale": scaling,
        "causal": module.is_causal if is_causal is None else is_causal,
    }
    if cu_seq_lens_q is None:
        return flash_attn_func(query, key, value, **options), None
    joined = (tensor.reshape(-1, *tensor.shape[2:]) for tensor in (query, key, value))
    given = *joined, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k
    return flash_attn_varlen_func(*given, **options).view(query.shape), None


AttentionInterface.register(FLASH, _flash)
AttentionMaskInterface.register(FLASH, flash_attention_mask)
for _name, _config in ATTENTION.items():
    if is_function(_config):
        AttentionInterface.register(f"memstudy_{_name}", partial(_attend, _name))
        AttentionMaskInterface.register(f"memstudy_{_name}", _padding_mask)
