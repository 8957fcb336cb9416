"""The memory of a sequence of training steps of unequal lengths: a few lengths are traced, the others follow from them.

Steps of one form, as of two rows with padding, ask for one sequence of blocks, whose sizes follow the number of tokens:
on a line, on a parabola where a mask has a place for each pair of tokens, or on a line of tokens rounded up, as kernels
round them. So each block's size is fitted to some lengths and has to be met, to the byte, at another one. Where no
formula meets all, as where a kernel changes between two lengths, the range is halved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from memstudy.profiler import cuda
from memstudy.profiler.catalogue import Gpu, find_gpu
from memstudy.profiler.events import MIB, OutOfMemory
from memstudy.profiler.prediction import follow
from memstudy.profiler.programs import Program, Replay, programs_of
from memstudy.profiler.roles import Step

HEAD = 2  # steps traced as they come: the first makes the optimizer's state, the second frees what the first has left
ALIGNED = 8  # kernels take other ways where the number of tokens is no multiple
ROUNDED = (8, 16, 32, 64, 128)  # tokens, to whose multiples kernels round
FEW, MORE = 4, 9  # lengths of a range that are traced: to find lines, and to find other formulas
MOST_TRACED = 300  # lengths to trace before a sequence is refused


class StepShape(NamedTuple):
    """The shape of a step's batch.

    Attributes
    ----------
    tokens : int
        The length of each row, padding included.
    rows : int
    padded : bool
        Whether any row is shorter than ``tokens`` and has padding.
    sequences : int
        How many sequences share a row without padding between; 0 where each row is one sequence.
    """

    tokens: int
    rows: int = 1
    padded: bool = False
    sequences: int = 0

    @classmethod
    def of(cls, lengths: Sequence[int], *, flattened: bool = False) -> StepShape:
        """The shape of a batch of texts of ``lengths``: padded to the longest, or ``flattened`` to one row."""
        if flattened:
            return cls(sum(lengths), 1, False, len(lengths))
        return cls(max(lengths), len(lengths), min(lengths) < max(lengths))

    @property
    def form(self) -> tuple[int, bool, bool, bool]:
        """What two shapes must have in common for blocks to follow from one to the other."""
        return self.rows, self.padded, self.sequences > 0, self.tokens % ALIGNED == 0


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
        replayed.step(*known.at(place, shape), name=shape if place >= HEAD else place)
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
    """

    def __init__(self, build_for: Callable, wanted: tuple[StepShape, ...], card: Gpu | None):
        self.exact: dict[StepShape, tuple[Program, np.ndarray]] = {}
        self._build_for, self._wanted, self._card = build_for, wanted, card
        self._formulas: dict[StepShape, _Formulas] = {}
        self._same: dict[Program, Program] = {}
        by_form: dict[tuple, list[StepShape]] = {}
        for shape in sorted(set(wanted[HEAD:])):
            by_form.setdefault(shape.form, []).append(shape)
        self._trace([shape for stretch in by_form.values() for shape in _spread(stretch, FEW)])
        self._learn(list(by_form.values()))

    def at(self, place: int, shape: StepShape) -> tuple[Program, np.ndarray]:
        """Program and sizes of the step at ``place``."""
        if place < HEAD:
            return self._head[place]
        if shape in self.exact:
            return self.exact[shape]
        formulas = self._formulas[shape]
        return formulas.program, formulas.sizes([shape])[0]

    def line(self, peaks: Sequence[int]) -> tuple[float, float, float]:
        """Bytes besides tokens and for each, and the worst deviation, of the ``peaks`` of the commonest form."""
        steps = [(place, shape) for place, shape in enumerate(self._wanted) if place >= HEAD] or [(0, self._wanted[0])]
        common = Counter(shape.form[:3] for _, shape in steps).most_common(1)[0][0]
        points = {
            shape.tokens * shape.rows: peaks[place]
            for place, shape in steps
            if shape.form[:3] == common and (shape in self.exact or place < HEAD)
        }
        (low, least), (high, most) = min(points.items()), max(points.items())
        slope = (most - least) / (high - low) if high > low else 0.0
        besides = least - slope * low
        return besides, slope, max(abs(besides + slope * tokens - peak) / peak for tokens, peak in points.items())

    def _learn(self, stretches: list[list[StepShape]]) -> None:
        """Find formulas for each of ``stretches``, sorted shapes of one form; halve where there is none."""
        while stretches:
            missed = [stretch for stretch in stretches if not self._follow(stretch)]
            self._trace([shape for stretch in missed for shape in _spread(stretch, MORE)])
            halves = []
            for stretch in missed:
                if not self._follow(stretch):
                    halves += [stretch[: len(stretch) // 2], stretch[len(stretch) // 2 :]]
            self._trace([shape for stretch in halves for shape in _spread(stretch, FEW)])
            stretches = halves

    def _follow(self, stretch: list[StepShape]) -> bool:
        """Whether all of ``stretch`` are traced, or formulas found that meet those traced."""
        traced = [shape for shape in stretch if shape in self.exact]
        if len(traced) == len(stretch):
            return True
        if len({self.exact[shape][0] for shape in traced}) > 1:
            return False
        formulas = _Formulas.through(traced, [self.exact[shape] for shape in traced], stretch)
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
        head = self._wanted[:HEAD]
        closing = new[-1:]  # shows what the last one of them leaves to the next step
        steps = [*head, *new, *closing]
        self.recorder, events = follow(self._build_for(steps), len(steps), self._card, 1, cuda.TODAY)
        self.building, *told = programs_of(events)
        self._head = told[: len(head)]
        for shape, (program, sizes) in zip(new, told[len(head) :], strict=False):
            program.check_settled()
            self.exact[shape] = self._same.setdefault(program, program), sizes


def _spread(stretch: list[StepShape], count: int) -> list[StepShape]:
    """``count`` of the shapes of ``stretch``, its ends among them, of various remainders by the kernels' multiples."""
    if len(stretch) <= count + 1:
        return stretch
    chosen, remainders = [stretch[0], stretch[-1]], {shape.tokens % ROUNDED[-1] for shape in (stretch[0], stretch[-1])}
    for number in range(1, count - 1):
        place = number * (len(stretch) - 1) // (count - 1)
        near = stretch[place : place + max(1, len(stretch) // count)]
        shape = next((shape for shape in near if shape.tokens % ROUNDED[-1] not in remainders), near[0])
        chosen.append(shape)
        remainders.add(shape.tokens % ROUNDED[-1])
    return chosen


@dataclass(frozen=True)
class _Formulas:
    """The size of each block that a program makes, as a sum of `_features` of the step's shape."""

    program: Program
    weights: np.ndarray  # (features, different formulas)
    formula: np.ndarray  # of each block

    @classmethod
    def through(
        cls, shapes: list[StepShape], traced: list[tuple[Program, np.ndarray]], stretch: list[StepShape]
    ) -> _Formulas | None:
        """The formulas that meet ``traced`` at ``shapes`` and agree for all of ``stretch``; None without any."""
        sizes, formula = np.unique(np.stack([sizes for _, sizes in traced]), axis=1, return_inverse=True)
        given, asked = _features(shapes), _features(stretch)
        line = [0, *(column for column in (1, 2) if np.ptp(asked[:, column]))]
        weights = np.zeros((given.shape[1], sizes.shape[1]))
        found = np.zeros(sizes.shape[1], dtype=bool)
        for more in _BASES:
            columns = [*line, *more]
            basis = given[:, columns]
            spare = len(shapes) - len(columns)  # lengths that the formula meets unfitted
            if spare < 1 + bool(more) or np.linalg.matrix_rank(basis / basis.max(axis=0)) < len(columns):
                continue
            scale = basis.max(axis=0)
            tried = np.linalg.lstsq(basis / scale, sizes, rcond=None)[0] / scale[:, None]
            meets = (np.rint(basis @ tried) == sizes).all(axis=0)
            values = np.rint(asked[:, columns] @ tried)
            other = np.rint(asked @ weights)
            if (meets & found & (values != other).any(axis=0)).any() and more:
                return None  # two formulas meet all that is traced, but not each other
            new = meets & ~found
            weights[np.ix_(columns, new)] = tried[:, new]
            found |= meets
            if found.all() and not more:
                break
        return cls(traced[0][0], weights, formula.reshape(-1)) if found.all() else None

    def sizes(self, shapes: list[StepShape]) -> np.ndarray:
        """The size of each block, a row for each of ``shapes`` [bytes]."""
        return np.rint(_features(shapes) @ self.weights).astype(np.int64)[:, self.formula]


def _features(shapes: list[StepShape]) -> np.ndarray:
    """What sizes may grow with, a row for each of ``shapes``."""
    tokens = np.array([shape.tokens for shape in shapes], dtype=float)
    rows = np.array([shape.rows for shape in shapes], dtype=float)
    columns = [np.ones_like(tokens), tokens, np.array([shape.sequences for shape in shapes], dtype=float)]
    columns += [tokens * tokens, rows * tokens // 10]  # masks; an embedding's gradient sums tokens by tens
    for multiple in ROUNDED:
        rounded = -(-tokens // multiple) * multiple
        columns += [rounded, tokens * rounded]
    return np.stack(columns, axis=1)


# Features beside the line in tokens and sequences, from the plainest on.
_ROUNDED = range(5, 5 + 2 * len(ROUNDED), 2)
_BASES = [(), (3,), (4,), *((column,) for column in _ROUNDED), *((column, column + 1) for column in _ROUNDED)]
