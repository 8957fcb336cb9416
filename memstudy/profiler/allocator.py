"""Replay of PyTorch's CUDA caching allocator: the memory that a stream of requests takes from the device.

The allocator asks the device for *segments*, cuts *blocks* from segments and keeps freed blocks
(c10/cuda/CUDACachingAllocator.cpp, torch 2.13; no garbage collection, default settings or ``expandable_segments``). A
segment serves only one stream. ``max_memory_allocated`` counts blocks, whose sizes are rounded up and may include a
tail too small to cut off; ``max_memory_reserved`` counts segments. Requested bytes alone determine neither, hence
the replay.
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
LARGE = 10 * MIB  # kMinLargeAlloc: requests of at least this get a segment of their own,
ROUND_LARGE = 2 * MIB  # kRoundLarge: rounded up to a multiple of this
ENDLESS = 2**40  # granules of an expandable segment's addresses
# Between the first addresses of two expandable segments [bytes]: more than any GPU has; 128 of them stay below 2^53,
# where the exact numbers of a viewer in a browser end.
APART = 2**46


@dataclass(eq=False, slots=True)
class _Block:
    size: int
    address: int
    pool: _Pool
    mapped: bool = True  # False: addresses of an expandable segment without memory behind them
    free: bool = True
    before: _Block | None = None
    after: _Block | None = None

    @property
    def expandable_size(self) -> int:
        return self.size + (self.after.size if self.after is not None and not self.after.mapped else 0)


@dataclass(eq=False)
class _Pool:
    """Free small or large blocks of one stream, smallest first, then lowest address, for the allocator's best fit."""

    small: bool
    stream: int
    base: int  # what is added to its blocks' addresses
    keys: list[tuple[int, int]] = field(default_factory=list)
    blocks: dict[tuple[int, int], _Block] = field(default_factory=dict)
    unmapped: list[_Block] = field(default_factory=list)  # lowest address first

    @property
    def granule(self) -> int:
        """The unit in which an expandable segment is mapped and unmapped [bytes]."""
        return SMALL_SEGMENT if self.small else LARGE_SEGMENT

    def add(self, block: _Block) -> None:
        if block.mapped:
            key = block.size, block.address
            bisect.insort(self.keys, key)
            self.blocks[key] = block
        else:
            bisect.insort(self.unmapped, block, key=lambda other: other.address)

    def remove(self, block: _Block) -> None:
        if block.mapped:
            key = block.size, block.address
            del self.keys[bisect.bisect_left(self.keys, key)]
            del self.blocks[key]
        else:
            self.unmapped.remove(block)

    def best_fit(self, size: int) -> int | None:
        """The place in ``keys`` of the best block of at least ``size`` bytes; None without one."""
        keys = self.keys
        best = bisect.bisect_left(keys, (size, -1))
        if best == len(keys):
            return None
        if self.unmapped:
            # get_free_block: an expandable block counts with the size that it can grow to.
            while best + 1 < len(keys):
                block, larger = self.blocks[keys[best]], self.blocks[keys[best + 1]]
                if larger.expandable_size >= block.expandable_size:
                    break
                best += 1
        return best

    def take(self, place: int) -> _Block:
        """Remove and return the block at ``place``."""
        return self.blocks.pop(self.keys.pop(place))


class CachingAllocator:
    """The allocator of one device; all sizes in bytes.

    Parameters
    ----------
    capacity : int, optional
        Device memory for segments. When a request does not fit, every wholly free segment is given back. A request that
        still does not fit is granted nevertheless, and ``first_refusal`` holds the first one's size.
    expandable_segments : bool
        As with ``PYTORCH_ALLOC_CONF=expandable_segments:True``: one segment per stream and pool, with memory mapped
        where needed. Its addresses have no end here; PyTorch reserves addresses for 1 1/8 of the device's memory.

    Attributes
    ----------
    allocated, reserved : int
        Bytes currently in used blocks, and in segments.
    peak_allocated, peak_reserved : int
        Their highest values.
    first_refusal : int or None
        The size of the first request that did not fit [bytes].
    told : list of tuple
        Kind, address, bytes, label and stream of each :class:`Event` of segments, and of the first refusal.
    """

    def __init__(self, *, capacity: int | None = None, expandable_segments: bool = False):
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0
        self.first_refusal: int | None = None
        self.told: list[tuple[str, int, int, str, int]] = []
        self._capacity, self._expandable = capacity, expandable_segments
        self._pools: dict[tuple[int, bool], _Pool] = {}
        self._next_address = 0

    def malloc(self, size: int, stream: int = 0) -> _Block:
        """Return a block of at least ``size`` > 0 bytes for ``stream``; ``block.size`` is its actual size."""
        size = -(-size // ROUND) * ROUND
        pool = self._pool(stream, small=size <= SMALL)
        place = pool.best_fit(size)
        if place is not None:
            block = pool.take(place)
        else:
            block = self._map(pool, size) if self._expandable else self._segment(pool, size)
            pool.remove(block)
        if self._splits(pool, block.size - size):
            self._split(block, size)
        block.free = False
        self.allocated += block.size
        if self.allocated > self.peak_allocated:
            self.peak_allocated = self.allocated
        return block

    def pass_through(self, size: int, stream: int = 0) -> None:
        """Request a block and free it at once: with a free block at hand, only the peak can change."""
        rounded = -(-size // ROUND) * ROUND
        pool = self._pool(stream, small=rounded <= SMALL)
        place = pool.best_fit(rounded)
        if place is None:
            self.free(self.malloc(size, stream))
            return
        found = pool.keys[place][0]
        used = rounded if self._splits(pool, found - rounded) else found
        self.peak_allocated = max(self.peak_allocated, self.allocated + used)

    def state(self) -> tuple:
        """What decides where later requests go, besides the blocks in use."""
        return tuple(
            (name, *pool.keys, *((hole.address, hole.size) for hole in pool.unmapped))
            for name, pool in self._pools.items()
        )

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
                    self._tell("segment_free", block)

    def _splits(self, pool: _Pool, rest: int) -> bool:
        """should_split: in a large segment, a tail of up to 1 MiB stays with the block."""
        return rest >= ROUND if pool.small or self._expandable else rest > SMALL

    def _pool(self, stream: int, *, small: bool) -> _Pool:
        pool = self._pools.get((stream, small))
        if pool is None:
            base = APART * len(self._pools) if self._expandable else 0
            pool = self._pools[stream, small] = _Pool(small, stream, base)
            if self._expandable:
                pool.add(_Block(ENDLESS * pool.granule, 0, pool, mapped=False))
        return pool

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
        self._tell("segment_alloc", block)
        pool.add(block)
        return block

    def _map(self, pool: _Pool, size: int) -> _Block:
        """Turn the first stretch of free blocks and unmapped addresses with room for ``size`` bytes into one block."""
        self._reserve(lambda: sum(missing for _, missing in self._stretch(pool, size)), size)
        for block, missing in self._stretch(pool, size):
            if not missing:
                continue
            pool.remove(block)
            if missing < block.size:
                self._split(block, missing)
            block.mapped = True
            self._tell("segment_map", block)
            grown = self._settle(block)  # merges with the stretch so far and with a free block behind it
        return grown

    def _stretch(self, pool: _Pool, size: int) -> list[tuple[_Block, int]]:
        """The blocks of the first stretch with room, each with its number of bytes to map (find_expandable_block)."""
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
        """Give back the whole granules within a free block, even in the middle of a segment."""
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
        self._tell("segment_unmap", block)
        self._settle(block)

    def _tell(self, kind: str, block: _Block) -> None:
        pool = block.pool
        self.told.append((kind, pool.base + block.address, block.size, "small" if pool.small else "large", pool.stream))

    def _reserve(self, needed: Callable[[], int], size: int) -> None:
        """Take ``needed()`` bytes from the device; ``needed`` is called again after the cache has been emptied."""
        if self._capacity is not None and self.reserved + needed() > self._capacity:
            self.empty_cache()
            if self.reserved + needed() > self._capacity and self.first_refusal is None:
                self.first_refusal = size
                self.told.append(("oom", 0, size, "", 0))
        self.reserved += needed()
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def _split(self, block: _Block, size: int) -> _Block:
        """Cut ``block`` after ``size`` bytes and return the rest, a free block."""
        rest = _Block(
            block.size - size, block.address + size, block.pool, block.mapped, before=block, after=block.after
        )
        if block.after is not None:
            block.after.before = rest
        block.size, block.after = size, rest
        block.pool.add(rest)
        return rest

    def _settle(self, block: _Block) -> _Block:
        """Merge a newly freed, mapped or unmapped block with its free neighbours of equal ``mapped``."""
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
    """Result of :func:`replay`; sizes in bytes.

    ``events`` are the replayed events, with blocks' sizes and addresses, and the allocator's own events among them;
    ``peak_reserved`` is the peak in segments.
    """

    events: list[Event]
    peak_reserved: int
    out_of_memory: OutOfMemory | None


def replay(events: Iterable[Event], *, capacity: int | None = None, expandable_segments: bool = False) -> Replay:
    """Run ``events`` through a :class:`CachingAllocator` with the given parameters."""
    allocator = CachingAllocator(capacity=capacity, expandable_segments=expandable_segments)
    blocks: dict[int, _Block] = {}
    seen: list[Event] = []
    phase, iteration, out_of_memory = "build", 0, None
    for event in events:
        if event.kind == "alloc" and event.bytes:  # a tensor without elements requests no memory
            block = blocks[event.block] = allocator.malloc(event.bytes, event.stream)
            if allocator.first_refusal is not None and out_of_memory is None:
                out_of_memory = OutOfMemory(allocator.first_refusal, phase, iteration, event.label)
            address = block.pool.base + block.address
            event = replace(event, bytes=block.size, requested=event.bytes, address=address)
        elif event.kind == "free" and event.block in blocks:
            allocator.free(blocks.pop(event.block))
        elif event.kind == "phase":
            phase = event.label
        elif event.kind == "iteration":
            iteration += 1
        elif event.kind == "empty_cache":
            allocator.empty_cache()
        for kind, address, size, label, stream in allocator.told:
            seen.append(Event(kind, event.time_ms, 0, size, label or event.label, stream, event.issued, address))
        allocator.told.clear()
        seen.append(event)
    return Replay(seen, allocator.peak_reserved, out_of_memory)
