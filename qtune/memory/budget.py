"""The one search over what a recipe leaves to memory; `run`, `fit` and the offers after an out-of-memory ask it.

Each tells it which levers it may pull and which micro-batches it may choose. Levers come in the order of harm, at the
smallest micro-batch; as soon as that is enough, the micro-batch is made as large as memory allows.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from qtune.errors import ModelError
from qtune.memory.cached import predicted
from qtune.memory.kept_dequantized import KEEP_DEQUANTIZED, Dequantized, fastest_kept, plan_at_first
from qtune.memory.kept_layers import CHECKPOINTING, Kept, Steps, fastest, pace_of, rates_of
from qtune.plan import keeps_nothing, whole_parts
from qtune.recipe.parse import changed
from qtune.recipe.schema import FourBit
from qtune.recipe.text import show_value
from qtune.sizes import GIB, MIB, gib_text, size_in_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import PretrainedConfig

    from qtune.device.present import Device
    from qtune.memory.allowance import Need
    from qtune.memory.predict import Longest, Prediction
    from qtune.plan import Plan
    from qtune.recipe.schema import KeyPath, Recipe

MICRO_BATCH = ("training", "micro_batch_size")
EMBEDDINGS = ("memory", "embeddings")
LAYERS = ("memory", "layers")

SMALL_TILE_MIB = 16
"""Tile of the loss that is tried where the usual one is too much: a quarter of it."""


@dataclass(frozen=True)
class Lever:
    """A change of the recipe that saves memory."""

    key: KeyPath
    value: Any
    why: str
    """What it costs."""

    @property
    def words(self) -> str:
        """The change as a recipe says it."""
        return f"{'.'.join(map(str, self.key))} = {show_value(self.value)}"


HOST = Lever(EMBEDDINGS, "host", "the head crosses the bus twice a micro-batch, same result; slower answers")


def levers(recipe: Recipe, plan: Plan) -> Iterator[Lever]:
    """What can be changed, least harm first. On a CPU host memory is the memory that is short."""
    if plan.keep_dequantized:
        yield Lever(KEEP_DEQUANTIZED, False, "weights are dequantized for every product: more time, same result")
    if plan.gradient_checkpointing is not True:
        yield Lever(
            CHECKPOINTING,
            True,
            "the forward is computed twice: more time, same result",
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
    if plan.loss_tile_bytes > SMALL_TILE_MIB * MIB:
        yield Lever(("memory", "loss_tile"), f"{SMALL_TILE_MIB}MiB", "smaller matrix products in the loss, same result")
    if plan.device.kind == "cuda" and plan.embeddings == "device":
        yield HOST
    if plan.device.kind == "cuda" and plan.activations == "device":
        yield Lever(("memory", "activations"), "host", "activations cross the bus out and back, same result")


def lossy_levers(plan: Plan) -> Iterator[Lever]:
    """What changes the model: shown with what it gives, and pulled by nobody but the user."""
    if plan.device.kind == "cuda" and plan.embeddings == "device":
        yield Lever(
            EMBEDDINGS,
            "int8",
            "embeddings and head in 8 bits, which changes the model: the built-in one's loss on "
            "qtune/tuned/neutral.txt by -0.002 nats (standard error 0.002), no other was measured",
        )


def last_levers(recipe: Recipe, plan: Plan) -> Iterator[Lever]:
    """What is pulled only where everything else together is not enough: a step then takes as long as the bus."""
    can_wait = isinstance(recipe.quantization, FourBit) and not getattr(recipe.adapter, "dora", False)
    if plan.device.kind == "cuda" and plan.layers == "device" and can_wait:
        yield Lever(LAYERS, "host", "every layer crosses the bus twice a step, same result; slower answers")


@dataclass(frozen=True)
class Trial:
    """One thing that was tried."""

    what: str
    """The change, in the recipe's words."""
    why: str
    """What it costs; where it is not possible, why."""
    before: Need
    need: Need
    """After the change."""
    verdict: Literal["kept", "saves nothing", "not possible", "not needed"] = "kept"
    """"not needed": it saves, and what came after it is enough without it."""
    pace: float | None = None
    """Seconds of a step after the change over those before it; None where the card's rates are not known."""


def needed_bytes(prediction: Prediction) -> int:
    """What must be free on the card."""
    return prediction.need.total_bytes


@dataclass(frozen=True)
class Search:
    """What is searched for: a step of the longest rows that costs no more than `limit` bytes on a device."""

    config: PretrainedConfig
    device: Device
    longest: Longest | None
    limit: int
    cost: Callable[[Prediction], int] = needed_bytes
    tell: Callable[[str], None] = lambda words: None
    """Called with a description of the next trace."""
    traced: dict[tuple[str, int], Prediction] = field(default_factory=dict)
    """What was traced so far, by recipe and micro-batch."""

    def plan(self, recipe: Recipe) -> Plan:
        """What the recipe means on this device before memory is asked."""
        longest = None if self.longest is None else self.longest.most
        return plan_at_first(recipe, self.device, self.config, longest)

    def trace(self, recipe: Recipe, rows: int, *pulled: Lever) -> Prediction:
        """The step of a recipe with `rows` at once. `pulled`: how the recipe came to be.

        Raises:
            ModelError: it cannot be traced, or is not possible.
        """
        key = (recipe.model_dump_json(), rows)
        if key not in self.traced:
            length = "" if self.longest is None else f" x {self.longest.length} tokens"
            self.tell(", ".join([f"{rows}{length}", *(lever.words for lever in pulled)]))
            plan = self.plan(recipe).with_micro_batch(rows)
            self.traced[key] = predicted(self.config, recipe, plan, self.longest)
        return self.traced[key]

    def is_enough(self, prediction: Prediction) -> bool:
        """Whether a step costs no more than there is."""
        return self.cost(prediction) <= self.limit


@dataclass(frozen=True)
class Settled:
    """Where a search ended."""

    recipe: Recipe
    """With the levers that were pulled."""
    rows: int
    """The micro-batch."""
    prediction: Prediction
    is_enough: bool
    changes: dict[KeyPath, Any]
    """The levers that were pulled: keys and their values."""
    trials: tuple[Trial, ...]

    @property
    def need(self) -> Need:
        """What the step needs."""
        return self.prediction.need

    @property
    def host_bytes(self) -> int:
        """What waits in the computer's memory."""
        return self.prediction.host_bytes


def settle(
    search: Search, recipe: Recipe, levers: Sequence[Lever], sizes: Sequence[int], last: Sequence[Lever] = ()
) -> Settled:
    """Pulls `levers` one after the other until a step of the smallest micro-batch is enough; then the largest that is.

    A lever that saves nothing is left out again; it may save once another one has taken away what hid it, so it is
    tried again then. What a later one has made needless is given back, most harm first.

    sizes: the micro-batches that may be chosen, ascending. last: levers that come after all others.

    Raises:
        ModelError: the recipe's own step cannot be traced.
    """
    prediction = search.trace(recipe, sizes[0])
    pulled: list[Lever] = []
    trials: list[Trial] = []
    pending, waiting, more_was_kept = list(levers), list(last), True
    while ((pending and more_was_kept) or waiting) and not search.is_enough(prediction):
        if not pending or not more_was_kept:
            pending, waiting = [*waiting, *pending], []
        tried, pending, more_was_kept = pending, [], False
        for lever in tried:
            if search.is_enough(prediction):
                break
            together = [*(other for other in pulled if other.key != lever.key), lever]
            candidate = changed(recipe, {other.key: other.value for other in together})
            trial, after = _tried(search, candidate, sizes[0], together, prediction)
            trials = [*(old for old in trials if old.what != trial.what), trial]
            if trial.verdict == "kept" and after is not None:
                pulled, prediction, more_was_kept = together, after, True
            elif trial.verdict == "saves nothing":
                pending.append(lever)
    if search.is_enough(prediction):
        for lever in reversed(pulled[:-1]):
            rest = [other for other in pulled if other is not lever]
            candidate = changed(recipe, {other.key: other.value for other in rest})
            _, without = _tried(search, candidate, sizes[0], rest, prediction)
            if without is not None and search.is_enough(without):
                pulled, prediction = rest, without
                trials = [replace(one, verdict="not needed") if one.what == lever.words else one for one in trials]
    changes = {lever.key: lever.value for lever in pulled}
    recipe, rows = changed(recipe, changes) if changes else recipe, sizes[0]
    if search.is_enough(prediction):
        rows = largest_that_fits(sizes, lambda size: search.cost(search.trace(recipe, size, *pulled)), search.limit)
        prediction = search.trace(recipe, rows)
    return Settled(recipe, rows, prediction, search.is_enough(prediction), changes, tuple(trials))


def _tried(
    search: Search, candidate: Recipe, rows: int, pulled: list[Lever], before: Prediction
) -> tuple[Trial, Prediction | None]:
    """Whether the last lever of `pulled` saves anything."""
    lever = pulled[-1]
    try:
        after = search.trace(candidate, rows, *pulled)
    except ModelError as error:  # an adapter that trains the embeddings keeps them on the card
        return Trial(lever.words, error.problems[0].message, before.need, before.need, "not possible"), None
    saves = (search.cost(after), needed_bytes(after)) < (search.cost(before), needed_bytes(before))
    verdict: Literal["kept", "saves nothing"] = "kept" if saves else "saves nothing"
    pace = pace_of(search.device, before, after)
    return Trial(lever.words, lever.why, before.need, after.need, verdict, pace), after


def as_run(search: Search, recipe: Recipe, *, any_rows: bool = False) -> tuple[Settled, Plan]:
    """What `qtune run` settles by itself, and the plan that it makes: micro-batch, embeddings, the layers that are
    computed twice and those that keep their weights dequantized, where the recipe says "auto". Embeddings go to the
    host, which changes nothing but the speed, where a step would not fit otherwise and where that helps. On a processor
    they are there already, and the micro-batch is the plan's, or the largest below it that memory allows.

    any_rows: whether the micro-batch is free also where the recipe gives a number.
    """
    plan = search.plan(recipe)
    is_card, rows_are_open = search.device.kind == "cuda", recipe.training.micro_batch_size == "auto"
    free_rows = any_rows or (is_card and rows_are_open)
    sizes = whole_parts(plan.micro_batch_size * plan.accumulation_steps) if free_rows else [plan.micro_batch_size]
    own = [HOST] if is_card and recipe.memory.embeddings == "auto" else []
    is_by_bound = bool(plan.keep_dequantized) and recipe.memory.keep_dequantized == "auto"
    if is_by_bound and not search.is_enough(search.trace(recipe, sizes[0])):
        # On a processor. Where that is too much after all, it goes before anything else does.
        recipe = changed(recipe, {KEEP_DEQUANTIZED: False})
        plan = plan.with_dequantized_kept(False, "there is no room for it")
    settled_here = settle(search, recipe, own, sizes)
    if rows_are_open and not free_rows and not settled_here.is_enough:
        free_rows, sizes = True, [size for size in whole_parts(sizes[0] * plan.accumulation_steps) if size <= sizes[0]]
        settled_here = settle(search, recipe, own, sizes)
    if EMBEDDINGS in settled_here.changes:
        what = "one row" if sizes[0] == 1 else f"{sizes[0]} rows"
        needed = settled_here.trials[-1].before.total_bytes / GIB
        reason = f"with them on the card {what} would need {needed:.2f} GiB of {search.limit / GIB:.2f}"
        plan = plan.with_embeddings_on_host(reason)
    tried = [size for size in sizes if size <= settled_here.rows]
    settled_here, plan, rule = _with_layers_kept(search, recipe, settled_here, plan, tried)
    tried = [size for size in tried if size <= settled_here.rows]
    settled_here, plan, rule = _with_dequantized_kept(search, settled_here, plan, tried, rule)
    if free_rows:
        words = f"{gib_text(settled_here.need.total_bytes)} traced and margin, of {gib_text(search.limit)}"
        plan = plan.with_micro_batch(settled_here.rows, f"{rule}: {words}")
    return settled_here, plan


def _with_layers_kept(
    search: Search, recipe: Recipe, found: Settled, plan: Plan, sizes: Sequence[int]
) -> tuple[Settled, Plan, str]:
    """The layers that are computed twice, where the recipe leaves that open; and how rows were chosen.

    On a card as few as there is room for; none at all where the embeddings had to make room already, for that step is
    as lean as it can be. On a processor, whose memory is seldom the limit, only as many as must be.
    """
    is_whole = found.rows == plan.micro_batch_size * plan.accumulation_steps
    largest = "the whole share of a step fits at once" if is_whole else "the largest that fits"
    is_card = search.device.kind == "cuda"
    is_open = recipe.training.gradient_checkpointing == "auto"
    if not is_open or found.is_enough != is_card or EMBEDDINGS in found.changes:
        return found, plan, largest
    count = int(search.config.get_text_config().num_hidden_layers)

    def traced(layers: bool | int, rows: int) -> Prediction:
        lever = Lever(CHECKPOINTING, layers, "the forward of these layers is computed twice")
        return search.trace(changed(found.recipe, {lever.key: lever.value}), rows, lever)

    steps = Steps(traced, search.cost, search.limit, count)
    share = plan.micro_batch_size * plan.accumulation_steps
    best = fastest(steps, sizes, share, rates_of(search.device))
    if best is None:
        if is_card:
            return found, plan, largest
        best = Kept(True, found.rows, traced(True, found.rows), 0.0)
    words = f"{gib_text(best.prediction.need.total_bytes)} traced and margin, of {gib_text(search.limit)}"
    some = "every layer" if best.layers is True else f"{best.layers} of {count} layers"
    what = f"computing {some} twice is enough for a step to fit" if best.layers else "a step fits without it"
    reason = f"{what}: {words}"
    chosen = changed(found.recipe, {CHECKPOINTING: best.layers})
    enough = search.is_enough(best.prediction)
    settled = replace(found, recipe=chosen, rows=best.rows, prediction=best.prediction, is_enough=enough)
    rule = largest if best.rows == found.rows else "the fastest that fits"
    return settled, plan.with_checkpointing(best.layers, reason), rule


def _with_dequantized_kept(
    search: Search, found: Settled, plan: Plan, sizes: Sequence[int], rule: str
) -> tuple[Settled, Plan, str]:
    """The layers that keep their weights dequantized, where the recipe leaves that open: on a card, for what is left
    over of its memory where nothing has to be saved any more."""
    is_open = found.recipe.memory.keep_dequantized == "auto"
    if (
        not is_open
        or search.device.kind != "cuda"
        or keeps_nothing(found.recipe, search.device, lean_step=plan.lean_step) is not None
    ):
        return found, plan, rule
    rates = rates_of(search.device)
    if not found.is_enough or EMBEDDINGS in found.changes or plan.gradient_checkpointing is not False or rates is None:
        reason = "memory is asked for it last, and some layers are computed twice to save some"
        if plan.gradient_checkpointing is False:
            reason = "there is no room for it"
        return found, plan.with_dequantized_kept(False, reason), rule
    count = int(search.config.get_text_config().num_hidden_layers)

    def traced(layers: bool | int, rows: int) -> Prediction:
        lever = Lever(KEEP_DEQUANTIZED, layers, "their weights stay dequantized")
        return search.trace(changed(found.recipe, {lever.key: lever.value}), rows, lever)

    share = plan.micro_batch_size * plan.accumulation_steps
    best = fastest_kept(Steps(traced, search.cost, search.limit, count), sizes, share, rates)
    chosen = changed(found.recipe, {KEEP_DEQUANTIZED: best.layers})
    plan = plan.with_dequantized_kept(best.layers, _why_kept(best, count, search.limit))
    if best.rows != found.rows:
        rule = "the fastest that fits"
    return replace(found, recipe=chosen, rows=best.rows, prediction=best.prediction), plan, rule


def _why_kept(best: Dequantized, count: int, limit: int) -> str:
    words = f"{gib_text(best.prediction.need.total_bytes)} traced and margin, of {gib_text(limit)}"
    if best.layers is True:
        return f"all of them, for there is room: {words}"
    return f"those of {best.layers} of {count} layers fit: {words}" if best.layers else f"without them: {words}"


def settled(
    config: PretrainedConfig,
    recipe: Recipe,
    plan: Plan,
    longest: Longest | None = None,
    tell: Callable[[str], None] = lambda words: None,
) -> Plan:
    """`plan` with what a recipe leaves to a card's memory. tell: hears what is traced next."""
    return as_run(Search(config, plan.device, longest, budget_bytes(recipe, plan), tell=tell), recipe)[1]


def budget_bytes(recipe: Recipe, plan: Plan) -> int:
    """[memory] budget in bytes; "auto" is what the device has free."""
    budget = recipe.memory.budget
    return plan.device.free_bytes if budget == "auto" else size_in_bytes(budget, "memory.budget")


NEARLY_STRAIGHT = 0.02
"""How far memory over rows is trusted to be from a straight line, as a share of the limit."""


def largest_that_fits(sizes: Sequence[int], cost: Callable[[int], int], limit: int) -> int:
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
