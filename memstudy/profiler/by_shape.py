"""Ops whose fake kernel fails, followed by what shapes say: products by expert, and ops whose result data decide."""

from __future__ import annotations

from collections.abc import Callable

import torch

_ATEN = torch.ops.aten
_MASKS = (torch.bool, torch.uint8)


def grouped_mm_on(*, cuda: bool) -> Callable:
    """``aten::_grouped_mm`` of any type: a product for each expert, whatever the number of its tokens.

    The fake kernel takes bfloat16 only. aten/src/ATen/native/GroupedMMUtils.h, ``create_grouped_gemm_output_tensor``:
    on CUDA, rows are aligned to 16 bytes. oneDNN's buffers, which depend on each expert's tokens, are not counted.
    """

    def grouped_mm(left, right, offs=None, bias=None, out_dtype=None):
        dtype = out_dtype or left.dtype
        shape = (*left.shape[:-1], right.shape[-1])
        if left.dim() == right.dim() == 2:
            shape = (offs.shape[0], *shape)
        elif right.dim() == 2:
            shape = shape[1:]
        width = -(-shape[-1] * dtype.itemsize // 16) * 16 // dtype.itemsize if cuda else shape[-1]
        return torch.empty((*shape[:-1], width), dtype=dtype)[..., : shape[-1]]

    return grouped_mm


def nonzero(tensor):
    """The most that ``aten::nonzero`` can find."""
    return torch.empty((tensor.numel(), tensor.dim()), dtype=torch.int64)


def bincount(tensor, weights=None, minlength=0):
    """``aten::bincount`` of numbers that are all below ``minlength``."""
    return torch.empty(max(minlength, 1), dtype=torch.int64 if weights is None else torch.float64)


def coalesce(sparse):
    """``aten::_coalesce`` of a sparse tensor whose entries are all at places of their own."""
    indices, values = torch.empty_like(sparse._indices()), torch.empty_like(sparse._values())
    return _sparse(sparse, indices, values)


def sparse_mask(tensor, mask):
    """``aten::sparse_mask``: the entries of ``tensor`` at the places of ``mask``."""
    values = torch.empty_like(mask._values(), dtype=tensor.dtype)
    return _sparse(mask, mask._indices().clone(), values)


def _sparse(like, indices, values):
    return torch.sparse_coo_tensor(indices, values, like.shape, is_coalesced=True)


def index(tensor, indices):
    """``aten::index`` by masks: they become indices (aten/src/ATen/native/IndexingUtils.h, ``expandTensors``)."""
    expanded = _expanded(indices)
    return NotImplemented if expanded is None else _ATEN.index(tensor, expanded)


def index_put(tensor, indices, values, accumulate=False, unsafe=False):
    """``aten::_index_put_impl_`` by masks, as `index`."""
    expanded = _expanded(indices)
    if expanded is None:
        return NotImplemented
    return _ATEN._index_put_impl_(tensor, expanded, values, accumulate, unsafe)


def _expanded(indices: list) -> list | None:
    if not any(given is not None and given.dtype in _MASKS for given in indices):
        return None
    columns = []
    for given in indices:
        masks = given is not None and given.dtype in _MASKS
        columns += given.nonzero().unbind(1) if masks else [given]
    return columns


_ASSUMED = {
    nonzero: "every element of a mask counted as chosen",
    bincount: "no number counted that is above the given length",
    coalesce: "no entry of a sparse tensor is given twice",
}


def kernels(*, cuda: bool) -> dict[str, Callable]:
    """The kernels by the name of their op; one that returns ``NotImplemented`` leaves the op to its fake kernel."""
    return {
        "aten::_grouped_mm": grouped_mm_on(cuda=cuda),
        "aten::nonzero": nonzero,
        "aten::bincount": bincount,
        "aten::_coalesce": coalesce,
        "aten::sparse_mask": sparse_mask,
        "aten::index": index,
        "aten::_index_put_impl_": index_put,
    }


def assumed(kernel: Callable) -> set[str]:
    """What ``kernel`` assumes of the data."""
    return {f"data-dependent shapes ({_ASSUMED[kernel]})"} if kernel in _ASSUMED else set()
