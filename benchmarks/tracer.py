"""The cost of tracing: times of steps of the Lab-4 model with and without `measure`.

python benchmarks/tracer.py [ROUNDS]

A round builds the model twice, once traced and once not, and takes one warm-up and three timed steps each time, so that
other load on the machine affects both; the order alternates between rounds. Other processes on the same cores can
change the ratio by more than tracing does: run the benchmark alone, and look at the spread.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

from memstudy.profiler import measure
from memstudy.trainers.language_model import LanguageModelRun

TARGET = 1.1
STEPS = 3
LAB4 = LanguageModelRun(
    experiment="baseline",
    n_layers=6,
    hidden_size=512,
    n_heads=8,
    feed_forward=2048,
    vocab_size=10_000,
    seq_len=512,
    batch_size=1,
    measure_steps=1,
)


def timed_build(seconds: list[float]) -> Callable[[], Callable[[], None]]:
    """Build of the Lab-4 step that appends the time of each step [s] to ``seconds``."""

    def make():
        step = LAB4.build()()

        def timed():
            began = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - began)

        return timed

    return make


def traced() -> list[float]:
    """Times of ``STEPS`` steps under `measure` [s]."""
    seconds: list[float] = []
    measure(timed_build(seconds), iterations=1 + STEPS)
    return seconds[1:]


def alone() -> list[float]:
    """Times of ``STEPS`` steps without `measure` [s]."""
    seconds: list[float] = []
    step = timed_build(seconds)()
    for _ in range(1 + STEPS):
        step()
    return seconds[1:]


def main(rounds: int) -> None:
    """Print the medians, and the ratio over all rounds and within each round."""
    times: dict[Callable, list[float]] = {traced: [], alone: []}
    ratios = []
    for number in range(rounds):
        order = (traced, alone) if number % 2 else (alone, traced)
        medians = {}
        for way in order:
            seconds = way()
            times[way] += seconds
            medians[way] = statistics.median(seconds)
        ratios.append(medians[traced] / medians[alone])
        print(f"round {number + 1:2d}: traced / alone = {ratios[-1]:.3f}", flush=True)
    with_trace, without = (1e3 * statistics.median(times[way]) for way in (traced, alone))
    print(f"traced {with_trace:.1f} ms, alone {without:.1f} ms (medians of {rounds * STEPS} steps)")
    print(f"ratio {with_trace / without:.3f}; by round {min(ratios):.3f} to {max(ratios):.3f}; target {TARGET}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
