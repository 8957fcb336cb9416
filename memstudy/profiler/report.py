"""The report of a training step's memory, shared by measurement and prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from memstudy.profiler.catalogue import Gpu
from memstudy.profiler.events import CATEGORIES, MIB, Event, OutOfMemory
from memstudy.profiler.time.cost import StepTime
from memstudy.profiler.time.ops import Work


@dataclass(frozen=True)
class MemoryReport:
    """Memory of a training step in bytes; ``*_mib`` in MiB (2^20 bytes).

    Attributes
    ----------
    device : str
        The device measured, or predicted for.
    kind : str
        ``measured`` or ``predicted``.
    peak_bytes : int
        Most bytes allocated at once, over building and all steps.
    peak_by_category : dict
        Bytes by category at the moment of the peak; they add up to ``peak_bytes``.
    peak_by_phase : dict
        Most bytes allocated at once in each phase, over all steps.
    forward_end_by_category : dict
        Bytes by category when the last forward pass has ended and its backward pass begins.
    iteration_peaks : tuple of int
        The peak of each step; the first step has no optimizer state until its end.
    timeline : list of tuple
        ``(time since the step began [ms], phase, bytes by category)`` after each event of the last step.
    modules : dict
        Bytes of activations alive at the end of the last forward pass, by the module that made them.
    peak_reserved_bytes : int or None
        Most bytes that the CUDA caching allocator held from the device; None on a CPU.
    requested_bytes : int or None
        On a predicted GPU: most bytes that tensors requested at once, before the allocator's rounding and without the
        kernels' internal memory.
    workspace_bytes : int
        On a predicted GPU: cuBLAS's workspaces among ``peak_bytes``, counted under ``other``.
    context_bytes : int
        On a predicted GPU: the process's memory outside the allocator's segments.
    memory_bytes : int or None
        All memory of the predicted GPU.
    out_of_memory : OutOfMemory or None
        On a predicted GPU: the request that would fail there; None when the step fits.
    unverified : tuple of str
        Of a prediction: what had to be assumed; for a GPU also ops that no rule covers, predicted as their CPU kernels,
        and memory not counted.
    time : StepTime or None
        The predicted time of the last step; None for generation, compiled modules, a measurement, a CPU, and a GPU
        described without its speed.
    fused : MemoryReport or None
        Of a prediction with modules given to ``torch.compile``: the same with fused kernels, the lower end of a band
        whose upper end is this report, in which each op's result has memory. None without such modules.
    time_by_pass : dict
        Of predicted generation, as ``time``: of ``prefill``, and of a ``token`` that comes after the whole text.
    gpu : Gpu or None
        The predicted GPU.
    events : sequence of Event
        All events, of building and of every step, from which the rest follows.
    issued : sequence of tuple
        Phase and work of each op of the last step, where its time is predicted; an accumulated batch has two parts.
    """

    device: str
    kind: str
    peak_bytes: int
    peak_by_category: dict[str, int]
    peak_by_phase: dict[str, int]
    forward_end_by_category: dict[str, int]
    iteration_peaks: tuple[int, ...]
    timeline: list[tuple[float, str, dict[str, int]]] = field(repr=False)
    modules: dict[str, int]
    peak_reserved_bytes: int | None = None
    requested_bytes: int | None = None
    workspace_bytes: int = 0
    context_bytes: int = 0
    memory_bytes: int | None = None
    out_of_memory: OutOfMemory | None = None
    unverified: tuple[str, ...] = ()
    time: StepTime | None = None
    fused: MemoryReport | None = None
    time_by_pass: dict[str, StepTime] = field(default_factory=dict)
    gpu: Gpu | None = None
    events: Sequence[Event] = field(default=(), repr=False, compare=False)  # with times of this run
    issued: Sequence[tuple[str, Work]] = field(default=(), repr=False)

    @property
    def peak_allocated_mib(self) -> float:
        """Most memory allocated at once [MiB]."""
        return self.peak_bytes / MIB

    @property
    def at_rest_bytes(self) -> int:
        """Bytes allocated after the last step; of generation, after the last token, with the cache."""
        return sum(self.timeline[-1][2].values())

    @property
    def most_by_category(self) -> dict[str, int]:
        """Most bytes of each category at any time of the last step; at different times, so they don't add up."""
        return {name: max(live[name] for _, _, live in self.timeline) for name in self.peak_by_category}

    @property
    def peak_reserved_mib(self) -> float | None:
        """Most memory reserved by the caching allocator [MiB]; None without one."""
        return None if self.peak_reserved_bytes is None else self.peak_reserved_bytes / MIB

    @property
    def whole_gpu_mib(self) -> float | None:
        """The process's memory as ``nvidia-smi`` would show it [MiB]: segments and context; None without a GPU."""
        return None if self.peak_reserved_bytes is None else (self.peak_reserved_bytes + self.context_bytes) / MIB

    def waterfall_mib(self) -> dict[str, float]:
        """The peak in parts that add up [MiB]: the categories, then a GPU's workspace, fragmentation and context.

        ``other`` excludes the workspace; ``fragmentation`` is the reserved memory beyond the allocated peak.
        """
        parts = dict(self.peak_by_category)
        if self.peak_reserved_bytes is not None:
            parts["other"] -= self.workspace_bytes
            parts["workspace"] = self.workspace_bytes
            parts["fragmentation"] = self.peak_reserved_bytes - self.peak_bytes
            parts["context"] = self.context_bytes
        return {name: size / MIB for name, size in parts.items()}

    def scalars(self) -> dict[str, float]:
        """Flat metrics for a record, each with its unit in its name."""
        peaks = self.iteration_peaks
        row = {
            "peak_allocated_mib": self.peak_allocated_mib,
            "step_peak_mean_mib": sum(peaks) / len(peaks) / MIB,
            "step_peak_max_mib": max(peaks) / MIB,
        }
        row |= {f"peak_{name}_mib": n / MIB for name, n in self.peak_by_category.items()}
        row |= {f"most_{name}_mib": n / MIB for name, n in self.most_by_category.items()}
        row |= {f"peak_in_{name}_mib": n / MIB for name, n in self.peak_by_phase.items()}
        row |= {f"forward_end_{name}_mib": n / MIB for name, n in self.forward_end_by_category.items()}
        if self.peak_reserved_mib is not None:
            row["peak_reserved_mib"] = self.peak_reserved_mib
        if self.fused is not None:
            row["fused_peak_allocated_mib"] = self.fused.peak_allocated_mib
            if self.fused.peak_reserved_mib is not None:
                row["fused_peak_reserved_mib"] = self.fused.peak_reserved_mib
        if self.time is not None:
            row |= {
                "step_time_ms": self.time.step_time_ms,
                "step_time_low_ms": self.time.low_ms,
                "step_time_high_ms": self.time.high_ms,
            }
        return row

    def thinned_timeline(self, points: int) -> list[tuple[float, str, dict[str, int]]]:
        """The timeline thinned to ``points`` rows: each stretch keeps its highest moment, so the peak stays."""
        stretch = max(1, -(-len(self.timeline) // points))
        return [
            max(self.timeline[i : i + stretch], key=lambda row: sum(row[2].values()))
            for i in range(0, len(self.timeline), stretch)
        ]

    def timeline_mib(self, points: int) -> list[list]:
        """The timeline thinned to ``points`` rows ``[ms, phase, MiB of each category]``."""
        return [
            [round(ms, 3), phase, *(round(live[name] / MIB, 3) for name in CATEGORIES)]
            for ms, phase, live in self.thinned_timeline(points)
        ]

    def snapshot(self) -> dict:
        """The step in the format of ``torch.cuda.memory._snapshot``, for PyTorch's memory viewer."""
        from memstudy.profiler.snapshot import snapshot

        return snapshot(self)

    def trace(self) -> dict:
        """The last step as a Chrome trace, which Perfetto opens: memory by category, and ops with their times."""
        from memstudy.profiler.trace import trace

        return trace(self)

    def _repr_html_(self) -> str:
        from memstudy.profiler.drawing import drawn

        return drawn(self)
