"""The largest batch that fits a memory budget, by trial: only a size that has been run is ever reported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class LargestBatch:
    """Result of :func:`largest_batch`.

    Attributes
    ----------
    batch_size : int
        The largest batch that was run within the budget; 0 when a batch of 1 does not fit.
    peak_mib : float or None
        Measured peak of ``batch_size`` [MiB]; None for 0.
    headroom_percent : float or None
        Share of the budget that ``batch_size`` leaves free; None for 0.
    refused_at : int or None
        The smallest batch that was run and did not fit; None when ``limit`` was reached first.
    tested : tuple of int
        Every batch that was run, in order.
    """

    batch_size: int
    peak_mib: float | None
    headroom_percent: float | None
    refused_at: int | None
    tested: tuple[int, ...]


def largest_batch(
    trial: Callable[[int], float | None], *, budget_mib: float, start: int = 1, limit: int = 4096
) -> LargestBatch:
    """Find the largest batch within ``budget_mib``: doubling steps away from ``start``, then bisection.

    Parameters
    ----------
    trial : callable
        Runs a batch of the given size in a fresh process and returns its peak [MiB], or None if it did not fit.
    budget_mib : float
        The budget [MiB], above 0.
    start : int
        First size to try: a predicted size saves trials, 1 always works.
    limit : int
        Largest size to try.

    Raises
    ------
    ValueError
        When ``budget_mib`` is not above 0 or ``start`` is not within 1 to ``limit``.
    """
    if budget_mib <= 0:
        raise ValueError(f"budget_mib={budget_mib}: a budget above 0 MiB is needed")
    if not 1 <= start <= limit:
        raise ValueError(f"start={start}: a batch size from 1 to {limit} is needed")
    peaks: dict[int, float | None] = {0: 0.0}

    def fits(batch: int) -> bool:
        if batch not in peaks:
            peaks[batch] = trial(batch)
        return peaks[batch] is not None

    fitting, refused = 0, limit + 1
    batch, stride = start, 1
    while refused - fitting > 1:
        if fits(batch):
            fitting = batch
        else:
            refused = batch
        if refused > limit:
            batch = min(fitting + stride, limit)
        elif fitting == 0 and batch > 1:
            batch = max(refused - stride, 1)
        else:
            batch = (fitting + refused) // 2
        stride *= 2
    return LargestBatch(
        batch_size=fitting,
        peak_mib=peaks[fitting] if fitting else None,
        headroom_percent=100 * (1 - peaks[fitting] / budget_mib) if fitting else None,
        refused_at=refused if refused <= limit else None,
        tested=tuple(batch for batch in peaks if batch),
    )
