"""Which memory technique for which Transformer: predict, measure and compare, to the byte."""

import logging
import os

# The profiler's start and stop lines, written to stderr at each measurement; read when torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
# Kernels for 4-bit products, which nothing here uses, are missing.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
