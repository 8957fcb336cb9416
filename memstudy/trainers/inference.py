"""Forward passes alone: the memory that they take beside the parameters, and the time that a user waits.

What PyTorch allocates is measured to the byte. An engine has memory that PyTorch does not see, so that beside it stands
by how much the process grew, which is what engines can be compared by.
"""

from __future__ import annotations

import statistics
from typing import Literal

import psutil
import torch
from pydantic import PositiveInt
from transformers import set_seed

from memstudy import techniques
from memstudy.profiler import MIB
from memstudy.profiler.roles import Step
from memstudy.trainers.hub_model import HubModelRun
from memstudy.trainers.timing import WARM_UP, measured, timed


class InferenceRun(HubModelRun):
    """Every choice of one run of forward passes without gradients, in fp32.

    ``measure_steps`` batches of random tokens are timed, each by itself. Techniques are those for inference: pruned
    weights, and one engine.
    """

    kind: Literal["inference"] = "inference"
    measure_steps: PositiveInt = 20
    processes: Literal[1] = 1

    @staticmethod
    def _takes(lever):
        return lever.at_inference

    def build(self, *, gpu=None, parts=None):
        """As of a training step: one forward pass on a batch of random tokens, whole and the same on any GPU."""

        def make() -> Step:
            set_seed(self.seed)
            device = "cuda" if torch.cuda.is_available() else "cpu"
            model = self.make_model().eval()
            batch = {name: tensor.to(device) for name, tensor in self.make_batch().items() if name != "labels"}
            if device != "cpu":
                model.to(device)
            for lever in self.levers():
                lever.prepare(model)
            forward = next(filter(None, (lever.forward_pass(model, batch) for lever in self.levers())), None)

            def step():
                with torch.no_grad():
                    forward() if forward else model(**batch)

            return step

        return make

    def steps_to_settle(self):
        return 1

    def carry_out(self, checkpoints):
        techniques.check_available(self.levers())
        before = psutil.Process().memory_info().rss
        step = self.build()()
        for _ in range(WARM_UP):
            step()
        grown = psutil.Process().memory_info().rss - before
        times = sorted(1e3 * timed(step) / self.batch_size for _ in range(self.measure_steps))
        metrics = {
            "resident_mib": grown / MIB,
            "sample_time_ms": statistics.median(times),
            "sample_time_p95_ms": times[max(0, -(-95 * len(times) // 100) - 1)],  # the nearest rank
        }
        del step  # and its model: the next one is measured alone
        if all(lever.in_pytorch for lever in self.levers()):
            metrics |= self._allocated()
        return {"metrics": metrics, "curves": {"sample_times_ms": [round(t, 4) for t in times]}, "data": {}}

    def _allocated(self) -> dict[str, float]:
        report, _ = measured(self.build(), iterations=1)
        # The pass's own: making a model and factoring its projections holds more than a small batch does.
        peak = max(report.iteration_peaks)
        parameters = report.most_by_category["parameters"]
        if self.budget_mib and peak / MIB > self.budget_mib:
            raise MemoryError(f"peak {peak / MIB:.1f} MiB passes the budget of {self.budget_mib:g} MiB")
        return {
            "peak_allocated_mib": peak / MIB,
            "parameters_mib": parameters / MIB,
            "beside_parameters_mib": (peak - parameters) / MIB,
        }
