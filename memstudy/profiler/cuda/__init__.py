"""CUDA on fake CPU tensors: its semantics, and what its kernels allocate besides their results."""

from memstudy.profiler.cuda.bitsandbytes import kernels
from memstudy.profiler.cuda.scratch import BelowDispatch
from memstudy.profiler.cuda.semantics import TODAY, Semantics, as_on, corrected

__all__ = ["TODAY", "BelowDispatch", "Semantics", "as_on", "corrected", "kernels"]
