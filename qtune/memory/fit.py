"""Change a recipe until it fits a card, least harm first; or find the longest rows, the largest micro-batch that do."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from qtune.adapter.lean_check import examined
from qtune.device.cards import device_for
from qtune.errors import InputError, Problem
from qtune.memory.allowance import CONTEXT_BYTES
from qtune.memory.budget import (
    EMBEDDINGS,
    MICRO_BATCH,
    Lever,
    Search,
    Settled,
    Trial,
    as_run,
    budget_bytes,
    largest_that_fits,
    last_levers,
    levers,
    settle,
)
from qtune.memory.cached import predicted
from qtune.memory.kept_dequantized import KEEP_DEQUANTIZED
from qtune.memory.kept_layers import CHECKPOINTING
from qtune.memory.longest import Rows, longest_rows
from qtune.memory.predict import Longest
from qtune.model.geometry import load_geometry
from qtune.model.load import attention_rule
from qtune.model.quantization import require_kind
from qtune.plan import make_plan
from qtune.recipe.parse import changed
from qtune.recipe.text import plain_changes, rewritten
from qtune.run.resolved import text_for
from qtune.sizes import MIB, gib_text

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PretrainedConfig

    from qtune.device.present import Device
    from qtune.memory.allowance import Need
    from qtune.plan import Plan
    from qtune.recipe.file import Resolved
    from qtune.recipe.schema import KeyPath, Recipe

LENGTH_STEP = 64
"""Lengths are tried in multiples of this."""

INTERPOLATIONS = 6
"""So many guesses along a straight line are made before lengths are halved."""


@dataclass(frozen=True)
class Fitted:
    """How a search over a recipe's settings ended."""

    plan: Plan
    """What `qtune run` will do with the recipe as it ended."""
    rows: Rows
    budget_bytes: int
    asked: Settled
    """The recipe as it was given, as `qtune run` would settle it."""
    need: Need
    """The recipe as it ended."""
    trials: list[Trial] = field(default_factory=list)
    changes: dict[KeyPath, Any] = field(default_factory=dict)
    """Recipe keys and their new values; nothing that `qtune run` settles by itself."""
    left: dict[KeyPath, Any] = field(default_factory=dict)
    """What the recipe leaves open, and what `qtune run` will choose."""
    host_bytes: int = 0
    """What waits in the computer's memory of the recipe as it ended."""

    @property
    def longest(self) -> Longest:
        """The longest rows of the recipe as it ended."""
        length = self.changes.get(("data", "max_length"))
        return self.rows.longest if length is None else _cut(self.rows.longest, length)

    @property
    def fits(self) -> bool:
        """Whether the recipe as it ended stays within the budget."""
        return self.need.fits(self.budget_bytes)

    def to_json(self) -> dict[str, Any]:
        """Plain values: what changes by the names of its keys, sizes in bytes. Where nothing fits `needed_bytes` is the
        smallest budget that would do, with the changes of `not_enough`."""
        return {
            "device": self.plan.device.name,
            "fits": self.fits,
            "verdict": self.need.verdict(self.budget_bytes),
            "asked_bytes": self.asked.need.total_bytes,
            "needed_bytes": self.need.total_bytes,
            "budget_bytes": self.budget_bytes,
            "host_bytes": self.host_bytes,
            "micro_batch_size": self.plan.micro_batch_size,
            "changes": plain_changes(self.changes) if self.fits else {},
            "not_enough": {} if self.fits else plain_changes(self.changes),
            "left_to_run": plain_changes(self.left),
        }


def fit(
    config: PretrainedConfig,
    recipe: Recipe,
    device: Device,
    budget: int,
    rows: Rows | None = None,
    allow_length: bool = False,
    tell: Callable[[str], None] = lambda words: None,
) -> Fitted:
    """Searches the settings in the order of harm; each candidate is traced.

    First what `qtune run` would settle by itself, and only where that is not enough the levers one after the other,
    with `allow_length` at last the length. A value that is "auto" stays so where run then settles it.

    tell: hears what is traced next.
    """
    rows = rows or Rows(Longest(recipe.data.max_length), "data.max_length, every token scored")
    search = Search(config, device, rows.longest, budget, tell=tell)
    asked, plan = as_run(search, recipe)
    if asked.is_enough:
        return Fitted(
            plan, rows, budget, asked, asked.need, list(asked.trials), {}, _left(recipe, plan), asked.host_bytes
        )
    trials = list(asked.trials)
    if asked.rows > 1:
        price = f"{recipe.training.batch_size} micro-batches make a step: the same gradient, a little slower"
        single = search.trace(asked.recipe, 1)
        trials.append(Trial("training.micro_batch_size = 1", price, asked.need, single.need))
    plan = search.plan(asked.recipe)
    last = list(last_levers(asked.recipe, plan))
    pulled = settle(search, asked.recipe, list(levers(asked.recipe, plan)), [1], last)
    again = {trial.what for trial in pulled.trials}
    trials = [*(trial for trial in trials if trial.what not in again), *pulled.trials]
    changes = dict(pulled.changes)
    if allow_length and not pulled.is_enough:
        length, trial = _shorter(search, pulled)
        trials.append(trial)
        if trial.verdict == "kept":
            changes["data", "max_length"] = length
            search = replace(search, longest=_cut(rows.longest, length), traced={})
    # As it is written: what run settles by itself, it settles anew.
    ended = changed(recipe, changes) if changes else recipe
    final, plan = as_run(search, ended)
    if not final.is_enough:
        final, plan = as_run(search, ended, any_rows=True)
        if final.is_enough:
            changes[MICRO_BATCH] = plan.micro_batch_size
    need = final.need if final.is_enough else min((final.need, pulled.need), key=lambda one: one.total_bytes)
    left = _left(recipe, plan) if final.is_enough else {}
    return Fitted(plan, rows, budget, asked, need, trials, changes, left, final.host_bytes)


def _left(recipe: Recipe, plan: Plan) -> dict[KeyPath, Any]:
    """What `qtune run` chooses by memory."""
    own: dict[KeyPath, Any] = {MICRO_BATCH: plan.micro_batch_size} if recipe.training.micro_batch_size == "auto" else {}
    if recipe.training.gradient_checkpointing == "auto":
        own[CHECKPOINTING] = plan.gradient_checkpointing
    if recipe.memory.keep_dequantized == "auto" and plan.keep_dequantized:
        own[KEEP_DEQUANTIZED] = plan.keep_dequantized
    is_open = recipe.memory.embeddings == "auto" and plan.device.kind == "cuda"
    return own | ({EMBEDDINGS: plan.embeddings} if is_open else {})


def _shorter(search: Search, pulled: Settled) -> tuple[int, Trial]:
    """The longest rows that fit, one at a time, and what that saves."""
    assert search.longest is not None
    plan = search.plan(pulled.recipe).with_micro_batch(1)
    length = longest_that_fits(search.config, pulled.recipe, plan, search.limit, search.longest, search.tell)
    length = length or LENGTH_STEP
    lever = Lever(
        ("data", "max_length"),
        length,
        'longer rows stop the run; data.on_long_row = "cut-right" cuts them, "drop" leaves them out',
    )
    cut = replace(search, longest=_cut(search.longest, length), traced={})
    after = cut.trace(changed(pulled.recipe, {lever.key: length}), 1)
    verdict: Literal["kept", "saves nothing"] = (
        "kept" if search.cost(after) < search.cost(pulled.prediction) else ("saves nothing")
    )
    return length, Trial(lever.words, lever.why, pulled.need, after.need, verdict)


def _cut(longest: Longest, length: int) -> Longest:
    """The longest rows where none is longer than `length`."""
    scored = None if longest.scored is None else min(longest.scored, length)
    evaluated = None if longest.evaluated is None else min(longest.evaluated, length)
    return Longest(min(longest.length, length), scored, longest.equal, evaluated)


def longest_that_fits(
    config: PretrainedConfig,
    recipe: Recipe,
    plan: Plan,
    budget: int,
    rows: Longest | None = None,
    tell: Callable[[str], None] = lambda words: None,
) -> int:
    """The largest length, in steps of LENGTH_STEP, at which one row fits; 0 if none does.

    Searched up to what the model has positions for. tell: hears what is traced next.
    """
    single = plan.with_micro_batch(1)
    scored = None if rows is None else rows.scored
    most = int(getattr(config.get_text_config(), "max_position_embeddings", 0) or 131072)

    def cost(length: int) -> int:
        tell(f"1 x {length} tokens")
        longest = Longest(length, None if scored is None else min(scored, length), True)
        return predicted(config, recipe, single, longest).need.total_bytes

    return _longest_within(LENGTH_STEP, most // LENGTH_STEP * LENGTH_STEP, cost, budget)


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
        needed = cost(guess)
        if needed <= limit:
            low, below = guess, needed
        else:
            high, above = guess, needed
        turn += 1
    return low


def largest_micro_batch(
    config: PretrainedConfig,
    recipe: Recipe,
    plan: Plan,
    budget: int,
    rows: Longest | None,
    tell: Callable[[str], None] = lambda words: None,
) -> int:
    """The most rows that fit at once, whatever the effective batch; 0 if one does not. tell: hears what is next."""
    whole = recipe.model_copy(update={"training": recipe.training.model_copy(update={"batch_size": 2**10})})
    sizes = [2**power for power in range(11)]

    @cache
    def cost(size: int) -> int:
        tell(f"{size} x {plan.max_length} tokens")
        wide = make_plan(changed(whole, {("training", "micro_batch_size"): size}), plan.device, attention_rule(config))
        return predicted(config, recipe, wide, rows).need.total_bytes

    size = largest_that_fits(sizes, cost, budget)
    return size if cost(size) <= budget else 0


def fit_recipe(
    resolved: Resolved,
    gpu: str | None,
    vram: str | None,
    *,
    allow_length: bool,
    tell: Callable[[str], None] = lambda words: None,
) -> Fitted:
    """`qtune fit`: for the card that is named, that has this much memory, or that is here. tell: hears what is traced
    next.

    Raises:
        ModelError, InputError: the model's configuration or the card's name cannot be used.
    """
    recipe = resolved.recipe
    device, limit, config = _card(recipe, gpu, vram)
    return fit(config, recipe, device, limit, longest_rows(resolved), allow_length, tell)


@dataclass(frozen=True)
class Largest:
    """The largest value of a key with which a step fits a card, everything else as the recipe says."""

    key: Literal["data.max_length", "training.micro_batch_size"]
    value: int
    """0: not even the smallest fits."""
    max_length: int
    """Tokens of a row, of the recipe."""
    card: str
    budget_bytes: int

    @property
    def text(self) -> str:
        """In a line."""
        card = f"{self.card} ({gib_text(self.budget_bytes)})"
        if self.key == "data.max_length":
            if not self.value:
                return f"not even a row of {LENGTH_STEP} tokens fits {card}"
            return f"{self.key} = {self.value} is the largest that fits {card}, one row at a time, every token scored"
        rows = f"{self.max_length} tokens"
        if not self.value:
            return f"not even one row of {rows} fits {card}; qtune fit without --max says what would help"
        return f"{self.key} = {self.value}, {rows} a row, is the largest power of two for {card}"


def largest_value(
    recipe: Recipe,
    gpu: str | None,
    vram: str | None,
    what: Literal["length", "batch"],
    tell: Callable[[str], None] = lambda words: None,
) -> Largest:
    """What `qtune fit --max length|batch` finds.

    tell: hears what is traced next.
    """
    device, limit, config = _card(recipe, gpu, vram)
    plan = make_plan(recipe, device, attention_rule(config))
    if what == "length":
        found = longest_that_fits(config, recipe, plan, limit, tell=tell)
        return Largest("data.max_length", found, plan.max_length, device.name, limit)
    rows = largest_micro_batch(config, recipe, plan, limit, None, tell)
    return Largest("training.micro_batch_size", rows, plan.max_length, device.name, limit)


def _card(recipe: Recipe, gpu: str | None, vram: str | None) -> tuple[Device, int, PretrainedConfig]:
    """The device, what may be spent on it, and the model's configuration. --vram goes before the recipe's budget.

    Raises:
        ModelError, InputError: the model's configuration or the card's name cannot be used; nothing could fit.
    """
    device, config = examined(device_for(gpu, vram), recipe), load_geometry(recipe.model)
    require_kind(config, recipe.quantization)
    given = budget_bytes(recipe, make_plan(recipe, device, attention_rule(config)))
    limit = device.total_bytes if vram is not None else min(given, device.free_bytes)
    if device.kind == "cuda" and limit <= CONTEXT_BYTES:
        context = f"CUDA's own part of a process takes {CONTEXT_BYTES / MIB:.0f} MiB"
        raise InputError(Problem("memory", f"{limit / MIB:,.0f} MiB: {context} before there is a model"))
    return device, limit, config


def fitted_text(resolved: Resolved, fitted: Fitted, target: Path) -> str:
    """The recipe's text for the file `target`, with what was found and what --set changed; paths right from there."""
    return rewritten(text_for(resolved, target), fitted.changes, f"to fit {gib_text(fitted.budget_bytes)}")
