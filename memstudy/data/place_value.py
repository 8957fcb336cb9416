"""Questions and answers about the digits of a number, as in DeepMind's generator.

"What is the tens digit of 89290?" (Saxton et al. 2019, arXiv:1904.01557, module ``numbers__place_value``). A
training question draws an entropy e uniformly from 3 to 10, a number from 1 to 10^e, and one of the number's digits.
Interpolation questions have e = 8, extrapolation questions e = 12 and places that no training question asks for.
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
    """Yield ``count`` different questions with their answers.

    Parameters
    ----------
    split : {"train", "test", "extrapolate"}
        Sets the size of the numbers (``ENTROPIES``).
    count : int
    seed : int
    without : container of str
        Held-back questions, which are left out.
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
    """The right answer to ``question``.

    Raises
    ------
    ValueError
        When ``question`` is not like the generator's, or the number has no such digit.
    """
    match = _QUESTION.fullmatch(question)
    if not match:
        raise ValueError(f"{question!r} is not a question like 'What is the tens digit of 89290?'")
    place, number = PLACES.index(match[1]), match[2]
    if place >= len(number):
        raise ValueError(f"{number} has no {match[1]} digit")
    return number[-1 - place]


def place(question: str) -> str:
    """Which digit ``question`` asks for, one of ``PLACES``."""
    return _QUESTION.fullmatch(question)[1]
