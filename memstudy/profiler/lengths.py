"""The memory of a sequence of training steps of unequal lengths: a few lengths are traced, the others follow from them.

Steps of one form, as of two rows with padding, ask for one sequence of blocks, whose sizes follow the number of tokens
by `formulas`. Where no formulas meet all lengths traced, as where a kernel changes between two lengths, the range of
lengths is halved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from memstudy.profiler import cuda
from memstudy.profiler.catalogue import Gpu, find_gpu
from memstudy.profiler.events import MIB, OutOfMemory
from memstudy.profiler.formulas import Formulas, StepShape, spread
from memstudy.profiler.prediction import follow
from memstudy.profiler.programs import Program, Replay, programs_of
from memstudy.profiler.roles import Step

PARTS = ("first", "middle", "last")
FEW, MORE = 4, 9  # lengths of a range that are traced: to find lines, and to find other formulas
MOST_TRACED = 300  # lengths to trace before a sequence is refused


@dataclass(frozen=True)
class LengthsReport:
    """The predicted memory of a sequence of steps, in bytes.

    Attributes
    ----------
    device : str
    shapes : tuple of StepShape
        The batches, in order.
    step_peaks : tuple of int
        Most bytes allocated at once in each step.
    requested_peaks : tuple of int
        As ``step_peaks``, before the allocator's rounding.
    step_reserved : tuple of int
        Bytes that the caching allocator holds from the device after each step; empty on a CPU.
    reserved_peaks : tuple of int
        Most bytes held in each step; empty on a CPU.
    context_bytes : int
        The process's memory outside the allocator's segments.
    memory_bytes : int or None
        All memory of the GPU.
    out_of_memory : OutOfMemory or None
        The first request that fails; its ``iteration`` is the step, from 1.
    refused : tuple of int
        All steps with a request that fails, from 1; after each, the replay goes on with an empty cache.
    bytes_per_token, bytes_besides : float
        The line of requested peaks by a step's tokens, of the shapes traced.
    worst_deviation : float
        How far the line is from a traced peak, at most, as a share of the peak; 0 for fewer than three.
    traced : int
        How many shapes were traced; the blocks of the others follow.
    unverified : tuple of str
        As `MemoryReport.unverified`.
    """

    device: str
    shapes: tuple[StepShape, ...]
    step_peaks: tuple[int, ...]
    requested_peaks: tuple[int, ...]
    step_reserved: tuple[int, ...]
    reserved_peaks: tuple[int, ...]
    context_bytes: int
    memory_bytes: int | None
    out_of_memory: OutOfMemory | None
    refused: tuple[int, ...]
    bytes_per_token: float
    bytes_besides: float
    worst_deviation: float
    traced: int
    unverified: tuple[str, ...]
    time: None = None  # that of unequal steps is not predicted

    @property
    def worst(self) -> int:
        """The step with the highest peak, from 1."""
        return max(range(len(self.step_peaks)), key=self.step_peaks.__getitem__) + 1

    @property
    def peak_allocated_mib(self) -> float:
        """The highest peak [MiB]."""
        return max(self.step_peaks) / MIB

    @property
    def whole_gpu_mib(self) -> float | None:
        """The process's memory at most, with the context [MiB]; None on a CPU."""
        return (max(self.reserved_peaks) + self.context_bytes) / MIB if self.reserved_peaks else None


def over_lengths(
    build_for: Callable[[Sequence[StepShape]], Callable[[], Step]],
    shapes: Sequence[StepShape | int],
    *,
    gpu: str | Gpu | None = None,
    expandable_segments: bool = False,
    empty_cache_every: int | None = None,
    progress: Callable[[Sequence[StepShape]], Iterable[StepShape]] = iter,
) -> LengthsReport:
    """Predict the memory of each of a sequence of steps with batches of unequal lengths.

    Parameters
    ----------
    build_for : callable
        From shapes to the ``build`` of `predict`, whose n-th step has the n-th shape.
    shapes : sequence of StepShape or int
        The batch of each step; a number is that of the tokens of a batch of one row.
    gpu, expandable_segments
        As in `predict`.
    empty_cache_every : int, optional
        ``torch.cuda.empty_cache()`` is called before the first step and each ``empty_cache_every`` steps.
    progress : callable
        Iterates over the shapes as they are replayed, to show how far the replay is.

    Raises
    ------
    ValueError
        As `predict`; without a shape, for fewer than 1 token or row, for ``empty_cache_every`` below 1, and when a
        step's blocks do not follow from those of other lengths.
    """
    wanted = tuple(shape if isinstance(shape, StepShape) else StepShape(shape) for shape in shapes)
    if not wanted:
        raise ValueError("no lengths: at least 1 step is needed")
    for place, shape in enumerate(wanted, start=1):
        if shape.tokens < 1 or shape.rows < 1:
            raise ValueError(f"step {place} has {shape.rows} × {shape.tokens} tokens: at least 1 × 1 is needed")
    if empty_cache_every is not None and empty_cache_every < 1:
        raise ValueError(f"empty_cache_every={empty_cache_every}: at least 1 step lies between")
    card = find_gpu(gpu) if isinstance(gpu, str) else gpu
    known = _Known(build_for, wanted, card)
    replayed = Replay(known.building, card, expandable_segments=expandable_segments)
    for place, shape in enumerate(progress(wanted)):
        if empty_cache_every and place % empty_cache_every == 0:
            replayed.empty_cache()
        replayed.step(*known.at(place, shape), name=shape if place >= known.head else place)
    besides, per_token, deviation = known.line(replayed.requested_peaks)
    recorder = known.recorder
    return LengthsReport(
        device="cpu" if card is None else card.name,
        shapes=wanted,
        step_peaks=tuple(replayed.peaks),
        requested_peaks=tuple(replayed.requested_peaks),
        step_reserved=tuple(replayed.reserved),
        reserved_peaks=tuple(replayed.reserved_peaks),
        context_bytes=0 if card is None else int(card.context_mib * MIB),
        memory_bytes=None if card is None else int(card.memory_mib * MIB),
        out_of_memory=replayed.out_of_memory,
        refused=tuple(replayed.refused),
        bytes_per_token=per_token,
        bytes_besides=besides,
        worst_deviation=deviation,
        traced=len(known.exact),
        unverified=tuple(sorted(recorder.assumed | (set() if card is None else recorder.below.unverified))),
    )


class _Known:
    """What is known of the steps: the traced ones, and the formulas of the others.

    Attributes
    ----------
    exact : dict
        Program and sizes of each traced shape.
    head : int
        How many steps are traced as they come.
    """

    def __init__(self, build_for: Callable, wanted: tuple[StepShape, ...], card: Gpu | None):
        self.exact: dict[StepShape, tuple[Program, np.ndarray]] = {}
        self._build_for, self._wanted, self._card = build_for, wanted, card
        self._formulas: dict[StepShape, Formulas] = {}
        self._same: dict[Program, Program] = {}
        # The first update makes the optimizer's state, and the step that follows frees what that one has left.
        self.head = next((place for place, shape in enumerate(wanted) if shape.part in ("", "last")), len(wanted)) + 2
        by_form: dict[tuple, list[StepShape]] = {}
        for shape in sorted(set(wanted[self.head :])):
            by_form.setdefault(shape.form, []).append(shape)
        self._trace([shape for stretch in by_form.values() for shape in spread(stretch, FEW)])
        self._learn(list(by_form.values()))

    def at(self, place: int, shape: StepShape) -> tuple[Program, np.ndarray]:
        """Program and sizes of the step at ``place``."""
        if place < self.head:
            return self._head[place]
        if shape in self.exact:
            return self.exact[shape]
        formulas = self._formulas[shape]
        return formulas.program, formulas.sizes([shape])[0]

    def line(self, peaks: Sequence[int]) -> tuple[float, float, float]:
        """Bytes besides tokens and for each, and the worst deviation, of the ``peaks`` of the commonest form."""
        steps = [(place, shape) for place, shape in enumerate(self._wanted) if place >= self.head] or [
            (0, self._wanted[0])
        ]
        common = Counter(shape.form[:-1] for _, shape in steps).most_common(1)[0][0]
        points = {
            shape.tokens * shape.rows: peaks[place]
            for place, shape in steps
            if shape.form[:-1] == common and (shape in self.exact or place < self.head)
        }
        (low, least), (high, most) = min(points.items()), max(points.items())
        slope = (most - least) / (high - low) if high > low else 0.0
        besides = least - slope * low
        return besides, slope, max(abs(besides + slope * tokens - peak) / peak for tokens, peak in points.items())

    def _learn(self, stretches: list[list[StepShape]]) -> None:
        """Find formulas for each of ``stretches``, sorted shapes of one form; halve where there is none."""
        while stretches:
            missed = [stretch for stretch in stretches if not self._follow(stretch)]
            self._trace([shape for stretch in missed for shape in spread(stretch, MORE)])
            halves = []
            for stretch in missed:
                if not self._follow(stretch):
                    halves += [stretch[: len(stretch) // 2], stretch[len(stretch) // 2 :]]
            self._trace([shape for stretch in halves for shape in spread(stretch, FEW)])
            stretches = halves

    def _follow(self, stretch: list[StepShape]) -> bool:
        """Whether all of ``stretch`` are traced, or formulas found that meet those traced."""
        traced = [shape for shape in stretch if shape in self.exact]
        if len(traced) == len(stretch):
            return True
        if len({self.exact[shape][0] for shape in traced}) > 1:
            return False
        formulas = Formulas.through(traced, [self.exact[shape] for shape in traced], stretch)
        if formulas is not None:
            self._formulas |= dict.fromkeys(stretch, formulas)
        return formulas is not None

    def _trace(self, shapes: list[StepShape]) -> None:
        """Trace the building, the first steps, and those of ``shapes`` that are not known."""
        new = [shape for shape in dict.fromkeys(shapes) if shape not in self.exact]
        if self.exact and not new:
            return
        if len(self.exact) + len(new) > MOST_TRACED:
            raise ValueError(
                f"the steps' blocks follow from no {MOST_TRACED} lengths: pad the lengths to multiples of 64"
            )
        head = self._wanted[: self.head]
        steps = [*head, *self._in_turn(new, head[-1])]
        closing = steps[-1]._replace(part="first" if steps[-1].part else "")  # shows what the last one leaves to it
        steps.append(closing)
        self.recorder, events = follow(self._build_for(steps), len(steps), self._card, 1, cuda.TODAY)
        self.building, *told = programs_of(events)
        self._head = told[: len(head)]
        for shape, (program, sizes) in list(zip(steps, told, strict=True))[len(head) : -1]:
            self.exact[shape] = self._same.setdefault(program, program), sizes

    def _in_turn(self, shapes: list[StepShape], before: StepShape) -> Iterator[StepShape]:
        """``shapes`` as steps after ``before``: those that are parts of updates in whole updates."""
        if before.part in ("first", "middle"):
            yield before._replace(part="last")
        yield from (shape for shape in shapes if not shape.part)
        parts = [[shape for shape in shapes if shape.part == part] for part in PARTS]
        for number in range(max(map(len, parts))):
            for part, some in zip(PARTS, parts, strict=True):
                if some:
                    yield some[number % len(some)]
                elif part != "middle":
                    yield next(filter(None, parts))[0]._replace(part=part)
