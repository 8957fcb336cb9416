"""One attention layer alone, as a run: memory and time of its forward and backward pass, in fp32.

The memory is the peak between the layer's call and the end of backward: the input and its gradient, the weights'
gradients, tensors saved for backward and scratch. The weights, which a model has anyway, and the output's gradient,
which belongs to the next layer, are not counted. The peak is given in MiB and in U, one fp32 tensor of the input's
shape.

The time is also given as a ratio to bare projections, four ``Linear`` on the same input. The layer and the projections
are timed in turn, so that other load on the machine slows both.
"""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import nn
from transformers import set_seed

from memstudy.attention import AttentionConfig, Unavailable
from memstudy.attention.settings import check_window, mixer_of
from memstudy.profiler import MIB, Gpu, MemoryReport, measure, predict
from memstudy.profiler.roles import Step
from memstudy.studies.attention_layer.peers import PEERS
from memstudy.trainers.base import PROCESS_MIB, SLACK, Run, gpu_needs, megabytes, once_for_equal_steps
from memstudy.trainers.timing import WARM_UP, timed


class LayerRun(Run):
    """Every choice of one attention layer measured alone: forward and backward in fp32, no optimizer.

    ``who`` says whose layer of the variant is measured: ``memstudy`` or a name in ``peers.PEERS``. With ``cross`` the
    layer attends to a second sequence of the same shape instead of its own. ``measure_steps`` steps are timed, on the
    process's threads.
    """

    kind: Literal["layer"] = "layer"
    who: str = "memstudy"
    attention: dict[str, bool | str | int | float]
    seq_len: Annotated[int, Field(ge=2)]
    batch_size: PositiveInt = 1
    hidden_size: PositiveInt = 512
    n_heads: PositiveInt = 8
    is_causal: bool
    cross: bool = False
    measure_steps: PositiveInt = 5
    seed: NonNegativeInt = 0
    techniques: ClassVar[tuple[str, ...]] = ()
    processes: ClassVar[int] = 1

    @model_validator(mode="after")
    def _consistent(self):
        if self.hidden_size % self.n_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is not a multiple of n_heads={self.n_heads}")
        mixer = self.mixer()
        mixer.check_causal(self.is_causal)
        check_window(mixer, self.seq_len)
        if self.cross and self.is_causal:
            raise ValueError("cross=true needs is_causal=false: the two sequences have no common order")
        if self.cross and "memory" not in inspect.signature(mixer.module.forward).parameters:
            raise ValueError(f"cross=true: the layer of {mixer.name!r} attends to its own sequence only")
        if self.who == "memstudy":
            return self
        if self.who not in PEERS:
            raise ValueError(f"unknown who {self.who!r}; known: memstudy, {', '.join(PEERS)}")
        if PEERS[self.who].variant != mixer.name:
            raise ValueError(f"who={self.who!r} has {PEERS[self.who].variant!r}, not {mixer.name!r}")
        return self

    def mixer(self) -> AttentionConfig:
        """Config of the attention variant."""
        return mixer_of(self.attention)

    def make_layer(self) -> nn.Module:
        """The layer with random weights, from torch's global generator.

        Raises
        ------
        Unavailable
            When the peer is not installed here.
        """
        if self.who == "memstudy":
            mixer = self.mixer()
            return mixer.module(self.hidden_size, self.n_heads, mixer, is_causal=self.is_causal)
        return PEERS[self.who].make(self)

    def build(self, *, gpu: str | Gpu | None = None) -> Callable[[], Step]:
        """The argument of ``profiler.predict``: makes the layer and returns its step, the same for every ``gpu``."""
        return self._one_step

    def foretell(self, gpu: str | Gpu | None = None) -> MemoryReport:
        """Predict a step on ``gpu``, or on this CPU if ``gpu`` is empty; its peak counts all tensors."""
        return predict(self.build(), gpu=gpu or None)

    def execute(self, checkpoints):
        unit = 4 * self.batch_size * self.seq_len * self.hidden_size  # bytes
        device = "cuda" if torch.cuda.is_available() else "cpu"
        peak = self.peak_bytes(measure, device=device)
        metrics = {"peak_allocated_mib": peak / MIB, "peak_u": peak / unit}
        if device == "cpu":
            metrics["predicted_peak_mib"] = self.peak_bytes(predict) / MIB
        steps, bare = self._times(device)
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

    def peak_bytes(self, follow: Callable[..., MemoryReport], *, device: str = "cpu") -> int:
        """Peak of one step [bytes], by ``follow`` (``measure`` or ``predict``)."""
        report, before = self.followed(follow, device=device)
        return max(report.iteration_peaks) - before

    def followed(self, follow: Callable[..., MemoryReport], *, device: str = "cpu") -> tuple[MemoryReport, int]:
        """The report of ``follow`` on two steps, and what is allocated before them [bytes]."""
        before: list[int] = []

        def build() -> Step:
            layer, inputs, direction = self._make(device)
            storages = (t.untyped_storage() for t in (*layer.parameters(), *layer.buffers(), direction))
            before.append(sum({storage._cdata: storage.nbytes() for storage in storages}.values()))
            return _step([layer], inputs, direction)

        return follow(build, iterations=2), before[0]

    def _one_step(self) -> Step:
        layer, inputs, direction = self._make("cpu")
        return _step([layer], inputs, direction)

    def _times(self, device: str) -> tuple[list[float], list[float]]:
        """Times of the steps of the layer, and of the bare projections [s]."""
        layer, inputs, direction = self._make(device)
        bare = [nn.Linear(self.hidden_size, self.hidden_size, device=device) for _ in range(4)]
        steps = _step([layer], inputs, direction), _step(bare, inputs[:1], direction)
        for step in steps * WARM_UP:
            step()
        pairs = [[timed(step) for step in steps] for _ in range(self.measure_steps)]
        return [pair[0] for pair in pairs], [pair[1] for pair in pairs]

    def _make(self, device: str) -> tuple[nn.Module, list[torch.Tensor], torch.Tensor]:
        """The layer, its input (with ``cross`` also the second sequence), the gradient of its output."""
        set_seed(self.seed)
        shape = (self.batch_size, self.seq_len, self.hidden_size)
        with torch.device(device):  # made on the device: a module of fake tensors can't be moved
            layer = self.make_layer()
            inputs = [torch.randn(shape, requires_grad=True) for _ in range(1 + self.cross)]
            return layer, inputs, torch.randn(shape)

    def needs(self, gpu=""):
        try:
            follow = partial(self.followed, partial(predict, gpu=gpu or None))
            report, before = once_for_equal_steps(self, gpu, follow)
        except Unavailable:  # the run itself reports why
            return {"mem_mb": megabytes(PROCESS_MIB)}
        if gpu:  # the bare projections take less time than a layer that has them too
            return {"mem_mb": megabytes(2 * PROCESS_MIB), **gpu_needs(report, 2 + 2 * (WARM_UP + self.measure_steps))}
        return {"mem_mb": megabytes(PROCESS_MIB + SLACK * (max(report.iteration_peaks) - before) / MIB)}


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
