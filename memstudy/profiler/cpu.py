"""Memory that CPU kernels allocate internally: no dispatch mode sees it, so rules compute it.

Each rule follows PyTorch 2.13's source and names the file (below ``aten/src/ATen``). A rule needs only shapes and
types, and the number of threads where each thread has its own buffer. oneDNN's buffers depend on the processor: oneDNN
is asked for those of recurrent layers, of convolutions and of products in half precision, unless they are large.
"""

from __future__ import annotations

import functools
import itertools
import math
import weakref
from collections.abc import Callable, Sequence

import torch

from memstudy.profiler.internals import (
    OpOverload,
    OpOverloadPacket,
    _current_autograd_node,
    _disable_current_modes,
    _get_current_graph_task_keep_graph,
    tree_map_only,
)

_ATEN = torch.ops.aten
_COMPARISONS = (_ATEN.eq, _ATEN.ne, _ATEN.lt, _ATEN.le, _ATEN.gt, _ATEN.ge)
_BINARY = {
    *(_ATEN.add, _ATEN.sub, _ATEN.rsub, _ATEN.mul, _ATEN.div, _ATEN.maximum, _ATEN.minimum, *_COMPARISONS),
    *(_ATEN.add_, _ATEN.sub_, _ATEN.mul_, _ATEN.div_),
}
# Kernels of bitsandbytes for the CPU that are written in Python (backends/default/ops.py and backends/cpu/ops.py): what
# they allocate is seen. The others are written in C++ and allocate only their results.
IN_PYTHON = {
    "bitsandbytes::" + name
    for name in (
        "gemm_4bit", "quantize_4bit", "int8_vectorwise_quant", "int8_vectorwise_dequant", "int8_scaled_mm",
        "int8_mixed_scaled_mm", "int8_linear_matmul", "int8_mm_dequant", "optimizer_update_32bit",
        "optimizer_update_8bit_blockwise",
    )
}  # fmt: skip
_RECURRENT = {_ATEN.mkldnn_rnn_layer, _ATEN.mkldnn_rnn_layer_backward}
_PRODUCTS = {_ATEN.mm, _ATEN.addmm, _ATEN.bmm, _ATEN.baddbmm, _ATEN.linear}
_SUPPORTS = {
    torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
    torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
}
MOST_ASKED = 2**30  # multiplications of a product: some hundredths of a second
_QUOTIENTS = (_ATEN.div, _ATEN.div_)
# Ops whose second operand is saved for backward (tools/autograd/derivatives.yaml).
_SAVING = {_ATEN.mul, _ATEN.div, _ATEN.mul_, _ATEN.div_}


class BelowDispatch:
    """Follows the ops of a step and reports through ``tell`` the internal allocations of their kernels."""

    def __init__(self, tell: Callable[..., None]):
        self.unverified: set[str] = set()
        self._tell = tell
        self._blocks = itertools.count(-1, -1)  # no storage's key is negative
        self._saved: tuple[int, weakref.ref] | None = None

    def before(self, func: OpOverload) -> None:
        """To be called before ``func``: the previous op has its node in autograd's graph by now."""
        if self._saved is None or func.namespace == "prim":  # prim.device is called before the result has its node
            return
        saved = self._saved[1]()
        if func.is_view and saved is not None and saved._is_view():
            return  # autograd may be making the view's node anew, under a lock that asking for the node would wait for
        (block, result), self._saved = self._saved, None
        node = None if result() is None else result().grad_fn
        if node is None:
            self._tell("free", block=block)
        else:
            self._free_with(node, block)

    def after(self, func: OpOverload, args: Sequence, result: object) -> None:
        """To be called after ``func`` has returned and its results have been recorded."""
        inside, made = scratch(func, args, result), number(func, args)
        if _multiplications(func, args, result) > MOST_ASKED:
            self.unverified.add("oneDNN's buffers in large products (not counted)")
        if made:
            block = next(self._blocks)
            self._tell("alloc", block=block, size=made)
        if inside:
            self._tell("alloc", block=0, size=inside)
            self._tell("free", block=0)
        if made and saves_number(func, args):
            self._saved = block, weakref.ref(result)
        elif made:
            self._tell("free", block=block)

    def _free_with(self, node: torch.autograd.graph.Node, block: int) -> None:
        """Tell the release of ``block`` once ``node`` has been executed or dropped with its graph."""

        def executed(*gradients):
            if not _get_current_graph_task_keep_graph():
                released()

        released = weakref.finalize(executed, self._tell, "free", block=block)
        released.atexit = False
        node.register_hook(executed)


def corrected(func: OpOverload, args: Sequence, result: object) -> object:
    """The result of ``func`` as its real kernel gives it, where the fake kernel differs."""
    if func is _ATEN.native_layer_norm.default and args[2] is not None and args[2].dtype != args[0].dtype:
        # Mean and 1 / deviation are in the weight's type (native/cpu/mixed_data_type.h, ``param_scalar_type``).
        return result[0], *(statistic.to(args[2].dtype) for statistic in result[1:])
    if func is _ATEN.mkldnn_rnn_layer.default:
        return *result[:3], result[3].new_empty(_asked(func, args)[1])
    if func is _ATEN.mkldnn_rnn_layer_backward.default:  # a gradient for each of the two biases
        return *result[:4], torch.empty_like(result[3]), *result[5:]
    return result


def scratch(func: OpOverload, args: Sequence, result: object) -> int:
    """Most bytes that the kernel of ``func`` holds besides its results; freed before the kernel returns."""
    packet = func.overloadpacket
    if packet in _RECURRENT or 0 < _multiplications(func, args, result) <= MOST_ASKED:
        return _asked(func, args)[0]
    if packet in _BINARY:
        return _casts(packet, args, result)
    rule = _RULES.get(packet)
    copied = sum(_copy(args[position]) for position in _CONTIGUOUS.get(packet, ()))
    return copied + (rule(args, result) if rule else 0)


def _multiplications(func: OpOverload, args: Sequence, result: object) -> int:
    """How many multiplications oneDNN makes: native/mkldnn/Matmul.cpp, ``use_mkldnn_matmul``."""
    packet = func.overloadpacket
    if packet in _PRODUCTS and _SUPPORTS.get(args[-2].dtype, bool)():
        return result.numel() * args[-2].shape[-1]
    if packet is _ATEN.convolution:
        return result.numel() * math.prod(args[1].shape[1:])
    return args[0].numel() * math.prod(args[2].shape[1:]) if packet is _ATEN.convolution_backward else 0


def _asked(func: OpOverload, args: Sequence) -> tuple[int, int]:
    """Bytes that oneDNN holds besides the results of ``func``, and bytes of a recurrent layer's workspace.

    native/mkldnn/RNN.cpp, Conv.cpp and Matmul.cpp: workspace, packed weights and scratch are as large as oneDNN says.
    """
    described = tree_map_only(torch.Tensor, lambda tensor: (tensor.shape, tensor.stride(), tensor.dtype), args)
    hashable = tuple(tuple(arg) if isinstance(arg, list) else arg for arg in described)
    return _run_once(func.overloadpacket, hashable, torch.is_grad_enabled(), torch.get_num_threads())


@functools.cache
def _run_once(packet: OpOverloadPacket, described: tuple, *settings: int) -> tuple[int, int]:
    """Run on tensors without values; oneDNN's sizes depend on ``settings`` too."""
    with _disable_current_modes():
        args = [
            torch.empty_strided(*arg[:2], dtype=arg[2])
            if isinstance(arg, tuple) and torch.dtype in map(type, arg)
            else arg
            for arg in described
        ]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            result = packet(*args)
    events = profile.profiler.kineto_results.events()
    held = list(itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]"))
    workspace = packet is _ATEN.mkldnn_rnn_layer and result[3]
    return max(held, default=0) - sum(held[-1:]), workspace.numel() if torch.is_tensor(workspace) else 0


def number(func: OpOverload, args: Sequence) -> int:
    """Bytes of the 0-dim tensors made of the Python numbers among ``args`` for the duration of ``func``.

    A number becomes a 64-bit tensor where the kernel expects a tensor (torch/csrc/utils/python_arg_parser.cpp;
    native/BinaryOps.cpp, ``wrapped_scalar_tensor``). Autograd's own formulas use the saved tensor instead.
    """
    numbers = [arg for arg in args[:2] if isinstance(arg, (bool, int, float))]
    if func.overloadpacket not in _BINARY or not numbers:
        return 0
    node = None if torch.is_grad_enabled() else _current_autograd_node()
    if func._overloadname == "Tensor" and node is not None and node.name() in ("MulBackward0", "DivBackward0"):
        return 0
    return sum(1 if isinstance(given, bool) else 8 for given in numbers)


def saves_number(func: OpOverload, args: Sequence) -> bool:
    """Whether autograd keeps the tensor counted by :func:`number` until the backward of ``func``."""
    if func.overloadpacket not in _SAVING or func._overloadname == "Scalar":
        return False
    return torch.is_grad_enabled() and isinstance(args[0], torch.Tensor) and args[0].requires_grad


def _casts(packet, args: Sequence, result: torch.Tensor) -> int:
    """Copies to the common type: operands, and an in-place output, of another type (TensorIterator.cpp)."""
    left, right = args[:2]
    common = torch.result_type(left, right)
    if packet in _QUOTIENTS and not (common.is_floating_point or common.is_complex):
        common = torch.get_default_dtype()
    copied = sum(_numel(operand) for operand in (left, right) if _dtype(operand) != common)
    if result is left and result.dtype != common:
        copied += result.numel()
    return copied * common.itemsize


def _copy(tensor: torch.Tensor) -> int:
    """Bytes of a contiguous copy of ``tensor``; 0 when ``tensor`` is contiguous."""
    return 0 if tensor.is_contiguous() else tensor.numel() * tensor.dtype.itemsize


def _numel(operand: torch.Tensor | float) -> int:
    return operand.numel() if isinstance(operand, torch.Tensor) else 1


def _dtype(operand: torch.Tensor | float) -> torch.dtype:
    if isinstance(operand, torch.Tensor):
        return operand.dtype
    return torch.bool if isinstance(operand, bool) else torch.int64 if isinstance(operand, int) else torch.float64


def _foreach(args: Sequence, result: object) -> int:
    """The slow path: one tensor at a time, each with a number (native/ForeachOpsKernels.cpp)."""
    tensors, operand = args[:2]
    if not isinstance(operand, (bool, int, float)):
        return 0
    return max(8 + (0 if tensor.dtype == _dtype(operand) else tensor.dtype.itemsize) for tensor in tensors)


def _sum(args: Sequence, result: torch.Tensor) -> int:
    """A copy of the input in the output's type (native/ReduceOpsUtils.h, ``make_reduction``)."""
    return args[0].numel() * result.dtype.itemsize if args[0].dtype != result.dtype else 0


def _mean(args: Sequence, result: torch.Tensor) -> int:
    """A sum, then an in-place division by an integer (native/ReduceOps.cpp)."""
    return max(_sum(args, result), 8 + result.dtype.itemsize)


def _safe_softmax(args: Sequence, result: torch.Tensor) -> int:
    """Masks of the -inf elements and of the rows of only -inf, and a zero (native/transformers/attention.cpp)."""
    masked = result.numel()
    return masked + masked // result.shape[args[1]] + result.dtype.itemsize if masked else 0


def _logsumexp(args: Sequence, result: torch.Tensor) -> int:
    """The maxima and ``exp(x - maximum)`` (native/ReduceOps.cpp, ``logsumexp_out_impl``)."""
    return (args[0].numel() + result.numel()) * result.dtype.itemsize


def _sort(args: Sequence, result: Sequence[torch.Tensor]) -> int:
    """One row of indices (native/cpu/SortingKernel.cpp)."""
    values = result[0]
    return 8 * values.shape[-1] if values.dim() else 0


def _index(args: Sequence, result: torch.Tensor) -> int:
    """Indices of int32 as int64 (native/IndexingUtils.h, ``expandTensors``)."""
    return sum(8 * index.numel() for index in args[1] if index is not None and index.dtype is torch.int32)


def _layer_norm_backward(args: Sequence, result: Sequence[torch.Tensor]) -> int:
    """Each thread's sums for the gradients of weight and bias (native/cpu/layer_norm_kernel.cpp)."""
    if result[1] is None and result[2] is None:
        return 0
    return 2 * torch.get_num_threads() * math.prod(args[2]) * args[1].dtype.itemsize


def _flash_sizes(query: torch.Tensor, key: torch.Tensor) -> tuple[int, int, int]:
    """Queries and keys per block, and bytes per accumulated number (native/cpu/FlashAttentionKernel.cpp)."""
    queries, keys = query.shape[-2], key.shape[-2]
    rows = 256 if queries >= 768 else 64 if queries >= 192 else 32
    return min(rows, queries), min(512, keys), max(query.dtype.itemsize, torch.float32.itemsize)


def _flash_forward(args: Sequence, result: object) -> int:
    """Each thread's scores, row maxima, row sums and output, and a copy of the scores in a narrower input type."""
    query, key = args[:2]
    rows, columns, wide = _flash_sizes(query, key)
    narrow = query.dtype.itemsize if query.dtype.itemsize < wide else 0
    block = wide * (rows * columns + 2 * rows + rows * query.shape[-1]) + narrow * rows * columns
    return torch.get_num_threads() * block


def _flash_backward(args: Sequence, result: object) -> int:
    """Each thread's scores and score gradients in both types, one thread's row sums, and the transposed gradient.

    Every thread has row sums, but the profiler, and so `measure`, sees no allocation in the other threads.
    """
    gradient, query, key = args[:3]
    rows, columns, wide = _flash_sizes(query, key)
    narrow = query.dtype.itemsize if query.dtype.itemsize < wide else 0
    block = 2 * rows * columns * (wide + narrow)
    return _copy(gradient.transpose(1, 2)) + torch.get_num_threads() * block + wide * rows


# Positions of arguments first made contiguous (native/SoftMax.cpp, native/layer_norm.cpp, native/Embedding.cpp).
_CONTIGUOUS = {
    _ATEN._softmax: (0,),
    _ATEN._log_softmax: (0,),
    _ATEN._softmax_backward_data: (0, 1),
    _ATEN._log_softmax_backward_data: (0, 1),
    _ATEN.native_layer_norm: (0,),
    _ATEN.native_layer_norm_backward: (0, 1),
    _ATEN.embedding_dense_backward: (0,),
}
_RULES = {
    **dict.fromkeys((_ATEN._foreach_add_, _ATEN._foreach_sub_, _ATEN._foreach_mul_, _ATEN._foreach_div_), _foreach),
    _ATEN.sum: _sum,
    _ATEN.cumsum: _sum,
    _ATEN.mean: _mean,
    _ATEN._safe_softmax: _safe_softmax,
    _ATEN.logsumexp: _logsumexp,
    _ATEN.sort: _sort,
    _ATEN.index: _index,
    _ATEN.native_layer_norm_backward: _layer_norm_backward,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _flash_forward,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _flash_backward,
}
