"""The record of a run whose memory ran out: what was alive, predicted against free, who else, what would have fit."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from qtune.errors import first_line
from qtune.memory.remedies import Room, phase_bytes, remedies
from qtune.model.load import load_config
from qtune.recipe.text import show_value
from qtune.run.resumption import CHANGEABLE, beginning_anew, resuming
from qtune.sizes import size_in_bytes
from qtune.startup.interrupts import take_again

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from qtune.device.processes import Holder
    from qtune.errors import Failure
    from qtune.memory.longest import Rows
    from qtune.plan import Plan
    from qtune.recipe.schema import KeyPath, Recipe
    from qtune.run.folder import RunDir

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Predicted:
    """The step that failed, traced."""

    rows: int
    length: int
    phase_bytes: int
    peak_bytes: int
    needed_bytes: int
    """With what the driver and the allocator add."""


@dataclass(frozen=True)
class Offer:
    """A change that would have fit, and the command that goes on with it."""

    change: str
    why: str
    peak_bytes: int
    needed_bytes: int
    command: str
    is_new_run: bool
    """The change decides what is learned, so that the stopped run cannot go on with it."""


@dataclass(frozen=True)
class Report:
    """Everything that is said; the value that goes into memory.json under "failure"."""

    failure: Failure
    device: str
    available_bytes: int
    """What a step could have had: free, and held by the run itself; or less, by [memory] budget."""
    others: list[Holder] | None
    """Other processes on the card; None: not asked (CPU), or no answer."""
    run: str
    saved: str | None
    """Name of the last complete checkpoint."""
    predicted: Predicted | None = None
    offers: tuple[Offer, ...] = ()
    least_bytes: int = 0
    """The least that a step needs with any of the changes that were traced; 0: none was."""
    untraced: str = ""
    """Why nothing could be traced."""

    def to_json(self) -> dict[str, Any]:
        """Plain values, sizes in bytes."""
        found = asdict(self)
        return found.pop("failure") | found


def first_report(
    failure: Failure, recipe: Recipe, plan: Plan, run_dir: RunDir, saved: str | None, others: list[Holder] | None
) -> Report:
    """What is known at once."""
    available = failure.free_bytes + failure.own_bytes
    if recipe.memory.budget != "auto":
        available = min(available, size_in_bytes(recipe.memory.budget, "memory.budget"))
    return Report(failure, plan.device.name, available, others, str(run_dir.path), saved)


def with_offers(
    report: Report, recipe: Recipe, plan: Plan, rows: Rows, run_dir: RunDir, tell: Callable[[str], None]
) -> Report:
    """The same with the failed step's prediction and what would have fit, by tracing; where that fails, why.

    tell: hears what is traced next.
    """
    failure = report.failure
    # In the forward, the backward and the evaluation, what does not fit has been split; elsewhere there is no batch.
    size = failure.batch["rows"] if failure.batch is not None else plan.micro_batch_size
    room = Room(report.available_bytes, failure.phase, _short_bytes(failure), report.saved is not None)
    try:
        search = remedies(load_config(recipe.model), recipe, plan, rows.longest, size, room, tell)
    except KeyboardInterrupt:
        take_again()
        return replace(report, untraced="stopped")
    except Exception as error:
        # Whatever it is, the report of the first failure must not be lost to a second one.
        log.debug("the step could not be traced", exc_info=True)
        return replace(report, untraced=f"{type(error).__name__}: {first_line(error)}")
    need = search.failed.need
    expected = Predicted(
        size, rows.longest.length, phase_bytes(search.failed, failure.phase), need.traced_bytes, need.total_bytes
    )
    offers = tuple(
        Offer(one.words, one.why, one.peak_bytes, one.needed_bytes, *command_for(run_dir, one.changes))
        for one in search.found
    )
    return replace(report, predicted=expected, offers=offers, least_bytes=search.least_bytes)


def _short_bytes(failure: Failure) -> int:
    """By how much memory did not do. A request that is refused though as much is free found no piece large enough."""
    wanted, free = failure.wanted_bytes, failure.free_bytes
    return max(1, wanted - free if wanted > free else wanted)


def command_for(run_dir: RunDir, changes: Mapping[KeyPath, Any]) -> tuple[str, bool]:
    """The command that goes on with a run and other values, and whether it has to be a new run."""
    words = [
        f"{'.'.join(map(str, key))}={value if isinstance(value, str) else show_value(value)}"
        for key, value in changes.items()
    ]
    if any(key not in CHANGEABLE for key in changes):
        return beginning_anew(run_dir, words, is_settled=True), True
    return resuming(run_dir, *(part for word in words for part in ("--set", word))), False
