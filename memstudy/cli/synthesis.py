"""Over all studies: memory saved against time paid against quality lost, of everything that a study measured so.

Each study writes its rows with ``Study.trade_offs``; a report draws them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from memstudy.figures import use_style, write_figure

SAME = 1.0  # quality lost [%] up to which a technique counts as costing none, and time [%] likewise
MUCH = 10.0
COLORS = {
    rf"none ($\leq${SAME:g} %)": "C2",
    rf"some ($\leq${MUCH:g} %)": "C1",
    f"much (> {MUCH:g} %)": "C3",
    "not measured": "0.6",
}


def read(report: Path, stems: Sequence[str]) -> pd.DataFrame:
    """The rows of the studies ``stems``, those that wrote some.

    Columns: ``study``, ``technique``, ``memory`` and ``time`` (measured, the study's baseline being 1),
    ``quality_lost`` [%], missing where it was not measured.
    """
    paths = [report / "tradeoffs" / f"{stem}.csv" for stem in stems]
    frames = [pd.read_csv(path).assign(study=path.stem) for path in paths if path.exists()]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def price(rows: pd.DataFrame) -> pd.Series:
    """What each technique's memory is paid with: nothing, time, quality, or both."""
    time, quality = rows["time"] > 1 + SAME / 100, rows["quality_lost"] > SAME
    return (
        pd.Series("nothing", index=rows.index).mask(time, "time").mask(quality, "quality").mask(time & quality, "both")
    )


def draw(generated: Path, stems: Sequence[str]) -> bool:
    """Write figure, table and values ``synthesis`` below ``generated``; whether there is anything to draw."""
    rows = read(generated / "report", stems)
    if rows.empty:
        return False
    use_style()
    rows["quality"] = pd.cut(rows["quality_lost"], [-float("inf"), SAME, MUCH, float("inf")], labels=list(COLORS)[:3])
    rows["quality"] = rows["quality"].cat.add_categories("not measured").fillna("not measured")
    figure, axes = plt.subplots(figsize=(5.83, 4.4))
    markers = dict(zip(rows["study"].unique(), "osD^vP", strict=False))
    for (study, quality), of_it in rows.groupby(["study", "quality"], observed=True):
        axes.plot(of_it["time"], of_it["memory"], markers[study], color=COLORS[quality], markersize=5, alpha=0.8)
    axes.axhline(1, color="0.5", linewidth=0.8, linestyle="--")
    axes.axvline(1, color="0.5", linewidth=0.8, linestyle="--")
    axes.set(xscale="log", yscale="log", xlabel="time of a step, the study's baseline = 1; measured")
    axes.set(ylabel="memory at the step's peak, baseline = 1; measured")
    for axis, ticks in ((axes.xaxis, (0.25, 0.5, 1, 2, 4, 8)), (axes.yaxis, (0.05, 0.1, 0.2, 0.5, 1, 2))):
        axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
    axes.set(xlim=_around(rows["time"]), ylim=_around(rows["memory"]))
    _name(axes, rows, rows.loc[rows.groupby("study")["memory"].idxmin()])
    shapes = [Line2D([], [], color="k", marker=m, linestyle="", label=s.replace("_", " ")) for s, m in markers.items()]
    hues = [Line2D([], [], color=c, marker="o", linestyle="", label=f"quality lost: {q}") for q, c in COLORS.items()]
    figure.legend(handles=[*shapes, *hues], loc="outside upper center", ncols=3, fontsize=7)
    write_figure(figure, generated / "figures" / "synthesis.pdf")
    plt.close(figure)
    rows["paid with"] = price(rows)
    saving = rows[rows["memory"] < 1 - SAME / 100].sort_values("memory")
    best = saving.groupby(["paid with", "study"], sort=False).head(2)
    order = ["nothing", "time", "quality", "both"]
    best = best.sort_values("paid with", key=lambda column: column.map(order.index), kind="stable")
    table = best[["paid with", "study", "technique", "memory", "time", "quality_lost"]].set_axis(
        ["paid with", "study", "technique", "memory [×]", "time [×]", "quality lost [%]"], axis=1
    )
    table["study"] = table["study"].str.replace("_", " ")
    formats = {"memory [×]": "{:.2f}", "time [×]": "{:.2f}", "quality lost [%]": "{:+.1f}"}
    styler = (
        table.style.hide(axis="index").format(formats, na_rep="–", escape="latex").format_index(escape="latex", axis=1)
    )
    latex = styler.to_latex(hrules=True, column_format=r"llp{46mm}rrr")
    (generated / "report" / "tables" / "synthesis.tex").write_text(latex, encoding="utf-8")
    said = f"\\defval{{synthesis.same}}{{{SAME:g}}}\n\\defval{{synthesis.n_rows}}{{{len(rows)}}}\n"
    (generated / "report" / "values").mkdir(exist_ok=True)
    (generated / "report" / "values" / "synthesis.tex").write_text(said, encoding="utf-8")
    return True


def _name(axes: Axes, rows: pd.DataFrame, named: pd.DataFrame) -> None:
    """Write the techniques of ``named`` to the right of their points, above or below: where fewer of ``rows`` are."""
    place = axes.transData.transform
    points = place(rows[["time", "memory"]].to_numpy()) * 72 / axes.figure.dpi
    for row in named.itertuples():
        x, y = place((row.time, row.memory)) * 72 / axes.figure.dpi
        beside = (points[:, 0] > x) & (points[:, 0] < x + 4 * len(row.technique))
        above, below = (
            int((beside & ((points[:, 1] - y) * way > 2) & ((points[:, 1] - y) * way < 12)).sum()) for way in (1, -1)
        )
        offset = (4, 4 if above < below else -8)
        axes.annotate(row.technique, (row.time, row.memory), xytext=offset, textcoords="offset points", fontsize=6)


def _around(values: pd.Series) -> tuple[float, float]:
    """Limits of a logarithmic axis that leave room for labels."""
    return 0.8 * values.min(), 1.4 * values.max()
