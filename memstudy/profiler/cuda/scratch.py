"""Memory that CUDA's kernels allocate besides their results (paths are PyTorch's)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from memstudy.profiler.catalogue import Gpu
from memstudy.profiler.cuda.verified import is_verified
from memstudy.profiler.events import WORKSPACE
from memstudy.profiler.internals import OpOverload, _current_autograd_node

_ATEN = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)


class BelowDispatch:
    """Reports through ``tell`` the internal allocations of the kernels of a step's ops.

    Attributes
    ----------
    unverified : set of str
        Names of ops that no rule covers.
    """

    def __init__(self, tell: Callable[..., None], workspace: int):
        self.unverified: set[str] = set()
        self._tell, self._workspace = tell, workspace
        self._multiplied: set[bool] = set()

    def before(self, func: OpOverload) -> None:
        """To be called before ``func``; does nothing on CUDA."""

    def after(self, func: OpOverload, args: tuple, result: object) -> None:
        """To be called after ``func`` has returned and its results have been recorded."""
        if not is_verified(func):
            self.unverified.add(func._schema.name)
        in_backward = _current_autograd_node() is not None  # autograd has a thread of its own for the GPU
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
    """Size of cuBLAS's workspace, one per multiplying thread and never freed; cuBLASLt uses it too.

    aten/src/ATen/cuda/CublasHandlePool.cpp, ``parseChosenWorkspaceSize``: ":4096:2:16:8", and 32 MiB on Hopper and
    Blackwell.
    """
    return 32 * 2**20 if gpu.compute_capability[0] in (9, 10, 12) else 2 * 4096 * 1024 + 8 * 16 * 1024


def scratch(func, args: tuple, result: object) -> list[int]:
    """Sizes of the blocks that the kernel of ``func`` allocates and frees before it returns [bytes]."""
    rule = _SCRATCH.get(func.overloadpacket)
    return rule(args, result) if rule else []


def _in_rows(grad: torch.Tensor) -> list[int]:
    """A copy of a gradient that is not contiguous as (batch, seq, heads, head_dim).

    aten/src/ATen/native/transformers/cuda/attention_backward.cu, ``contiguous`` in both backward functions.
    """
    return [] if grad.transpose(1, 2).is_contiguous() else [grad.numel() * grad.element_size()]


def _flash_backward(args, result) -> list[int]:
    """aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp, ``mha_bwd``.

    The row sums of gradient times output, and the queries' gradient in fp32, both in rounded shapes; with grouped
    queries also the gradients of keys and values for every query head.
    """
    query, key = args[1], args[2]
    batch, heads, query_len, head_dim = query.shape
    rounded = -(-query_len // 128) * 128
    width = -(-head_dim // 32) * 32 if head_dim <= 128 else -(-head_dim // 64) * 64
    sizes = [*_in_rows(args[0]), 4 * batch * heads * rounded, 4 * batch * rounded * heads * width]
    if key.shape[1] != heads:
        sizes += [query.element_size() * batch * key.shape[2] * heads * head_dim] * 2
    return sizes


def _varlen_backward(args, result) -> list[int]:
    """As `_flash_backward`, of joined sequences: ``mha_varlen_bwd`` has 128 rows more for each sequence."""
    query, key, first = args[1], args[2], args[6]
    total, heads, head_dim = query.shape
    rows = total + 128 * (first.numel() - 1)
    width = -(-head_dim // 32) * 32 if head_dim <= 128 else -(-head_dim // 64) * 64
    sizes = [4 * heads * rows, 4 * rows * heads * width]
    if key.shape[1] != heads:
        sizes += [query.element_size() * key.shape[0] * heads * head_dim] * 2
    return sizes


def _efficient_forward(args, result) -> list[int]:
    """aten/src/ATen/native/transformers/cuda/attention.cu: fp32 sums of wide results in half precision."""
    query, value = args[0], args[2]
    width = value.shape[-1]
    return [4 * query[..., 0].numel() * width] if query.dtype in _HALF and width > 128 else []


def _efficient_backward(args, result) -> list[int]:
    """aten/src/ATen/native/transformers/cuda/attention_backward.cu and mem_eff_attention/kernel_backward.h.

    The row sums of gradient times output, and the kernel's workspace: the queries' gradient in fp32, in tiles with a
    header each. (In fp32, ordinary ops make the row sums and free their products before the workspace is allocated.)
    Not counted are the staging buffers for the gradients of keys and values, in half precision beyond 128 columns or
    where shared memory is small: some MiB at most, unless batch times heads is in the hundreds.
    """
    query = args[1]
    batch, heads, query_len, head_dim = query.shape
    rows = 64 if head_dim <= 64 else 128
    tiles = -(-query_len // rows) * -(-head_dim // 64)  # some kernels have one tile of 128 columns, so one header less
    workspace = batch * heads * tiles * (16 + 4 * rows * 64)
    return [*_in_rows(args[0]), 4 * batch * heads * query_len, workspace]


def _embedding_backward(args, result) -> list[int]:
    """aten/src/ATen/native/cuda/Embedding.cu and EmbeddingBackwardKernel.cu.

    More than 3,072 tokens are sorted, and each run of ten equal tokens has a partial gradient in fp32; memory is
    allocated for the most runs possible.
    """
    grad, indices, rows = args[:3]
    tokens, width = indices.numel(), grad.shape[-1]
    if tokens <= 3072:
        return []
    segments = min(tokens, rows)
    partial = tokens // 10 + segments
    return [8 * tokens] * 3 + [8 * segments] * 2 + [8 * partial, 4 * partial * width]


def _index_put(args, result) -> list[int]:
    """aten/src/ATen/native/cuda/Indexing.cu, ``index_put_with_sort_kernel``: adding sorts the indices as int64."""
    accumulates = len(args) > 3 and args[3]
    indices = max((8 * index.numel() for index in args[1] if index is not None), default=0)
    return [indices] * 6 if accumulates else []


def _foreach_norm(args, result) -> list[int]:
    """aten/src/ATen/native/cuda/ForeachReduceOp.cu: a partial norm for every 65,536 elements of the largest tensor."""
    chunks = max(-(-tensor.numel() // 65536) for tensor in args[0])
    return [4 * len(args[0]) * chunks]


_SCRATCH: dict[object, Callable[[tuple, object], list[int]]] = {
    _ATEN._scaled_dot_product_flash_attention_backward: _flash_backward,
    _ATEN._flash_attention_backward: _varlen_backward,
    _ATEN._scaled_dot_product_efficient_attention: _efficient_forward,
    _ATEN._scaled_dot_product_efficient_attention_backward: _efficient_backward,
    _ATEN.embedding_dense_backward: _embedding_backward,
    _ATEN.index_put: _index_put,
    _ATEN.index_put_: _index_put,
    _ATEN._index_put_impl_: _index_put,
    _ATEN._foreach_norm: _foreach_norm,
}
