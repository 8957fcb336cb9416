"""Forward passes alone: the memory that they take beside the parameters, and the time that a user waits."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from transformers import set_seed

from memstudy.hub_configs import InferenceRun
from memstudy.layers import WARM_UP, measured, timed
from memstudy.memory import MIB
from memstudy.memory.trace import Step


def build(run: InferenceRun) -> Callable[[], Step]:
    """What ``memory.measure`` and ``memory.predict`` take: one forward pass on a batch of random tokens."""

    def make() -> Step:
        set_seed(run.seed)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = run.make_model().eval()
        batch = {name: tensor.to(device) for name, tensor in run.make_batch().items() if name != "labels"}
        if device != "cpu":
            model.to(device)

        def step():
            with torch.no_grad():
                model(**batch)

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
    MemoryError
        When the measured peak passes ``run.budget_mib``.
    """
    report, step = measured(build(run), iterations=1)
    # The pass's own: making a model and factoring its projections holds more than a small batch does.
    peak = max(report.iteration_peaks)
    parameters = report.most_by_category["parameters"]
    if run.budget_mib and peak / MIB > run.budget_mib:
        raise MemoryError(f"peak {peak / MIB:.1f} MiB passes the budget of {run.budget_mib:g} MiB")
    for _ in range(WARM_UP):
        step()
    times = sorted(1e3 * timed(step) / run.batch_size for _ in range(run.measure_steps))
    metrics = {
        "peak_allocated_mib": peak / MIB,
        "parameters_mib": parameters / MIB,
        "beside_parameters_mib": (peak - parameters) / MIB,
        "sample_time_ms": statistics.median(times),
        "sample_time_p95_ms": times[max(0, -(-95 * len(times) // 100) - 1)],  # the nearest rank
    }
    return {"metrics": metrics, "curves": {"sample_times_ms": [round(t, 4) for t in times]}, "data": {}}
