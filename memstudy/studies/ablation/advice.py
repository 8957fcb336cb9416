"""Which levers to add and in which order: the quickest first, by the reference rows of the memory ablation.

The study's decision table and the commands ``memstudy advise`` and ``memstudy fit --advise`` climb the same ladder.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence

from memstudy import machine, records, techniques
from memstudy.project import read_parameters
from memstudy.trainers.hub_model import HubModelRun

STUDY = "memory_ablation"
_SIZE = ("n_layers", "hidden_size", "n_heads", "feed_forward", "vocab_size", "seq_len", "batch_size", "measure_steps")


def ladder(
    times: Mapping[str, float], savings: Mapping[str, float], *, start: Sequence[str] = ()
) -> list[tuple[str, ...]]:
    """Ever longer lists of levers, the quickest lever first.

    A lever that excludes some that were added before takes their place if it saves more than each; else it is left out.

    Parameters
    ----------
    times : mapping of str to float
        The levers to add, with the time of a step that has this one alone.
    savings : mapping of str to float
        What each of them saves alone.
    start : sequence of str
        The levers to begin with, which stay.

    Returns
    -------
    list of tuple of str
        The first is ``start``.
    """
    rungs = [tuple(start)]
    for text in sorted(times, key=times.__getitem__):
        rivals = [other for other in rungs[-1] if techniques.excluded((other, text))]
        if all(other not in start and savings[text] > savings[other] for other in rivals):
            rungs.append((*(other for other in rungs[-1] if other not in rivals), text))
    return rungs


def in_more_parts(rung: Sequence[str], batch_size: int) -> list[tuple[str, ...]]:
    """``rung`` with its batch in ever more equal parts, twice as many while that divides it, at last single sequences.

    What excludes accumulation is dropped.
    """
    parts = next((int(t.steps) for t in techniques.parse(rung) if isinstance(t, techniques.Accumulation)), 1)
    lists = []
    while parts < batch_size:
        parts = 2 * parts if batch_size % (2 * parts) == 0 else batch_size
        text = f"accumulation={parts}"
        lists.append((*(other for other in rung if not techniques.excluded((other, text))), text))
    return lists


def first_that_fits(rungs: Sequence[tuple[str, ...]], fits: Callable[[tuple[str, ...]], bool]) -> int | None:
    """The place of the first of ``rungs`` that fits, or None, after asking ``fits`` of few.

    The first and the last are asked; then, as each rung saves memory on the one before, those in the middle of what is
    open. So the rung before the one that is found does not fit; one further down might, where a lever does not save.
    """
    if fits(rungs[0]):
        return 0
    if not fits(rungs[-1]):
        return None
    return 1 + bisect.bisect_left(range(1, len(rungs) - 1), True, key=lambda place: fits(rungs[place]))


def advised() -> list[str]:
    """The levers among which the study advises, at full scale."""
    return read_parameters(STUDY, "full")["advised"]


def suited(texts: Sequence[str], **choices: object) -> tuple[str, ...]:
    """Those of ``texts`` that the `HubModelRun` of ``choices`` takes."""

    def takes(text: str) -> bool:
        try:
            HubModelRun(experiment="advice", techniques=(text,), **choices)
        except ValueError:
            return False
        return True

    return tuple(filter(takes, texts))


def reference() -> dict[frozenset[str], dict]:
    """The measured steps of the memory ablation at full scale, by their levers; those of this machine if there are any.

    Returns
    -------
    dict
        A record each; that of no levers, the baseline, is among them.

    Raises
    ------
    ValueError
        When the baseline's is missing.
    """
    parameters = read_parameters(STUDY, "full")
    folder = records.ROOT / "results" / STUDY
    by_device: dict[str, dict[frozenset[str], dict]] = {}
    for record in records.read_records(folder):
        config = record["config"]
        of_it = config["kind"] == "language_model" and all(config[name] == parameters[name] for name in _SIZE)
        if of_it and record["status"] == "ok":
            device = record["provenance"]["device"]
            by_device.setdefault(device, {})[frozenset(config["techniques"])] = record
    whole = {device: rows for device, rows in by_device.items() if frozenset() in rows}
    if not whole:
        raise ValueError(
            f"no reference rows in {folder}, by which levers are put in order: run memstudy report {STUDY} --scale full"
        )
    return whole.get(machine.device()) or next(iter(whole.values()))


def reference_ladder(
    rows: Mapping[frozenset[str], dict], levers: Sequence[str], *, start: Sequence[str] = ()
) -> list[tuple[str, ...]]:
    """The `ladder` of those of ``levers`` that were measured alone, by the reference ``rows``."""
    peak, time = "peak_allocated_mib", "step_time_ms"
    plain = rows[frozenset()]["metrics"]
    alone = {text: rows[frozenset([text])]["metrics"] for text in levers if frozenset([text]) in rows}
    times = {text: metrics[time] / plain[time] for text, metrics in alone.items()}
    savings = {text: 1 - metrics[peak] / plain[peak] for text, metrics in alone.items()}
    return ladder(times, savings, start=start)
