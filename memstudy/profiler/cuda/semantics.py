"""CUDA's semantics on fake CPU tensors: what a CUDA build of PyTorch would do where a CPU build does otherwise.

Each rule is a small function with its reason and its source (paths are PyTorch's, torch 2.13). A rule either stands in
for an op's dispatch (registered for the length of a prediction at the dispatch keys that a CPU tensor goes through, so
that it holds wherever the op is called from, recomputation in backward included) or says what a kernel allocates
besides its results (`scratch`). What no rule covers is predicted as its CPU kernel and named in the report as
unverified.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch.library import _scoped_library

from memstudy.profiler.catalogue import Gpu
from memstudy.profiler.cuda import autocast, scratch
from memstudy.profiler.cuda.attention import attention_on, flash_attn

_ATEN = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)


def softmax(self, dim, dtype=None):
    """Reads fp16 and writes fp32 at once; from bf16 it makes a copy in fp32 first, as the CPU does from both.

    aten/src/ATen/native/SoftMax.cpp, ``softmax``.
    """
    if self.dtype is torch.float16 and dtype is torch.float32:
        return _ATEN._softmax(self, dim, True)
    return _ATEN._softmax(self if dtype is None else self.to(dtype), dim, False)


@dataclass(frozen=True)
class Semantics:
    """What changed from release to release of PyTorch; the defaults are those of 2.13.

    Attributes
    ----------
    softmax : callable
        The kernel of ``softmax(input, dim, dtype)``.
    fp32 : tuple of str
        Ops that autocast runs in fp32.
    workspace_bytes : callable
        What cuBLAS keeps for a thread that multiplies on a `Gpu`, in the caching allocator's memory.
    """

    softmax: Callable = softmax
    fp32: tuple[str, ...] = autocast.FP32
    workspace_bytes: Callable[[Gpu], int] = scratch.workspace_bytes


TODAY = Semantics()


@contextmanager
def as_on(gpu: Gpu, semantics: Semantics) -> Iterator[None]:
    """Make CPU tensors behave as tensors on ``gpu`` do, as far as memory goes, within the block."""
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
        for change in (_foreach_optimizers(), *_amp(), _offload(), flash_attn()):
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


def _log_softmax(self, dim, dtype=None):
    """As `softmax`; ibidem, ``log_softmax``."""
    if self.dtype is torch.float16 and dtype is torch.float32:
        return _ATEN._log_softmax(self, dim, True)
    return _ATEN._log_softmax(self if dtype is None else self.to(dtype), dim, False)


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


def corrected(func: torch._ops.OpOverload, args: tuple, result: object) -> object:
    """What the kernel of ``func`` gives, where its fake one gives something else."""
    if func is _ATEN.native_layer_norm.default:
        # aten/src/ATen/native/cuda/layer_norm_kernel.cu: mean and rstd are fp32 at least, on the CPU as the input.
        output, *moments = result
        return output, *(moment.float() if moment.dtype in _HALF else moment for moment in moments)
    return result
