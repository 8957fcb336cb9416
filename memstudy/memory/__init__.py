"""Training memory: measured (``trace``), predicted (``predict``), and the largest batch that fits."""

from memstudy.memory.report import CATEGORIES, MIB, PHASES, MemoryReport
from memstudy.memory.trace import measure

__all__ = ["CATEGORIES", "MIB", "PHASES", "MemoryReport", "measure"]
