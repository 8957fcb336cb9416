"""Reports as HTML for notebooks, with pictures as inline SVG: where the memory goes, when, and whether it fits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING

from memstudy.profiler.events import MIB
from memstudy.profiler.waterfall import verdict

if TYPE_CHECKING:
    from memstudy.profiler.report import MemoryReport

# The colours of PyTorch's memory viewer (Tableau 10).
COLOURS = {
    "parameters": "#4e79a7",
    "gradients": "#59a14f",
    "optimizer": "#edc949",
    "activations": "#76b7b2",
    "temporary": "#e15759",
    "other": "#bab0ab",
    "workspace": "#9c755f",
    "fragmentation": "#ff9da7",
    "context": "#af7aa1",
    "cache": "#76b7b2",
    "logits": "#f28e2c",
}
LABELS, PLOT, NUMBERS = 100, 300, 130  # widths [px]
ROW, HEIGHT = 20, 130  # heights of a bar's row and of the timeline [px]
POINTS = 200  # of the timeline


def drawn(report: MemoryReport) -> str:
    """The ``report`` as HTML: verdict, waterfall, timeline, step time, and what is not checked."""
    return _box(*_lines(report), _waterfall(report, _scale(report)), _timeline(report), *_notes(report))


class Comparison:
    """Reports side by side, on one scale, and their parts in a table; a notebook shows them."""

    def __init__(self, unnamed: dict[str, MemoryReport], named: dict[str, MemoryReport]):
        self.named = named
        self.reports = unnamed | named

    def _repr_html_(self) -> str:
        scale = max(map(_scale, self.reports.values()))
        sides = "".join(
            f'<div style="flex: 1 1 380px; max-width: 620px; padding-right: 1em">{"".join(each)}</div>'
            for each in self._sides(scale)
        )
        return _box(f'<div style="display: flex; flex-wrap: wrap">{sides}</div>', self._table())

    def _sides(self, scale: float) -> Iterator[list[str]]:
        for name, report in self.reports.items():
            yield [*[_bold(name)] * (name in self.named), *_lines(report), _waterfall(report, scale)]

    def _table(self) -> str:
        columns = [(name, report.waterfall_mib()) for name, report in self.reports.items()]
        rows = [*dict.fromkeys(part for _, parts in columns for part in parts), "in all"]
        for _, parts in columns:
            parts["in all"] = sum(parts.values())
        if len(columns) == 2:
            (_, before), (_, after) = columns
            columns.append(("difference", {row: after[row] - before[row] for row in before if row in after}))
        head = "".join(f"<th>{escape(name)}</th>" for name in ["MiB", *(name for name, _ in columns)])
        body = ""
        for row in rows:
            cells = (f"<td>{parts[row]:z,.1f}</td>" if row in parts else "<td></td>" for _, parts in columns)
            body += f"<tr><th>{escape(row)}</th>{''.join(cells)}</tr>"
        style = 'style="font-size: inherit; text-align: right; border-spacing: 12px 0"'
        return f"<table {style}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def compare(*reports: MemoryReport, **named: MemoryReport) -> Comparison:
    """Compare reports side by side, named by their devices or as given: ``compare(before, after)``.

    Raises
    ------
    ValueError
        For fewer than two reports.
    """
    unnamed = {f"{n}: {report.device}, {report.kind}": report for n, report in enumerate(reports, start=1)}
    if len(unnamed | named) < 2:
        raise ValueError(f"compare takes at least two reports, and was given {len(unnamed | named)}")
    return Comparison(unnamed, named)


def _box(*parts: str) -> str:
    return f'<div style="font-size: 13px; line-height: 1.5">{"".join(parts)}</div>'


def _bold(text: str) -> str:
    return f"<div><b>{escape(text)}</b></div>"


def _scale(report: MemoryReport) -> float:
    """What the whole width stands for [MiB]: the GPU's memory, unless the parts would be too small to see."""
    whole, memory = sum(report.waterfall_mib().values()), (report.memory_bytes or 0) / MIB
    return memory if whole <= memory <= 2 * whole else whole


def _lines(report: MemoryReport) -> Iterator[str]:
    if report.memory_bytes is not None:
        colour = "#59a14f" if report.out_of_memory is None else "#e15759"
        said = f"{report.device}, {report.kind}: {verdict(report)}"
        yield f'<div style="border-left: 4px solid {colour}; padding-left: 6px">{_bold(said)}</div>'
    else:
        yield _bold(f"{report.device}, {report.kind}: {report.peak_allocated_mib:,.1f} MiB at the peak")
    if report.time:
        yield f"<div>a step takes {report.time}, predicted; bound by the {report.time.bound_by}</div>"
    for name, time in report.time_by_pass.items():
        yield f"<div>{escape(name)}: {time}, predicted; bound by the {time.bound_by}</div>"


def _notes(report: MemoryReport) -> Iterator[str]:
    untimed = {kind for time in [report.time, *report.time_by_pass.values()] if time for kind in time.untimed}
    for what, names in {"not checked against CUDA": report.unverified, "not in the time": sorted(untimed)}.items():
        if names:
            yield f'<div style="opacity: 0.7">{what}: {escape(", ".join(names))}</div>'


def _svg(height: float, *parts: str) -> str:
    width = LABELS + PLOT + NUMBERS
    size = f'viewBox="0 0 {width} {height:g}" width="{width}" height="{height:g}"'
    style = 'style="display: block; max-width: 100%; height: auto"'
    text = 'font-family="sans-serif" font-size="12" fill="currentColor"'
    return f"<svg {size} {style} {text}>{''.join(parts)}</svg>"


def _text(x: float, y: float, text: str, anchor: str = "start", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(text)}</text>'


def _rect(x: float, y: float, width: float, colour: str, title: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{ROW - 6}" fill="{colour}">'
        f"<title>{escape(title)}</title></rect>"
    )


def _upright(x: float, top: float, bottom: float) -> str:
    return f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}" stroke="currentColor" stroke-dasharray="3 3"/>'


def _waterfall(report: MemoryReport, scale: float) -> str:
    """The parts of the peak, each bar from where the one above ends, over a width of ``scale`` [MiB]."""
    parts, drawing, before = report.waterfall_mib(), [], 0.0
    whole = sum(parts.values())
    total = "whole GPU" if report.memory_bytes else "peak"
    rows = [*((name, size, COLOURS[name]) for name, size in parts.items()), (total, whole, "#79706e")]
    for number, (name, size, colour) in enumerate(rows):
        if name == total:
            before = 0.0
        y = 18 + ROW * number
        share = f"{100 * size / whole:.0f} %" if whole else ""
        bold = 'font-weight="bold"' if name == total else ""
        drawing += [
            _text(LABELS - 8, y + 11, name, "end", bold),
            _rect(LABELS + PLOT * before / scale, y, PLOT * size / scale, colour, f"{name}: {size:,.1f} MiB, {share}"),
            _text(LABELS + PLOT + NUMBERS - 44, y + 11, f"{size:,.0f} MiB", "end", bold),
            _text(LABELS + PLOT + NUMBERS - 2, y + 11, share, "end", 'opacity="0.7"'),
        ]
        before += size
    bottom = 18 + ROW * len(rows)
    memory = (report.memory_bytes or 0) / MIB
    if 0 < memory <= scale:
        limit = LABELS + PLOT * memory / scale
        drawing.append(_upright(limit, 14, bottom))
        drawing.append(_text(limit, 10, f"{report.device}: {memory:,.0f} MiB", "end"))
    return _svg(bottom + 2, *drawing)


def _timeline(report: MemoryReport) -> str:
    """Allocated bytes by category over the events of the last step, in order."""
    rows = report.thinned_timeline(POINTS)
    most = max(sum(live.values()) for _, _, live in rows)
    top, drawing, base = 18, [], [0] * len(rows)
    step = PLOT / len(rows)

    def place(value: float) -> float:
        return top + HEIGHT * (1 - value / most) if most else top + HEIGHT

    def edge(values: list[float]) -> list[str]:
        return [f"{LABELS + step * (n + side):.1f},{place(v):.1f}" for n, v in enumerate(values) for side in (0, 1)]

    for name in (name for name in report.peak_by_category if any(live[name] for _, _, live in rows)):
        above = [under + live[name] for under, (_, _, live) in zip(base, rows, strict=True)]
        points = " ".join([*edge(above), *reversed(edge(base))])
        drawing.append(f'<polygon points="{points}" fill="{COLOURS[name]}"><title>{escape(name)}</title></polygon>')
        base = above
    phases = [(next(same)[0], phase) for phase, same in groupby(enumerate(rows), key=lambda row: row[1][1])]
    places = [LABELS + step * index for index, _ in phases]
    for (_, phase), x, following in zip(phases, places, [*places[1:], math.inf], strict=True):
        drawing.append(_upright(x, 4, top + HEIGHT))
        if following - x > 8 * len(phase):
            drawing.append(_text(x + 3, 12, phase))
    drawing += [
        _text(LABELS - 8, top + 9, f"{most / MIB:,.0f} MiB", "end"),
        _text(LABELS - 8, top + HEIGHT, "0", "end"),
        _text(LABELS, top + HEIGHT + 15, "allocations and releases of the last step, in order", more='opacity="0.7"'),
    ]
    return _svg(top + HEIGHT + 22, *drawing)
