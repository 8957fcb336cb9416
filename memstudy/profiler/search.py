"""The largest batch within a memory budget, by prediction, confirmed by a run where the machine can."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from memstudy.profiler.catalogue import Gpu, find_gpu
from memstudy.profiler.prediction import predict
from memstudy.profiler.report import MemoryReport
from memstudy.profiler.roles import Step

LIMIT = 65_536  # largest batch to consider
STEP_TOKENS = 8  # sequence lengths are searched in multiples of 8, which GPUs multiply fastest


@dataclass(frozen=True)
class Fit:
    """Result of :func:`fit`.

    Attributes
    ----------
    batch_size : int
        The largest batch that fits, over all processes; 0 when a batch of 1 per process does not fit.
    accumulation : int
        How many batches make the effective batch; 1 without ``effective_batch``.
    budget_mib, needed_mib : float
        The budget, and the memory of that batch: the process's whole memory on a GPU, allocated memory on a CPU. For
        batch size 0: the memory of a batch of 1 per process.
    report : MemoryReport
        The prediction for that batch, or for a batch of 1 per process.
    refused_at : int or None
        The smallest batch that was found not to fit.
    tested : bool
        Whether the batch was run within the budget; otherwise it is only predicted.
    """

    batch_size: int
    accumulation: int
    budget_mib: float
    needed_mib: float
    report: MemoryReport
    refused_at: int | None
    tested: bool

    @property
    def headroom_percent(self) -> float:
        """Share of the budget left free; negative when nothing fits."""
        return 100 * (1 - self.needed_mib / self.budget_mib)


def steps_to_settle(processes: int) -> int:
    """Steps until memory settles: the first ends with new optimizer state, and DDP then rebuilds its buckets."""
    return 2 if processes == 1 else 3


def check_budget(budget_mib: float) -> None:
    """Raise ValueError for a budget that is not above 0 and finite."""
    if not 0 < budget_mib < math.inf:
        raise ValueError(f"budget_mib={budget_mib}: a budget above 0 MiB is needed")


def fit(
    build_for_batch: Callable[[int], Callable[[], Step]],
    *,
    gpu: str | Gpu | None = None,
    budget_mib: float | None = None,
    effective_batch: int | None = None,
    expandable_segments: bool = False,
    processes: int = 1,
    limit: int = LIMIT,
    run: Callable[[int], float | None] | None = None,
    foretell: Callable[[int, Gpu | None], MemoryReport] | None = None,
) -> Fit:
    """Find the largest batch that fits a GPU, or a budget on this CPU.

    The result and the next larger candidate are both predicted. (Reserved memory may fall as the batch grows, so in
    rare cases a still larger batch would fit.)

    Parameters
    ----------
    build_for_batch : callable
        From a batch size to the ``build`` of :func:`~memstudy.profiler.predict`. With ``effective_batch``, ``step``
        must accumulate at least two batches, so that gradients exist during the second.
    gpu : str or Gpu, optional
        The GPU; its whole memory is the default budget.
    budget_mib : float, optional
        The budget [MiB]; required without ``gpu``, and replaces the memory size of ``gpu``.
    effective_batch : int, optional
        Sequences in one update, accumulated from batches; the batch size must divide this number.
    expandable_segments, processes
        As in :func:`~memstudy.profiler.predict`; the processes share the batch, and each has the budget.
    limit : int
        Largest batch to consider; at least ``processes``.
    run : callable, optional
        Runs a real batch and returns its measured peak [MiB], or None if it did not fit. The predicted batch is run,
        then smaller ones until one fits.
    foretell : callable, optional
        Predicts a batch size on a GPU in place of ``build_for_batch``, as of generation.

    Raises
    ------
    ValueError
        Without ``gpu`` and ``budget_mib``, for a budget that is not above 0 and finite, and for an effective batch that
        is below 1 or no multiple of ``processes``.
    """
    card = find_gpu(gpu) if isinstance(gpu, str) else gpu
    if budget_mib is None and card is None:
        raise ValueError("fit needs a GPU or budget_mib")
    budget = card.memory_mib if budget_mib is None else budget_mib
    check_budget(budget)
    if card is not None:
        card = card.model_copy(update={"memory_mib": budget})
    if effective_batch is not None and effective_batch < 1:
        raise ValueError(f"effective_batch={effective_batch}: at least 1 sequence is needed")
    if effective_batch is not None and effective_batch % processes:
        raise ValueError(f"effective_batch={effective_batch}: processes={processes} do not share it evenly")
    sizes: Sequence[int] = range(processes, limit + 1, processes)
    if effective_batch is not None:
        sizes = [size for size in sizes[: effective_batch // processes] if effective_batch % size == 0]
    reports: dict[int, MemoryReport] = {}

    def of_steps(size: int, card: Gpu | None) -> MemoryReport:
        return predict(
            build_for_batch(size),
            gpu=card,
            iterations=steps_to_settle(processes),
            expandable_segments=expandable_segments,
            processes=processes,
            repeats=max(0, (effective_batch or 0) // size - 2),
        )

    predicted = foretell or of_steps

    def needed(size: int) -> float:
        if size not in reports:
            reports[size] = predicted(size, card)
        report = reports[size]
        return report.peak_allocated_mib if card is None else report.whole_gpu_mib

    places, tested = _largest(needed, sizes, budget), False
    while run is not None and places and not (tested := run(sizes[places - 1]) is not None):
        places -= 1
    size = sizes[places - 1] if places else 0
    return Fit(
        batch_size=size,
        accumulation=effective_batch // size if effective_batch and size else 1,
        budget_mib=budget,
        needed_mib=needed(size or sizes[0]),
        report=reports[size or sizes[0]],
        refused_at=sizes[places] if places < len(sizes) else None,
        tested=tested,
    )


def _largest(needed: Callable[[int], float], sizes: Sequence[int], budget: float) -> int:
    """The place in ``sizes``, counted from 1, of the largest size that fits; 0 when none does.

    Memory is nearly linear in the batch, except for small batches, whose peak is in the optimizer, and for jumps in
    reserved memory. So a line gives the next size: through the last two sizes while all fit, then through the nearest
    on either side. A turn that did not halve what is left is followed by a bisection, so that jumps cost few turns.
    """
    before, fits, refused, place, left = 0, 0, len(sizes) + 1, 1, math.inf
    while True:
        if needed(sizes[place - 1]) <= budget:
            before, fits = fits, place
        else:
            refused = place
        if refused - fits <= 1:
            return fits
        if refused > len(sizes) and not before:
            place = min(4, len(sizes))
        elif refused > len(sizes):
            place = min(_on_line(needed, sizes, budget, before, fits), 16 * fits, len(sizes))
        elif refused - fits <= left / 2:
            place = min(_on_line(needed, sizes, budget, fits, refused), refused - 1)
        else:
            place = (fits + refused) // 2
        place, left = max(place, fits + 1), refused - fits


def _on_line(needed, sizes, budget, low: int, high: int) -> int:
    """The place of the largest size that should fit, by the line through places ``low`` and ``high``."""
    small, large = sizes[low - 1], sizes[high - 1]
    slope = (needed(large) - needed(small)) / (large - small)
    return bisect.bisect_right(sizes, small + (budget - needed(small)) / slope) if slope > 0 else len(sizes)
