"""The history of a deep model from those of two shallow ones, where that is provably the same as tracing it.

A model of L equal layers (or groups of p layers, after some layers of their own at the front) runs the same operations
in each of them, so the bytes alive at a given operation of layer i are a + b i + c L: what every layer adds to the
weights, what each layer already passed keeps for the backward, what each layer already differentiated has released.
Two depths, n and n + p, give a, b and c for every single operation; nothing is fitted, the coefficients are differences
of integers. Which layers are equal is read from the whole model (`layers.py`). Where the two shallow histories do not
have this form, `stretch` says so by returning None, and the caller traces every layer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy

from qtune.memory.tracing.categories import in_order
from qtune.memory.tracing.history import History, Label
from qtune.memory.tracing.layers import depth_for

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qtune.memory.tracing.layers import Repetition


@dataclass(frozen=True)
class Span:
    """A stretch of ticks within one phase and one layer (None: outside the layers)."""

    visit: int
    layer: int | None
    first: int
    last: int
    """Half-open: ticks first .. last - 1."""


def stretch(short: History, longer: History, shape: Repetition, layers: int, container: str) -> History | None:
    """History of `layers` layers from histories of n and n + period layers, n = depth_for(layers, shape).

    container: dotted name of the module list that holds the layers. None where the two do not fit the form.
    """
    small, period = depth_for(layers, shape), shape.period
    names = tuple(in_order({*short.names, *longer.names}))
    a, b = _aligned(short, names), _aligned(longer, names)
    spans_a, spans_b = _spans(short, container), _spans(longer, container)
    more = layers - small
    if more % period or not spans_a or not _middle_is_affine(b, longer, spans_b, shape, small + period):
        return None
    paired = _paired(spans_a, spans_b, small, period)
    if paired is None:
        return None
    blocks: list[NDArray[numpy.int64]] = []
    labels: list[Label] = []
    for span, twin in paired:
        if not _same_work(short, span, longer, twin):
            return None
        deeper = a[:, span.first : span.last]
        step = b[:, twin.first : twin.last] - deeper
        blocks.append(deeper + step * (more // period))
        labels += short.labels[span.first : span.last]
    blocks, labels = _with_middle([span for span, _ in paired], blocks, labels, period, small, more)
    return History(names, numpy.concatenate(blocks, axis=1), tuple(labels), short.paged)


def _aligned(history: History, names: tuple[str, ...]) -> NDArray[numpy.int64]:
    rows = numpy.zeros((len(names), history.bytes.shape[1]), dtype=numpy.int64)
    for row, name in enumerate(history.names):
        rows[names.index(name)] = history.bytes[row]
    return rows


def _spans(history: History, container: str) -> list[Span]:
    pattern = re.compile(rf"(?:^|\.){re.escape(container)}\.(\d+)(?:\.|$)")
    known: dict[str, int | None] = {}
    spans: list[Span] = []
    for tick, label in enumerate(history.labels):
        if label.module not in known:
            match = pattern.search(label.module)
            known[label.module] = int(match[1]) if match else None
        layer = known[label.module]
        if spans and (spans[-1].visit, spans[-1].layer) == (label.visit, layer):
            spans[-1] = Span(label.visit, layer, spans[-1].first, tick + 1)
        else:
            spans.append(Span(label.visit, layer, tick, tick + 1))
    return spans


def _paired(spans: list[Span], twins: list[Span], small: int, period: int) -> list[tuple[Span, Span]] | None:
    """Each span of the short history with its counterpart, counted from the nearer end; None if orders differ."""
    front = small - 2 * period

    def place(span: Span, depth: int) -> int | None:
        """The same number for the same place: from the front, or (negative) from the back."""
        if span.layer is None:
            return None
        return span.layer if span.layer < front else span.layer - depth

    kept = [twin for twin in twins if twin.layer is None or not front <= twin.layer < front + period]
    if len(kept) != len(spans):
        return None
    for span, twin in zip(spans, kept, strict=True):
        if place(span, small) != place(twin, small + period) or span.visit != twin.visit:
            return None
    return list(zip(spans, kept, strict=True))


def _same_work(history: History, span: Span, other: History, twin: Span) -> bool:
    ops = [label.op for label in history.labels[span.first : span.last]]
    return ops == [label.op for label in other.labels[twin.first : twin.last]]


def _middle_is_affine(
    matrix: NDArray[numpy.int64], history: History, spans: list[Span], shape: Repetition, depth: int
) -> bool:
    """Whether the middle groups do the same work and differ by the same bytes from one to the next, at every tick."""
    period = shape.period
    for visit in {span.visit for span in spans if span.layer is not None}:
        by_layer = {span.layer: span for span in spans if span.visit == visit and span.layer is not None}
        if (
            len([span for span in spans if span.visit == visit and span.layer is not None]) != depth
            or len(by_layer) != depth
        ):
            return False
        for layer in range(shape.front + period, depth - 3 * period):
            first, second, third = (by_layer[layer + step * period] for step in range(3))
            if not (_same_work(history, first, history, second) and _same_work(history, second, history, third)):
                return False
            x, y, z = (matrix[:, span.first : span.last] for span in (first, second, third))
            if (y - x != z - y).any():
                return False
    return True


def _with_middle(
    spans: list[Span], blocks: list[NDArray[numpy.int64]], labels: list[Label], period: int, small: int, more: int
) -> tuple[list[NDArray[numpy.int64]], list[Label]]:
    """Put the layers between the second group and the last but one, each on the line between those two."""
    out_blocks: list[NDArray[numpy.int64]] = []
    out_labels: list[Label] = []
    place = {(span.visit, span.layer): number for number, span in enumerate(spans)}
    front = small - 2 * period
    at = 0
    for number, span in enumerate(spans):
        here = labels[at : at + span.last - span.first]
        at += len(here)
        forward = span.layer is not None and (span.visit, span.layer + 1) in place
        ascending = forward and place[span.visit, (span.layer or 0) + 1] > number
        out_blocks.append(blocks[number])
        out_labels += [_renumbered(label, span.layer, small, more, front) for label in here]
        leaves_front = span.layer == front - 1 and ascending
        leaves_back = span.layer == front and not ascending
        if not (leaves_front or leaves_back):
            continue
        middle = range(front, front + more)
        for layer in middle if ascending else reversed(middle):
            below = front - period + (layer - front) % period
            above = below + period  # the first group after the inserted ones, `more` layers further down
            low, high = blocks[place[span.visit, below]], blocks[place[span.visit, above]]
            groups = (more + period) // period
            step = (high - low) // groups
            out_blocks.append(low + step * ((layer - below) // period))
            source = spans[place[span.visit, below]]
            start = sum(len(block[0]) for block in blocks[: place[span.visit, below]])
            chosen = labels[start : start + source.last - source.first]
            out_labels += [_with_layer(label, below, layer) for label in chosen]
    return out_blocks, out_labels


def _renumbered(label: Label, layer: int | None, small: int, more: int, front: int) -> Label:
    return label if layer is None or layer < front else _with_layer(label, layer, layer + more)


def _with_layer(label: Label, old: int, new: int) -> Label:
    module = re.sub(rf"\.{old}(?=\.|$)", f".{new}", label.module, count=1)
    return Label(label.visit, label.phase, module, label.op)
