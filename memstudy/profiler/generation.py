"""The memory of generation, token by token: a few tokens are traced, the events of the others follow from them.

From its sixth token on, generation repeats one sequence of events, in which a block's size grows by the same number of
bytes with each token: a tensor over the context is one token longer. The sequence is traced where a stretch of tokens
begins, in its middle and where it ends, and a stretch is halved until the three agree: so a sliding window's end, or a
kernel's step from one buffer to a larger one, is found.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from memstudy.profiler import cuda
from memstudy.profiler.allocator import SMALL
from memstudy.profiler.catalogue import Gpu, find_gpu
from memstudy.profiler.events import WORKSPACE, Event
from memstudy.profiler.prediction import follow, report_of, time_of
from memstudy.profiler.report import MemoryReport
from memstudy.profiler.roles import Step

SETTLED = 6  # the token from which on the events repeat: earlier ones free what the prefill has made
FULL = 32
HEAD = "lm_head"
CATEGORIES = ("parameters", "cache", "temporary", "logits", "other")


@dataclass(frozen=True)
class _Token:
    """The events of one token; number 0 is building, 1 the prefill.

    Each event is its kind, category, module and stream, and of a block that it frees or names: how many tokens ago the
    block was made, and by which event of that token. ``sizes`` are the sizes of the blocks made, 0 for other events.
    """

    events: tuple[tuple[str, str, str, int, int, int], ...]
    sizes: tuple[int, ...]

    def longer(self, growth: list[int], tokens: int) -> _Token:
        return replace(self, sizes=tuple(size + tokens * more for size, more in zip(self.sizes, growth, strict=True)))

    def small(self) -> set[int]:
        """The events of small blocks that are made and freed within the token: they leave segments alone behind."""
        freed = {at: i for i, (kind, *_, back, at) in enumerate(self.events) if kind == "free" and not back}
        return {i for at, end in freed.items() if self.sizes[at] <= SMALL for i in (at, end)}


def predict_generation(
    build: Callable[[int, int], Callable[[], Step]],
    *,
    prompt: int,
    tokens: int,
    gpu: str | Gpu | None = None,
    expandable_segments: bool = False,
    uniform: bool = True,
) -> MemoryReport:
    """Predict the memory of generating ``tokens`` tokens after ``prompt`` others.

    On a GPU, one in `FULL` tokens is replayed with all its blocks, and the last. Of the others, small temporary blocks
    are left out: ``iteration_peaks`` are lower by them. They leave nothing behind but a place in a segment of 2 MiB, so
    the reserved memory is exact unless a small block that stays would have to look for another.

    Parameters
    ----------
    build : callable
        From a number of prompt tokens and of tokens to generate to the ``build`` of `predict`, whose step generates
        and calls ``roles.next_iteration`` before each token but the first.
    prompt, tokens : int
        Both at least 1, in each sequence.
    gpu, expandable_segments
        As in `predict`.
    uniform : bool
        Whether the tokens repeat one sequence of events. Otherwise each token is followed.

    Returns
    -------
    MemoryReport
        As `predict`'s, each token an iteration. Its categories: ``parameters``; ``cache``, what modules make and keep
        for the next token; ``temporary``, freed within the token; ``logits``, what the head makes and what is chosen
        from it; ``other``, inputs and buffers.
    """
    card = find_gpu(gpu) if isinstance(gpu, str) else gpu

    @functools.cache
    def traced(length: int, count: int):
        recorder, events = follow(build(length, count), 1, card, 1, cuda.TODAY)
        return recorder, _tokens(events)

    def pair(number: int) -> list[_Token]:
        """Token ``number`` and the next, traced as those that come early after a longer prompt."""
        return traced(prompt + number - SETTLED, SETTLED + 2)[1][SETTLED:][:2]

    if tokens <= 2 * SETTLED or not uniform:
        recorder, told = traced(prompt, tokens + 1)  # the last token's events include the release of the cache
        last, told = recorder, told[:-1]
    else:
        recorder, first = traced(prompt, SETTLED + 2)
        last, _ = traced(prompt + tokens - 1 - SETTLED, SETTLED + 2)
        told = itertools.chain(first[:SETTLED], _stretch(pair, SETTLED, tokens - 1), pair(tokens - 1))
    events = _events(told, FULL if card else 1, tokens)
    times = {"prefill": time_of(recorder, card, step=0), "token": time_of(last, card)}
    return report_of(
        events,
        recorder,
        card,
        expandable_segments=expandable_segments,
        categories=CATEGORIES,
        time_by_pass={name: time for name, time in times.items() if time},
    )


def _stretch(pair: Callable[[int], list[_Token]], low: int, high: int) -> Iterator[_Token]:
    """The tokens from ``low`` up to but without ``high``."""
    middle = (low + high) // 2
    first = pair(low)[0]
    found = [(start - low + i, token) for start in (low, middle, high) for i, token in enumerate(pair(start))]
    if all(token.events == first.events for _, token in found):
        growth = [more - size for size, more in zip(first.sizes, pair(low)[1].sizes, strict=True)]
        if all(token.sizes == first.longer(growth, after).sizes for after, token in found):
            yield from (first.longer(growth, after) for after in range(high - low))
            return
    if high - low == 1:
        yield first
    else:
        yield from _stretch(pair, low, middle)
        yield from _stretch(pair, middle, high)


def _tokens(events: list[Event]) -> list[_Token]:
    """The traced ``events`` by token."""
    starts = [0, *(i for i, event in enumerate(events) if event.kind == "iteration"), len(events)]
    made: dict[int, tuple[int, int]] = {}
    told: list[list] = []
    for number, (start, end) in enumerate(itertools.pairwise(starts)):
        told.append([])
        for event in events[start:end]:
            if event.kind == "alloc":
                made[event.block] = number, len(told[-1])
            elif event.block and event.block not in made:
                continue
            maker, at = made.get(event.block, (number, 0))
            if event.kind == "free":
                del made[event.block]
            told[-1].append((event, number - maker, at))
    return [_token(each, number) for number, each in enumerate(told)]


def _token(told: list[tuple[Event, int, int]], number: int) -> _Token:
    freed = {at for event, back, at in told if event.kind == "free" and not back}

    def category(event: Event, place: int) -> str:
        if event.kind != "alloc" or not number or event.label == WORKSPACE:
            return ""
        if event.label in ("", HEAD):
            return "logits"
        return "" if place in freed else "cache"

    rows = [
        (event.kind, category(event, place), event.label, event.stream, back, at)
        for place, (event, back, at) in enumerate(told)
    ]
    return _Token(tuple(rows), tuple(event.bytes for event, _, _ in told))


def _events(tokens: Iterable[_Token], full: int, last: int) -> Iterator[Event]:
    """The events of ``tokens``, with blocks numbered anew."""
    blocks: dict[tuple[int, int], int] = {}
    for number, token in enumerate(tokens):
        whole = number < 2 * SETTLED or not number % full or number == last
        skipped = () if whole else token.small()
        for place, ((kind, category, label, stream, back, at), size) in enumerate(
            zip(token.events, token.sizes, strict=True)
        ):
            if place in skipped:
                continue
            block = 0
            if kind == "alloc":
                block = blocks[number, place] = number << 32 | place + 1
            elif kind in ("free", "is"):
                maker = number - back, at
                block = blocks.pop(maker) if kind == "free" else blocks[maker]
            yield Event(kind, number, block, size, label, stream)
            if category:
                yield Event("is", number, block, label=category)
