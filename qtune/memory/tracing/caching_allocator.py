"""PyTorch's CUDA caching allocator, played on sizes alone: how much of a card its segments take for given tensors.

After c10/cuda/CUDACachingAllocator.cpp (torch 2.13): requests up to 1 MiB from a pool of 2 MiB segments, larger ones
from segments of 20 MiB or, from 10 MiB on, of their own size rounded up to 2 MiB; best fit, split where enough is left,
neighbours joined when freed; on failure whole free segments go back and the request is tried once more. With expandable
segments each pool is one range of addresses into which pages of 2 or 20 MiB are mapped.
"""

import bisect
from dataclasses import dataclass, field

from qtune.sizes import MIB

SMALL = MIB  # kSmallSize
SMALL_SEGMENT, LARGE_SEGMENT = 2 * MIB, 20 * MIB  # kSmallBuffer, kLargeBuffer
OWN_SEGMENT_FROM, OWN_ROUNDING = 10 * MIB, 2 * MIB  # kMinLargeAlloc, kRoundLarge
MIN_BLOCK = 512  # kMinBlockSize
RANGE = 2**50  # addresses of one pool: more than any card

Place = tuple[bool, int]
"""Where a block is: whether in the small pool, and its address."""


class OutOfMemoryError(Exception):
    """The capacity is not enough, even with everything unused given back."""


@dataclass
class _Pool:
    """Blocks of one pool, beside each other in one range of addresses; segments never touch."""

    size: dict[int, int] = field(default_factory=dict)
    """Address -> bytes of every block, used, free or (expandable) not mapped."""
    free: list[tuple[int, int]] = field(default_factory=list)
    """(bytes, address) of the free ones, smallest first."""
    is_free: set[int] = field(default_factory=set)
    before: dict[int, int] = field(default_factory=dict)
    """Address -> address of the block that ends there."""

    def add_free(self, address: int, size: int) -> None:
        self.size[address] = size
        self.is_free.add(address)
        bisect.insort(self.free, (size, address))

    def take_free(self, address: int) -> int:
        size = self.size[address]
        del self.free[bisect.bisect_left(self.free, (size, address))]
        self.is_free.discard(address)
        return size

    def split(self, address: int, size: int) -> None:
        """Leave `size` bytes at `address`, which is used, and make the rest a free block."""
        rest = self.size[address] - size
        self.size[address] = size
        self.before[address + size] = address
        self.add_free(address + size, rest)
        if (after := address + size + rest) in self.size:
            self.before[after] = address + size

    def join(self, address: int) -> int:
        """Make a used block free, joined with free neighbours; its new address."""
        size = self.size[address]
        after = address + size
        if after in self.is_free:
            size += self.take_free(after)
            del self.size[after], self.before[after]
        before = self.before.get(address)
        if before is not None and before in self.is_free:
            size += self.take_free(before)
            del self.size[address], self.before[address]
            address = before
        if address + size in self.size:
            self.before[address + size] = address
        self.add_free(address, size)
        return address


class _Segments:
    """What both kinds of segments count, in bytes, and how a block is freed."""

    def __init__(self, capacity: int | None, pools: dict[bool, _Pool]) -> None:
        self.capacity, self.pools = capacity, pools
        self.reserved = self.peak = 0
        """Taken from the card, and the most of it."""
        self.allocated = self.allocated_peak = 0
        """In blocks that are used, and the most of it."""

    def free(self, place: Place) -> None:
        small, address = place
        self.allocated -= self.pools[small].size[address]
        self.pools[small].join(address)

    def _taken(self, small: bool, address: int) -> Place:
        self.allocated += self.pools[small].size[address]
        self.allocated_peak = max(self.allocated_peak, self.allocated)
        return small, address


class FixedSegments(_Segments):
    """The allocator as it comes. capacity: bytes of the card that it may take; None: any."""

    def __init__(self, capacity: int | None = None) -> None:
        super().__init__(capacity, {True: _Pool(), False: _Pool()})
        self.segments: dict[Place, int] = {}
        self.next = 0

    def allocate(self, size: int) -> Place:
        size = max(MIN_BLOCK, -(-size // MIN_BLOCK) * MIN_BLOCK)
        small = size <= SMALL
        pool = self.pools[small]
        at = bisect.bisect_left(pool.free, (size, -1))
        if at < len(pool.free):
            address = pool.free[at][1]
            pool.take_free(address)
        else:
            address = self._segment(pool, small, size)
        rest = pool.size[address] - size
        if rest >= MIN_BLOCK if small else rest > SMALL:
            pool.split(address, size)
        return self._taken(small, address)

    def _segment(self, pool: _Pool, small: bool, size: int) -> int:
        if small:
            wanted = SMALL_SEGMENT
        elif size < OWN_SEGMENT_FROM:
            wanted = LARGE_SEGMENT
        else:
            wanted = -(-size // OWN_ROUNDING) * OWN_ROUNDING
        if self.capacity is not None and self.reserved + wanted > self.capacity:
            self.give_back()
            if self.reserved + wanted > self.capacity:
                raise OutOfMemoryError
        address = self.next
        self.next += wanted + MIN_BLOCK  # a gap, so that blocks of two segments are no neighbours
        self.segments[small, address] = wanted
        pool.size[address] = wanted
        self.reserved += wanted
        self.peak = max(self.peak, self.reserved)
        return address

    def give_back(self) -> None:
        """Gives back every segment that is wholly free, as `torch.cuda.empty_cache` does."""
        for place, size in list(self.segments.items()):
            pool = self.pools[place[0]]
            if place[1] in pool.is_free and pool.size[place[1]] == size:
                pool.take_free(place[1])
                del pool.size[place[1]], self.segments[place]
                self.reserved -= size


class ExpandableSegments(_Segments):
    """The allocator with expandable_segments:True. capacity: bytes of the card that it may take; None: any."""

    def __init__(self, capacity: int | None = None) -> None:
        super().__init__(capacity, {True: _Pool({0: RANGE}), False: _Pool({0: RANGE})})
        self.unmapped: dict[bool, list[int]] = {True: [0], False: [0]}

    def allocate(self, size: int) -> Place:
        size = max(MIN_BLOCK, -(-size // MIN_BLOCK) * MIN_BLOCK)
        small = size <= SMALL
        pool = self.pools[small]
        address = self._best(pool, small, size)
        if address is None:
            address = self._map(pool, small, size)
        pool.take_free(address)
        if pool.size[address] - size >= MIN_BLOCK:
            pool.split(address, size)
        return self._taken(small, address)

    def _room(self, pool: _Pool, small: bool, address: int) -> int:
        """Bytes that a free block has or can be given: what follows it and is not mapped counts."""
        after = address + pool.size[address]
        return pool.size[address] + (pool.size[after] if self._is_unmapped(small, after) else 0)

    def _is_unmapped(self, small: bool, address: int) -> bool:
        found = self.unmapped[small]
        at = bisect.bisect_left(found, address)
        return at < len(found) and found[at] == address

    def _best(self, pool: _Pool, small: bool, size: int) -> int | None:
        at = bisect.bisect_left(pool.free, (size, -1))
        if at == len(pool.free):
            return None
        while at + 1 < len(pool.free) and self._room(pool, small, pool.free[at + 1][1]) < self._room(
            pool, small, pool.free[at][1]
        ):
            at += 1
        return pool.free[at][1]

    def _map(self, pool: _Pool, small: bool, size: int) -> int:
        """Map pages for a request that no free block holds; the free block that holds it then."""
        hole, have = self._hole(pool, small, size)
        wanted = self._pages(pool, small, hole, size - have)
        if self.capacity is not None and self.reserved + wanted > self.capacity:
            self.give_back()
            hole, have = self._hole(pool, small, size)
            wanted = self._pages(pool, small, hole, size - have)
            if self.reserved + wanted > self.capacity:
                raise OutOfMemoryError
        rest = pool.size[hole] - wanted
        self.unmapped[small].remove(hole)
        pool.size[hole] = wanted
        if rest:
            pool.size[hole + wanted] = rest
            pool.before[hole + wanted] = hole
            bisect.insort(self.unmapped[small], hole + wanted)
        self.reserved += wanted
        self.peak = max(self.peak, self.reserved)
        return pool.join(hole)

    def _hole(self, pool: _Pool, small: bool, size: int) -> tuple[int, int]:
        """The first stretch without pages that, with the free block before it, holds `size`; and that block's bytes."""
        for hole in self.unmapped[small]:
            before = pool.before.get(hole)
            have = pool.size[before] if before is not None and before in pool.is_free else 0
            if have + pool.size[hole] >= size:
                return hole, have
        raise OutOfMemoryError

    def _pages(self, pool: _Pool, small: bool, hole: int, missing: int) -> int:
        page = SMALL_SEGMENT if small else LARGE_SEGMENT
        return min(-(-missing // page) * page, pool.size[hole])

    def give_back(self) -> None:
        """Unmaps every page that lies wholly in a free block, as `torch.cuda.empty_cache` does."""
        for small, pool in self.pools.items():
            page = SMALL_SEGMENT if small else LARGE_SEGMENT
            for size, address in list(pool.free):
                first, last = -(-address // page) * page, (address + size) // page * page
                if last > first:
                    self._unmap(pool, small, address, first, last)

    def _unmap(self, pool: _Pool, small: bool, address: int, first: int, last: int) -> None:
        end = address + pool.take_free(address)
        after_end = end if end in pool.size else None
        before = pool.before.get(address)
        del pool.size[address]
        pool.before.pop(address, None)
        if first > address:
            pool.add_free(address, first - address)
            if before is not None:
                pool.before[address] = before
            before = address
        size = last - first
        if last < end:
            pool.add_free(last, end - last)
            pool.before[last] = first
            if after_end is not None:
                pool.before[after_end] = last
        elif after_end is not None and self._is_unmapped(small, after_end):
            size += pool.size.pop(after_end)
            pool.before.pop(after_end, None)
            self.unmapped[small].remove(after_end)
            if first + size in pool.size:
                pool.before[first + size] = first
        elif after_end is not None:
            pool.before[after_end] = first
        if before is not None and self._is_unmapped(small, before):
            pool.size[before] += size
            if before + pool.size[before] in pool.size:
                pool.before[before + pool.size[before]] = before
            if last < end:
                pool.before[last] = before
        else:
            pool.size[first] = size
            if before is not None:
                pool.before[first] = before
            bisect.insort(self.unmapped[small], first)
        self.reserved -= last - first
