"""Steps as programs, which make and free blocks in one order whatever the blocks' sizes; and their replay.

A sequence of a thousand steps has tens of millions of events, so the replay keeps none: it notes each step's peaks, and
takes a step of a known shape that finds the allocator as before, and leaves it so, for done.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from memstudy.profiler.allocator import CachingAllocator
from memstudy.profiler.catalogue import Gpu
from memstudy.profiler.events import Event, OutOfMemory

EMPTY = -1  # in place of a slot: the cache is emptied


@dataclass(frozen=True)
class Program:
    """What a step does.

    Attributes
    ----------
    turns : tuple of int
        The slot of a block, to make the block the first time and to free it the second; or `EMPTY`.
    made : tuple
        Phase, module and stream of each block made, in order of slots; the blocks taken from earlier steps have the
        slots after.
    held : int
        How many blocks of earlier steps are there that this step or a later one frees.
    taken : tuple of int
        Those that this one frees, by their places among them, the oldest first.
    left : tuple of int
        The slots of the blocks that later steps free.
    """

    turns: tuple[int, ...]
    made: tuple[tuple[str, str, int], ...]
    held: int
    taken: tuple[int, ...]
    left: tuple[int, ...]

    @cached_property
    def signed(self) -> tuple[np.ndarray, np.ndarray]:
        """The slots of the turns, and 1 where the block is made, -1 where it is freed."""
        slots = np.array([turn for turn in self.turns if turn != EMPTY], dtype=np.int64)
        signs = np.full(len(slots), -1, dtype=np.int64)
        made = slots < len(self.made)
        first = np.unique(slots[made], return_index=True)[1]
        signs[np.flatnonzero(made)[first]] = 1
        return slots, signs

    @cached_property
    def folded(self) -> list[int]:
        """The turns, with ``-2 - slot`` for a block that is freed at once after it has been made."""
        turns, folded = self.turns, []
        place = 0
        while place < len(turns):
            at_once = turns[place] == turns[place + 1] != EMPTY if place + 1 < len(turns) else False
            folded.append(-2 - turns[place] if at_once else turns[place])
            place += 1 + at_once
        return folded


def programs_of(events: Iterable[Event]) -> list[tuple[Program, np.ndarray]]:
    """The programs of building and of each step, each with the sizes of the blocks that it makes."""
    told: list[dict] = []
    alive: dict[int, tuple[int, int]] = {}  # step and slot of each block

    def begin() -> None:
        told.append({"turns": [], "made": [], "sizes": [], "taken": {}, "left": {}})

    def free(block: int) -> None:
        step, slot = alive.pop(block)
        if step < len(told) - 1:
            told[step]["left"][slot] = None
            slot = now["taken"].setdefault((step, slot), -10 - len(now["taken"]))
        now["turns"].append(slot)

    begin()
    phase = "build"
    for event in events:
        now = told[-1]
        if event.kind == "iteration":
            begin()
        elif event.kind == "phase":
            phase = event.label
        elif event.kind == "empty_cache":
            now["turns"].append(EMPTY)
        elif event.kind == "alloc":
            if event.block in alive:  # another thread has freed the block
                free(event.block)
            alive[event.block] = len(told) - 1, len(now["made"])
            now["turns"].append(len(now["made"]))
            now["made"].append((phase, event.label, event.stream))
            now["sizes"].append(event.bytes)
        elif event.kind == "free" and event.block in alive:
            free(event.block)
    programs, held = [], []
    for number, one in enumerate(told):
        programs.append((_program(one, held), np.array(one["sizes"], dtype=np.int64)))
        held = [block for block in held if block not in one["taken"]]
        held += [(number, slot) for slot in sorted(one["left"])]
    return programs


def _program(one: dict, held: list[tuple[int, int]]) -> Program:
    count = len(one["made"])
    taken = [place for place, block in enumerate(held) if block in one["taken"]]
    slots = {one["taken"][held[place]]: count + number for number, place in enumerate(taken)}
    turns = _sorted_frees([slots.get(turn, turn) for turn in one["turns"]], count)
    return Program(turns, tuple(one["made"]), len(held), tuple(taken), tuple(sorted(one["left"])))


def _sorted_frees(turns: list[int], count: int) -> tuple[int, ...]:
    """``turns`` with blocks that are freed one after another in one order: autocast's cache frees its casts in any.

    The allocator is left the same by each order. The latest blocks come first.
    """
    made, told, freed = 0, [], []
    for turn in turns:
        if made <= turn < count or turn == EMPTY:
            told += sorted(freed, key=lambda slot: (slot >= count, -slot))
            freed = []
            told.append(turn)
            made += turn != EMPTY
        else:
            freed.append(turn)
    return tuple(told + sorted(freed, key=lambda slot: (slot >= count, -slot)))


@dataclass
class _Done:
    """How a step went; bytes."""

    peak: int
    reserved_peak: int
    reserved: int


class Replay:
    """Runs programs one after another, on a GPU through its caching allocator.

    Attributes
    ----------
    requested_peaks, peaks : list of int
        Most bytes requested, and allocated, at once in each step.
    reserved_peaks, reserved : list of int
        On a GPU: most bytes held in each step, and those held after.
    out_of_memory : OutOfMemory or None
        The first request that fails.
    refused : list of int
        The steps with a request that fails, from 1; the cache is then emptied.
    """

    def __init__(self, building: tuple[Program, np.ndarray], card: Gpu | None, *, expandable_segments: bool):
        self.requested_peaks: list[int] = []
        self.peaks: list[int] = []
        self.reserved_peaks: list[int] = []
        self.reserved: list[int] = []
        self.out_of_memory: OutOfMemory | None = None
        self.refused: list[int] = []
        self._allocator = card and CachingAllocator(
            capacity=card.capacity_bytes, expandable_segments=expandable_segments
        )
        self._live = 0
        self._held: list[tuple] = []  # sizes and blocks that the steps have left to later ones
        self._known: dict[tuple, _Done] = {}
        self._run(*building, iteration=0)

    def empty_cache(self) -> None:
        """Empty the allocator's cache, if there is an allocator."""
        if self._allocator:
            self._allocator.empty_cache()

    def step(self, program: Program, sizes: np.ndarray, *, name: Hashable) -> None:
        """Run a step; those of equal ``name`` have equal programs and sizes."""
        allocator = self._allocator
        requested = self._live + self._rise(program, sizes)
        self.requested_peaks.append(requested)
        if allocator is None:
            self._run(program, sizes, iteration=len(self.peaks) + 1)
            self.peaks.append(requested)
            return
        before = name, allocator.state(), self._addresses()
        done = self._known.get(before)
        if done is None:
            allocator.peak_allocated, allocator.peak_reserved = allocator.allocated, allocator.reserved
            self._run(program, sizes, iteration=len(self.peaks) + 1)
            done = _Done(allocator.peak_allocated, allocator.peak_reserved, allocator.reserved)
            refused = allocator.first_refusal is not None
            if not refused and (name, allocator.state(), self._addresses()) == before:
                self._known[before] = done
        self.peaks.append(done.peak)
        self.reserved_peaks.append(done.reserved_peak)
        self.reserved.append(done.reserved)
        allocator.told.clear()
        if allocator.first_refusal is not None:
            allocator.first_refusal = None
            self.refused.append(len(self.peaks))
            allocator.empty_cache()

    def _rise(self, program: Program, sizes: np.ndarray) -> int:
        """How far the requested bytes rise above those at the beginning of the step."""
        return max(0, int(self._changes(program, sizes).cumsum().max(initial=0)))

    def _changes(self, program: Program, sizes: np.ndarray) -> np.ndarray:
        if program.held != len(self._held):
            raise ValueError("a step frees other blocks than the steps before have left: predict each length by itself")
        slots, signs = program.signed
        taken = [self._held[place][0] for place in program.taken]
        return signs * np.concatenate([sizes, np.array(taken, dtype=np.int64)])[slots]

    def _addresses(self) -> tuple:
        return tuple((size, block and block.address) for size, block in self._held)

    def _run(self, program: Program, sizes: np.ndarray, *, iteration: int) -> None:
        self._live += int(self._changes(program, sizes).sum())
        taken = [self._held[place][1] for place in program.taken]
        blocks = [*itertools.repeat(None, len(sizes)), *taken]
        asked = sizes.tolist()
        if self._allocator:
            self._request(program, asked, blocks, iteration)
        self._held = [one for place, one in enumerate(self._held) if place not in program.taken]
        self._held += [(asked[slot], blocks[slot]) for slot in program.left]

    def _request(self, program: Program, sizes: list[int], blocks: list, iteration: int) -> None:
        allocator, made, count = self._allocator, program.made, len(sizes)
        for turn in program.folded:
            if turn < EMPTY:
                slot = -2 - turn
                if sizes[slot]:
                    allocator.pass_through(sizes[slot], made[slot][2])
            elif turn == EMPTY:
                allocator.empty_cache()
                continue
            elif blocks[turn] is not None:
                allocator.free(blocks[turn])
                blocks[turn] = None
                continue
            elif turn < count and sizes[turn]:  # a tensor without elements requests no memory
                slot = turn
                blocks[turn] = allocator.malloc(sizes[turn], made[turn][2])
            else:
                continue
            if allocator.first_refusal is not None and self.out_of_memory is None:
                phase, module, _ = made[slot]
                self.out_of_memory = OutOfMemory(allocator.first_refusal, phase, iteration, module)
