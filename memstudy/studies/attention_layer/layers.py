"""One attention layer alone: memory and time of its forward and backward pass, in fp32.

The memory is the peak between the layer's call and the end of backward: the input and its gradient, the weights'
gradients, tensors saved for backward and scratch. The weights, which a model has anyway, and the output's gradient,
which belongs to the next layer, are not counted. The peak is given in MiB and in U, one fp32 tensor of the input's
shape.

The time is also given as a ratio to bare projections, four ``Linear`` on the same input. The layer and the projections
are timed in turn, so that other load on the machine slows both.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import set_seed

from memstudy.profiler import MIB, MemoryReport, measure, predict
from memstudy.profiler.roles import Step
from memstudy.trainers.timing import WARM_UP, timed

if TYPE_CHECKING:
    from memstudy.studies.attention_layer.run import LayerRun


def execute(run: LayerRun) -> dict:
    """Execute ``run`` in this process.

    Returns
    -------
    dict
        ``metrics`` (flat, units in the names), ``curves`` and ``data``.

    Raises
    ------
    Unavailable
        When the peer is not installed here.
    """
    unit = 4 * run.batch_size * run.seq_len * run.hidden_size  # bytes
    device = "cuda" if torch.cuda.is_available() else "cpu"
    peak = peak_bytes(run, measure, device=device)
    metrics = {"peak_allocated_mib": peak / MIB, "peak_u": peak / unit}
    if device == "cpu":
        metrics["predicted_peak_mib"] = peak_bytes(run, predict) / MIB
    steps, bare = _times(run, device)
    ratio = statistics.median(steps) / statistics.median(bare)
    ratios = [step / four for step, four in zip(steps, bare, strict=True)]
    metrics |= {
        "step_time_ms": 1e3 * statistics.median(steps),
        "step_time_min_ms": 1e3 * min(steps),
        "step_time_max_ms": 1e3 * max(steps),
        "projections_time_ms": 1e3 * statistics.median(bare),
        "projections_time_min_ms": 1e3 * min(bare),
        "projections_time_max_ms": 1e3 * max(bare),
        "time_ratio": ratio,
        "time_ratio_min": min(ratios),
        "time_ratio_max": max(ratios),
    }
    times = {"step_times_ms": steps, "projections_times_ms": bare}
    return {
        "metrics": metrics,
        "curves": {name: [round(1e3 * t, 3) for t in seconds] for name, seconds in times.items()},
        "data": {},
    }


def peak_bytes(run: LayerRun, follow: Callable[..., MemoryReport], *, device: str = "cpu") -> int:
    """Peak of one step of ``run`` [bytes], by ``follow`` (``measure`` or ``predict``)."""
    report, before = followed(run, follow, device=device)
    return max(report.iteration_peaks) - before


def followed(run: LayerRun, follow: Callable[..., MemoryReport], *, device: str = "cpu") -> tuple[MemoryReport, int]:
    """The report of ``follow`` on two steps of ``run``, and what is allocated before them [bytes]."""
    before: list[int] = []

    def build() -> Step:
        layer, inputs, direction = _make(run, device)
        storages = (t.untyped_storage() for t in (*layer.parameters(), *layer.buffers(), direction))
        before.append(sum({storage._cdata: storage.nbytes() for storage in storages}.values()))
        return _step([layer], inputs, direction)

    return follow(build, iterations=2), before[0]


def one_step(run: LayerRun) -> Step:
    """The step of ``run`` on this CPU, or on fake tensors: forward and backward of the layer."""
    layer, inputs, direction = _make(run, "cpu")
    return _step([layer], inputs, direction)


def _times(run: LayerRun, device: str) -> tuple[list[float], list[float]]:
    """Times of the steps of the layer, and of the bare projections [s]."""
    layer, inputs, direction = _make(run, device)
    bare = [nn.Linear(run.hidden_size, run.hidden_size, device=device) for _ in range(4)]
    steps = _step([layer], inputs, direction), _step(bare, inputs[:1], direction)
    for step in steps * WARM_UP:
        step()
    pairs = [[timed(step) for step in steps] for _ in range(run.measure_steps)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _make(run: LayerRun, device: str) -> tuple[nn.Module, list[torch.Tensor], torch.Tensor]:
    """The layer, its input (with ``cross`` also the second sequence), the gradient of its output."""
    set_seed(run.seed)
    shape = (run.batch_size, run.seq_len, run.hidden_size)
    with torch.device(device):  # made on the device: a module of fake tensors can't be moved
        layer = run.make_layer()
        inputs = [torch.randn(shape, requires_grad=True) for _ in range(1 + run.cross)]
        return layer, inputs, torch.randn(shape)


def _step(modules: Sequence[nn.Module], inputs: list[torch.Tensor], direction: torch.Tensor) -> Step:
    others = dict(zip(("memory",), inputs[1:], strict=False))

    def step():
        torch.autograd.backward([_Along.apply(module(inputs[0], **others), direction) for module in modules])
        for leaf in (*inputs, *(parameter for module in modules for parameter in module.parameters())):
            leaf.grad = None

    return step


class _Along(torch.autograd.Function):
    """Dot product of output and direction: a loss that allocates no tensor of the output's size."""

    @staticmethod
    def forward(ctx, output, direction):
        ctx.direction = direction
        return torch.dot(output.flatten(), direction.flatten())

    @staticmethod
    def backward(ctx, grad_loss):
        return ctx.direction, None  # each loss is a root of backward: its own gradient is 1
