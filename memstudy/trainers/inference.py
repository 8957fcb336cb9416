"""Forward passes alone: their memory beside the parameters, and the time for each sample.

PyTorch's allocations are measured to the byte. PyTorch does not see the memory of other engines, so the growth of the
process is reported as well, to compare engines by.
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

    ``measure_steps`` batches of random tokens are timed one by one. The techniques are those for inference: pruned
    weights, and at most one engine.
    """

    kind: Literal["inference"] = "inference"
    measure_steps: PositiveInt = 20
    processes: Literal[1] = 1

    @staticmethod
    def _takes(technique):
        return technique.at_inference

    def build(self, *, gpu=None, parts=None):
        """As `StepRun.build`, for one forward pass on a whole batch of random tokens, the same for any ``gpu``."""

        def make() -> Step:
            set_seed(self.seed)
            device = "cuda" if torch.cuda.is_available() else "cpu"
            model = self.make_model().eval()
            batch = {name: tensor.to(device) for name, tensor in self.make_batch().items() if name != "labels"}
            if device != "cpu":
                model.to(device)
            for technique in self.parsed_techniques():
                technique.prepare(model)
            forward = next(
                filter(None, (technique.forward_pass(model, batch) for technique in self.parsed_techniques())), None
            )

            def step():
                with torch.no_grad():
                    forward() if forward else model(**batch)

            return step

        return make

    def steps_to_settle(self):
        return 1

    def carry_out(self, checkpoints):
        techniques.check_available(self.parsed_techniques())
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
        del step  # frees its model: the next one is measured alone
        if all(technique.in_pytorch for technique in self.parsed_techniques()):
            metrics |= self._allocated()
        return {"metrics": metrics, "curves": {"sample_times_ms": [round(t, 4) for t in times]}, "data": {}}

    def _allocated(self) -> dict[str, float]:
        report, _ = measured(self.build(), iterations=1)
        # The peak of the pass alone: building the model and factoring its projections can take more than a small batch.
        peak = max(report.iteration_peaks)
        parameters = report.most_by_category["parameters"]
        self.check_budget(peak / MIB)
        return {
            "peak_allocated_mib": peak / MIB,
            "parameters_mib": parameters / MIB,
            "beside_parameters_mib": (peak - parameters) / MIB,
        }
