"""Which techniques to add, and in which order.

The study's decision table adds the fastest first. ``memstudy advise`` and ``memstudy fit --advise`` add them by what
they change: nothing, the arithmetic, which weights are trained, and the weights. What changes as much comes fastest
first: on a GPU by prediction for the model itself, on this CPU by the reference rows of the memory ablation. On a GPU,
techniques that turn out to be needless beside later ones are then left out again, where that saves time.
"""

from __future__ import annotations

import bisect
import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from pydantic import PositiveInt

from memstudy import techniques
from memstudy.profiler import Gpu
from memstudy.studies.ablation.reference import METRICS
from memstudy.trainers.hub_model import HubModelRun

# Added after the techniques of the ladder.
ARITHMETIC = ("pure_bf16",)
ADAPTER = ("convention=uncast", "lora=16")
FOUR_BITS = "nf4_weights"
CUTS = 2, 4  # layers of the models whose step times give that of the whole; even, for techniques of half the layers


class Alone(NamedTuple):
    """Step time, and share of the memory saved, of each technique used alone, relative to none."""

    times: dict[str, float]
    savings: dict[str, float]


def ladder(
    times: Mapping[str, float], savings: Mapping[str, float], *, start: Sequence[str] = ()
) -> list[tuple[str, ...]]:
    """Successive lists of techniques; the fastest technique is added first.

    A technique that excludes earlier ones replaces them if it saves more than each of them, and is left out otherwise.

    Parameters
    ----------
    times : mapping of str to float
        The techniques to add, each with the step time when used alone.
    savings : mapping of str to float
        Memory that each technique saves when used alone.
    start : sequence of str
        Techniques that every list contains.

    Returns
    -------
    list of tuple of str
        The first list is ``start``.
    """
    rungs = [tuple(start)]
    for text in sorted(times, key=times.__getitem__):
        rivals = [other for other in rungs[-1] if techniques.excluded((other, text))]
        if all(other not in start and savings[text] > savings[other] for other in rivals):
            rungs.append((*(other for other in rungs[-1] if other not in rivals), text))
    return rungs


def climb(
    alone: Alone,
    takes: Callable[[tuple[str, ...]], bool],
    *,
    start: tuple[str, ...] = (),
    parts_of: int = 1,
    keep: Literal["exact", "full"] | None = None,
) -> list[tuple[str, ...]]:
    """Successive lists of techniques that change more and more.

    Exact techniques come first, then accumulation in more and more parts, techniques that change the arithmetic,
    adapters, and 4-bit weights beside them. A technique that excludes earlier ones replaces them, and is left out if it
    excludes one of ``start``.

    Parameters
    ----------
    alone : Alone
        The techniques to choose from, with what orders them.
    takes : callable
        Whether a list of techniques suits the model and the machine.
    start : tuple of str
        Techniques that every list contains.
    parts_of : int
        Sequences that accumulation may divide; 1 for no accumulation.
    keep : str, optional
        ``exact`` for techniques that keep the loss up to rounding, ``full`` for those that train all weights.

    Returns
    -------
    list of tuple of str
        The first list is ``start``.
    """
    exact = {text: time for text, time in alone.times.items() if techniques.parse((text,))[0].exact}
    rungs = ladder(exact, alone.savings, start=start)
    rungs += in_more_parts(rungs[-1], parts_of)
    if keep == "exact":
        return rungs
    inexact = {text: time for text, time in alone.times.items() if text not in exact}
    rungs += ladder(inexact, alone.savings, start=rungs[-1])[1:]
    # bf16_weights takes the same memory as pure_bf16 and loses no small updates.
    more = [] if "bf16_weights" in rungs[-1] else [ARITHMETIC]
    if keep is None:  # a precision in ``start`` takes the place of the adapter's convention
        more.append(ADAPTER[1:] if techniques.excluded((*start, *ADAPTER)) else ADAPTER)
    for added in more:
        left = (text for text in rungs[-1] if text in start or not techniques.excluded((text, *added)))
        rungs += _taken((*left, *added), takes)
    return rungs if keep else rungs + _taken((*rungs[-1], FOUR_BITS), takes)


def _taken(rung: tuple[str, ...], takes: Callable[[tuple[str, ...]], bool]) -> list[tuple[str, ...]]:
    """``rung`` alone in a list, if its techniques go together and suit; an empty list otherwise."""
    return [rung] if not techniques.excluded(rung) and takes(rung) else []


def share_trained(adapter: str, **choices: object) -> float:
    """Share of the weights that the technique ``adapter`` trains; ``choices`` are fields of a `HubModelRun`."""
    run = HubModelRun(experiment="advice", techniques=(adapter,), **choices)
    with torch.device("meta"):  # sizes alone
        network = run.make_model()
        network = run.parsed_techniques()[0].prepare(network) or network
    sizes = {weight: weight.numel() for weight in network.parameters()}
    return sum(size for weight, size in sizes.items() if weight.requires_grad) / sum(sizes.values())


def in_more_parts(rung: Sequence[str], batch_size: int) -> list[tuple[str, ...]]:
    """``rung`` with more and more accumulation: parts double while they divide the batch; last are single sequences.

    Techniques that exclude accumulation are dropped.
    """
    parts = next((int(t.steps) for t in techniques.parse(rung) if isinstance(t, techniques.Accumulation)), 1)
    lists = []
    while parts < batch_size:
        parts = 2 * parts if batch_size % (2 * parts) == 0 else batch_size
        text = f"accumulation={parts}"
        lists.append((*(other for other in rung if not techniques.excluded((other, text))), text))
    return lists


def first_that_fits(
    rungs: Sequence[tuple[str, ...]],
    fits: Callable[[tuple[str, ...]], bool],
    likely: Callable[[tuple[str, ...]], bool] | None = None,
) -> int | None:
    """Index of the first of ``rungs`` that fits, or None, with few calls of ``fits``.

    The search bisects, since each rung saves memory over the one before: with a guess that costs less, ``likely``, by
    that. The rung before the result does not fit; an earlier one might, if a technique saves no memory.
    """
    known = functools.cache(fits)
    if known(rungs[0]):
        return 0
    if likely is None and not known(rungs[-1]):
        return None
    guess = 1 + bisect.bisect_left(range(1, len(rungs) - 1), True, key=lambda place: (likely or known)(rungs[place]))
    found = next((place for place in range(guess, len(rungs)) if known(rungs[place])), None)
    while found and found > 1 and known(rungs[found - 1]):
        found -= 1
    return found


def quickest(
    rung: tuple[str, ...],
    loose: Sequence[str],
    time: Callable[[tuple[str, ...]], float],
    fits: Callable[[tuple[str, ...]], bool],
) -> tuple[str, ...]:
    """``rung`` without those of the techniques ``loose`` that only take ``time``, as long as the rest ``fits``.

    Accumulation goes to half its parts at a time, an odd number of parts to one. Of each round's lists, the two that
    take least time are tried.
    """
    names = {text.partition("=")[0] for text in loose}
    while True:
        shorter = {}
        for text in rung:
            name, _, value = text.partition("=")
            halves = name == "accumulation" and int(value) > 2 and int(value) % 2 == 0
            half = f"{name}={int(value) // 2}" if halves else ""
            if name in names:
                shorter[name] = tuple(filter(None, (half if other == text else other for other in rung)))
        quicker = sorted((name for name in shorter if time(shorter[name]) < time(rung)), key=lambda n: time(shorter[n]))
        chosen = next((name for name in quicker[:2] if fits(shorter[name])), None)
        if chosen is None:
            return rung
        # What does not fit now does not fit with less, and is not tried again.
        rung, names = shorter[chosen], {*quicker[quicker.index(chosen) :]}


def suited(texts: Sequence[str], **choices: object) -> tuple[str, ...]:
    """The techniques in ``texts`` that a `HubModelRun` with ``choices`` accepts."""

    def takes(text: str) -> bool:
        try:
            HubModelRun(experiment="advice", techniques=(text,), **choices)
        except ValueError:
            return False
        return True

    return tuple(filter(takes, texts))


def step(model: str, texts: Sequence[str], **choices: object) -> HubModelRun:
    """A step of ``model`` with ``choices`` and those of the techniques ``texts`` that it accepts."""
    return HubModelRun(experiment=model, model=model, techniques=suited(texts, model=model, **choices), **choices)


def measured_alone(rows: Mapping[frozenset[str], Mapping[str, float]], texts: Sequence[str]) -> Alone:
    """The techniques in ``texts`` that a `Reference`'s ``rows`` measured alone, on the ablation's model."""
    figures = {
        text: [rows[name][metric] for metric in METRICS]
        for text in ("", *texts)
        if (name := frozenset(filter(None, [text]))) in rows
    }
    return _relative(figures)


def predicted_alone(figures: Callable[[tuple[str, ...]], list[float]], texts: Sequence[str]) -> Alone:
    """The techniques ``texts``, each added alone to a step whose `estimates` are ``figures``."""
    return _relative({text: figures((text,) if text else ()) for text in ("", *texts)})


class CutRun(HubModelRun):
    """A step of a model's first ``n_layers`` layers (of its encoder, if it has two stacks).

    A model with cross-attention keeps all layers of its decoder.
    """

    n_layers: PositiveInt

    def config(self):
        whole = super().config()
        short = copy.deepcopy(whole)
        for name, value in vars(whole).items():
            if isinstance(value, list) and len(value) == whole.num_hidden_layers:  # a kind of layer for each
                setattr(short, name, value[: self.n_layers])
        short.num_hidden_layers = self.n_layers
        return short


def estimates(plain: HubModelRun, card: Gpu, **choices: bool) -> Callable[[tuple[str, ...]], list[float]]:
    """A function from techniques to the step time [ms] and the memory [MiB] of ``plain`` with them, on ``card``.

    ``choices`` are those of `HubModelRun.foretell`.

    Steps of all layers would take a minute in all. Time is linear in the number of layers, and memory nearly so, hence
    two steps of a few layers of the model give the whole one. A model whose configuration does not say how many layers
    it has, or that has few, is predicted whole.
    """
    n_layers = getattr(plain.config(), "num_hidden_layers", 0)

    def foretold(run: HubModelRun) -> list[float]:
        report = run.foretell(card, **choices)
        return [report.time.step_time_ms, report.whole_gpu_mib]

    @functools.cache
    def figures(texts: tuple[str, ...]) -> list[float]:
        chosen = dict(plain) | {"techniques": texts}
        if n_layers <= max(CUTS):
            return foretold(HubModelRun(**chosen))
        low, high = CUTS
        pairs = zip(*(foretold(CutRun(**chosen, n_layers=number)) for number in CUTS), strict=True)
        return [first + (n_layers - low) / (high - low) * (last - first) for first, last in pairs]

    return figures


def _relative(figures: Mapping[str, Sequence[float]]) -> Alone:
    """Times and savings from the step time and the memory of each technique, and of none, whose name is empty."""
    plain_time, plain_memory = figures[""]
    alone = {text: figure for text, figure in figures.items() if text}
    return Alone(
        {text: time / plain_time for text, (time, _) in alone.items()},
        {text: 1 - memory / plain_memory for text, (_, memory) in alone.items()},
    )
