"""CUDA's semantics on fake CPU tensors: rules for where a CUDA build of PyTorch differs from a CPU build.

Each rule is a small function with its reason and its source (paths are PyTorch's, torch 2.13). A rule either replaces
an op's kernel (registered during a prediction at the dispatch keys of CPU tensors, so that the rule holds for every
caller of the op, recomputation in backward included) or gives a kernel's allocations besides its results (`scratch`).
An op that no rule covers is predicted as its CPU kernel and named in the report as unverified.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch

from memstudy.profiler.catalogue import Gpu
from memstudy.profiler.cuda import autocast, bitsandbytes, scratch
from memstudy.profiler.cuda.attention import attention_on, flash_attn
from memstudy.profiler.cuda.bitsandbytes import layers_as_on_cuda
from memstudy.profiler.internals import FOREACH_DEVICES, OpOverload, _scoped_library

_ATEN = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)


def softmax(self, dim, dtype=None):
    """CUDA's kernel reads fp16 and writes fp32; bf16 is first copied to fp32, as the CPU does with both.

    aten/src/ATen/native/SoftMax.cpp, ``softmax``.
    """
    if self.dtype is torch.float16 and dtype is torch.float32:
        return _ATEN._softmax(self, dim, True)
    return _ATEN._softmax(self if dtype is None else self.to(dtype), dim, False)


@dataclass(frozen=True)
class Semantics:
    """The semantics that differ between PyTorch releases; the defaults are for 2.13.

    Attributes
    ----------
    softmax : callable
        The kernel of ``softmax(input, dim, dtype)``.
    fp32 : tuple of str
        Ops that autocast runs in fp32.
    workspace_bytes : callable
        Bytes that cuBLAS keeps in the caching allocator's memory for each multiplying thread, from the `Gpu`.
    gemm_4bit : callable
        The kernel of bitsandbytes' ``gemm_4bit``.
    """

    softmax: Callable = softmax
    fp32: tuple[str, ...] = autocast.FP32
    workspace_bytes: Callable[[Gpu], int] = scratch.workspace_bytes
    gemm_4bit: Callable = bitsandbytes.gemm_4bit


TODAY = Semantics()


@contextmanager
def as_on(gpu: Gpu, semantics: Semantics, transfer: Callable) -> Iterator[None]:
    """Make CPU tensors use memory as tensors on ``gpu`` do, within the block; ``transfer`` hears of offloaded ones."""
    with ExitStack() as stack:
        library = stack.enter_context(_scoped_library("aten", "IMPL"))
        for key in ("AutogradCPU", "CPU"):
            library.impl("dropout", _dropout, key)
            library.impl("softmax.int", semantics.softmax, key)
            library.impl("log_softmax.int", _log_softmax, key)
            library.impl("scaled_dot_product_attention", attention_on(gpu), key)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once|.*Overriding a previously registered kernel")
            for name, kernel in autocast.kernels(semantics.fp32).items():
                library.impl(name, kernel, "AutocastCPU", allow_override=True)
        for change in (
            _foreach_optimizers(),
            *_amp(),
            _offload(transfer),
            flash_attn(),
            layers_as_on_cuda(),
        ):
            stack.enter_context(change)
        yield


# --- kernels that only CUDA has


def _dropout(input, p, train):
    """One fused kernel with a mask of one byte per element; the CPU keeps a mask in the input's own dtype.

    aten/src/ATen/native/Dropout.cpp, ``is_fused_kernel_acceptable``.
    """
    if not train or p == 0 or input.numel() == 0:
        return input
    if p == 1:
        return input * torch.zeros((), dtype=input.dtype)
    return _ATEN.native_dropout(input, p, train)[0]


def _log_softmax(self, dim, dtype=None):
    """As `softmax`: aten/src/ATen/native/SoftMax.cpp, ``log_softmax``."""
    if self.dtype is torch.float16 and dtype is torch.float32:
        return _ATEN._log_softmax(self, dim, True)
    return _ATEN._log_softmax(self if dtype is None else self.to(dtype), dim, False)


# --- optimizers, mixed precision, offload


def _foreach_optimizers():
    """Make the multi-tensor optimizers the default, as on CUDA; they hold one more copy of all parameters.

    torch/optim/optimizer.py, ``_default_to_fused_or_foreach``.
    """
    return patch(FOREACH_DEVICES, lambda: ["cpu"])


def _amp() -> list:
    """Make ``torch.autocast("cuda")`` and ``torch.amp.GradScaler("cuda")`` work on the CPU tensors.

    No gradient is infinite: the scaler always lets the optimizer step.
    """
    autocast, scaler = torch.autocast.__init__, torch.amp.GradScaler.__init__

    def enter(self, device_type, dtype=None, *args, **kwargs):
        if device_type == "cuda":  # fp16 by default
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


def _offload(transfer: Callable):
    """Saved tensors move to the host's memory and come back into new memory of the GPU.

    torch/autograd/graph.py, ``save_on_cpu``.
    """

    def on_cpu(self, pin_memory=False, device_type="cuda"):
        def pack(tensor):
            transfer(tensor, to_host=True)
            return tensor.shape, tensor.stride(), tensor.dtype

        def unpack(packed):
            shape, stride, dtype = packed
            tensor = torch.empty_strided(shape, stride, dtype=dtype)
            transfer(tensor, to_host=False)
            return tensor

        torch.autograd.graph.saved_tensors_hooks.__init__(self, pack, unpack)

    return patch.object(torch.autograd.graph.save_on_cpu, "__init__", on_cpu)


def corrected(func: OpOverload, args: tuple, result: object) -> object:
    """The result of ``func`` as its CUDA kernel gives it, where the fake kernel differs."""
    if func is _ATEN.native_layer_norm.default:
        # aten/src/ATen/native/cuda/layer_norm_kernel.cu: mean and rstd are at least fp32, not the input's type.
        output, *moments = result
        return output, *(moment.float() if moment.dtype in _HALF else moment for moment in moments)
    if func is _ATEN._linalg_svd.default:
        # aten/src/ATen/native/BatchLinearAlgebra.cpp, _linalg_svd: cuSOLVER gives Vh row by row, so that its first
        # rows are contiguous, and an adapter that keeps them keeps all of Vh.
        u, s, vh = result
        return u, s, vh.contiguous()
    return result
