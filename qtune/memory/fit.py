"""Change a recipe until it fits a card, least harm first; or find the longest rows, the largest micro-batch that do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qtune.memory.budget import budget_bytes, choose_micro_batch, largest_that_fits
from qtune.memory.cache import predicted
from qtune.memory.predict import Longest
from qtune.memory.profile import device_for
from qtune.memory.rewrite import rewritten
from qtune.model import attention_rule, load_config
from qtune.plan import make_plan
from qtune.recipe import FourBit, KeyPath, PrefixTuning, Recipe, parse_recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PretrainedConfig

    from qtune.device import Device
    from qtune.memory.margin import Need
    from qtune.plan import Plan

LENGTH_STEP = 64
"""Lengths are tried in multiples of this."""


@dataclass(frozen=True)
class Trial:
    """One thing that was tried."""

    what: str
    """The change, in the recipe's words."""
    why: str
    """What it costs."""
    need: Need


@dataclass(frozen=True)
class Fitted:
    """What `fit` found."""

    recipe: Recipe
    plan: Plan
    budget_bytes: int
    trials: list[Trial]
    changes: dict[KeyPath, Any] = field(default_factory=dict)
    """Recipe keys and their new values."""

    @property
    def need(self) -> Need:
        """Of the last trial: the recipe as it ended."""
        return self.trials[-1].need

    @property
    def fits(self) -> bool:
        """Whether the recipe as it ended stays within the budget."""
        return self.need.fits(self.budget_bytes)


@dataclass(frozen=True)
class Lever:
    """A change of the recipe that saves memory."""

    key: KeyPath
    value: Any
    why: str


def fit(
    config: PretrainedConfig,
    recipe: Recipe,
    device: Device,
    budget: int,
    longest: Longest | None = None,
    allow_length: bool = False,
) -> Fitted:
    """Searches the settings in the order of harm; each candidate is traced.

    First the micro-batch alone. If one row does not fit: checkpointing, then the optimizer's bits, then double
    quantization; with `allow_length` at last the length. As soon as one row fits, the micro-batch is made as large as
    the budget allows.
    """
    changes: dict[KeyPath, Any] = {}
    rows = longest or Longest(recipe.data.max_length)
    plan = make_plan(recipe, device, attention_rule(config))
    trials = [Trial("as it is", "", predicted(config, recipe, plan, rows).need)]
    if trials[0].need.fits(budget):
        return Fitted(recipe, plan, budget, trials)
    chosen = choose_micro_batch(config, recipe, plan, rows, budget)
    trials.append(_micro_batch_trial(chosen.plan, chosen.need))
    for lever in _levers(recipe, plan):
        if chosen.fits:
            break
        recipe = changed(recipe, {lever.key: lever.value})
        changes[lever.key] = lever.value
        plan = make_plan(recipe, device, attention_rule(config))
        chosen = choose_micro_batch(config, recipe, plan, rows, budget)
        trials.append(Trial(f"{'.'.join(map(str, lever.key))} = {_shown(lever.value)}", lever.why, chosen.need))
    if not chosen.fits and allow_length:
        length = longest_that_fits(config, recipe, chosen.plan, budget, rows)
        if length:
            recipe = changed(recipe, {("data", "max_length"): length})
            changes["data", "max_length"] = length
            rows = Longest(length, None if rows.scored is None else min(rows.scored, length), rows.equal)
            chosen = choose_micro_batch(config, recipe, make_plan(recipe, device, attention_rule(config)), rows, budget)
            trials.append(Trial(f"data.max_length = {length}", "longer rows are refused or cut", chosen.need))
    changes["training", "micro_batch_size"] = chosen.plan.micro_batch_size
    return Fitted(changed(recipe, changes), chosen.plan, budget, trials, changes)


def _micro_batch_trial(plan: Plan, need: Need) -> Trial:
    what = f"training.micro_batch_size = {plan.micro_batch_size}"
    return Trial(what, f"{plan.accumulation_steps} micro-batches a step, same gradient; a little slower", need)


def _levers(recipe: Recipe, plan: Plan) -> Iterator[Lever]:
    if not plan.gradient_checkpointing and not isinstance(recipe.adapter, PrefixTuning):
        yield Lever(("training", "gradient_checkpointing"), True, "a step takes about a third longer, same result")
    if plan.optimizer in ("adamw", "paged-adamw"):
        yield Lever(
            ("training", "optimizer"), "adamw-8bit", "8-bit moments; results as with 32 bits (arXiv:2110.02861)"
        )
    if plan.optimizer != "paged-adamw-8bit":
        yield Lever(("training", "optimizer"), "paged-adamw-8bit", "moments move to the host when the card is full")
    if isinstance(recipe.quantization, FourBit) and not recipe.quantization.double_quantization:
        yield Lever(("quantization", "double_quantization"), True, "no loss of quality was measured (arXiv:2305.14314)")


def longest_that_fits(
    config: PretrainedConfig, recipe: Recipe, plan: Plan, budget: int, rows: Longest | None = None
) -> int:
    """The largest length, in steps of LENGTH_STEP, at which one row fits; 0 if none does.

    Searched up to what the model has positions for.
    """
    single = plan.with_micro_batch(1, "")
    scored = None if rows is None else rows.scored
    most = int(getattr(config.get_text_config(), "max_position_embeddings", 0) or 131072)
    return _bisected(
        LENGTH_STEP,
        most // LENGTH_STEP * LENGTH_STEP,
        lambda n: (
            predicted(
                config, recipe, single, Longest(n, None if scored is None else min(scored, n), True)
            ).need.total_bytes
        ),
        budget,
    )


def _bisected(low: int, high: int, cost: Callable[[int], int], limit: int) -> int:
    """The largest multiple of LENGTH_STEP between `low` and `high` within the limit, by halving; 0 if `low` is not."""
    if cost(low) > limit:
        return 0
    if cost(high) <= limit:
        return high
    while high - low > LENGTH_STEP:
        middle = (low + high) // 2 // LENGTH_STEP * LENGTH_STEP
        if cost(middle) <= limit:
            low = middle
        else:
            high = middle
    return low


def largest_micro_batch(config: PretrainedConfig, recipe: Recipe, plan: Plan, budget: int, rows: Longest | None) -> int:
    """The most rows that fit at once, whatever the effective batch; 0 if one does not."""
    whole = recipe.model_copy(update={"training": recipe.training.model_copy(update={"batch_size": 2**10})})
    sizes = [2**power for power in range(11)]

    def cost(size: int) -> int:
        wide = make_plan(changed(whole, {("training", "micro_batch_size"): size}), plan.device, attention_rule(config))
        return predicted(config, recipe, wide, rows).need.total_bytes

    size = largest_that_fits(sizes, cost, budget)
    return size if cost(size) <= budget else 0


def changed(recipe: Recipe, changes: dict[KeyPath, Any]) -> Recipe:
    """A recipe with other values, checked like any other."""
    tables = recipe.model_dump(mode="json", exclude_none=True, exclude_unset=True)
    for name in ("quantization", "adapter"):
        tables[name] = getattr(recipe, name).model_dump(mode="json", exclude_none=True)
    for (table, key), value in changes.items():
        tables.setdefault(str(table), {})[str(key)] = value
    result = parse_recipe(tables)
    if isinstance(result, list):
        raise ValueError("; ".join(f"{fault.path}: {fault.message}" for fault in result))
    return result


def fit_recipe(recipe: Recipe, gpu: str | None, vram: str | None, *, allow_length: bool) -> Fitted:
    """`qtune fit`: for the card that is named, that has this much memory, or that is here.

    Raises:
        ModelError, InputError: the model's configuration or the card's name cannot be used.
    """
    device = device_for(gpu, vram)
    config = load_config(recipe.model)
    limit = (
        budget_bytes(recipe, make_plan(recipe, device, attention_rule(config))) if vram is None else device.total_bytes
    )
    return fit(config, recipe, device, limit, allow_length=allow_length)


def largest_value(recipe: Recipe, gpu: str | None, vram: str | None, what: str) -> str:
    """`qtune fit --max length|batch`: one line with the largest value that fits."""
    device = device_for(gpu, vram)
    config = load_config(recipe.model)
    plan = make_plan(recipe, device, attention_rule(config))
    limit = budget_bytes(recipe, plan) if vram is None else device.total_bytes
    if what == "length":
        found = longest_that_fits(config, recipe, plan, limit)
        return f"longest row that fits {limit / 2**30:.2f} GiB, one at a time: {found or 'none'}"
    rows = largest_micro_batch(config, recipe, plan, limit, None)
    return f"most rows of {plan.max_length} tokens that fit {limit / 2**30:.2f} GiB at once: {rows or 'none'}"


def rewritten_recipe(text: str, found: Fitted) -> str:
    """The recipe's text with what was found."""
    return rewritten(text, found.changes, f"to fit {found.budget_bytes / 2**30:.2f} GiB")


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)
