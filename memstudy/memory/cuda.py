"""CUDA's semantics on fake CPU tensors: what a CUDA build of PyTorch would do where a CPU build does otherwise.

Each rule is a small function with its reason and its source (paths are PyTorch's, torch 2.13). A rule either stands in
for an op's dispatch (registered for the length of a prediction at the dispatch keys that a CPU tensor goes through, so
that it holds wherever the op is called from, recomputation in backward included) or says what a kernel allocates
besides its results (`scratch`). What no rule covers is predicted as its CPU kernel and named in the report as
unverified.
"""

from __future__ import annotations

import functools
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch._C import DispatchKey, DispatchKeySet, _ExcludeDispatchKeyGuard
from torch.library import _scoped_library, fallthrough_kernel

from memstudy.memory.catalogue import Gpu
from memstudy.memory.report import WORKSPACE

_ATEN = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)


@contextmanager
def semantics(gpu: Gpu) -> Iterator[None]:
    """Make CPU tensors behave as tensors on ``gpu`` do, as far as memory goes, within the block."""
    with ExitStack() as stack:
        library = stack.enter_context(_scoped_library("aten", "IMPL"))
        for key in ("AutogradCPU", "CPU"):
            library.impl("dropout", _dropout, key)
            library.impl("softmax.int", _softmax, key)
            library.impl("log_softmax.int", _log_softmax, key)
            library.impl("scaled_dot_product_attention", _attention_on(gpu), key)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once|.*Overriding a previously registered kernel")
            for name, kernel in _autocast().items():
                library.impl(name, kernel, "AutocastCPU", allow_override=True)
        for change in (_foreach_optimizers(), *_amp(), _offload(), _flash_attn()):
            stack.enter_context(change)
        yield


# --- kernels that CUDA has and the CPU has not


def _dropout(input, p, train):
    """One fused kernel with a mask of one byte an element; the CPU keeps a mask in the input's own dtype.

    aten/src/ATen/native/Dropout.cpp, ``is_fused_kernel_acceptable``.
    """
    if not train or p == 0 or input.numel() == 0:
        return input
    if p == 1:
        return input * torch.zeros((), dtype=input.dtype)
    return _ATEN.native_dropout(input, p, train)[0]


def _softmax(self, dim, dtype=None):
    """Reads fp16 and writes fp32 at once; from bf16 it makes a copy in fp32 first, as the CPU does from both.

    aten/src/ATen/native/SoftMax.cpp, ``softmax``.
    """
    if self.dtype is torch.float16 and dtype is torch.float32:
        return _ATEN._softmax(self, dim, True)
    return _ATEN._softmax(self if dtype is None else self.to(dtype), dim, False)


def _log_softmax(self, dim, dtype=None):
    """As `_softmax`; ibidem, ``log_softmax``."""
    if self.dtype is torch.float16 and dtype is torch.float32:
        return _ATEN._log_softmax(self, dim, True)
    return _ATEN._log_softmax(self if dtype is None else self.to(dtype), dim, False)


# --- scaled_dot_product_attention


def _attention_on(gpu: Gpu) -> Callable:
    """``scaled_dot_product_attention`` as CUDA carries it out on ``gpu``.

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
    """Hopper and Blackwell of the data centre, with the cuDNN (above 9.15) of the CUDA 13 wheels.

    aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, ``check_prefer_cudnn_attention`` and
    ``can_use_cudnn_attention``. What cuDNN itself takes is not known, so the op counts as unverified.
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

    Not with grouped queries, which came with torch 2.14.
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
def _flash_attn() -> Iterator[None]:
    """The flash_attn package's function, which keeps and takes what PyTorch's copy of the same kernel does.

    flash_attn/flash_attn_interface.py, ``FlashAttnFunc``; tensors are (batch, seq, heads, head_dim). A window changes
    which scores are computed, and no size.
    """

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, **others):
        heads_first = (tensor.transpose(1, 2) for tensor in (q, k, v))
        output = _ATEN._scaled_dot_product_flash_attention(*heads_first, dropout_p, causal, False, scale=softmax_scale)
        return output[0].transpose(1, 2)

    stand_in = types.ModuleType("flash_attn")
    stand_in.flash_attn_func = flash_attn_func
    # Not by patch.dict, which would also forget what is imported meanwhile.
    installed = sys.modules.get("flash_attn")
    sys.modules["flash_attn"] = stand_in
    try:
        yield
    finally:
        del sys.modules["flash_attn"]
        if installed is not None:
            sys.modules["flash_attn"] = installed


# --- autocast

_FP32 = (
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "sinh",
    "tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus", "layer_norm", "native_layer_norm",
    "rms_norm", "group_norm", "frobenius_norm.dim", "nuclear_norm", "nuclear_norm.dim", "cosine_similarity", "dist",
    "pdist", "renorm", "logsumexp",
)  # fmt: skip
_FP32_RESULT = (
    "softmax.int", "log_softmax.int", "cumprod", "cumsum", "linalg_vector_norm", "sum", "sum.dim_IntList",
)  # fmt: skip
_ON_CPU_ONLY = ("cross_entropy_loss", "cat", "stack", "index_copy", "avg_pool3d", "prod", "prod.dim_int", "trace")


def _autocast() -> dict[str, Callable]:
    """AutocastCUDA's policies where AutocastCPU's differ; both use the same cache of cast weights.

    aten/src/ATen/autocast_mode.h, ``AT_FORALL_FP32`` and ``AT_FORALL_FP32_SET_OPT_DTYPE``, less what is in both lists.
    What is cast to the lower precision is the same for the ops of Transformers.
    """
    kernels = {name: _in_fp32(_overload(name)) for name in _FP32}
    kernels |= {name: _to_fp32(_overload(name)) for name in _FP32_RESULT}
    return kernels | dict.fromkeys(_ON_CPU_ONLY, fallthrough_kernel)


def _overload(name: str):
    packet, _, overload = name.partition(".")
    return getattr(getattr(_ATEN, packet), overload or "default")


_below_autocast = DispatchKeySet(DispatchKey.AutocastCPU)


def _in_fp32(op) -> Callable:
    """Policy ``fp32``: every argument in lower precision is copied to fp32."""

    def kernel(*args, **kwargs):
        with _ExcludeDispatchKeyGuard(_below_autocast):
            args, kwargs = torch.utils._pytree.tree_map_only(
                torch.Tensor, lambda t: t.float() if t.dtype in _HALF else t, (args, kwargs)
            )
            return op(*args, **kwargs)

    return kernel


def _to_fp32(op) -> Callable:
    """Policy ``fp32_set_opt_dtype``: the op is asked for an fp32 result of what is in lower precision."""
    place = [argument.name for argument in op._schema.arguments].index("dtype")
    positional = not op._schema.arguments[place].kwarg_only

    def kernel(*args, **kwargs):
        given = args[place] if positional and len(args) > place else kwargs.get("dtype")
        if given is None and args[0].dtype in _HALF:
            args, kwargs = args[:place], kwargs | {"dtype": torch.float32}
        with _ExcludeDispatchKeyGuard(_below_autocast):
            return op(*args, **kwargs)

    return kernel


# --- optimizers, mixed precision, offload


def _foreach_optimizers():
    """Optimizers take their multi-tensor form by default on CUDA, which holds one more copy of all parameters.

    torch/optim/optimizer.py, ``_default_to_fused_or_foreach``.
    """
    return patch("torch.optim.optimizer._get_foreach_kernels_supported_devices", lambda: ["cpu"])


def _amp() -> list:
    """``torch.autocast("cuda")`` and ``torch.amp.GradScaler("cuda")`` work, on the tensors that stand for CUDA's.

    No loss is infinite: the scaler always lets the optimizer step.
    """
    autocast, scaler = torch.autocast.__init__, torch.amp.GradScaler.__init__

    def enter(self, device_type, dtype=None, *args, **kwargs):
        if device_type == "cuda":  # whose default is fp16
            device_type, dtype = "cpu", torch.float16 if dtype is None else dtype
        autocast(self, device_type, dtype, *args, **kwargs)

    def scale(self, device="cuda", *args, **kwargs):
        scaler(self, "cpu", *args, **kwargs)

    def step(self, optimizer, optimizer_state, *args, **kwargs):
        return optimizer.step(*args, **kwargs)

    return [
        patch.object(torch.autocast, "__init__", enter),
        patch.object(torch.amp.GradScaler, "__init__", scale),
        patch.object(torch.amp.GradScaler, "_maybe_opt_step", step),
    ]


def _offload():
    """What is saved goes to the host's memory, and comes back into new memory of the GPU.

    torch/autograd/graph.py, ``save_on_cpu``.
    """

    def on_cpu(self, pin_memory=False, device_type="cuda"):
        def pack(tensor):
            return tensor.shape, tensor.stride(), tensor.dtype

        def unpack(packed):
            shape, stride, dtype = packed
            return torch.empty_strided(shape, stride, dtype=dtype)

        torch.autograd.graph.saved_tensors_hooks.__init__(self, pack, unpack)

    return patch.object(torch.autograd.graph.save_on_cpu, "__init__", on_cpu)


# --- what kernels allocate besides their results


class BelowDispatch:
    """Tells by ``tell`` what the kernels of a step's ops allocate and release unseen.

    Attributes
    ----------
    unverified : set of str
        Names of ops that no rule covers.
    """

    def __init__(self, tell: Callable[..., None], gpu: Gpu):
        self.unverified: set[str] = set()
        self._tell, self._gpu = tell, gpu
        self._multiplied: set[bool] = set()

    def before(self, func: torch._ops.OpOverload) -> None:
        """``func`` is called."""

    def after(self, func: torch._ops.OpOverload, args: tuple, result: object) -> None:
        """``func`` has returned, and its results have been told."""
        if not is_verified(func):
            self.unverified.add(func._schema.name)
        in_backward = torch._C._current_autograd_node() is not None  # autograd has a thread of its own for the GPU
        if func.overloadpacket in PRODUCTS and in_backward not in self._multiplied:
            self._multiplied.add(in_backward)
            block = -len(self._multiplied)  # no storage's key is negative
            self._tell("alloc", block=block, size=workspace_bytes(self._gpu), label=WORKSPACE)
        sizes = scratch(func, args, result)
        for number, size in enumerate(sizes):
            self._tell("alloc", block=-10 - number, size=size)
        for number in range(len(sizes)):
            self._tell("free", block=-10 - number)


PRODUCTS = {_ATEN.mm, _ATEN.addmm, _ATEN.bmm, _ATEN.baddbmm, _ATEN.addbmm, _ATEN.addmv, _ATEN.mv, _ATEN.dot}


def workspace_bytes(gpu: Gpu) -> int:
    """cuBLAS's workspace, one for each thread that multiplies and kept for good; cuBLASLt's is the same memory.

    aten/src/ATen/cuda/CublasHandlePool.cpp, ``parseChosenWorkspaceSize``: ":4096:2:16:8", and 32 MiB on Hopper and
    Blackwell.
    """
    return 32 * 2**20 if gpu.compute_capability[0] in (9, 10, 12) else 2 * 4096 * 1024 + 8 * 16 * 1024


def scratch(func, args: tuple, result: object) -> list[int]:
    """What the kernel of ``func`` allocates and gives back before it ends [bytes each]."""
    rule = _SCRATCH.get(func.overloadpacket)
    return rule(args, result) if rule else []


def _in_rows(grad: torch.Tensor) -> list[int]:
    """A copy of a gradient that does not lie as (batch, row, head, width).

    aten/src/ATen/native/transformers/cuda/attention_backward.cu, ``contiguous`` in both backward functions.
    """
    return [] if grad.transpose(1, 2).is_contiguous() else [grad.numel() * grad.element_size()]


def _flash_backward(args, result) -> list[int]:
    """aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp, ``mha_bwd``.

    The rowsum of gradient times output, and the gradient of the queries in fp32, both over rounded shapes; with
    grouped queries the gradients of keys and values for every query head.
    """
    query, key = args[1], args[2]
    batch, heads, query_len, head_dim = query.shape
    rounded = -(-query_len // 128) * 128
    width = -(-head_dim // 32) * 32 if head_dim <= 128 else -(-head_dim // 64) * 64
    sizes = [*_in_rows(args[0]), 4 * batch * heads * rounded, 4 * batch * rounded * heads * width]
    if key.shape[1] != heads:
        sizes += [query.element_size() * batch * key.shape[2] * heads * head_dim] * 2
    return sizes


def _efficient_forward(args, result) -> list[int]:
    """aten/src/ATen/native/transformers/cuda/attention.cu: wide results in half precision are summed up in fp32."""
    query, value = args[0], args[2]
    width = value.shape[-1]
    return [4 * query[..., 0].numel() * width] if query.dtype in _HALF and width > 128 else []


def _efficient_backward(args, result) -> list[int]:
    """aten/src/ATen/native/transformers/cuda/attention_backward.cu and mem_eff_attention/kernel_backward.h.

    The rowsum of gradient times output, and the kernel's workspace: the gradient of the queries in fp32, in tiles with
    a header each. (In fp32 the rowsum is made of ordinary ops, whose products are gone when the workspace comes.)
    Not what the gradients of keys and values are staged in, in half precision beyond 128 columns or where shared memory
    is small: some MiB at most, unless there are hundreds of heads times batch.
    """
    query = args[1]
    batch, heads, query_len, head_dim = query.shape
    rows = 64 if head_dim <= 64 else 128
    tiles = -(-query_len // rows) * -(-head_dim // 64)  # some kernels have one of 128 columns, and a header less
    workspace = batch * heads * tiles * (16 + 4 * rows * 64)
    return [*_in_rows(args[0]), 4 * batch * heads * query_len, workspace]


def _embedding_backward(args, result) -> list[int]:
    """aten/src/ATen/native/cuda/Embedding.cu and EmbeddingBackwardKernel.cu.

    Beyond 3,072 tokens they are sorted, and each run of ten of the same token has a partial gradient in fp32; as many
    are allocated as there could be.
    """
    grad, indices, rows = args[:3]
    tokens, width = indices.numel(), grad.shape[-1]
    if tokens <= 3072:
        return []
    segments = min(tokens, rows)
    partial = tokens // 10 + segments
    return [8 * tokens] * 3 + [8 * segments] * 2 + [8 * partial, 4 * partial * width]


def _index_put(args, result) -> list[int]:
    """aten/src/ATen/native/cuda/Indexing.cu, ``index_put_with_sort_kernel``: adding sorts the indices, in int64."""
    accumulates = len(args) > 3 and args[3]
    indices = max((8 * index.numel() for index in args[1] if index is not None), default=0)
    return [indices] * 6 if accumulates else []


def _foreach_norm(args, result) -> list[int]:
    """aten/src/ATen/native/cuda/ForeachReduceOp.cu: a partial norm for every 65,536 elements of the largest tensor."""
    chunks = max(-(-tensor.numel() // 65536) for tensor in args[0])
    return [4 * len(args[0]) * chunks]


_SCRATCH: dict[object, Callable[[tuple, object], list[int]]] = {
    _ATEN._scaled_dot_product_flash_attention_backward: _flash_backward,
    _ATEN._scaled_dot_product_efficient_attention: _efficient_forward,
    _ATEN._scaled_dot_product_efficient_attention_backward: _efficient_backward,
    _ATEN.embedding_dense_backward: _embedding_backward,
    _ATEN.index_put: _index_put,
    _ATEN.index_put_: _index_put,
    _ATEN._index_put_impl_: _index_put,
    _ATEN._foreach_norm: _foreach_norm,
}


def corrected(func: torch._ops.OpOverload, args: tuple, result: object) -> object:
    """What the kernel of ``func`` gives, where its fake one gives something else."""
    if func is _ATEN.native_layer_norm.default:
        # aten/src/ATen/native/cuda/layer_norm_kernel.cu: mean and rstd are fp32 at least, on the CPU as the input.
        output, *moments = result
        return output, *(moment.float() if moment.dtype in _HALF else moment for moment in moments)
    return result


# --- what is known to be the same on both

# Compared with CUDA's own dispatch, byte by byte (benchmarks/cuda_oracle), or with what GPUs were seen to allocate
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
    # Results only, whatever the device.
    "addmm_", "amax", "dot", "empty_like", "empty_strided", "index_add_", "index_select", "linspace", "new_empty",
    "promote_types", "softmax", "where",
}  # fmt: skip


@functools.cache
def is_verified(func) -> bool:
    """Whether ``func`` is known to allocate on CUDA what it does here, with the rules above."""
    namespace, _, name = func._schema.name.partition("::")
    return namespace in ("prim", "profiler") or func.is_view or torch.Tag.pointwise in func.tags or name in _VERIFIED
