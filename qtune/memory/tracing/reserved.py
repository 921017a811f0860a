"""What PyTorch's allocator takes of a card for a traced step: every allocation of it, played in order.

Tensors leave gaps. Small and large ones live in two pools whose fullest moments differ; a block that is freed beside a
longer one is too small for the next; memory is mapped in pages. None of that is a share of anything: it follows from
the sizes and the order, which a trace knows. On an H100 the reserved bytes of eleven runs came out 3.3 % below to 0.6 %
above what the allocator reported, six of them within 0.4 %.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from qtune.memory.tracing import categories

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from qtune.memory.tracing.caching_allocator import ExpandableSegments, FixedSegments, Place
    from qtune.memory.tracing.ledger import Life

STEPS = 3
"""The optimizer's state comes after the first; the third finds the places that the second has left."""

BEFORE_QUANTIZATION = {"base weights 4-bit": 4, "base weights int8": 2}
"""Bytes of a weight in 16 bits, as it is loaded, for each that it has afterwards."""


def reserved_bytes(
    body: Sequence[Life], update: Sequence[Life], workspace_bytes: int, allocator: FixedSegments | ExpandableSegments
) -> int:
    """The most that the allocator ever takes from the card, over loading and a few steps.

    body: forward and backward of the second step, with all that was there before. update: the optimizer's phase of it.
    workspace_bytes: what cuBLAS keeps in the allocator for each of two threads, the forward's and the backward's.
    """
    begin = next((tick for tick, life in enumerate(body) if not _is_resting(life)), len(body))
    resting = [life for life in body[:begin] if life.died >= begin and _counts(life)]
    _load([life for life in resting if life.phase == "static"], allocator)
    allocator.allocate(workspace_bytes)
    backward = next((tick for tick, life in enumerate(body) if life.phase == "backward"), len(body))
    for step in range(STEPS):
        if step == 1:
            for life in resting:
                if life.phase != "static":
                    allocator.allocate(life.size)
        at_backward = (lambda: allocator.allocate(workspace_bytes)) if step == 0 else None
        kept = _play(body, range(begin, len(body)), allocator, backward, at_backward)
        optimizer = [tick for tick, life in enumerate(update) if life.phase == "optimizer"]
        for place in [*_play(update, optimizer, allocator), *kept]:
            allocator.free(place)
    return allocator.peak


def _load(static: list[Life], allocator: FixedSegments | ExpandableSegments) -> None:
    """Weights one after the other, each in 16 bits until the next one has come; then what is not loaded."""
    loading: list[Place] = []
    for life in static:
        if life.category in BEFORE_QUANTIZATION:
            loading.append(allocator.allocate(life.size * BEFORE_QUANTIZATION[life.category]))
            if len(loading) > 1:
                allocator.free(loading.pop(0))
        if life.category != categories.ADAPTER:
            allocator.allocate(life.size)
    for place in loading:
        allocator.free(place)
    for life in static:
        if life.category == categories.ADAPTER:
            allocator.allocate(life.size)


def _play(
    lives: Sequence[Life],
    ticks: Sequence[int],
    allocator: FixedSegments | ExpandableSegments,
    moment: int = -1,
    then: Callable[[], object] | None = None,
) -> list[Place]:
    """Allocates and frees these lives in order, doing `then` at the tick `moment`; the places of those still alive."""
    dying: defaultdict[int, list[int]] = defaultdict(list)
    for tick in ticks:
        dying[lives[tick].died].append(tick)
    places: dict[int, Place] = {}
    for tick in ticks:
        if tick == moment and then is not None:
            then()
        if _counts(lives[tick]):
            places[tick] = allocator.allocate(lives[tick].size)
        for dead in dying.get(tick, ()):
            if dead in places:
                allocator.free(places.pop(dead))
    return list(places.values())


def _is_resting(life: Life) -> bool:
    """Whether a storage was there before the step, and is afterwards."""
    return life.phase in ("static", "first step", "first micro-batch")


def _counts(life: Life) -> bool:
    """Whether a storage is in the card's own memory."""
    return life.size > 0 and life.category not in (categories.HOST, categories.PAGED)
