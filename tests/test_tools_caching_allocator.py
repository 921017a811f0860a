"""PyTorch's allocator on sizes alone: requests whose segments can be counted by hand, and blocks that never overlap."""

import itertools
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

from qtune.memory.tracing.caching_allocator import MIB, ExpandableSegments, FixedSegments, OutOfMemoryError


def test_small_requests_share_a_segment_of_two_mebibytes():
    allocator = FixedSegments()
    places = [allocator.allocate(MIB // 2) for _ in range(4)]
    assert allocator.reserved == 2 * MIB
    allocator.allocate(1)
    assert allocator.reserved == 4 * MIB
    for place in places:
        allocator.free(place)
    allocator.allocate(MIB)  # in what was joined again
    assert allocator.reserved == 4 * MIB


def test_larger_requests_take_twenty_mebibytes_and_the_largest_their_own_size():
    allocator = FixedSegments()
    allocator.allocate(2 * MIB)
    assert allocator.reserved == 20 * MIB
    allocator.allocate(9 * MIB)  # the rest of that segment
    assert allocator.reserved == 20 * MIB
    allocator.allocate(33 * MIB)
    assert allocator.reserved == 20 * MIB + 34 * MIB


def test_a_fixed_segment_that_is_too_small_is_wasted_and_an_expandable_one_grows():
    fixed, expandable = FixedSegments(), ExpandableSegments()
    for allocator in (fixed, expandable):
        for size in (100, 120, 140):
            allocator.free(allocator.allocate(size * MIB))
    assert fixed.reserved == 360 * MIB
    assert expandable.reserved == 140 * MIB


def test_what_is_free_is_given_back_before_memory_runs_out():
    fixed, expandable = FixedSegments(200 * MIB), ExpandableSegments(200 * MIB)
    for allocator in (fixed, expandable):
        held = allocator.allocate(60 * MIB)
        allocator.free(allocator.allocate(120 * MIB))
        allocator.allocate(140 * MIB)
        assert allocator.reserved == 200 * MIB
        with pytest.raises(OutOfMemoryError):
            allocator.allocate(2 * MIB)
        allocator.free(held)
        allocator.allocate(60 * MIB)


def test_pages_within_a_free_block_are_unmapped_and_those_at_its_edges_stay():
    allocator = ExpandableSegments(160 * MIB)
    first = allocator.allocate(50 * MIB)
    allocator.allocate(90 * MIB)  # from 50 to 140 MiB
    allocator.free(first)  # pages 0-20 and 20-40 can go; that of 40-60 cannot
    with pytest.raises(OutOfMemoryError):
        allocator.allocate(70 * MIB)
    allocator.allocate(55 * MIB)
    assert allocator.reserved == 160 * MIB


@pytest.mark.parametrize("kind", [FixedSegments, ExpandableSegments])
@pytest.mark.parametrize("seed", range(12))
def test_blocks_never_overlap_and_all_of_it_comes_back(kind, seed):
    rng = random.Random(seed)
    allocator = kind(rng.choice([None, 300 * MIB]))
    held = []
    for _ in range(300):
        if held and rng.random() < 0.5:
            allocator.free(held.pop(rng.randrange(len(held)))[0])
            continue
        size = int(2 ** rng.uniform(5, 26))
        try:
            held.append((allocator.allocate(size), size))
        except OutOfMemoryError:
            assert allocator.capacity is not None
        spans = sorted((small, address, address + size) for (small, address), size in held)
        for (pool, _, end), (other, begin, _) in itertools.pairwise(spans):
            assert pool != other or end <= begin
        assert allocator.reserved >= sum(size for _, size in held)
    for place, _ in held:
        allocator.free(place)
    allocator.capacity = 0
    with pytest.raises(OutOfMemoryError):
        allocator.allocate(10**12)
    assert allocator.reserved == 0
