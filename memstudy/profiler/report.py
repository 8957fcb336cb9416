"""What a training step held in memory: the report that a measurement and a prediction share."""

from __future__ import annotations

from dataclasses import dataclass

from memstudy.profiler.events import CATEGORIES, MIB, OutOfMemory


@dataclass(frozen=True)
class MemoryReport:
    """What a training step held in memory, in bytes; ``*_mib`` in MiB (2^20 bytes).

    Attributes
    ----------
    device : str
        Where it was measured, or for which it was predicted.
    kind : str
        ``measured`` or ``predicted``.
    peak_bytes : int
        Most bytes allocated at once, over building and all steps.
    peak_by_category : dict
        The same moment, by category; the values add up to ``peak_bytes``.
    peak_by_phase : dict
        Most bytes allocated at once in each phase, over all steps.
    forward_end_by_category : dict
        When the last forward pass had ended and its backward pass began.
    iteration_peaks : tuple of int
        The peak of each step; the first has no optimizer state before its end.
    timeline : list of tuple
        ``(time since the step began [ms], phase, bytes by category)`` after each event of the last step.
    modules : dict
        Bytes of activations alive at the end of the last forward pass, by the module that made them.
    peak_reserved_bytes : int or None
        What the CUDA caching allocator had taken from the device at most; None elsewhere.
    requested_bytes : int or None
        On a predicted GPU: the most that tensors alone asked for at once, before the allocator rounds it up and without
        what kernels use inside themselves.
    workspace_bytes : int
        On a predicted GPU: cuBLAS's workspaces among ``peak_bytes``, counted under ``other``.
    context_bytes : int
        On a predicted GPU: what the process takes besides the allocator's segments.
    memory_bytes : int or None
        All memory of the predicted GPU.
    out_of_memory : OutOfMemory or None
        On a predicted GPU: the request that would fail there; None when the step fits.
    unverified : tuple of str
        On a predicted GPU: ops that no rule covers, predicted as their CPU kernels, and what is not counted.
    """

    device: str
    kind: str
    peak_bytes: int
    peak_by_category: dict[str, int]
    peak_by_phase: dict[str, int]
    forward_end_by_category: dict[str, int]
    iteration_peaks: tuple[int, ...]
    timeline: list[tuple[float, str, dict[str, int]]]
    modules: dict[str, int]
    peak_reserved_bytes: int | None = None
    requested_bytes: int | None = None
    workspace_bytes: int = 0
    context_bytes: int = 0
    memory_bytes: int | None = None
    out_of_memory: OutOfMemory | None = None
    unverified: tuple[str, ...] = ()

    @property
    def peak_allocated_mib(self) -> float:
        """Most memory allocated at once [MiB]."""
        return self.peak_bytes / MIB

    @property
    def most_by_category(self) -> dict[str, int]:
        """Most bytes of each category at any time of the last step; at different times, so they don't add up."""
        return {name: max(live[name] for _, _, live in self.timeline) for name in CATEGORIES}

    @property
    def peak_reserved_mib(self) -> float | None:
        """Most memory reserved by the caching allocator [MiB]; None without one."""
        return None if self.peak_reserved_bytes is None else self.peak_reserved_bytes / MIB

    @property
    def whole_gpu_mib(self) -> float | None:
        """What the GPU's own monitor would show of the process [MiB]: segments and context; None without a GPU."""
        return None if self.peak_reserved_bytes is None else (self.peak_reserved_bytes + self.context_bytes) / MIB

    def waterfall_mib(self) -> dict[str, float]:
        """The whole of the peak in parts that add up [MiB]: the categories, then what a GPU adds to them.

        ``other`` without the workspace; ``fragmentation`` is what the allocator has reserved beyond its peak.
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
        return row

    def timeline_mib(self, points: int) -> list[list]:
        """The timeline thinned to ``points`` rows ``[ms, phase, MiB of each category]``.

        Of each stretch the highest moment is kept, so a thinned timeline has the step's peak.
        """
        stretch = max(1, -(-len(self.timeline) // points))
        highest = (
            max(self.timeline[i : i + stretch], key=lambda row: sum(row[2].values()))
            for i in range(0, len(self.timeline), stretch)
        )
        return [
            [round(ms, 3), phase, *(round(live[name] / MIB, 3) for name in CATEGORIES)] for ms, phase, live in highest
        ]
