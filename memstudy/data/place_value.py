"""Questions about the digits of a number, as DeepMind's generator asks them, and their answers.

"What is the tens digit of 89290?" (Saxton et al. 2019, arXiv:1904.01557, module ``numbers__place_value``). For a
training question an entropy e is drawn evenly from 3 to 10, a number from 1 to 10^e, and one of its digits. Questions
for interpolation have e = 8; for extrapolation e = 12, with digits at places that no training question asks for.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Container, Iterator

PLACES = (
    "units",
    "tens",
    "hundreds",
    *(size + name for name in ("thousands", "millions", "billions", "trillions") for size in ("", "ten ", "hundred ")),
)
ENTROPIES = {"train": (3.0, 10.0), "test": (8.0, 8.0), "extrapolate": (12.0, 12.0)}  # by split

_QUESTION = re.compile(rf"What is the ({'|'.join(PLACES)}) digit of ([1-9]\d*)\?")


def questions(split: str, count: int, *, seed: int, without: Container[str] = ()) -> Iterator[tuple[str, str]]:
    """Give ``count`` questions with their answers, none twice.

    Parameters
    ----------
    split : {"train", "test", "extrapolate"}
        Which numbers are asked about.
    count : int
    seed : int
    without : container of str
        Questions that are left out: those held back.
    """
    draw, seen = random.Random(f"{split} {seed}"), set()
    while len(seen) < count:
        number = draw.randint(1, math.ceil(10 ** draw.uniform(*ENTROPIES[split])))
        place = draw.randrange(len(str(number)))
        question = f"What is the {PLACES[place]} digit of {number}?"
        if question not in seen and question not in without:
            seen.add(question)
            yield question, str(number)[-1 - place]


def answer(question: str) -> str:
    """The right answer.

    Raises
    ------
    ValueError
        When ``question`` is none of this form, or the number has no such digit.
    """
    match = _QUESTION.fullmatch(question)
    if not match:
        raise ValueError(f"{question!r} is no question like 'What is the tens digit of 89290?'")
    place, number = PLACES.index(match[1]), match[2]
    if place >= len(number):
        raise ValueError(f"{number} has no {match[1]} digit")
    return number[-1 - place]


def place(question: str) -> str:
    """Which digit ``question`` asks for, one of ``PLACES``."""
    return _QUESTION.fullmatch(question)[1]
