"""The style of the report's figures, and the drawing functions that several studies use."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import blended_transform_factory

STYLE = Path(__file__).with_name("paper.mplstyle")
WIDTH = 5.83  # text width of the report [inches]
MARKERS = "osD^vP<>X*phd8"
HATCHES = ("", "////", "\\\\\\\\", "....", "", "xxxx", "", "")  # tell stacked parts apart in grey


def use_style() -> None:
    """Draw all later figures in the report's style."""
    plt.style.use(STYLE)


def write_figure(figure: Figure, path: Path) -> None:
    """Write ``figure`` as PDF to ``path``, and as PNG beside it for web pages."""
    # fontTools warns that matplotlib's Computer Modern files have no dates.
    logging.getLogger("fontTools.ttLib").setLevel(logging.ERROR)
    # No date, so that the same rows give the same file.
    figure.savefig(path, metadata={"CreationDate": None})
    figure.savefig(path.with_suffix(".png"), dpi=160)


def stacked_bars(parts: pd.DataFrame, *, row_height: float, margin: float, label: str, legend_columns: int) -> Axes:
    """Horizontal stacked bars: a bar for each row of ``parts``, the first on top, and its columns named above.

    ``row_height`` and ``margin`` [inches] set the figure's height; ``label`` is the axis label.
    """
    _, axes = plt.subplots(figsize=(WIDTH, margin + row_height * len(parts)))
    parts.iloc[::-1].plot.barh(stacked=True, ax=axes, width=0.75, linewidth=0, edgecolor="white")
    for part, hatch in zip(axes.containers, HATCHES, strict=False):
        plt.setp(part.patches, hatch=hatch)
    axes.set(xlabel=label, ylabel="")
    axes.grid(axis="y", visible=False)
    legend_above(axes, legend_columns)
    return axes


def legend_above(axes: Axes, columns: int) -> None:
    """Put the legend above ``axes``; above the only axes of a figure, in the middle of the figure."""
    across = axes.figure.transFigure if len(axes.figure.axes) == 1 else axes.transAxes
    above = blended_transform_factory(across, axes.transAxes)
    place = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "bbox_transform": above}
    axes.legend(ncols=columns, columnspacing=1.0, handlelength=1.0, **place)


def memory_timeline(axes: Axes, x: pd.Series, parts: pd.DataFrame, phases: pd.Series) -> dict[str, float]:
    """Draw allocated memory over ``x``, the columns of ``parts`` stacked, with a dotted line between phases.

    Returns the ``x`` at which each phase begins, without the first.
    """
    axes.stackplot(x, parts.T, labels=parts.columns, linewidth=0, step="post")
    begins = {phase: x[phases.eq(phase).idxmax()] for phase in phases.drop_duplicates().iloc[1:]}
    for place in begins.values():
        axes.axvline(place, color="0.3", linewidth=0.8, linestyle=":")
    return begins


def steps_over_budget(
    axes: Axes, peaks: Mapping[str, Sequence[int]], context: int, budget: int | None, device: str
) -> None:
    """Draw the ``peaks`` of each step, in bytes by name, and as a line the ``budget`` of ``device``.

    ``context`` [bytes] lies beside the peaks.
    """
    for name, values in peaks.items():
        if values:
            axes.plot(
                range(1, len(values) + 1), [(value + context) / 2**30 for value in values], linewidth=0.8, label=name
            )
    if budget is not None:
        axes.axhline(budget / 2**30, color="0.3", linewidth=0.8, linestyle="--", label=device)
    axes.set(xlabel="step", ylabel="peak of a step\n[GiB], predicted", ylim=(0, None))
    legend_above(axes, 3)


def mark_gpus(axes: Axes, memory: Mapping[str, float]) -> None:
    """Write each GPU's name, rotated by 90°, at its ``memory`` on the horizontal axis."""
    for name, amount in memory.items():
        axes.annotate(
            name, (amount, 0), xycoords=("data", "axes fraction"), xytext=(3, 3), textcoords="offset points",
            fontsize=7, rotation=90, color="0.4",
        )  # fmt: skip


def small_multiples(titles: Sequence[str], *, columns: int, height: float, margin: float, **options) -> dict[str, Axes]:
    """Panels of one figure by their ``titles``: ``columns`` per row, ``height`` [inches] each, ``margin`` above all.

    ``options`` go to ``plt.subplots``.
    """
    columns = min(columns, len(titles))
    rows = math.ceil(len(titles) / columns)
    _, panels = plt.subplots(rows, columns, figsize=(WIDTH, margin + height * rows), squeeze=False, **options)
    for place in range(len(titles), panels.size):
        panels.flat[place].set_visible(False)
        panels.flat[place - columns].tick_params(labelbottom=True)  # a shared axis has its labels there alone
    return dict(zip(titles, panels.flat, strict=False))


def name_points(axes: Axes, points: pd.DataFrame, named: pd.DataFrame) -> None:
    """Write the index of ``named`` right of its points, above or below: on the side with fewer of ``points``.

    Both frames have the horizontal coordinate in the first column, the vertical coordinate in the second.
    """
    place = axes.transData.transform
    drawn = place(points.to_numpy()) * 72 / axes.figure.dpi
    for name, where in zip(named.index, named.to_numpy(), strict=True):
        x, y = place(where) * 72 / axes.figure.dpi
        beside = (drawn[:, 0] > x) & (drawn[:, 0] < x + 4 * len(name))
        above, below = (((drawn[beside, 1] - y) * way > 2) & ((drawn[beside, 1] - y) * way < 12) for way in (1, -1))
        offset = (4, 4 if above.sum() < below.sum() else -8)
        axes.annotate(name, where, xytext=offset, textcoords="offset points", fontsize=6)


def trade_off_panel(axes: Axes, rows: pd.DataFrame, looks: Mapping[str, dict], markers: Mapping[str, str]) -> None:
    """Draw ``memory`` against ``time`` of ``rows``, both relative to a baseline at 1, on logarithmic axes.

    ``quality`` chooses colour and fill, ``study`` the marker; the ``technique`` that takes least memory in a study is
    named.
    """
    for (study, quality), points in rows.groupby(["study", "quality"]):
        axes.plot(points["time"], points["memory"], markers[study], **looks[quality], markersize=5, alpha=0.8)
    axes.axhline(1, color="0.5", linewidth=0.8, linestyle="--")
    axes.axvline(1, color="0.5", linewidth=0.8, linestyle="--")
    axes.set(xscale="log", yscale="log")
    for axis, ticks in ((axes.xaxis, (0.25, 0.5, 1, 2, 4, 8)), (axes.yaxis, (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 2))):
        axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.margins(0.15)  # room for the names
    least = rows.loc[rows.groupby("study")["memory"].idxmin()].set_index("technique")
    name_points(axes, rows[["time", "memory"]], least[["time", "memory"]])
