"""What an op asks of a GPU: kernels, bytes to move, arithmetic. Paths are PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil, log2, prod

import torch

from memstudy.profiler.internals import OpOverload
from memstudy.profiler.results import tensors

_ATEN = torch.ops.aten
KINDS = ("products", "attention", "elementwise and norms", "optimizer", "transfers", "host waits")


@dataclass(frozen=True)
class Work:
    """What one op asks of the GPU.

    Attributes
    ----------
    kind : str
        One of `KINDS`; the optimizer's ops are those of its phase, whatever their kind.
    kernels : int
        How many kernels it launches; 0 for a view, which only the host handles.
    moved_bytes : int
        Bytes read and written, by a kernel that finds nothing in a cache.
    flops : int
        Floating-point operations of an attention kernel.
    product : tuple of int
        Batch, rows, columns and inner size of a product, or empty.
    arithmetic : str
        What is multiplied: ``fp16``, ``bf16``, ``tf32``, which tensor cores take if the GPU has them, or ``fp32``.
    attention : str
        An attention kernel's constant in ``constants.yaml``, or empty.
    unvectorised : int
        Bytes of the smallest element, where the kernel loads elements one by one; otherwise 0.
    name : str
        The op, as PyTorch names it.
    """

    kind: str
    kernels: int = 1
    moved_bytes: int = 0
    flops: int = 0
    product: tuple[int, ...] = ()
    arithmetic: str = "fp32"
    attention: str = ""
    unvectorised: int = 0
    name: str = ""


VIEW = Work("elementwise and norms", kernels=0)
WAIT = Work("host waits", kernels=0)


def work_of(func: OpOverload, args: tuple, kwargs: dict, result: object) -> Work:
    """The work of ``func`` on fake tensors; an op that no rule covers reads its arguments and writes its results."""
    packet = func.overloadpacket
    if packet in _WAITS:
        return replace(WAIT, kernels=2, moved_bytes=size_of(args[0]))
    made = tuple(tensors(result if isinstance(result, (tuple, list)) else (result,)))
    if func.is_view or packet in _NOTHING or (not made and not func._schema.is_mutable):
        return VIEW
    given = [tensor for tensor in tensors((*args, *kwargs.values())) if tensor.layout is torch.strided]
    made = tuple(tensor for tensor in made if tensor.layout is torch.strided)
    arguments = func._schema.arguments
    named = {argument.name: value for argument, value in zip(arguments, args, strict=False)} | kwargs
    everything = sum(map(size_of, (*given, *made)))
    if rule := _PRODUCTS.get(packet):
        return Work("products", 1, everything, product=rule(args, made), arithmetic=_unit(made[0].dtype))
    if packet in _ATTENTION:
        constant, kernels = _ATTENTION[packet]
        query, key = args[1:3] if kernels > 1 else args[:2]  # in backward, the gradient comes first
        flops = (10 if kernels > 1 else 4) * query.numel() * key.shape[-2] // (2 if named.get("is_causal") else 1)
        return Work("attention", kernels, everything, flops, arithmetic=_unit(query.dtype), attention=constant)
    own = {tensor.untyped_storage()._cdata for tensor in given}
    new = [tensor for tensor in made if tensor.untyped_storage()._cdata not in own]
    if not new and not func._schema.is_mutable:
        return VIEW  # a reshape that needed no copy
    read, written, largest = 0, sum(map(size_of, new)), max(map(size_of, new), default=0)
    for argument in arguments:
        size = sum(map(size_of, tensors((named.get(argument.name),))))
        # The fused optimizers' schemas call gradients written; the kernels read them.
        writes = argument.alias_info is not None and argument.alias_info.is_write and argument.name != "grads"
        written += size if writes else 0
        read += 0 if packet in _READS_LITTLE or argument.is_out or (writes and packet in _OVERWRITES) else size
    if packet in _READS_RESULT:  # only the rows that are asked for are read
        read = largest + sum(size_of(tensor) for tensor in given if not tensor.is_floating_point())
    if packet in _PUTS:  # only the elements that are given are written
        read, written = 2 * sum(map(size_of, given[1:])), 0
    *passes, kernels = _PASSES.get(packet, (0, 0, 0, 1))
    moved = read + written + int(passes[_row(given[0])] * size_of(given[0]) if given else 0)
    if func._schema.name.startswith("aten::_fft"):  # a pass for each dimension: 4,096 elements fit in shared memory
        kernels = sum(max(1, ceil(log2(given[0].shape[dim]) / 12)) for dim in args[1])
        moved *= kernels
    kernels = ceil(_EACH_COLUMN[packet] * given[0].shape[-1]) if packet in _EACH_COLUMN else kernels
    if func._schema.name.startswith(_MULTI_TENSOR):
        kernels = _launches([value for value in args if isinstance(value, (list, tuple)) and [*tensors(value)]])
    return Work("elementwise and norms", kernels, moved, unvectorised=_element(func, given, made))


def _element(func: OpOverload, given: list[torch.Tensor], made: tuple[torch.Tensor, ...]) -> int:
    """Bytes of the smallest element, if the op is elementwise and its tensors differ in layout or type; otherwise 0.

    aten/src/ATen/native/cuda/CUDALoops.cuh: only contiguous tensors of one type are loaded as vectors.
    """
    whole = [tensor for tensor in (*given, *made) if tensor.dim()]
    if func.overloadpacket in _COPIES:  # also vectorised between types, and where shapes differ
        alike = func.overloadpacket is _ATEN.cat or len({t.stride() for t in whole}) == 1
    elif torch.Tag.pointwise in func.tags or func.overloadpacket is _ATEN.native_dropout_backward:
        # A mask of bool is loaded as what it is; other types are cast to one.
        types = {t.dtype for t in whole} - {torch.bool}
        alike = len(types) <= 1 and len({(t.shape, t.stride()) for t in whole}) == 1
    else:
        return 0
    dense = (t.numel() == 1 + sum((n - 1) * by for n, by in zip(t.shape, t.stride(), strict=True)) for t in whole)
    return 0 if alike and all(dense) else min((t.element_size() for t in whole), default=0)


def _row(tensor: torch.Tensor) -> int:
    """0 for rows of up to 1,024 elements, 1 for rows of up to 64 KiB, 2 for longer ones."""
    elements = tensor.shape[-1] if tensor.dim() else 1
    return (elements > 1024) + (elements * tensor.element_size() > 65536)


def is_untimed(func: OpOverload) -> bool:
    """Whether the time of ``func`` is not that of its bytes, and no rule knows another."""
    timed = {*_EACH_COLUMN, *_WAITS, _ATEN.linalg_vector_norm}
    return func._schema.name.startswith(_UNTIMED) and func.overloadpacket not in timed


def _launches(lists: list) -> int:
    """Kernels of a multi-tensor op: aten/src/ATen/native/cuda/MultiTensorApply.cuh, ``depth_to_max_tensors``.

    A launch takes so many tensors, and 320 chunks of 65,536 elements.
    """
    tensors_in_launch = {1: 110, 2: 64, 3: 48, 4: 36}.get(len(lists), 30)
    chunks = sum(-(-tensor.numel() // 65_536) for tensor in lists[0])
    return max(1, -(-len(lists[0]) // tensors_in_launch), -(-chunks // 320))


def size_of(tensor: torch.Tensor) -> int:
    """Bytes of ``tensor``, where an expanded dimension counts once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return prod(sizes) * tensor.element_size() if tensor.layout is torch.strided else 0


def _unit(dtype: torch.dtype) -> str:
    wide = "tf32" if torch.get_float32_matmul_precision() != "highest" else "fp32"
    return {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(dtype, wide)


def _rows(args: tuple, made: tuple) -> tuple[int, ...]:
    """Sizes of a product whose last two arguments among the tensors are its factors."""
    left, right = [value for value in args if isinstance(value, torch.Tensor)][-2:]
    rows, columns = left.shape[-2] if left.dim() > 1 else 1, right.shape[-1] if right.dim() > 1 else 1
    return prod(left.shape[:-2]), rows, columns, left.shape[-1]


def _linear(args: tuple, made: tuple) -> tuple[int, ...]:
    """``linear`` as inference mode leaves it whole."""
    return 1, args[0].numel() // args[0].shape[-1], args[1].shape[0], args[1].shape[-1]


def _grouped(args: tuple, made: tuple) -> tuple[int, ...]:
    """A product for each expert, with its even share of the tokens."""
    left, right = args[:2]
    experts = right.shape[0] if right.dim() == 3 else made[0].shape[0]
    if left.dim() == right.dim() == 2:
        return experts, left.shape[0], right.shape[1], left.shape[1] // experts
    return experts, left.shape[0] // experts if left.dim() == 2 else left.shape[1], right.shape[-1], left.shape[-1]


def _convolution(args: tuple, made: tuple) -> tuple[int, ...]:
    """A convolution as the product that an implicit GEMM takes."""
    weight = args[1]
    return 1, made[0].numel() // made[0].shape[1], weight.shape[0], weight[0].numel()


def _convolution_backward(args: tuple, made: tuple) -> tuple[int, ...]:
    grad, _, weight = args[:3]
    return sum(args[-1][:2]), grad.numel() // grad.shape[1], weight.shape[0], weight[0].numel()


_PRODUCTS: dict[object, Callable[[tuple, tuple], tuple[int, ...]]] = {
    **dict.fromkeys((_ATEN.mm, _ATEN.addmm, _ATEN.bmm, _ATEN.baddbmm, _ATEN.mv, _ATEN.addmv, _ATEN.dot), _rows),
    _ATEN.linear: _linear,
    _ATEN._grouped_mm: _grouped,
    _ATEN.convolution: _convolution,
    _ATEN.convolution_backward: _convolution_backward,
}
# The constant of each kernel, and how many kernels its backward is; cuDNN's counts as flash attention, and the CPU's as
# memory-efficient attention, which `memstudy.attention.softmax` takes instead of it on CUDA.
_ATTENTION = {
    getattr(_ATEN, f"_scaled_dot_product_{name}{suffix}"): (f"{share}_{way}_share", kernels if suffix else 1)
    for way, suffix in (("forward", ""), ("backward", "_backward"))
    for share, kernels, names in (
        ("flash", 3, ("flash_attention", "cudnn_attention")),
        ("efficient", 2, ("efficient_attention", "flash_attention_for_cpu")),
    )
    for name in names
}
_UNTIMED = (
    "aten::linalg_", "aten::_linalg", "aten::sort", "aten::topk", "aten::_scaled_mm", "c10d::", "_c10d",
    "bitsandbytes::int8_linear_matmul",
)  # fmt: skip
_WAITS = {_ATEN._local_scalar_dense, _ATEN.nonzero, _ATEN.equal, _ATEN.is_nonzero, _ATEN._linalg_check_errors}
_NOTHING = {
    _ATEN.empty, _ATEN.empty_like, _ATEN.empty_strided, _ATEN.new_empty, _ATEN.new_empty_strided, _ATEN.lift_fresh,
    _ATEN.resize_, _ATEN.set_, _ATEN.detach_, _ATEN.t_, _ATEN.transpose_, _ATEN.squeeze_, _ATEN.unsqueeze_,
}  # fmt: skip
_READS_RESULT = {_ATEN.embedding, _ATEN.gather, _ATEN.index, _ATEN.index_select, _ATEN.nll_loss_forward}
_READS_LITTLE = _READS_RESULT | {_ATEN.nll_loss_backward}  # fills its result with zeros, but for one element a row
# Kernels for each column of a matrix, each of which waits for the one before: a factorisation takes a column at a time,
# for its pivot or its norm, and a triangular solution 32 of them.
_EACH_COLUMN = {
    _ATEN._linalg_solve_ex: 17 / 16, _ATEN.linalg_inv_ex: 17 / 16, _ATEN.linalg_lu_factor_ex: 1, _ATEN.linalg_qr: 2,
    _ATEN.linalg_cholesky_ex: 1, _ATEN.linalg_lu_solve: 1 / 16, _ATEN.linalg_solve_triangular: 1 / 32,
}  # fmt: skip
_PUTS = {_ATEN.index_put_, _ATEN._index_put_impl_, _ATEN.scatter_, _ATEN.index_copy_}
_OVERWRITES = {_ATEN.copy_, _ATEN.fill_, _ATEN.zero_, _ATEN._foreach_copy_, _ATEN._foreach_zero_}
_MULTI_TENSOR = "aten::_foreach", "aten::_fused_adam", "aten::_fused_sgd", "aten::_amp_foreach"
_COPIES = {_ATEN._to_copy, _ATEN.copy_, _ATEN.clone, _ATEN.cat}
# How many more passes an op makes over its first argument, for rows of up to 1,024 elements, of up to 64 KiB and longer
# ones, and its kernels. aten/src/ATen/native/cuda/PersistentSoftmax.cuh holds a short row in registers; longer rows are
# read again, at first from a cache. layer_norm_kernel.cu, backward: one kernel for the input, two for weight and bias.
_PASSES: dict[object, tuple[float, float, float, int]] = {
    **dict.fromkeys((_ATEN._softmax, _ATEN._log_softmax), (0, 0.6, 2.4, 1)),
    **dict.fromkeys((_ATEN._softmax_backward_data, _ATEN._log_softmax_backward_data), (0, 1.8, 1.8, 1)),
    _ATEN.native_layer_norm: (0.2, 0.9, 1.1, 1),
    _ATEN.native_layer_norm_backward: (2.4, 3.7, 3.7, 3),
    _ATEN.embedding_dense_backward: (2, 2, 2, 10),
    _ATEN.nll_loss_backward: (0, 0, 0, 2),
    **dict.fromkeys((_ATEN.index_put_, _ATEN._index_put_impl_), (0, 0, 0, 10)),
    _ATEN._foreach_norm: (0, 0, 0, 2),
}
