"""The sizes of a step's blocks as formulas of the batch's shape.

A size is on a line in tokens, on a parabola where a mask has a place for each pair of tokens, or on a line of tokens
rounded up, as kernels round them. A formula is fitted to some lengths and has to be met, to the byte, at further ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from memstudy.profiler.programs import Program

ALIGNED = 8  # kernels take other ways where the number of tokens is no multiple
ROUNDED = (8, 16, 32, 64, 128)  # tokens, to whose multiples kernels round


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
    part : {"", "first", "middle", "last"}
        Which part of an update, whose gradients are accumulated; nothing where the batch is the whole update.
    """

    tokens: int
    rows: int = 1
    padded: bool = False
    sequences: int = 0
    part: str = ""

    @classmethod
    def of(cls, lengths: Sequence[int], *, flattened: bool = False) -> StepShape:
        """The shape of a batch of texts of ``lengths``: padded to the longest, or ``flattened`` to one row."""
        if flattened:
            return cls(sum(lengths), 1, False, len(lengths))
        return cls(max(lengths), len(lengths), min(lengths) < max(lengths))

    @property
    def form(self) -> tuple[int, bool, bool, str, bool]:
        """What two shapes must have in common for blocks to follow from one to the other."""
        return self.rows, self.padded, self.sequences > 0, self.part, self.tokens % ALIGNED == 0


def accumulated(shapes: Sequence[StepShape], parts: int) -> list[StepShape]:
    """``shapes`` as the parts of updates, ``parts`` in each; the last update may have fewer."""
    named = []
    for start in range(0, len(shapes), parts):
        update = shapes[start : start + parts]
        names = ["first", *["middle"] * (len(update) - 2), "last"] if len(update) > 1 else [""]
        named += [shape._replace(part=name) for shape, name in zip(update, names, strict=True)]
    return named


def spread(stretch: list[StepShape], count: int) -> list[StepShape]:
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
class Formulas:
    """The size of each block that a program makes, as a sum of `_features` of the step's shape."""

    program: Program
    weights: np.ndarray  # (features, different formulas)
    formula: np.ndarray  # of each block

    @classmethod
    def through(
        cls, shapes: list[StepShape], traced: list[tuple[Program, np.ndarray]], stretch: list[StepShape]
    ) -> Formulas | None:
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
