"""The simulated caching allocator: each rule by hand, and both modes against the slow allocators in `naive`."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import naive

from memstudy.profiler.allocator import CachingAllocator, replay
from memstudy.profiler.events import MIB, Event, OutOfMemory

KIB = 1024

both = pytest.mark.parametrize("expandable", [False, True], ids=["default", "expandable"])


def reserved_for(*sizes, expandable=False):
    """Bytes in segments after requests of `sizes`, none freed."""
    allocator = CachingAllocator(expandable_segments=expandable)
    for size in sizes:
        allocator.malloc(size)
    return allocator.reserved


# --- streams


@both
def test_what_is_freed_serves_its_own_stream_alone(expandable):
    allocator = CachingAllocator(expandable_segments=expandable)
    allocator.free(allocator.malloc(12 * MIB))
    reserved = allocator.reserved
    allocator.malloc(12 * MIB, stream=7)
    assert allocator.reserved == 2 * reserved
    allocator.malloc(12 * MIB)
    assert allocator.reserved == 2 * reserved
    allocator.malloc(1)
    allocator.malloc(1, stream=7)
    assert allocator.reserved == 2 * reserved + 2 * 2 * MIB


def test_an_event_says_on_which_stream():
    events = [Event("alloc", 0, block, 12 * MIB, stream=block % 2) for block in range(4)]
    events += [Event("free", 0, block) for block in range(4)]
    assert replay([*events, *events[:4]]).peak_reserved == replay(events[:4]).peak_reserved
    moved = [Event("alloc", 0, block, 12 * MIB, stream=5) for block in range(4)]
    assert replay([*events, *moved]).peak_reserved == 2 * replay(events[:4]).peak_reserved


# --- blocks and segments


@both
@pytest.mark.parametrize(("asked", "given"), [(1, 512), (512, 512), (513, 1024), (3 * MIB + 1, 3 * MIB + 512)])
def test_blocks_are_multiples_of_512_bytes(expandable, asked, given):
    allocator = CachingAllocator(expandable_segments=expandable)
    assert allocator.malloc(asked).size == given
    assert allocator.allocated == allocator.peak_allocated == given


@pytest.mark.parametrize(
    ("asked", "segment"),
    [
        (1, 2 * MIB),
        (MIB, 2 * MIB),  # the last small request
        (MIB + 1, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB - 511, 10 * MIB),  # rounded up to 10 MiB
        (10 * MIB, 10 * MIB),
        (10 * MIB + 1, 12 * MIB),
        (20 * MIB, 20 * MIB),
        (33 * MIB, 34 * MIB),
    ],
)
def test_the_segment_of_a_first_request(asked, segment):
    assert reserved_for(asked) == segment


def test_small_requests_share_segments_of_2_mib():
    assert reserved_for(*[512 * KIB] * 4) == 2 * MIB
    assert reserved_for(*[512 * KIB] * 5) == 4 * MIB
    assert reserved_for(*[700 * KIB] * 3) == 4 * MIB  # the third does not fit behind the two


def test_small_and_large_requests_never_share():
    assert reserved_for(2 * MIB, MIB) == 20 * MIB + 2 * MIB
    assert reserved_for(512, 2 * MIB) == 2 * MIB + 20 * MIB


def test_a_small_block_is_split_down_to_512_bytes():
    allocator = CachingAllocator()
    first = allocator.malloc(512)
    allocator.malloc(MIB - 512)
    allocator.malloc(MIB - 512)
    allocator.malloc(512)  # the last 512 bytes of the segment
    assert allocator.reserved == 2 * MIB == allocator.allocated
    allocator.free(first)
    allocator.malloc(1)
    assert allocator.reserved == 2 * MIB


@pytest.mark.parametrize(("rest", "block"), [(MIB, 10 * MIB), (MIB + 512, 9 * MIB - 512)], ids=["1 MiB", "more"])
def test_a_large_tail_up_to_1_mib_stays_with_its_block_and_counts(rest, block):
    allocator = CachingAllocator()
    allocator.free(allocator.malloc(10 * MIB))
    assert allocator.malloc(10 * MIB - rest).size == block
    assert allocator.allocated == block
    assert allocator.peak_allocated == 10 * MIB


def test_a_new_segment_has_a_tail_too():
    allocator = CachingAllocator()
    assert allocator.malloc(11 * MIB).size == 12 * MIB
    assert allocator.malloc(11 * MIB - 512).size == 11 * MIB - 512
    assert allocator.reserved == 2 * 12 * MIB


@both
def test_the_best_fit_is_the_smallest_then_the_lowest(expandable):
    allocator = CachingAllocator(expandable_segments=expandable)
    sizes = [6 * MIB, 4 * MIB, 8 * MIB, 4 * MIB]
    blocks, walls = [], []
    for size in sizes:
        blocks.append(allocator.malloc(size))
        walls.append(allocator.malloc(2 * MIB))  # keeps freed blocks from merging
    addresses = [block.address for block in blocks]
    for block in reversed(blocks):
        allocator.free(block)
    reserved = allocator.reserved
    assert [allocator.malloc(4 * MIB).address for _ in range(2)] == [addresses[1], addresses[3]]
    assert allocator.malloc(5 * MIB).address == addresses[0]
    assert allocator.malloc(7 * MIB).address == addresses[2]
    assert allocator.reserved == reserved


@both
@pytest.mark.parametrize("order", ["abc", "acb", "bac", "bca", "cab", "cba"])
def test_freed_neighbours_become_one_block(expandable, order):
    allocator = CachingAllocator(expandable_segments=expandable)
    blocks = {name: allocator.malloc(6 * MIB) for name in "abc"}
    end = allocator.malloc(2 * MIB)
    for name in order:
        allocator.free(blocks[name])
    assert allocator.malloc(18 * MIB).address == 0
    assert (allocator.reserved, allocator.allocated) == (20 * MIB, 20 * MIB)
    assert end.address == 18 * MIB


def test_blocks_do_not_merge_across_segments():
    allocator = CachingAllocator()
    blocks = [allocator.malloc(10 * MIB), allocator.malloc(10 * MIB)]
    assert blocks[0].address + blocks[0].size == blocks[1].address
    for block in blocks:
        allocator.free(block)
    allocator.malloc(20 * MIB)
    assert allocator.reserved == 40 * MIB


def test_peaks_stay():
    allocator = CachingAllocator()
    allocator.free(allocator.malloc(30 * MIB))
    allocator.empty_cache()
    allocator.malloc(1)
    assert (allocator.allocated, allocator.peak_allocated) == (512, 30 * MIB)
    assert (allocator.reserved, allocator.peak_reserved) == (2 * MIB, 30 * MIB)


def test_empty_cache_gives_back_wholly_free_segments_only():
    allocator = CachingAllocator()
    small, large, own = allocator.malloc(1), allocator.malloc(2 * MIB), allocator.malloc(30 * MIB)
    rest = allocator.malloc(5 * MIB)  # beside `large`
    for block in (small, large, own):
        allocator.free(block)
    assert allocator.reserved == 2 * MIB + 20 * MIB + 30 * MIB
    allocator.empty_cache()
    assert allocator.reserved == 20 * MIB
    assert allocator.malloc(2 * MIB).address == large.address  # the remaining segment can still be used
    allocator.free(rest)
    assert allocator.reserved == 20 * MIB


# --- a device that is full


@both
def test_what_fits_exactly_is_no_refusal(expandable):
    allocator = CachingAllocator(capacity=22 * MIB, expandable_segments=expandable)
    allocator.malloc(MIB)
    allocator.malloc(20 * MIB)
    assert allocator.first_refusal is None
    allocator.malloc(MIB + 1)
    assert allocator.first_refusal == MIB + 512


def test_nothing_is_given_back_for_what_fits_exactly():
    allocator = CachingAllocator(capacity=42 * MIB)
    allocator.free(allocator.malloc(20 * MIB))
    allocator.malloc(22 * MIB)
    assert allocator.reserved == 42 * MIB


def test_cached_segments_are_given_back_before_a_request_is_refused():
    allocator = CachingAllocator(capacity=40 * MIB)
    cached = [allocator.malloc(12 * MIB), allocator.malloc(14 * MIB)]
    kept = allocator.malloc(512)
    for block in cached:
        allocator.free(block)
    allocator.malloc(16 * MIB)  # 28 MiB are in use or cached, and no free block has 16 MiB
    assert allocator.first_refusal is None
    assert allocator.reserved == 16 * MIB + 2 * MIB
    assert allocator.peak_reserved == 28 * MIB
    allocator.malloc(24 * MIB)
    assert allocator.first_refusal == 24 * MIB
    assert allocator.reserved == 42 * MIB  # a refused request is granted all the same
    allocator.malloc(50 * MIB)
    assert allocator.first_refusal == 24 * MIB  # not the second
    allocator.free(kept)


def test_a_segment_that_is_partly_in_use_cannot_be_given_back():
    """Fragmentation: 27 MiB are free, in segments partly in use, and 21 MiB do not fit."""
    refusals = {}
    for expandable in (False, True):
        allocator = CachingAllocator(capacity=40 * MIB, expandable_segments=expandable)
        blocks = [allocator.malloc(9 * MIB) for _ in range(4)]
        for block in blocks[1:]:
            allocator.free(block)
        allocator.malloc(21 * MIB)
        refusals[expandable] = allocator.first_refusal
    assert refusals == {False: 21 * MIB, True: None}


# --- expandable segments


@pytest.mark.parametrize(
    ("asked", "mapped"),
    [
        ([1], 2),
        ([MIB, MIB], 2),
        ([MIB, MIB, 1], 4),
        ([MIB + 1], 20),
        ([10 * MIB], 20),  # no segment of its own
        ([20 * MIB], 20),
        ([20 * MIB + 1], 40),
        ([12 * MIB, 12 * MIB], 40),  # across a granule's border; by default, two segments of 12 MiB
        ([50 * MIB, 10 * MIB], 60),
        ([1, 2 * MIB], 22),
    ],
)
def test_expandable_segments_grow_by_granules(asked, mapped):
    assert reserved_for(*asked, expandable=True) == mapped * MIB


def test_expandable_segments_split_large_blocks_down_to_512_bytes():
    allocator = CachingAllocator(expandable_segments=True)
    assert allocator.malloc(20 * MIB - 512).size == 20 * MIB - 512
    assert allocator.allocated == 20 * MIB - 512
    allocator.free(allocator.malloc(2 * MIB))
    assert allocator.reserved == 40 * MIB


@pytest.mark.parametrize(("expandable", "reserved"), [(False, 550), (True, 100)])
def test_expandable_segments_do_not_fragment_as_requests_grow(expandable, reserved):
    allocator = CachingAllocator(expandable_segments=expandable)
    for size in range(10, 110, 10):  # each is freed before the next; by default, no segment fits the next size
        allocator.free(allocator.malloc(size * MIB))
    assert allocator.reserved == reserved * MIB


def test_the_end_that_could_grow_is_taken_last():
    """The end's 4 MiB would fit best, but count together with the unmapped addresses behind them."""
    allocator = CachingAllocator(expandable_segments=True)
    hole = allocator.malloc(6 * MIB)
    allocator.malloc(10 * MIB)
    allocator.free(hole)
    assert allocator.malloc(3 * MIB).address == hole.address
    assert allocator.malloc(4 * MIB).address == 16 * MIB  # the hole no longer fits


def test_a_request_takes_free_memory_before_unmapped_addresses():
    allocator = CachingAllocator(expandable_segments=True)
    allocator.malloc(15 * MIB)
    assert allocator.malloc(25 * MIB).address == 15 * MIB
    assert allocator.reserved == 40 * MIB


def test_empty_cache_unmaps_granules_in_the_middle_and_they_are_mapped_again():
    allocator = CachingAllocator(expandable_segments=True)
    first, middle, last = (allocator.malloc(size * MIB) for size in (15, 50, 5))
    assert allocator.reserved == 80 * MIB
    allocator.free(middle)  # 15..65 MiB, so the granules 20..40 and 40..60 are free
    allocator.empty_cache()
    assert allocator.reserved == 40 * MIB  # 60..80 MiB stays mapped because of `last`
    assert allocator.malloc(6 * MIB).address == 70 * MIB  # free mapped pieces: 5, 5 and 10 MiB
    assert allocator.reserved == 40 * MIB
    assert allocator.malloc(12 * MIB).address == 15 * MIB  # 5 MiB mapped, 7 MiB newly mapped
    assert allocator.reserved == 60 * MIB
    whole = allocator.malloc(38 * MIB)  # 13 MiB mapped, 20 MiB newly mapped, 5 MiB mapped
    assert (whole.address, whole.size) == (27 * MIB, 38 * MIB)
    assert allocator.reserved == 80 * MIB
    for block in (first, whole, last):
        allocator.free(block)
    allocator.empty_cache()
    assert allocator.reserved == 60 * MIB  # the granules of the blocks in use: 15..27 and 70..76 MiB


def test_a_request_that_no_hole_has_room_for_goes_to_the_end():
    allocator = CachingAllocator(expandable_segments=True)
    hole = allocator.malloc(40 * MIB)
    allocator.malloc(20 * MIB)
    allocator.free(hole)
    allocator.empty_cache()
    assert allocator.malloc(41 * MIB).address == 60 * MIB
    assert allocator.malloc(40 * MIB).address == 0


def test_expandable_segments_are_unmapped_before_a_request_is_refused():
    allocator = CachingAllocator(capacity=80 * MIB, expandable_segments=True)
    blocks = [allocator.malloc(20 * MIB) for _ in range(3)]
    allocator.free(blocks[1])
    # The hole is too small, and the end needs 40 MiB more, so the hole's 20 MiB move there.
    assert allocator.malloc(30 * MIB).address == 60 * MIB
    assert allocator.first_refusal is None
    assert allocator.reserved == allocator.peak_reserved == 80 * MIB
    allocator.malloc(21 * MIB)  # 10 MiB are left at the end
    assert allocator.first_refusal == 21 * MIB


# --- against the slow allocators

AROUND = [0, 512, MIB, 2 * MIB, 9 * MIB, 10 * MIB, 12 * MIB, 19 * MIB, 20 * MIB, 40 * MIB]
sizes = st.one_of(
    st.builds(lambda size, more: max(1, size + more), st.sampled_from(AROUND), st.integers(-1024, 1024)),
    st.integers(1, 2 * MIB),
    st.integers(MIB, 24 * MIB),
)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("malloc"), sizes),
        st.tuples(st.just("free"), st.integers(0, 50)),
        st.tuples(st.just("empty_cache"), st.none()),
    ),
    max_size=60,
)


def run(operations, *allocators):
    """Carry out the operations on both allocators; yield the live blocks and both answers after each operation."""
    ours, slow = allocators
    blocks, names = {}, iter(range(len(operations)))
    for what, number in operations:
        sizes = None
        if what == "malloc":
            name = next(names)
            blocks[name] = ours.malloc(number)
            sizes = blocks[name].size, slow.malloc(name, number)
        elif what == "free" and blocks:
            name = sorted(blocks)[number % len(blocks)]
            ours.free(blocks.pop(name))
            slow.free(name)
        elif what == "empty_cache":
            ours.empty_cache()
            slow.empty_cache()
        yield blocks, sizes


SLOW = {False: naive.PlainAllocator, True: naive.ExpandableAllocator}


@both
@settings(max_examples=200, deadline=None)
@given(operations=operations)
def test_every_operation_as_the_slow_allocator(expandable, operations):
    ours, slow = CachingAllocator(expandable_segments=expandable), SLOW[expandable]()
    for _, sizes in run(operations, ours, slow):
        assert sizes is None or sizes[0] == sizes[1]
        assert (ours.allocated, ours.reserved) == (slow.allocated, slow.reserved)


@both
@settings(max_examples=200, deadline=None)
@given(operations=operations, capacity=st.integers(0, 100 * MIB))
def test_every_operation_on_a_full_device_as_the_slow_allocator(expandable, operations, capacity):
    ours = CachingAllocator(capacity=capacity, expandable_segments=expandable)
    slow = SLOW[expandable](capacity)
    for _, sizes in run(operations, ours, slow):
        assert sizes is None or sizes[0] == sizes[1]
        assert (ours.allocated, ours.reserved) == (slow.allocated, slow.reserved)
        assert ours.first_refusal == (slow.refused[0] if slow.refused else None)


@both
@settings(max_examples=200, deadline=None)
@given(operations=operations)
def test_invariants(expandable, operations):
    ours = CachingAllocator(expandable_segments=expandable)
    blocks, peak_allocated, peak_reserved = {}, 0, 0
    for blocks, _ in run(operations, ours, SLOW[expandable]()):
        for small in (True, False):  # with expandable segments, each pool has its own addresses
            of_pool = sorted((b.address, b.size) for b in blocks.values() if (b.size <= MIB) == small)
            assert all(start + size <= following for (start, size), (following, _) in pairwise(of_pool))
        assert ours.allocated == sum(block.size for block in blocks.values()) <= ours.reserved
        peak_allocated, peak_reserved = max(peak_allocated, ours.allocated), max(peak_reserved, ours.reserved)
    assert (ours.peak_allocated, ours.peak_reserved) == (peak_allocated, peak_reserved)
    for block in blocks.values():
        ours.free(block)
    assert ours.allocated == 0
    ours.empty_cache()
    assert ours.reserved == 0
    ours.malloc(1)
    assert ours.reserved == 2 * MIB  # as a new allocator


# --- replayed events


def alloc(block, size, module=""):
    return Event("alloc", 0.0, block, size, module)


def free(block):
    return Event("free", 0.0, block)


def phase(name):
    return Event("phase", 0.0, label=name)


ITERATION, EMPTY_CACHE = Event("iteration", 0.0), Event("empty_cache", 0.0)


def test_the_replay_tells_blocks_and_leaves_everything_else_as_it_was():
    events = [
        alloc(7, 1000, "up"),
        phase("forward"),
        ITERATION,
        Event("is", 2.5, 7, label="parameters"),
        alloc(8, 11 * MIB, "down"),
        free(7),
        free(8),
        alloc(7, 5),
    ]
    replayed = replay(events)
    asked = [Event("segment_alloc", 0.0, bytes=size * MIB, address=place) for size, place in ((2, 0), (12, 2 * MIB))]
    assert replayed.events == [
        replace(asked[0], label="small"),
        replace(alloc(7, 1024, "up"), requested=1000),
        *events[1:4],
        replace(asked[1], label="large"),
        replace(alloc(8, 12 * MIB, "down"), requested=11 * MIB, address=2 * MIB),
        *events[5:7],
        replace(alloc(7, 512), requested=5),
    ]
    assert replayed.peak_reserved == 14 * MIB
    assert replayed.out_of_memory is None


@both
def test_frees_of_unknown_blocks_are_ignored(expandable):
    events = [free(3), alloc(3, 20 * MIB), free(3), free(3), alloc(4, 20 * MIB), alloc(5, 20 * MIB)]
    replayed = replay(events, expandable_segments=expandable)
    kinds = [event.kind for event in replayed.events if not event.kind.startswith("segment")]
    assert kinds == ["free", "alloc", "free", "free", "alloc", "alloc"]
    assert replayed.peak_reserved == 40 * MIB


def test_a_tensor_without_elements_takes_no_memory():
    events = [alloc(1, 0), free(1), alloc(1, 0), alloc(2, 1), free(1)]
    replayed = replay(events)
    assert [event.bytes for event in replayed.events if event.kind == "alloc"] == [0, 0, 512]
    assert replay(events[:3]).peak_reserved == 0
    assert replayed.peak_reserved == 2 * MIB


@pytest.mark.parametrize(("between", "reserved"), [([], 42), ([EMPTY_CACHE], 22)])
def test_an_empty_cache_event_empties_the_cache(between, reserved):
    events = [alloc(1, 20 * MIB), free(1), *between, alloc(2, 22 * MIB)]
    assert replay(events).peak_reserved == reserved * MIB


def test_the_first_request_that_does_not_fit_is_told_with_where_it_came_from():
    events = [
        alloc(1, 20 * MIB),
        phase("forward"),
        ITERATION,
        alloc(2, 20 * MIB, "embed"),
        phase("backward"),
        ITERATION,
        phase("forward"),
        alloc(3, 30 * MIB - 1, "block.up"),
        phase("backward"),
        alloc(4, 90 * MIB, "block.down"),
    ]
    assert replay(events, capacity=160 * MIB).out_of_memory is None
    found = replay(events, capacity=60 * MIB).out_of_memory
    assert found == OutOfMemory(30 * MIB, "forward", 2, "block.up")
    assert str(found) == "out of memory in forward of step 2 in block.up, asking for 30.0 MiB"
    found = replay(events, capacity=10 * MIB).out_of_memory
    assert found == OutOfMemory(20 * MIB, "build", 0, "")
    assert str(found) == "out of memory moving the model to the GPU, asking for 20.0 MiB"


@pytest.mark.parametrize(("expandable", "fits"), [(False, False), (True, True)])
def test_a_replay_can_have_expandable_segments(expandable, fits):
    events = [*(alloc(n, 9 * MIB) for n in range(4)), *(free(n) for n in (1, 2, 3)), alloc(5, 21 * MIB)]
    replayed = replay(events, capacity=40 * MIB, expandable_segments=expandable)
    assert (replayed.out_of_memory is None) == fits
