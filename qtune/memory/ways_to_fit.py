"""What would make a step fit: each change alone, and those together that fit at the least loss of time.

Every figure is traced. Which combinations are traced, and in which order, follows from the single changes: as if what
each saves and costs added up. Where none of the likely ones is enough, all that saves is put together.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

from qtune.errors import ModelError
from qtune.memory.budget import MICRO_BATCH, Lever, Search, largest_that_fits, last_levers, levers, lossy_levers, settle
from qtune.memory.kept_layers import CHECKPOINTING, Steps, fewest, pace_of, rates_of, seconds
from qtune.memory.remedies import as_planned
from qtune.plan import whole_parts
from qtune.recipe.parse import changed
from qtune.recipe.text import plain_changes, show_changes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from transformers import PretrainedConfig

    from qtune.memory.allowance import Need
    from qtune.memory.forecast import Forecast
    from qtune.memory.predict import Prediction
    from qtune.recipe.schema import KeyPath, Recipe

MOST_TRACED = 8
"""Combinations that are traced before all that saves is put together."""
SLACK = 1.1
"""Savings do not quite add up: a combination is worth a trace if the sum comes so near the budget."""


@dataclass(frozen=True)
class Way:
    """Changes of a recipe, and the step that they make."""

    changes: dict[KeyPath, Any]
    price: str
    """What they cost, in words."""
    need: Need
    is_enough: bool
    pace: float | None
    """Seconds of a step over those of the recipe as it is; None where the device's rates are not known."""

    @property
    def words(self) -> str:
        """The changes as a recipe says them, in one line."""
        return show_changes(self.changes)

    @property
    def lines(self) -> str:
        """The changes as lines of a recipe, under their tables."""
        tables: dict[str, list[str]] = {}
        for (table, *key), value in self.changes.items():
            tables.setdefault(str(table), []).append(show_changes({tuple(key): value}))
        return "\n".join(line for table, keys in tables.items() for line in (f"[{table}]", *keys))

    def to_json(self) -> dict[str, Any]:
        """Plain values; the changes by the names of their keys."""
        needed = {"needed_bytes": self.need.total_bytes, "fits": self.is_enough, "pace": self.pace}
        return {"changes": plain_changes(self.changes), "price": self.price, **needed}


@dataclass(frozen=True)
class WaysToFit:
    """All remedies at once."""

    single: tuple[Way, ...]
    """Each change alone that saves anything, least harm first."""
    best: Way | None
    """What fits with the least loss of time; None where nothing does that leaves the rows alone."""

    def to_json(self) -> dict[str, Any]:
        """Plain values: each change alone, and what fits."""
        return {
            "single": [way.to_json() for way in self.single],
            "best": None if self.best is None else self.best.to_json(),
        }


def ways_to_fit(
    config: PretrainedConfig, recipe: Recipe, forecast: Forecast, tell: Callable[[str], None] = lambda words: None
) -> WaysToFit:
    """All ways out of a forecast that does not fit. tell: hears what is traced next.

    Raises:
        ModelError: the recipe's step cannot be traced.
    """
    plan = forecast.plan
    asked = _Asked(
        Search(config, plan.device, forecast.rows.longest, forecast.budget_bytes, tell=tell),
        as_planned(recipe, plan),
        plan.micro_batch_size,
        plan.micro_batch_size * plan.accumulation_steps,
    )
    found = asked.alone(asked.levers(list(levers(asked.recipe, plan))))
    last = asked.alone(last_levers(asked.recipe, plan))
    best = asked.best(found, last)
    lossy = asked.alone(lossy_levers(plan))
    saving = tuple(way for _, way in [*found, *lossy, *last] if way.need.total_bytes < asked.before.need.total_bytes)
    return WaysToFit(saving, best)


@dataclass(frozen=True)
class _Asked:
    """A step that does not fit, and what is traced about it."""

    search: Search
    recipe: Recipe
    """With what the plan has settled."""
    rows: int
    batch: int

    @property
    def before(self) -> Prediction:
        return self.search.trace(self.recipe, self.rows)

    def levers(self, others: Sequence[Lever]) -> list[Lever]:
        """The single row first, where there are several: it is the only one that costs nothing but a little time."""
        if self.rows == 1:
            return list(others)
        return [Lever(MICRO_BATCH, 1, "the same gradient from more micro-batches, a little slower"), *others]

    def alone(self, some: Iterable[Lever]) -> list[tuple[Lever, Way]]:
        """Each change with the step that it alone makes; those that are not possible are left out."""
        found = []
        for lever in some:
            try:
                found.append((lever, self.way((lever,))))
            except ModelError:  # an adapter that trains the embeddings keeps them on the card
                continue
        return found

    def way(self, pulled: Sequence[Lever]) -> Way:
        """The step under these changes, with as many rows and as few layers computed twice as then fit."""
        own = {lever.key: lever.value for lever in pulled if lever.key != MICRO_BATCH}
        changes, rows = dict(own), 1 if any(lever.key == MICRO_BATCH for lever in pulled) else self.rows
        prediction = self.traced(own, rows)
        if self.search.is_enough(prediction):
            if rows != self.rows:
                rows = self._most_rows(own)
                prediction = self.traced(own, rows)
            if own.get(CHECKPOINTING) is True:
                changes, prediction = self._fewest(own, rows, prediction)
        if rows != self.rows:
            changes = {MICRO_BATCH: rows, **changes}
        price = "; ".join(lever.why for lever in pulled)
        return Way(changes, price, prediction.need, self.search.is_enough(prediction), self.pace(prediction, rows))

    def traced(self, changes: dict[KeyPath, Any], rows: int) -> Prediction:
        pulled = [Lever(key, value, "") for key, value in changes.items()]  # for what is told alone
        return self.search.trace(changed(self.recipe, changes) if changes else self.recipe, rows, *pulled)

    def _most_rows(self, changes: dict[KeyPath, Any]) -> int:
        sizes = [size for size in whole_parts(self.batch) if size <= self.rows]
        return largest_that_fits(sizes, lambda size: self.search.cost(self.traced(changes, size)), self.search.limit)

    def _fewest(
        self, changes: dict[KeyPath, Any], rows: int, every: Prediction
    ) -> tuple[dict[KeyPath, Any], Prediction]:
        count = int(self.search.config.get_text_config().num_hidden_layers)
        steps = Steps(
            lambda layers, at_once: self.traced({**changes, CHECKPOINTING: layers}, at_once),
            self.search.cost,
            self.search.limit,
            count,
        )
        layers, prediction = fewest(steps, rows) or (True, every)
        return {**changes, CHECKPOINTING: layers}, prediction

    def pace(self, prediction: Prediction, rows: int) -> float | None:
        """By the device's own rates, whole steps against whole steps."""
        known = pace_of(self.search.device, self.before, prediction)
        rates = rates_of(self.search.device)
        if known is None or rates is None:
            return None
        return seconds(prediction, self.batch // rows, rates) / seconds(self.before, self.batch // self.rows, rates)

    def order(self, way: Way) -> float:
        """How much longer a step is taken to be, for the order alone: a card of which no rates are known has those of
        a common one."""
        rates, rows = rates_of(self.search.device), way.changes.get(MICRO_BATCH, self.rows)
        if rates is None:
            return 0.0
        own = {key: value for key, value in way.changes.items() if key != MICRO_BATCH}
        after = seconds(self.traced(own, rows), self.batch // rows, rates)
        return after - seconds(self.before, self.batch // self.rows, rates)

    def best(self, found: Sequence[tuple[Lever, Way]], last: Sequence[tuple[Lever, Way]]) -> Way | None:
        """The way that fits with the least loss of time, of the likely ones; else all that saves together.

        last: what is pulled only where all of `found` together is not enough.
        """
        others = [lever for lever, _ in found if lever.key != MICRO_BATCH]
        if (way := self._likely(found) or self._all_that_saves(others)) is not None or not last:
            return way
        latest = [lever for lever, _ in last]
        return self._likely([*found, *last], latest) or self._all_that_saves(others, latest)

    def _likely(self, found: Sequence[tuple[Lever, Way]], wanted: Sequence[Lever] = ()) -> Way | None:
        """The fastest of the likely combinations that fits; with `wanted`, of those that have one of these in it."""
        before, limit = self.before.need.total_bytes, self.search.limit
        rates = rates_of(self.search.device)
        step = 0.0 if rates is None else seconds(self.before, self.batch // self.rows, rates)
        singles = [(lever, way.need.total_bytes - before, self.order(way)) for lever, way in found]
        likely = []
        for size in range(1, len(singles) + 1):
            for some in combinations(singles, size):
                keys = {lever.key for lever, _, _ in some}
                if wanted and not any(lever in wanted for lever, _, _ in some):
                    continue
                if len(keys) == size and before + sum(saved for _, saved, _ in some) <= SLACK * limit:
                    lost = sum(lost for _, _, lost in some)
                    # Of nearly equal ones that with the fewest changes: no change is made for a hundredth.
                    share = round(100 * lost / step) if step else 0
                    likely.append((share, size, lost, [lever for lever, _, _ in some]))
        likely.sort(key=lambda one: one[:3])
        for *_, pulled in likely[:MOST_TRACED]:
            if (way := self.way(pulled)).is_enough:
                return way
        return None

    def _all_that_saves(self, pulled: Sequence[Lever], last: Sequence[Lever] = ()) -> Way | None:
        settled = settle(self.search, self.recipe, pulled, whole_parts(self.batch), last)
        if not settled.is_enough:
            return None
        kept = {trial.what for trial in settled.trials if trial.verdict == "kept"}
        single = self.levers([])[:1] if settled.rows != self.rows else []
        every = [*pulled, *last]
        return self.way([*single, *(lever for lever in every if lever.words in kept and lever.key in settled.changes)])
