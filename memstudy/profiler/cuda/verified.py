"""Ops whose predicted memory, by the rules of `semantics` and `scratch`, is known to be right on CUDA."""

from __future__ import annotations

import functools

import torch

# Compared with CUDA's own dispatch, byte by byte (benchmarks/cuda_oracle), or with allocations seen on GPUs
# (benchmarks/prediction).
_VERIFIED = {
    "_local_scalar_dense",
    "optimizer_update_32bit", "optimizer_update_8bit_blockwise",
    "_foreach_add_", "_foreach_addcdiv_", "_foreach_addcmul_", "_foreach_div_", "_foreach_lerp_", "_foreach_mul_",
    "_foreach_norm", "_foreach_sqrt", "_fused_adamw_", "_log_softmax", "_log_softmax_backward_data",
    "_safe_softmax", "_scaled_dot_product_efficient_attention", "_scaled_dot_product_efficient_attention_backward",
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward", "_softmax",
    "_softmax_backward_data", "_to_copy", "_unsafe_view", "addmm", "all", "arange", "bmm", "cat", "constant_pad_nd",
    "copy_", "cumsum", "embedding", "embedding_dense_backward", "empty", "fill_", "full", "full_like", "gather",
    "index", "linalg_vector_norm", "masked_fill_", "mean", "mm", "native_dropout", "native_layer_norm",
    "native_layer_norm_backward", "new_empty_strided", "new_ones", "new_zeros", "nll_loss_backward",
    "nll_loss_forward", "normal_", "ones", "ones_like", "randint", "randn", "randn_like", "scalar_tensor",
    "select_backward", "slice_backward", "stack", "sum", "tril", "uniform_", "zero_", "zeros", "zeros_like",
    # Ops that allocate only their results, on any device.
    "addmm_", "amax", "dot", "empty_like", "empty_strided", "index_add_", "index_select", "linspace", "new_empty",
    "promote_types", "softmax", "where", "dequantize_4bit", "dequantize_blockwise", "int8_linear_matmul",
}  # fmt: skip


@functools.cache
def is_verified(func) -> bool:
    """Whether the predicted memory of ``func`` is known to be right on CUDA."""
    namespace, _, name = func._schema.name.partition("::")
    return namespace in ("prim", "profiler") or func.is_view or torch.Tag.pointwise in func.tags or name in _VERIFIED
