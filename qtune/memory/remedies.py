"""What would have fit: the least harmful changes of a recipe with which its step stays inside the memory there was."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from qtune.memory.budget import EMBEDDINGS, MICRO_BATCH, Lever, Search, last_levers, levers, settle
from qtune.memory.kept_dequantized import KEEP_DEQUANTIZED
from qtune.memory.tracing import categories
from qtune.plan import whole_parts
from qtune.recipe.parse import changed
from qtune.recipe.text import show_changes
from qtune.run.resumption import CHANGEABLE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PretrainedConfig

    from qtune.memory.predict import Longest, Prediction
    from qtune.plan import Plan
    from qtune.recipe.schema import KeyPath, Recipe

WANTED = 2
"""So many remedies are looked for."""


@dataclass(frozen=True)
class Room:
    """What a step may need, after one has failed in `phase`."""

    available_bytes: int
    """What was free, and what the run itself held."""
    phase: str
    short_bytes: int
    """By how much memory did not do; at least 1."""
    is_begun: bool = False
    """Whether steps are saved, which a change of what is learned would throw away."""


@dataclass(frozen=True)
class Remedy:
    """A change of the recipe that would have fit."""

    changes: dict[KeyPath, Any]
    why: str
    """What it costs."""
    peak_bytes: int
    """Traced."""
    needed_bytes: int
    """With what the driver and the allocator add."""

    @property
    def words(self) -> str:
        """The change as a recipe says it."""
        return show_changes(self.changes)


@dataclass(frozen=True)
class Remedies:
    """What was found: the remedies, least harm first, beside the step that failed."""

    failed: Prediction
    found: list[Remedy]
    least_bytes: int
    """The least that any of the traced steps needs."""


def phase_bytes(prediction: Prediction, phase: str) -> int:
    """The traced peak of one phase; of those that no step has (loading, saving), what stays all the time."""
    if (moment := prediction.by_phase.get(phase)) is not None:
        return moment.bytes
    optimizer = prediction.by_phase.get("optimizer")
    state = optimizer.alive.get(categories.OPTIMIZER, 0) if optimizer else 0
    return prediction.need.lasting_bytes - (state if phase == "load" else 0)


def remedies(
    config: PretrainedConfig,
    recipe: Recipe,
    plan: Plan,
    longest: Longest,
    rows: int,
    room: Room,
    tell: Callable[[str], None] = lambda words: None,
) -> Remedies:
    """Traces one change after the other, in the order in which `qtune fit` makes them, until WANTED of them would fit.

    First a smaller micro-batch. Then the levers, each alone; with single rows, where even those are too much without
    one. Where too few levers are enough alone, those that save something are put together. Of a run that has begun,
    those levers come first with which it can go on.

    rows: at once, when memory ran out. tell: hears what is traced next.

    Raises:
        ModelError: the recipe's step cannot be traced.
    """
    recipe = as_planned(recipe, plan)
    asking = Search(config, plan.device, longest, room.available_bytes, tell=tell)
    failed = asking.trace(recipe, rows)
    # The step must need no more than there was, and save in the failed phase what was missing there: the prediction of
    # the failed step may have been too low.
    allowed = phase_bytes(failed, room.phase) - room.short_bytes

    def cost(prediction: Prediction) -> int:
        over = phase_bytes(prediction, room.phase) - allowed
        return max(prediction.need.total_bytes, room.available_bytes + over)

    asked = _Asked(replace(asking, cost=cost), recipe, plan)
    size = rows
    fits_by_prediction = failed.need.fits(room.available_bytes)
    # Fewer rows at once change nothing where memory ran out beside them, as in loading or saving.
    if room.phase in ("forward", "backward", "eval") or not fits_by_prediction:
        smaller = [part for part in whole_parts(plan.micro_batch_size * plan.accumulation_steps) if part < rows]
        is_enough = bool(smaller) and asked.fits((), smaller)
        size = rows if is_enough or fits_by_prediction else 1
    ordered = [*levers(recipe, plan), *last_levers(recipe, plan)]
    if room.is_begun:
        ordered.sort(key=lambda lever: lever.key not in CHANGEABLE)
    not_enough = [lever for lever in ordered if asked.wants(lever) and not asked.fits((lever,), [size])]
    together = [lever for lever in not_enough if asked.wants(lever)]
    if len(together) > 1:
        asked.fits(together, [size])
    return Remedies(failed, asked.working, min(traced.need.total_bytes for traced in asking.traced.values()))


def as_planned(recipe: Recipe, plan: Plan) -> Recipe:
    """What the plan has settled is the recipe's, so that a change of one value leaves the others alone."""
    return changed(
        recipe,
        {
            ("training", "gradient_checkpointing"): plan.gradient_checkpointing,
            ("training", "optimizer"): plan.optimizer,
            EMBEDDINGS: plan.embeddings,
            KEEP_DEQUANTIZED: plan.keep_dequantized,
        },
    )


@dataclass(frozen=True)
class _Asked:
    """Changes that were traced, and those of them that would have fit."""

    search: Search
    recipe: Recipe
    plan: Plan
    working: list[Remedy] = field(default_factory=list)

    def fits(self, pulled: Sequence[Lever], sizes: Sequence[int]) -> bool:
        """Whether the levers are enough with one of these micro-batches; then they are a remedy."""
        outcome = settle(self.search, self.recipe, pulled, sizes)
        if outcome.is_enough:
            whys = {lever.words: lever.why for lever in pulled}
            price = "; ".join(whys[trial.what] for trial in outcome.trials if trial.verdict == "kept")
            changes = dict(outcome.changes)
            if outcome.rows != self.plan.micro_batch_size:
                changes = {MICRO_BATCH: outcome.rows} | changes
                parts = self.plan.micro_batch_size * self.plan.accumulation_steps // outcome.rows
                price = price or f"{parts} micro-batches make a step: the same gradient, a little slower"
            self.working.append(Remedy(changes, price, outcome.prediction.peak.bytes, outcome.need.total_bytes))
        return outcome.is_enough

    def wants(self, lever: Lever) -> bool:
        """Whether more is looked for, and not just another value of what was found."""
        return len(self.working) < WANTED and not any(lever.key in remedy.changes for remedy in self.working)
