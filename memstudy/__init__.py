"""Which memory technique for which Transformer: predict, measure and compare, to the byte."""

import logging
import os

# The profiler's start and stop lines, written to stderr at each measurement; read when torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
# Kernels for 4-bit products, which nothing here uses, are missing.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def load_ipython_extension(shell) -> None:
    """``%load_ext memstudy``: the cell magics ``%%memory`` and ``%%predict``."""
    from memstudy.notebook.magics import MemoryMagics

    shell.register_magics(MemoryMagics)


def explore(**chosen):
    """Widgets for model, GPU, batch, length and techniques, and what the step would take; ``chosen`` at the beginning.

    ``explore(model="gpt2", gpu="T4", batch_size=8, seq_len=512, techniques=["bf16"])``
    """
    try:
        import ipywidgets  # noqa: F401
    except ImportError:
        raise ImportError("memstudy.explore needs ipywidgets: pip install 'memstudy[notebook]'") from None
    from memstudy.notebook.explorer import Explorer

    return Explorer(**chosen)
