"""PyTorch's CUDA caching allocator, replayed: what a stream of requests takes from the device.

The allocator asks the device for *segments*, cuts *blocks* from them and keeps what is freed
(c10/cuda/CUDACachingAllocator.cpp, torch 2.13; no garbage collection, default settings or ``expandable_segments``); a
segment's blocks serve one stream alone. ``max_memory_allocated`` counts blocks, which are rounded up and whose tail is
sometimes not worth cutting off, and ``max_memory_reserved`` counts segments; both therefore come out of this replay and
not out of the requested bytes.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from memstudy.profiler.events import MIB, Event, OutOfMemory

ROUND = 512  # kMinBlockSize: every block is a multiple
SMALL = 1 * MIB  # kSmallSize: requests up to this come from small segments
SMALL_SEGMENT = 2 * MIB  # kSmallBuffer
LARGE_SEGMENT = 20 * MIB  # large_segment_size: the segment for requests below LARGE
LARGE = 10 * MIB  # kMinLargeAlloc: requests from here get a segment of their own size,
ROUND_LARGE = 2 * MIB  # kRoundLarge: rounded up to this
ENDLESS = 2**40  # granules


@dataclass(eq=False)
class _Block:
    size: int
    address: int
    pool: _Pool
    mapped: bool = True  # False: addresses of an expandable segment that have no memory yet, or no longer
    free: bool = True
    before: _Block | None = None
    after: _Block | None = None

    @property
    def key(self) -> tuple[int, int]:
        return self.size, self.address

    @property
    def expandable_size(self) -> int:
        return self.size + (self.after.size if self.after is not None and not self.after.mapped else 0)


@dataclass(eq=False)
class _Pool:
    """The free blocks of one kind, smallest first, then lowest address: the allocator's best fit."""

    small: bool
    keys: list[tuple[int, int]] = field(default_factory=list)
    blocks: dict[tuple[int, int], _Block] = field(default_factory=dict)
    unmapped: list[_Block] = field(default_factory=list)  # lowest address first

    @property
    def granule(self) -> int:
        """What an expandable segment is mapped and unmapped by."""
        return SMALL_SEGMENT if self.small else LARGE_SEGMENT

    def add(self, block: _Block) -> None:
        if block.mapped:
            bisect.insort(self.keys, block.key)
            self.blocks[block.key] = block
        else:
            bisect.insort(self.unmapped, block, key=lambda other: other.address)

    def remove(self, block: _Block) -> None:
        if block.mapped:
            del self.keys[bisect.bisect_left(self.keys, block.key)]
            del self.blocks[block.key]
        else:
            self.unmapped.remove(block)

    def best_fit(self, size: int) -> _Block | None:
        index = bisect.bisect_left(self.keys, (size, -1))
        if index == len(self.keys):
            return None
        best = self.blocks[self.keys[index]]
        # get_free_block: a block that can be expanded counts as large as it can become.
        for following in range(index + 1, len(self.keys)):
            larger = self.blocks[self.keys[following]]
            if larger.expandable_size >= best.expandable_size:
                break
            best = larger
        return best


class CachingAllocator:
    """The allocator of one device; all sizes in bytes.

    Parameters
    ----------
    capacity : int, optional
        What the device has for segments. A request that does not fit first gives back every wholly free segment; when
        it still does not fit it is granted all the same, and ``first_refusal`` says which it was.
    expandable_segments : bool
        As with ``PYTORCH_ALLOC_CONF=expandable_segments:True``: one segment a stream and pool, of which memory is
        mapped where it is needed. Its addresses have no end here; PyTorch sets aside 1 1/8 of the device's memory.

    Attributes
    ----------
    allocated, reserved : int
        Bytes in blocks in use, and in segments, now.
    peak_allocated, peak_reserved : int
        Their highest values.
    first_refusal : int or None
        The size of the first request that did not fit [bytes].
    """

    def __init__(self, *, capacity: int | None = None, expandable_segments: bool = False):
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0
        self.first_refusal: int | None = None
        self._capacity, self._expandable = capacity, expandable_segments
        self._pools: dict[tuple[int, bool], _Pool] = {}
        self._next_address = 0

    def malloc(self, size: int, stream: int = 0) -> _Block:
        """Give a block of at least ``size`` > 0 bytes, whose ``size`` says how many it has, for use on ``stream``."""
        size = -(-size // ROUND) * ROUND
        pool = self._pool(stream, small=size <= SMALL)
        block = pool.best_fit(size)
        if block is None:
            block = self._map(pool, size) if self._expandable else self._segment(pool, size)
        pool.remove(block)
        rest = block.size - size
        # should_split: of a large segment a tail of up to 1 MiB stays with the block.
        if rest >= ROUND if pool.small or self._expandable else rest > SMALL:
            self._split(block, size)
        block.free = False
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def free(self, block: _Block) -> None:
        """Take ``block`` back and merge it with free neighbours."""
        self.allocated -= block.size
        block.free = True
        self._settle(block)

    def empty_cache(self) -> None:
        """Give every wholly free segment back to the device, as ``torch.cuda.empty_cache()`` does."""
        for pool in self._pools.values():
            for block in list(pool.blocks.values()):
                if self._expandable:
                    self._unmap(block)
                elif block.before is None and block.after is None:
                    pool.remove(block)
                    self.reserved -= block.size

    def _pool(self, stream: int, *, small: bool) -> _Pool:
        if (stream, small) not in self._pools:
            pool = self._pools[stream, small] = _Pool(small)
            if self._expandable:
                pool.add(_Block(ENDLESS * pool.granule, 0, pool, mapped=False))
        return self._pools[stream, small]

    def _segment(self, pool: _Pool, size: int) -> _Block:
        # get_allocation_size
        if pool.small:
            segment = SMALL_SEGMENT
        elif size < LARGE:
            segment = LARGE_SEGMENT
        else:
            segment = -(-size // ROUND_LARGE) * ROUND_LARGE
        self._reserve(lambda: segment, size)
        block = _Block(segment, self._next_address, pool)
        self._next_address += segment
        pool.add(block)
        return block

    def _map(self, pool: _Pool, size: int) -> _Block:
        """Make the first stretch of free blocks and unmapped addresses that has room one block."""
        self._reserve(lambda: sum(missing for _, missing in self._stretch(pool, size)), size)
        for block, missing in self._stretch(pool, size):
            if not missing:
                continue
            pool.remove(block)
            if missing < block.size:
                self._split(block, missing)
            block.mapped = True
            grown = self._settle(block)  # with the stretch so far, and with what is free behind it
        return grown

    def _stretch(self, pool: _Pool, size: int) -> list[tuple[_Block, int]]:
        """The blocks of that stretch, each with how many of its bytes are to be mapped (find_expandable_block)."""
        for hole in pool.unmapped:
            block = hole.before if hole.before is not None and hole.before.free else hole
            stretch, room = [], 0
            while block is not None and block.free and room < size:
                whole = -(-(size - room) // pool.granule) * pool.granule
                stretch.append((block, 0 if block.mapped else min(block.size, whole)))
                room += block.size
                block = block.after
            if room >= size:
                return stretch
        raise AssertionError("the last addresses have no end")

    def _unmap(self, block: _Block) -> None:
        """Give back the whole granules within a free block, also from the middle of a segment."""
        pool = block.pool
        start = -(-block.address // pool.granule) * pool.granule
        end = (block.address + block.size) // pool.granule * pool.granule
        if end <= start:
            return
        pool.remove(block)
        if end < block.address + block.size:
            self._split(block, end - block.address)
        if start > block.address:
            head, block = block, self._split(block, start - block.address)
            pool.remove(block)
            pool.add(head)
        self.reserved -= block.size
        block.mapped = False
        self._settle(block)

    def _reserve(self, needed: Callable[[], int], size: int) -> None:
        """Take what ``needed()`` says from the device; asked again when cached memory has been given back."""
        if self._capacity is not None and self.reserved + needed() > self._capacity:
            self.empty_cache()
            if self.reserved + needed() > self._capacity and self.first_refusal is None:
                self.first_refusal = size
        self.reserved += needed()
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def _split(self, block: _Block, size: int) -> _Block:
        """Cut ``block`` after ``size`` bytes; gives what is cut off, which is free."""
        rest = _Block(
            block.size - size, block.address + size, block.pool, block.mapped, before=block, after=block.after
        )
        if block.after is not None:
            block.after.before = rest
        block.size, block.after = size, rest
        block.pool.add(rest)
        return rest

    def _settle(self, block: _Block) -> _Block:
        """Merge a block that became free, or was mapped or unmapped, with its like on both sides."""
        before, after, pool = block.before, block.after, block.pool
        if before is not None and before.free and before.mapped == block.mapped:
            pool.remove(before)
            block = self._merge(before, block)
        if after is not None and after.free and after.mapped == block.mapped:
            pool.remove(after)
            block = self._merge(block, after)
        pool.add(block)
        return block

    def _merge(self, first: _Block, second: _Block) -> _Block:
        first.size += second.size
        first.after = second.after
        if second.after is not None:
            second.after.before = first
        return first


@dataclass(frozen=True)
class Replay:
    """What :func:`replay` found; sizes in bytes.

    ``events`` are those given, each ``alloc`` with the size of its block; ``peak_reserved`` is the most in segments.
    """

    events: list[Event]
    peak_reserved: int
    out_of_memory: OutOfMemory | None


def replay(events: Iterable[Event], *, capacity: int | None = None, expandable_segments: bool = False) -> Replay:
    """Run ``events`` through a :class:`CachingAllocator`; its parameters are those of the same names."""
    allocator = CachingAllocator(capacity=capacity, expandable_segments=expandable_segments)
    blocks: dict[int, _Block] = {}
    seen: list[Event] = []
    phase, iteration, out_of_memory = "build", 0, None
    for event in events:
        if event.kind == "alloc" and event.bytes:  # nothing is asked for a tensor without elements
            block = blocks[event.block] = allocator.malloc(event.bytes, event.stream)
            if allocator.first_refusal is not None and out_of_memory is None:
                out_of_memory = OutOfMemory(allocator.first_refusal, phase, iteration, event.label)
            event = replace(event, bytes=block.size)
        elif event.kind == "free" and event.block in blocks:
            allocator.free(blocks.pop(event.block))
        elif event.kind == "phase":
            phase = event.label
        elif event.kind == "iteration":
            iteration += 1
        elif event.kind == "empty_cache":
            allocator.empty_cache()
        seen.append(event)
    return Replay(seen, allocator.peak_reserved, out_of_memory)
