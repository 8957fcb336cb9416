"""Training memory: measured (``trace``), predicted (``predict``), and the largest batch that fits."""

from memstudy.memory.batch_size import LargestBatch, largest_batch
from memstudy.memory.fit import Fit, fit
from memstudy.memory.gpus import Gpu, find_gpu, gpus
from memstudy.memory.predict import predict
from memstudy.memory.report import CATEGORIES, MIB, PHASES, MemoryReport
from memstudy.memory.trace import measure

__all__ = [
    "CATEGORIES",
    "MIB",
    "PHASES",
    "Fit",
    "Gpu",
    "LargestBatch",
    "MemoryReport",
    "find_gpu",
    "fit",
    "gpus",
    "largest_batch",
    "measure",
    "predict",
]
