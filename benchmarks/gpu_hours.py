"""GPU hours that the studies would take at the published settings, by prediction: the table of docs/cluster.rst.

    python benchmarks/gpu_hours.py                   # every study at gpu scale, on four cards
    python benchmarks/gpu_hours.py --studies lab4_grid --scale full

Counts the runs of the first round, as ``memstudy plan STUDY --scale gpu --gpu CARD`` does without any record. Nothing
is run but the notebooks' cells that need no rows.
"""

import argparse
import tempfile
from pathlib import Path

from memstudy import project
from memstudy.cli import jobs
from memstudy.profiler import find_gpu

GPUS = ("T4", "RTX4090", "A100-80GB", "H100-80GB")
COLUMNS = ("study", "runs", "records, MB", *GPUS)
WIDTHS = (19, 5, 12, *[25] * len(GPUS))


def totals(study: str, scale: str, gpus: list[str]) -> dict[str, jobs.Total]:
    """The total of ``study`` on each of ``gpus``."""
    planned, found = {}, {}
    for gpu in gpus:
        fast = find_gpu(gpu).bf16_is_fast
        if fast not in planned:
            with tempfile.TemporaryDirectory() as nothing:
                planned[fast] = jobs.missing(study, scale, Path(nothing), gpu)
        found[gpu] = jobs.Total.of(study, jobs.needs(planned[fast], gpu, of=f"{study} on {gpu}"))
    return found


def cell(total: jobs.Total) -> str:
    """GPU hours with their band; marks runs that do not fit (¹) and runs without a predicted time (²)."""
    low, middle, high = (f"{hours:,.1f}" for hours in total.hours)
    marks = "¹" * bool(total.refused) + "²" * bool(total.unpredicted)
    return f"{middle} ({low}–{high}){marks}" if total.on_gpu else "none"


def line(cells: tuple[str, ...]) -> str:
    """A line of a reStructuredText table."""
    return "  ".join(text.ljust(width) for text, width in zip(cells, WIDTHS, strict=True)).rstrip()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", nargs="+", default=project.studies())
    parser.add_argument("--scale", default="gpu")
    arguments = parser.parse_args()
    rule = line(tuple("=" * width for width in WIDTHS))
    print(rule, line(COLUMNS), rule, sep="\n")
    untimed = set()
    for study in arguments.studies:
        found = totals(study, arguments.scale, list(GPUS))
        most = max(found.values(), key=lambda total: total.runs)
        cells = [cell(found[gpu]) for gpu in GPUS]
        print(line((study, str(most.runs), f"{most.record_mb:,.2f}", *cells)), flush=True)
        untimed.update(kind for total in found.values() for kind in total.untimed)
    print(rule, f"\nNot in the hours: {', '.join(sorted(untimed)) or 'nothing'}.", sep="\n")


if __name__ == "__main__":
    main()
