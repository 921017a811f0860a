"""The memory that a recipe may spend, and the largest micro-batch that stays inside it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qtune.errors import ModelError
from qtune.memory.cached import predicted
from qtune.memory.tracing.in_parallel import may_fork, side_by_side
from qtune.sizes import GIB, gib_text, size_in_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PretrainedConfig

    from qtune.memory.allowance import Need
    from qtune.memory.predict import Longest
    from qtune.plan import Plan
    from qtune.recipe.schema import Recipe


@dataclass(frozen=True)
class Chosen:
    """A plan with its micro-batch settled by memory."""

    plan: Plan
    need: Need
    budget_bytes: int

    @property
    def fits(self) -> bool:
        """Whether even one row stays inside the budget."""
        return self.need.fits(self.budget_bytes)


def budget_bytes(recipe: Recipe, plan: Plan) -> int:
    """[memory] budget in bytes; "auto" is what the device has free."""
    budget = recipe.memory.budget
    return plan.device.free_bytes if budget == "auto" else size_in_bytes(budget, "memory.budget")


def choose_micro_batch(
    config: PretrainedConfig, recipe: Recipe, plan: Plan, longest: Longest | None = None, budget: int | None = None
) -> Chosen:
    """The largest micro-batch of `recipe` that fits, by tracing; the effective batch stays what it is.

    `qtune run` asks this under micro_batch_size = "auto"; `qtune fit` asks it for each of its candidates. Where not
    even one row fits, the answer is one row and `fits` is False.
    """
    limit = budget_bytes(recipe, plan) if budget is None else budget
    batch = plan.micro_batch_size * plan.accumulation_steps
    sizes = [size for size in range(1, batch + 1) if batch % size == 0]

    @functools.cache
    def need(size: int) -> Need:
        return predicted(config, recipe, plan.with_micro_batch(size, ""), longest).need

    if len(sizes) > 1 and may_fork():  # the second size is nearly always asked for, and costs no time there
        side_by_side([functools.partial(need, size) for size in sizes[:2]])  # the cache of predictions keeps it
    size = largest_that_fits(sizes, lambda candidate: need(candidate).total_bytes, limit)
    found = need(size)
    words = f"{gib_text(found.total_bytes)} traced and margin, of {gib_text(limit)}"
    return Chosen(plan.with_micro_batch(size, f"the largest that fits: {words}"), found, limit)


def settled(config: PretrainedConfig, recipe: Recipe, plan: Plan, longest: Longest | None = None) -> Plan:
    """`plan` with what a recipe leaves to a card's memory: the micro-batch, and where the embeddings are.

    They go to the host, which changes nothing but the speed, only where the step would not fit otherwise and where that
    helps.
    """

    def chosen(candidate: Plan) -> Chosen:
        if recipe.training.micro_batch_size == "auto":
            return choose_micro_batch(config, recipe, candidate, longest)
        return Chosen(candidate, predicted(config, recipe, candidate, longest).need, budget_bytes(recipe, candidate))

    on_card = chosen(plan)
    if on_card.fits or recipe.memory.embeddings != "auto":
        return on_card.plan
    rows = on_card.plan.micro_batch_size
    what = "one row" if rows == 1 else f"{rows} rows"
    needed, budget = on_card.need.total_bytes / GIB, on_card.budget_bytes / GIB
    reason = f"with them on the card {what} would need {needed:.2f} GiB of {budget:.2f}"
    try:
        on_host = chosen(plan.with_embeddings_on_host(reason))
    except ModelError:  # the adapter trains the embeddings
        return on_card.plan
    return on_host.plan if on_host.need.total_bytes < on_card.need.total_bytes else on_card.plan


NEARLY_STRAIGHT = 0.02
"""How far memory over rows is trusted to be from a straight line, as a share of the limit."""


def largest_that_fits(sizes: list[int], cost: Callable[[int], int], limit: int) -> int:
    """The largest of the ascending `sizes` whose cost is within `limit`; the first if none is.

    Cost grows with size, nearly in a straight line: two sizes give a guess, and the guess is checked by its own cost.
    The next size is asked for only where the line through the guess comes near the limit.
    """
    first = cost(sizes[0])
    if first > limit or len(sizes) == 1:
        return sizes[0]
    slope = max(1, (cost(sizes[1]) - first) // (sizes[1] - sizes[0]))
    guess = max(
        place for place, size in enumerate(sizes) if size == sizes[0] or first + slope * (size - sizes[0]) <= limit
    )
    while guess and cost(sizes[guess]) > limit:
        guess -= 1

    def comes_near(place: int) -> bool:
        ahead = cost(sizes[guess]) + slope * (sizes[place] - sizes[guess])
        return ahead <= (1 + NEARLY_STRAIGHT) * limit

    while guess + 1 < len(sizes) and comes_near(guess + 1) and cost(sizes[guess + 1]) <= limit:
        guess += 1
    return sizes[guess]
