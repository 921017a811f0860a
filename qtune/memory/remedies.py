"""What would have fit: the least harmful changes of a recipe with which its step stays inside the memory there was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qtune.errors import ModelError
from qtune.memory.cached import predicted
from qtune.memory.fit import Lever, levers
from qtune.memory.tracing import categories
from qtune.model.load import attention_rule
from qtune.plan import make_plan
from qtune.recipe.parse import changed
from qtune.recipe.text import show_value
from qtune.run.resumption import CHANGEABLE

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PretrainedConfig

    from qtune.memory.predict import Longest, Prediction
    from qtune.plan import Plan
    from qtune.recipe.schema import KeyPath, Recipe

WANTED = 2
"""So many remedies are looked for."""

MICRO_BATCH = ("training", "micro_batch_size")


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
        return ", ".join(f"{'.'.join(map(str, key))} = {show_value(value)}" for key, value in self.changes.items())


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
    search = _Search(config, recipe, plan, longest, rows, room, tell)
    is_predicted_to_fit = search.failed.need.fits(room.available_bytes)
    size = rows
    # Fewer rows at once change nothing where memory ran out beside them, as in loading or saving.
    if room.phase in ("forward", "backward", "eval") or not is_predicted_to_fit:
        for smaller in [size for size in range(rows - 1, 0, -1) if search.batch % size == 0]:
            if search.tries(smaller):
                break
        else:
            size = rows if is_predicted_to_fit else 1
    pulled = list(levers(recipe, plan))
    if room.is_begun:
        pulled.sort(key=lambda lever: lever.key not in CHANGEABLE)
    not_enough = [lever for lever in pulled if search.wants(lever) and not search.tries(size, lever)]
    together: list[Lever] = []
    least = search.failed.need.total_bytes
    for lever in not_enough:
        more = [*(other for other in together if other.key != lever.key), lever]
        if search.wants(lever) and not search.tries(size, *more) and search.last.need.total_bytes < least:
            together, least = more, search.last.need.total_bytes
    return Remedies(search.failed, search.found, search.least_bytes)


class _Search:
    """Traces candidates, and keeps those that would have fit."""

    def __init__(
        self,
        config: PretrainedConfig,
        recipe: Recipe,
        plan: Plan,
        longest: Longest,
        rows: int,
        room: Room,
        tell: Callable[[str], None],
    ) -> None:
        # What the plan has settled is the recipe's now, so that a change of one value leaves the others alone.
        settled: dict[KeyPath, Any] = {
            ("training", "gradient_checkpointing"): plan.gradient_checkpointing,
            ("training", "optimizer"): plan.optimizer,
            ("memory", "embeddings"): plan.embeddings,
        }
        self.config, self.plan, self.longest, self.room, self.tell = config, plan, longest, room, tell
        self.recipe = changed(recipe, settled)
        self.batch = plan.micro_batch_size * plan.accumulation_steps
        self.failed = self.last = self._trace(rows)
        self.least_bytes = self.failed.need.total_bytes
        self.found: list[Remedy] = []

    def wants(self, lever: Lever) -> bool:
        """Whether more is looked for, and not just another value of what was found."""
        return len(self.found) < WANTED and not any(lever.key in remedy.changes for remedy in self.found)

    def tries(self, size: int, *chosen: Lever) -> bool:
        """Whether micro-batches of `size` rows would have fit with these changes.

        They do if the step needs no more than there was, and if it saves in the failed phase what was missing there:
        the prediction of the failed step may have been too low.
        """
        try:
            self.last = self._trace(size, *chosen)
        except ModelError:  # an adapter that trains the embeddings keeps them on the card
            return False
        self.least_bytes = min(self.least_bytes, self.last.need.total_bytes)
        saved = phase_bytes(self.failed, self.room.phase) - phase_bytes(self.last, self.room.phase)
        if not self.last.need.fits(self.room.available_bytes) or saved < self.room.short_bytes:
            return False
        changes = {lever.key: lever.value for lever in chosen}
        why = "; ".join(lever.why for lever in chosen)
        if size != self.plan.micro_batch_size:
            changes = {MICRO_BATCH: size} | changes
            why = why or f"{self.batch // size} micro-batches make a step: the same gradient, a little slower"
        self.found.append(Remedy(changes, why, self.last.peak.bytes, self.last.need.total_bytes))
        return True

    def _trace(self, size: int, *chosen: Lever) -> Prediction:
        self.tell(", ".join([f"{size} x {self.longest.length} tokens", *(lever.words for lever in chosen)]))
        candidate = changed(self.recipe, {lever.key: lever.value for lever in chosen})
        plan = make_plan(candidate, self.plan.device, attention_rule(self.config)).with_micro_batch(size, "")
        return predicted(self.config, candidate, plan, self.longest)
