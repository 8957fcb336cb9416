"""What CUDA's kernels allocate besides their results (paths are PyTorch's)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from memstudy.profiler.catalogue import Gpu
from memstudy.profiler.cuda.verified import is_verified
from memstudy.profiler.events import WORKSPACE

_ATEN = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)


class BelowDispatch:
    """Tells by ``tell`` what the kernels of a step's ops allocate and release unseen.

    Attributes
    ----------
    unverified : set of str
        Names of ops that no rule covers.
    """

    def __init__(self, tell: Callable[..., None], workspace: int):
        self.unverified: set[str] = set()
        self._tell, self._workspace = tell, workspace
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
            self._tell("alloc", block=block, size=self._workspace, label=WORKSPACE)
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
