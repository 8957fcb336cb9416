"""Predict steps and layers with each GPU, and then each generation, left out of what chose the constants.

python benchmarks/step_time/left_out.py [TABLE]...

Takes some five minutes and no GPU. Constants differ by generation (compute capability), so three errors stand side by
side for each GPU's rows that the GPU bounds: with the constants as they are; with those of its generation chosen anew
on the generation's other GPUs alone, from what holds for unnamed generations (`CHOSEN`, by the least mean of the
errors' logarithms); and with none of its generation. A GPU that is alone in its generation has the last two equal.
Constants that all generations share (a kernel's start, the host, attention, the L2 cache) stay as they are: beside the
band's width, rows of V100 boards chose the slow host alone.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable
from types import ModuleType
from unittest.mock import patch

import numpy as np
import pandas as pd
from scipy.optimize import minimize
from tqdm import tqdm

from memstudy.profiler import find_gpu
from memstudy.profiler.prediction import follow
from memstudy.profiler.time.cost import constants, step_time, step_us
from memstudy.profiler.time.ops import Work
from memstudy.studies.published.times import UNNAMED, Row
from memstudy.studies.published.times.errors import LOWER_BOUNDS
from memstudy.studies.published.times.tables import TABLES

CHOSEN = {"memory_share": 1, "fp32_share": 1, "sustained": 1.25, "tflops_per_watt": np.inf}  # and their upper limits
Issued = list[tuple[str, Work]]


def traced(modules: Iterable[ModuleType]) -> list[tuple[Row, Issued]]:
    """The rows of ``modules`` that the GPU bounds, single ops aside, each with the ops of its step."""
    found = []
    for row in tqdm([row for module in modules for row in module.rows() if row.kind != "op"], leave=False):
        card = find_gpu(row.gpu)
        recorder, _ = follow(row.build, 2, card, 1, row.semantics)
        issued = recorder.issued.by_step[-1]
        if step_time(issued, card).bound_by == "GPU":
            found.append((row, issued))
    return found


def with_values(generation: str, values: Iterable[float]):
    """Within the block, ``generation`` has ``values`` of the constants `CHOSEN`, and else what unnamed ones have."""
    named = {name: one for name, one in constants().items() if isinstance(one.value, dict)}
    chosen = {name: {"other": one.value["other"]} for name, one in named.items()}
    for name, value in zip(CHOSEN, values, strict=True):
        chosen[name][generation] = value
    return patch.dict(constants(), {name: named[name].model_copy(update={"value": chosen[name]}) for name in named})


def fitted(generation: str, rows: list[tuple[Row, Issued]]) -> list[float]:
    """The values of `CHOSEN` with which the kernels of ``rows`` take the published times, in the mean."""
    counted = [Counter((row.gpu, work) for _, work in issued) for row, issued in rows]
    distinct = [*set().union(*counted)]
    counts = np.array([[works[each] for each in distinct] for works in counted])
    gpus, published_ms = (
        {row.gpu: find_gpu(row.gpu) for row, _ in rows},
        np.array([row.published_ms for row, _ in rows]),
    )

    def error(logarithms) -> float:
        with with_values(generation, np.exp(logarithms)):
            us = np.array([step_us(work, gpus[name]) for name, work in distinct])
        return np.abs(np.log(counts @ us / 1e3 / published_ms)).sum()

    start = np.log([constants()[name].value["other"] for name in CHOSEN])
    limits = [(None, np.log(limit)) for limit in CHOSEN.values()]
    options = {"xatol": 0.02, "fatol": 0.02, "maxfev": 120}
    return [*np.exp(minimize(error, start, method="Nelder-Mead", bounds=limits, options=options).x)]


def summary(rows: list[tuple[Row, Issued]], named: bool = True) -> list[float]:
    """Median and worst size of the errors of ``rows`` [%], if not ``named`` on a generation without constants."""
    errors = []
    for row, issued in rows:
        card = find_gpu(row.gpu)
        card = card if named else card.model_copy(update={"compute_capability": UNNAMED})
        errors.append(100 * abs(step_time(issued, card).step_time_ms / row.published_ms - 1))
    return [pd.Series(errors).median(), max(errors)]


def compared(rows: list[tuple[Row, Issued]]) -> pd.DataFrame:
    """The errors of each GPU's rows, by what is left out."""
    lines = {}
    for name in dict.fromkeys(row.gpu for row, _ in rows):
        generation = ".".join(map(str, find_gpu(name).compute_capability))
        family = [
            (row, issued)
            for row, issued in rows
            if find_gpu(row.gpu).compute_capability == find_gpu(name).compute_capability
        ]
        mine, others = ([one for one in family if (one[0].gpu == name) is own] for own in (True, False))
        unseen = summary(mine, named=False)
        without = unseen
        if others:
            with with_values(generation, fitted(generation, others)):
                without = summary(mine)
        lines[name] = [generation, len(mine), len(others), *summary(mine), *without, *unseen]
    groups = [("constants", "as they are"), ("left out", "GPU"), ("left out", "generation")]
    columns = ["generation", "rows", "of others"]
    columns += [f"{group}, {what}: {which}" for group, what in groups for which in ("median", "worst")]
    return pd.DataFrame(lines, index=columns).T.sort_values("generation", kind="stable")


def main() -> None:
    steps = [name for name in TABLES if name not in LOWER_BOUNDS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", choices=[*steps, "all"], default="all", help="default: all")
    chosen = parser.parse_args().tables
    table = compared(traced(TABLES[name] for name in (steps if "all" in chosen else chosen)))
    print(table.to_string(float_format="{:.1f}".format))


if __name__ == "__main__":
    main()
