"""AutocastCUDA's policies that differ from AutocastCPU's (paths are PyTorch's)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.library import fallthrough_kernel

from memstudy.profiler.internals import DispatchKey, DispatchKeySet, _ExcludeDispatchKeyGuard, tree_map_only

_ATEN = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)

FP32 = (
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "sinh",
    "tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus", "layer_norm", "native_layer_norm",
    "rms_norm", "group_norm", "frobenius_norm.dim", "nuclear_norm", "nuclear_norm.dim", "cosine_similarity", "dist",
    "pdist", "renorm", "logsumexp",
)  # fmt: skip
_FP32_RESULT = (
    "softmax.int", "log_softmax.int", "cumprod", "cumsum", "linalg_vector_norm", "sum", "sum.dim_IntList",
)  # fmt: skip
_ON_CPU_ONLY = ("cross_entropy_loss", "cat", "stack", "index_copy", "avg_pool3d", "prod", "prod.dim_int", "trace")


def kernels(fp32: Sequence[str]) -> dict[str, Callable]:
    """Kernels for AutocastCUDA's policies that differ from AutocastCPU's, by op; both share the cache of cast weights.

    aten/src/ATen/autocast_mode.h, ``AT_FORALL_FP32`` and ``AT_FORALL_FP32_SET_OPT_DTYPE``, less ops in both devices'
    lists. For the ops of Transformers, the lists of casts to the lower precision agree.
    """
    made = {name: _in_fp32(_overload(name)) for name in fp32}
    made |= {name: _to_fp32(_overload(name)) for name in _FP32_RESULT}
    return made | dict.fromkeys(_ON_CPU_ONLY, fallthrough_kernel)


def _overload(name: str):
    packet, _, overload = name.partition(".")
    return getattr(getattr(_ATEN, packet), overload or "default")


_below_autocast = DispatchKeySet(DispatchKey.AutocastCPU)


def _in_fp32(op) -> Callable:
    """Policy ``fp32``: every argument in lower precision is copied to fp32."""

    def kernel(*args, **kwargs):
        with _ExcludeDispatchKeyGuard(_below_autocast):
            args, kwargs = tree_map_only(torch.Tensor, lambda t: t.float() if t.dtype in _HALF else t, (args, kwargs))
            return op(*args, **kwargs)

    return kernel


def _to_fp32(op) -> Callable:
    """Policy ``fp32_set_opt_dtype``: an input in lower precision gets an fp32 result."""
    place = [argument.name for argument in op._schema.arguments].index("dtype")
    positional = not op._schema.arguments[place].kwarg_only

    def kernel(*args, **kwargs):
        given = args[place] if positional and len(args) > place else kwargs.get("dtype")
        if given is None and args[0].dtype in _HALF:
            args, kwargs = args[:place], kwargs | {"dtype": torch.float32}
        with _ExcludeDispatchKeyGuard(_below_autocast):
            return op(*args, **kwargs)

    return kernel
