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

from qtune.memory.tracing.history import History, Label, in_order
from qtune.memory.tracing.layers import depth_for

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qtune.memory.tracing.layers import Repetition


@dataclass(frozen=True)
class Run:
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
    runs_a, runs_b = _runs(short, container), _runs(longer, container)
    more = layers - small
    if more % period or not runs_a or not _middle_is_affine(b, longer, runs_b, shape, small + period):
        return None
    paired = _paired(runs_a, runs_b, small, period)
    if paired is None:
        return None
    blocks: list[NDArray[numpy.int64]] = []
    labels: list[Label] = []
    for run, twin in paired:
        if not _same_work(short, run, longer, twin):
            return None
        deeper = a[:, run.first : run.last]
        step = b[:, twin.first : twin.last] - deeper
        blocks.append(deeper + step * (more // period))
        labels += short.labels[run.first : run.last]
    blocks, labels = _with_middle([run for run, _ in paired], blocks, labels, period, small, more)
    return History(names, numpy.concatenate(blocks, axis=1), tuple(labels), short.paged)


def _aligned(history: History, names: tuple[str, ...]) -> NDArray[numpy.int64]:
    rows = numpy.zeros((len(names), history.bytes.shape[1]), dtype=numpy.int64)
    for row, name in enumerate(history.names):
        rows[names.index(name)] = history.bytes[row]
    return rows


def _runs(history: History, container: str) -> list[Run]:
    pattern = re.compile(rf"(?:^|\.){re.escape(container)}\.(\d+)(?:\.|$)")
    known: dict[str, int | None] = {}
    found: list[Run] = []
    for tick, label in enumerate(history.labels):
        if label.module not in known:
            match = pattern.search(label.module)
            known[label.module] = int(match[1]) if match else None
        layer = known[label.module]
        if found and (found[-1].visit, found[-1].layer) == (label.visit, layer):
            found[-1] = Run(label.visit, layer, found[-1].first, tick + 1)
        else:
            found.append(Run(label.visit, layer, tick, tick + 1))
    return found


def _paired(runs: list[Run], twins: list[Run], small: int, period: int) -> list[tuple[Run, Run]] | None:
    """Each run of the short history with its counterpart, counted from the nearer end; None if orders differ."""
    front = small - 2 * period

    def place(run: Run, depth: int) -> int | None:
        """The same number for the same place: from the front, or (negative) from the back."""
        if run.layer is None:
            return None
        return run.layer if run.layer < front else run.layer - depth

    kept = [twin for twin in twins if twin.layer is None or not front <= twin.layer < front + period]
    if len(kept) != len(runs):
        return None
    for run, twin in zip(runs, kept, strict=True):
        if place(run, small) != place(twin, small + period) or run.visit != twin.visit:
            return None
    return list(zip(runs, kept, strict=True))


def _same_work(history: History, run: Run, other: History, twin: Run) -> bool:
    ops = [label.op for label in history.labels[run.first : run.last]]
    return ops == [label.op for label in other.labels[twin.first : twin.last]]


def _middle_is_affine(
    matrix: NDArray[numpy.int64], history: History, runs: list[Run], shape: Repetition, depth: int
) -> bool:
    """Whether the middle groups do the same work and differ by the same bytes from one to the next, at every tick."""
    period = shape.period
    for visit in {run.visit for run in runs if run.layer is not None}:
        by_layer = {run.layer: run for run in runs if run.visit == visit and run.layer is not None}
        if (
            len([run for run in runs if run.visit == visit and run.layer is not None]) != depth
            or len(by_layer) != depth
        ):
            return False
        for layer in range(shape.front + period, depth - 3 * period):
            first, second, third = (by_layer[layer + step * period] for step in range(3))
            if not (_same_work(history, first, history, second) and _same_work(history, second, history, third)):
                return False
            x, y, z = (matrix[:, run.first : run.last] for run in (first, second, third))
            if (y - x != z - y).any():
                return False
    return True


def _with_middle(
    runs: list[Run], blocks: list[NDArray[numpy.int64]], labels: list[Label], period: int, small: int, more: int
) -> tuple[list[NDArray[numpy.int64]], list[Label]]:
    """Put the layers between the second group and the last but one, each on the line between those two."""
    out_blocks: list[NDArray[numpy.int64]] = []
    out_labels: list[Label] = []
    place = {(run.visit, run.layer): number for number, run in enumerate(runs)}
    front = small - 2 * period
    at = 0
    for number, run in enumerate(runs):
        here = labels[at : at + run.last - run.first]
        at += len(here)
        forward = run.layer is not None and (run.visit, run.layer + 1) in place
        ascending = forward and place[run.visit, (run.layer or 0) + 1] > number
        out_blocks.append(blocks[number])
        out_labels += [_renumbered(label, run.layer, small, more, front) for label in here]
        leaves_front = run.layer == front - 1 and ascending
        leaves_back = run.layer == front and not ascending
        if not (leaves_front or leaves_back):
            continue
        middle = range(front, front + more)
        for layer in middle if ascending else reversed(middle):
            below = front - period + (layer - front) % period
            above = below + period  # the first group after the inserted ones, `more` layers further down
            low, high = blocks[place[run.visit, below]], blocks[place[run.visit, above]]
            groups = (more + period) // period
            step = (high - low) // groups
            out_blocks.append(low + step * ((layer - below) // period))
            source = runs[place[run.visit, below]]
            start = sum(len(block[0]) for block in blocks[: place[run.visit, below]])
            chosen = labels[start : start + source.last - source.first]
            out_labels += [_with_layer(label, below, layer) for label in chosen]
    return out_blocks, out_labels


def _renumbered(label: Label, layer: int | None, small: int, more: int, front: int) -> Label:
    return label if layer is None or layer < front else _with_layer(label, layer, layer + more)


def _with_layer(label: Label, old: int, new: int) -> Label:
    module = re.sub(rf"\.{old}(?=\.|$)", f".{new}", label.module, count=1)
    return Label(label.visit, label.phase, module, label.op)
