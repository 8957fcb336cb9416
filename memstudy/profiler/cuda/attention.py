"""``scaled_dot_product_attention`` as on CUDA: which kernel takes which tensors (paths are PyTorch's)."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from memstudy.profiler.catalogue import Gpu

_ATEN = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)


def attention_on(gpu: Gpu) -> Callable:
    """``scaled_dot_product_attention`` as CUDA executes it on ``gpu``.

    aten/src/ATen/native/transformers/attention.cpp, ``scaled_dot_product_attention``.
    """

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
        needed = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
        mask = attn_mask
        if mask is not None and mask.dtype is torch.bool:  # convert_boolean_attn_mask
            zero, hidden = torch.zeros((), dtype=query.dtype), torch.full((), float("-inf"), dtype=query.dtype)
            mask = torch.where(mask, zero, hidden)
        if _cudnn_fits(gpu, query, key, value, dropout_p, enable_gqa):
            return _ATEN._scaled_dot_product_cudnn_attention(
                query, key, value, mask, needed, dropout_p, is_causal, False, scale=scale
            )[0]
        if _flash_fits(gpu, query, key, value, attn_mask, dropout_p, is_causal, enable_gqa):
            width = query.shape[-1]
            padded = [_padded(tensor, 8) for tensor in (query, key, value)]  # pad_last_dim<8>
            scale = width**-0.5 if scale is None else scale
            output = _ATEN._scaled_dot_product_flash_attention(*padded, dropout_p, is_causal, False, scale=scale)[0]
            return output if width % 8 == 0 else output[..., :width]
        if _efficient_fits(gpu, query, key, value):
            bias = None if mask is None else _bias(mask, query, key)
            return _ATEN._scaled_dot_product_efficient_attention(
                query, key, value, bias, needed, dropout_p, is_causal, scale=scale
            )[0]
        return _ATEN._scaled_dot_product_attention_math(
            query, key, value, mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
        )[0]

    return attention


def _cudnn_fits(gpu, query, key, value, dropout, enable_gqa) -> bool:
    """Whether cuDNN is used: on data-centre Hopper and Blackwell, with the CUDA 13 wheels' cuDNN (above 9.15).

    aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, ``check_prefer_cudnn_attention`` and
    ``can_use_cudnn_attention``. cuDNN's own memory is not known, so the op counts as unverified.
    """
    widths = query.shape[-1], value.shape[-1]
    return (
        gpu.compute_capability[0] in (9, 10)
        and query.dim() == 4
        and query.dtype in _HALF
        and float(dropout * 16).is_integer()
        and all(width % 8 == 0 and width <= 128 for width in widths)
        and key.shape[-2] != 1
        and not (dropout > 0 and query.shape[-2] == 1)
        and _heads_fit(query, key, enable_gqa)
    )


def _flash_fits(gpu, query, key, value, mask, dropout, is_causal, enable_gqa) -> bool:
    """aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, ``can_use_flash_attention``."""
    width = query.shape[-1]
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    small_sm = gpu.compute_capability in ((8, 6), (8, 7), (8, 9), (12, 0), (12, 1))
    return (
        gpu.compute_capability >= (8, 0)
        and query.dim() == 4
        and mask is None
        and query.dtype in _HALF
        and width <= 256
        and key.shape[-1] == value.shape[-1] == width
        and not (trains and small_sm and width > 192 and (dropout > 0 or width <= 224))
        and not (is_causal and query.shape[-2] != key.shape[-2])
        and _heads_fit(query, key, enable_gqa)
    )


def _efficient_fits(gpu, query, key, value) -> bool:
    """aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, ``can_use_mem_efficient_attention``.

    Grouped queries do not fit: their support came with torch 2.14.
    """
    half = query.dtype in _HALF
    tensor_cores = gpu.compute_capability >= (8, 0) or (gpu.compute_capability >= (7, 0) and half)
    alignment = (8 if half else 4) if tensor_cores else 1  # minimum_gemm_alignment
    return (
        query.dim() == 4
        and query.dtype in (torch.float16, torch.float32, *[torch.bfloat16] * (gpu.compute_capability >= (8, 0)))
        and query.shape[-1] == key.shape[-1]
        and query.shape[-1] % alignment == 0
        and value.shape[-1] % alignment == 0
        and all(tensor.stride(-1) == 1 for tensor in (query, key, value))
        and query.shape[1] == key.shape[1]
    )


def _heads_fit(query, key, enable_gqa) -> bool:
    return query.shape[1] == key.shape[1] or (enable_gqa and query.shape[1] % key.shape[1] == 0)


def _padded(tensor: torch.Tensor, multiple: int) -> torch.Tensor:
    missing = -tensor.shape[-1] % multiple
    return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor


def _bias(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The mask as the memory-efficient kernel takes it: copied when its rows are not aligned, then expanded.

    aten/src/ATen/native/transformers/attention.cpp, ``preprocess_mask``, ``aligned_tensor`` and ``pad_bias``.
    """
    width = mask.shape[-1]
    if mask.stride(-1) != 1 or any(stride % 8 for stride in mask.stride()[:-1]):
        mask = torch.nn.functional.pad(mask, (0, 8 - width % 8))[..., :width]
    return mask.expand(*query.shape[:3], key.shape[2])


@contextmanager
def flash_attn() -> Iterator[None]:
    """Replace ``flash_attn`` by PyTorch's copy of its kernel, which saves and allocates as much.

    flash_attn/flash_attn_interface.py, ``FlashAttnFunc``; tensors are (batch, seq, heads, head_dim). A window changes
    which scores are computed but no size. ``FlashAttnVarlenFunc`` takes sequences of unequal lengths, joined to
    (tokens, heads, head_dim), and where each begins.
    """

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, **others):
        heads_first = (tensor.transpose(1, 2) for tensor in (q, k, v))
        output = _ATEN._scaled_dot_product_flash_attention(*heads_first, dropout_p, causal, False, scale=softmax_scale)
        return output[0].transpose(1, 2)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, **others,
    ):  # fmt: skip
        given = q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        return _ATEN._flash_attention_forward(*given, dropout_p, causal, False, scale=softmax_scale)[0]

    stand_in = types.ModuleType("flash_attn")
    stand_in.flash_attn_func = flash_attn_func
    stand_in.flash_attn_varlen_func = flash_attn_varlen_func
    # patch.dict would also remove every module imported within the block.
    installed = sys.modules.get("flash_attn")
    sys.modules["flash_attn"] = stand_in
    try:
        yield
    finally:
        del sys.modules["flash_attn"]
        if installed is not None:
            sys.modules["flash_attn"] = installed
