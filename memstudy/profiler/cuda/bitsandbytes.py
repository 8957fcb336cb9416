"""bitsandbytes' CUDA kernels on fake tensors: the buffers that their wrappers in Python allocate.

bitsandbytes registers fake kernels that show only the results. Paths are of bitsandbytes 0.50.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from unittest.mock import patch

import torch

_OPS = torch.ops.bitsandbytes
_FUSED_UP_TO, _DEQUANTISED_BEYOND = 4, 1536  # tokens


def gemm_4bit(
    x, packed, shape, absmax, blocksize, quant_type, bias=None, absmax_8bit=None, absmax_code=None, absmax_offset=None
):
    """A product with a 4-bit weight, from bitsandbytes 0.50 on.

    backends/cuda/ops.py, ``gemm_4bit``: a fused kernel for few tokens, ``_dequant_linear_fallback`` beyond. In between,
    a table by processor and shape decides, and the larger way is taken here.
    """
    if _tokens(x) <= _FUSED_UP_TO and x.shape[-1] % blocksize == 0:
        return x.new_empty((*x.shape[:-1], shape[0]))
    if absmax_8bit is not None:
        unshifted = _OPS.dequantize_blockwise(absmax_8bit, absmax, absmax_code, 256, torch.float32)
        absmax = unshifted + absmax_offset  # both live until the product is made
    return _linear(x, _OPS.dequantize_4bit(packed, absmax, blocksize, quant_type, shape, x.dtype), bias)


def gemm_4bit_until_0_49(
    x, packed, shape, absmax, blocksize, quant_type, bias=None, absmax_8bit=None, absmax_code=None, absmax_offset=None
):
    """A product with a 4-bit weight, up to bitsandbytes 0.49.

    autograd/_functions.py of 0.49, ``matmul_4bit``: a product with a vector for one token without gradients, else the
    whole weight. A weight quantised from another type than the input's is not followed: that was one more copy.
    """
    if _tokens(x) == 1 and not x.requires_grad:
        return x.new_empty((*x.shape[:-1], shape[0]))
    if absmax_8bit is not None:
        absmax = _OPS.dequantize_blockwise(absmax_8bit, absmax, absmax_code, 256, torch.float32)
        absmax += absmax_offset
    return _linear(x, _OPS.dequantize_4bit(packed, absmax, blocksize, quant_type, shape, x.dtype), bias)


def _linear(x, weight, bias):
    """``linear`` in its parts: below autograd it would arrive at the recorder as one op."""
    rows = x.reshape(-1, x.shape[-1])
    product = rows.mm(weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())
    return product.view(*x.shape[:-1], weight.shape[0])


def assumed(kernel: Callable, args: tuple) -> str | None:
    """What ``kernel`` assumes of ``args`` that only the GPU or the data can say."""
    if kernel is gemm_4bit and _FUSED_UP_TO < _tokens(args[0]) <= _DEQUANTISED_BEYOND:
        return "bitsandbytes::gemm_4bit of 5 to 1,536 tokens (counted with the whole weight)"
    if kernel is _int8_vectorwise_quant and len(args) > 1 and args[1] > 0:
        return "outliers in bitsandbytes' 8-bit products (none assumed)"
    return None


def _tokens(x: torch.Tensor) -> int:
    return x.numel() // x.shape[-1]


def _int8_vectorwise_quant(x, threshold=0.0):
    """backends/cuda/ops.py, ``int8_vectorwise_quant``, where no value reaches the threshold."""
    stats = torch.empty(_tokens(x), dtype=torch.float32)
    quantised = torch.empty(x.shape, dtype=torch.int8)
    if threshold == 0:
        return quantised, stats, None
    _ = x.abs() >= threshold
    return quantised, stats, torch.empty(0, dtype=torch.int64)


def _int8_mm_dequant(x, row_stats, col_stats, dtype=None, bias=None):
    """backends/cuda/ops.py, ``int8_mm_dequant``: the kernel writes fp16, which is then cast."""
    return torch.empty(x.shape, dtype=torch.float16).to(dtype or torch.float16)


def _int8_scaled_mm(x, weight, row_stats, col_stats, bias=None, dtype=None):
    """backends/default/ops.py, ``int8_scaled_mm``."""
    return _OPS.int8_mm_dequant(_OPS.int8_linear_matmul(x, weight), row_stats, col_stats, dtype=dtype, bias=bias)


def _int8_mixed_scaled_mm(x, quantised, weight, row_stats, col_stats, outlier_cols=None, bias=None):
    """backends/default/ops.py, ``int8_mixed_scaled_mm``, without outliers."""
    outliers = torch.empty(0, dtype=x.dtype)
    return _OPS.int8_scaled_mm(quantised, weight, row_stats, col_stats, bias=bias, dtype=x.dtype), outliers


INT8 = {
    "bitsandbytes::int8_vectorwise_quant": _int8_vectorwise_quant,
    "bitsandbytes::int8_mm_dequant": _int8_mm_dequant,
    "bitsandbytes::int8_scaled_mm": _int8_scaled_mm,
    "bitsandbytes::int8_mixed_scaled_mm": _int8_mixed_scaled_mm,
}


def kernels(gemm: Callable) -> dict[str, Callable]:
    """The kernels by the name of their op; ``gemm`` is the one of the release to predict for."""
    return INT8 | {"bitsandbytes::gemm_4bit": gemm}


def layers_as_on_cuda() -> ExitStack:
    """A context in which bitsandbytes' layers take CUDA's ways for CPU tensors.

    nn/modules.py, ``Linear4bit.forward``, repacks weights for AVX-512; autograd/_functions.py, ``matmul``, has a
    function of its own for the CPU.
    """
    stack = ExitStack()
    if "bitsandbytes.nn.modules" in sys.modules:
        functions = sys.modules["bitsandbytes.autograd._functions"]
        stack.enter_context(patch("bitsandbytes.nn.modules.has_avx512bf16", lambda: False))
        stack.enter_context(patch.object(functions, "MatMul8bitFp", functions.MatMul8bitLt))
    return stack
