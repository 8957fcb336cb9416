"""Figures as the report has them."""

from __future__ import annotations

import logging
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

STYLE = Path(__file__).with_name("paper.mplstyle")


def use_style() -> None:
    """Draw what follows in the report's style."""
    plt.style.use(STYLE)


def write_figure(figure: Figure, path: Path) -> None:
    """Write ``figure`` as PDF to ``path``, and as PNG beside it for web pages."""
    # It warns that matplotlib's own Computer Modern files have no dates.
    logging.getLogger("fontTools.ttLib").setLevel(logging.ERROR)
    # Without a date, the same rows give the same file.
    figure.savefig(path, metadata={"CreationDate": None})
    figure.savefig(path.with_suffix(".png"), dpi=160)
