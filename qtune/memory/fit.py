"""Change a recipe until it fits a card, least harm first; or find the longest rows, the largest micro-batch that do."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from qtune.errors import ModelError
from qtune.memory.budget import budget_bytes, choose_micro_batch, largest_that_fits
from qtune.memory.cached import predicted
from qtune.memory.longest import Rows, longest_rows
from qtune.memory.predict import Longest
from qtune.memory.profile import device_for
from qtune.model.load import attention_rule, load_config
from qtune.plan import make_plan
from qtune.recipe.schema import FourBit, KeyPath, PrefixTuning, Recipe, parse_recipe
from qtune.recipe.text import rewritten
from qtune.run.resolved import absolute_paths

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from transformers import PretrainedConfig

    from qtune.device.present import Device
    from qtune.memory.allowance import Need
    from qtune.plan import Plan
    from qtune.recipe.file import Resolved

LENGTH_STEP = 64
"""Lengths are tried in multiples of this."""

INTERPOLATIONS = 6
"""So many guesses along a straight line are made before lengths are halved."""

SMALL_TILE_MIB = 16
"""Tile of the loss that is tried where the usual one is too much: a quarter of it."""


@dataclass(frozen=True)
class Trial:
    """One thing that was tried."""

    what: str
    """The change, in the recipe's words."""
    why: str
    """What it costs."""
    before: Need
    need: Need
    """After the change."""
    verdict: Literal["kept", "saves nothing", "not possible"] = "kept"


@dataclass(frozen=True)
class Fitted:
    """What `fit` found."""

    plan: Plan
    rows: Rows
    budget_bytes: int
    asked: Need
    """The recipe as it was given."""
    asked_rows: int
    """Its micro-batch."""
    need: Need
    """The recipe as it ended."""
    trials: list[Trial] = field(default_factory=list)
    changes: dict[KeyPath, Any] = field(default_factory=dict)
    """Recipe keys and their new values."""

    @property
    def longest(self) -> Longest:
        """The longest rows of the recipe as it ended."""
        length = self.changes.get(("data", "max_length"))
        return self.rows.longest if length is None else _cut(self.rows.longest, length)

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

    @property
    def words(self) -> str:
        """The change as a recipe says it."""
        return f"{'.'.join(map(str, self.key))} = {shown(self.value)}"


def fit(
    config: PretrainedConfig,
    recipe: Recipe,
    device: Device,
    budget: int,
    rows: Rows | None = None,
    allow_length: bool = False,
) -> Fitted:
    """Searches the settings in the order of harm; each candidate is traced.

    First the micro-batch alone. If one row does not fit, the levers one after the other, and with `allow_length` at
    last the length. A lever that saves nothing is left out again; it may save once another one has taken away what
    hid it, so it is tried again then. As soon as one row fits, the micro-batch is made as large as the budget allows.
    """
    rows = rows or Rows(Longest(recipe.data.max_length), "data.max_length, every token scored")
    attention = attention_rule(config)
    plan = make_plan(recipe, device, attention)
    asked = predicted(config, recipe, plan, rows.longest).need
    start = Fitted(plan, rows, budget, asked, plan.micro_batch_size, asked)
    if start.fits:
        return start
    trials: list[Trial] = []
    changes: dict[KeyPath, Any] = {}

    def one_row(candidate: Recipe, longest: Longest) -> Need:
        single = make_plan(candidate, device, attention).with_micro_batch(1, "")
        return predicted(config, candidate, single, longest).need

    need = asked
    if plan.micro_batch_size > 1:
        need = one_row(recipe, rows.longest)
        batch = plan.micro_batch_size * plan.accumulation_steps
        price = f"{batch} micro-batches make a step: the same gradient, a little slower"
        trials.append(Trial("training.micro_batch_size = 1", price, asked, need))
    pending, more_was_kept = list(levers(recipe, plan)), True
    while pending and more_was_kept and not need.fits(budget):
        tried, pending, more_was_kept = pending, [], False
        for lever in tried:
            if need.fits(budget):
                break
            trial = _tried(lever, recipe, need, lambda candidate: one_row(candidate, rows.longest))
            trials = [*(old for old in trials if old.what != trial.what), trial]
            if trial.verdict == "kept":
                recipe, need = changed(recipe, {lever.key: lever.value}), trial.need
                changes[lever.key] = lever.value
                more_was_kept = True
            elif trial.verdict == "saves nothing":
                pending.append(lever)
    longest = rows.longest
    if allow_length and not need.fits(budget):
        single = make_plan(recipe, device, attention).with_micro_batch(1, "")
        length = longest_that_fits(config, recipe, single, budget, longest) or LENGTH_STEP
        shorter = _cut(longest, length)
        lever = Lever(
            ("data", "max_length"),
            length,
            'longer rows stop the run; data.on_long_row = "cut-right" cuts them, "drop" leaves them out',
        )
        trial = _tried(lever, recipe, need, lambda candidate: one_row(candidate, shorter))
        trials.append(trial)
        if trial.verdict == "kept":
            recipe, need, longest = changed(recipe, {lever.key: length}), trial.need, shorter
            changes[lever.key] = length
    plan = make_plan(recipe, device, attention)
    if not need.fits(budget):
        return Fitted(plan, rows, budget, asked, start.asked_rows, need, trials, changes)
    chosen = choose_micro_batch(config, recipe, plan, longest, budget)
    changes["training", "micro_batch_size"] = chosen.plan.micro_batch_size
    return Fitted(chosen.plan, rows, budget, asked, start.asked_rows, chosen.need, trials, changes)


def _tried(lever: Lever, recipe: Recipe, before: Need, need_of: Callable[[Recipe], Need]) -> Trial:
    """Whether one row needs less with the lever."""
    try:
        after = need_of(changed(recipe, {lever.key: lever.value}))
    except ModelError as error:  # an adapter that trains the embeddings keeps them on the card
        return Trial(lever.words, error.problems[0].message, before, before, "not possible")
    return Trial(
        lever.words, lever.why, before, after, "kept" if after.total_bytes < before.total_bytes else "saves nothing"
    )


def _cut(longest: Longest, length: int) -> Longest:
    """The longest rows where none is longer than `length`."""
    scored = None if longest.scored is None else min(longest.scored, length)
    evaluated = None if longest.evaluated is None else min(longest.evaluated, length)
    return Longest(min(longest.length, length), scored, longest.equal, evaluated)


def levers(recipe: Recipe, plan: Plan) -> Iterator[Lever]:
    """What can be changed, least harm first. On a CPU host memory is the memory that is short."""
    if not plan.gradient_checkpointing and not isinstance(recipe.adapter, PrefixTuning):
        yield Lever(
            ("training", "gradient_checkpointing"),
            True,
            "the forward is computed twice: a third more time, same result",
        )
    if plan.optimizer in ("adamw", "paged-adamw"):
        yield Lever(
            ("training", "optimizer"), "adamw-8bit", "8-bit moments: results as with 32 bits (arXiv:2110.02861)"
        )
    if plan.optimizer != "paged-adamw-8bit" and plan.device.kind == "cuda":
        yield Lever(
            ("training", "optimizer"), "paged-adamw-8bit", "the moments also move to the host when the card is full"
        )
    if isinstance(recipe.quantization, FourBit) and not recipe.quantization.double_quantization:
        yield Lever(("quantization", "double_quantization"), True, "no loss of quality was measured (arXiv:2305.14314)")
    if plan.loss_tile_bytes > SMALL_TILE_MIB * 2**20:
        yield Lever(("memory", "loss_tile"), f"{SMALL_TILE_MIB}MiB", "smaller matrix products in the loss, same result")
    if plan.device.kind == "cuda" and plan.embeddings == "device":
        yield Lever(
            ("memory", "embeddings"),
            "host",
            "the head crosses the bus twice a micro-batch, same result; slower answers",
        )
    if plan.device.kind == "cuda" and plan.activations == "device":
        yield Lever(("memory", "activations"), "host", "activations cross the bus out and back, same result")


def longest_that_fits(
    config: PretrainedConfig, recipe: Recipe, plan: Plan, budget: int, rows: Longest | None = None
) -> int:
    """The largest length, in steps of LENGTH_STEP, at which one row fits; 0 if none does.

    Searched up to what the model has positions for.
    """
    single = plan.with_micro_batch(1, "")
    scored = None if rows is None else rows.scored
    most = int(getattr(config.get_text_config(), "max_position_embeddings", 0) or 131072)
    return _longest_within(
        LENGTH_STEP,
        most // LENGTH_STEP * LENGTH_STEP,
        lambda n: (
            predicted(
                config, recipe, single, Longest(n, None if scored is None else min(scored, n), True)
            ).need.total_bytes
        ),
        budget,
    )


def _longest_within(low: int, high: int, cost: Callable[[int], int], limit: int) -> int:
    """The largest multiple of LENGTH_STEP between `low` and `high` within the limit; 0 if `low` is not.

    Cost grows nearly in a straight line, so that the line between two known lengths soon meets the limit; where it does
    not, halving ends the search.
    """
    below, above = cost(low), cost(high)
    if below > limit:
        return 0
    if above <= limit:
        return high
    turn = 0
    while high - low > LENGTH_STEP:
        on_line = low + (high - low) * (limit - below) // (above - below)
        guess = on_line if turn < INTERPOLATIONS else (low + high) // 2
        guess = min(max(guess // LENGTH_STEP * LENGTH_STEP, low + LENGTH_STEP), high - LENGTH_STEP)
        found = cost(guess)
        if found <= limit:
            low, below = guess, found
        else:
            high, above = guess, found
        turn += 1
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


def fit_recipe(resolved: Resolved, gpu: str | None, vram: str | None, *, allow_length: bool) -> Fitted:
    """`qtune fit`: for the card that is named, that has this much memory, or that is here.

    Raises:
        ModelError, InputError: the model's configuration or the card's name cannot be used.
    """
    recipe = resolved.recipe
    device, limit, config = _card(recipe, gpu, vram)
    return fit(config, recipe, device, limit, longest_rows(resolved), allow_length=allow_length)


def largest_value(recipe: Recipe, gpu: str | None, vram: str | None, what: str) -> str:
    """`qtune fit --max length|batch`: one line with the largest value that fits, everything else as the recipe says."""
    device, limit, config = _card(recipe, gpu, vram)
    plan = make_plan(recipe, device, attention_rule(config))
    card = f"{device.name} ({limit / 2**30:.2f} GiB)"
    if what == "length":
        found = longest_that_fits(config, recipe, plan, limit)
        if not found:
            return f"not even a row of {LENGTH_STEP} tokens fits {card}"
        return f"data.max_length = {found} is the largest that fits {card}, one row at a time, every token scored"
    rows = largest_micro_batch(config, recipe, plan, limit, None)
    if not rows:
        return f"not even one row of {plan.max_length} tokens fits {card}; qtune fit without --max says what would help"
    return f"training.micro_batch_size = {rows}, {plan.max_length} tokens a row, is the largest power of two for {card}"


def _card(recipe: Recipe, gpu: str | None, vram: str | None) -> tuple[Device, int, PretrainedConfig]:
    """The device, what may be spent on it, and the model's configuration. --vram goes before the recipe's budget."""
    device, config = device_for(gpu, vram), load_config(recipe.model)
    given = budget_bytes(recipe, make_plan(recipe, device, attention_rule(config)))
    return device, device.total_bytes if vram is not None else min(given, device.free_bytes), config


def fitted_text(resolved: Resolved, found: Fitted, target: Path) -> str:
    """The recipe's text for the file `target`, with what was found and what --set changed; paths right from there."""
    asked = _set_changes(resolved)
    if target.parent.resolve() != resolved.folder.resolve():
        data = resolved.recipe.data
        for key in ("train", "validation", "test", "chat_template"):
            value = getattr(data, key)
            if (moved := absolute_paths(value, resolved.folder.resolve())) != value:
                asked["data", key] = moved
    text = rewritten(resolved.text, asked, "")
    return rewritten(text, found.changes, f"to fit {found.budget_bytes / 2**30:.2f} GiB")


def _set_changes(resolved: Resolved) -> dict[KeyPath, Any]:
    """What --set has put into the recipe, and as None what it has put out of it."""
    changes: dict[KeyPath, Any] = {}
    sources = {(str(path[0]), str(path[1])): origin.source for path, origin in resolved.origins.items()}
    tables = resolved.recipe.model_dump(mode="json", exclude_none=True)
    for table, key in sources:
        if sources[table, key] == "--set":
            changes[table, key] = tables[table][key]
    given = tomllib.loads(resolved.text)
    for table in {str(path[0]) for path in changes}:
        for key in given.get(table, {}):
            if sources.get((table, key)) not in ("recipe", "--set"):
                changes[table, key] = None
    return changes


def shown(value: Any) -> str:
    """A value as a recipe writes it."""
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)
