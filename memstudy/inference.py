"""Forward passes alone: the memory that they take beside the parameters, and the time that a user waits.

What PyTorch allocates is measured to the byte. An engine has memory that PyTorch does not see, so that beside it stands
by how much the process grew, which is what engines can be compared by.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import psutil
import torch
from transformers import set_seed

from memstudy import techniques
from memstudy.hub_configs import InferenceRun
from memstudy.layers import WARM_UP, measured, timed
from memstudy.profiler import MIB
from memstudy.profiler.roles import Step


def build(run: InferenceRun) -> Callable[[], Step]:
    """What ``profiler.measure`` and ``profiler.predict`` take: one forward pass on a batch of random tokens."""

    def make() -> Step:
        set_seed(run.seed)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = run.make_model().eval()
        batch = {name: tensor.to(device) for name, tensor in run.make_batch().items() if name != "labels"}
        if device != "cpu":
            model.to(device)
        for lever in run.levers():
            lever.prepare(model)
        forward = next(filter(None, (lever.forward_pass(model, batch) for lever in run.levers())), None)

        def step():
            with torch.no_grad():
                forward() if forward else model(**batch)

        return step

    return make


def execute(run: InferenceRun) -> dict:
    """Carry out ``run`` in this process.

    Returns
    -------
    dict
        ``metrics`` (flat, units in the names; a sample is one sequence), ``curves`` and ``data``.

    Raises
    ------
    Unavailable
        When a technique cannot run on this machine.
    MemoryError
        When the measured peak passes ``run.budget_mib``.
    """
    techniques.check_available(run.levers())
    before = psutil.Process().memory_info().rss
    step = build(run)()
    for _ in range(WARM_UP):
        step()
    grown = psutil.Process().memory_info().rss - before
    times = sorted(1e3 * timed(step) / run.batch_size for _ in range(run.measure_steps))
    metrics = {
        "resident_mib": grown / MIB,
        "sample_time_ms": statistics.median(times),
        "sample_time_p95_ms": times[max(0, -(-95 * len(times) // 100) - 1)],  # the nearest rank
    }
    del step  # and its model: the next one is measured alone
    if all(lever.in_pytorch for lever in run.levers()):
        metrics |= _allocated(run)
    return {"metrics": metrics, "curves": {"sample_times_ms": [round(t, 4) for t in times]}, "data": {}}


def _allocated(run: InferenceRun) -> dict[str, float]:
    report, _ = measured(build(run), iterations=1)
    # The pass's own: making a model and factoring its projections holds more than a small batch does.
    peak = max(report.iteration_peaks)
    parameters = report.most_by_category["parameters"]
    if run.budget_mib and peak / MIB > run.budget_mib:
        raise MemoryError(f"peak {peak / MIB:.1f} MiB passes the budget of {run.budget_mib:g} MiB")
    return {
        "peak_allocated_mib": peak / MIB,
        "parameters_mib": parameters / MIB,
        "beside_parameters_mib": (peak - parameters) / MIB,
    }
