"""Fitting: the largest value that stays inside a budget, cards by name, and a recipe's text that keeps its comments."""

from io import StringIO
from types import SimpleNamespace

import pytest
from rich.console import Console
from test_memory_trace import CARD, predict, recipe_with, tiny

from qtune.device.cards import card_named, size_in_bytes
from qtune.errors import InputError, ModelError, Problem
from qtune.memory.allowance import CONTEXT_BYTES, LOADING_SHARE, MOVING_SHARE, Need, card_need
from qtune.memory.budget import largest_that_fits, settled
from qtune.memory.fit import Fitted, _longest_within, fit, fitted_text, shown
from qtune.memory.longest import Rows
from qtune.memory.predict import Longest, summarize
from qtune.plan import Plan, make_plan
from qtune.recipe.file import check_recipe
from qtune.recipe.schema import Recipe
from qtune.recipe.text import rewritten
from qtune.screens.memory import draw_fit

GIB = 2**30


@pytest.mark.parametrize(("limit", "largest"), [(9, 1), (10, 1), (29, 1), (30, 2), (70, 4), (1000, 16)])
def test_the_largest_size_within_the_limit_is_found(limit, largest):
    assert largest_that_fits([1, 2, 4, 8, 16], lambda size: 10 + 20 * (size - 1), limit) == largest


def test_a_guess_that_is_wrong_is_corrected_by_its_own_cost():
    steep = {1: 10, 2: 11, 4: 40, 8: 90}
    gentle = {1: 1000, 2: 1100, 4: 1290, 8: 1660}
    assert largest_that_fits([1, 2, 4, 8], steep.__getitem__, 20) == 2
    assert largest_that_fits([1, 2, 4, 8], gentle.__getitem__, 1670) == 8


def test_a_size_far_beyond_the_limit_is_not_traced():
    asked = []

    def cost(size: int) -> int:
        asked.append(size)
        return 1000 + 100 * size

    assert largest_that_fits([1, 2, 4, 8, 16], cost, 1500) == 4
    assert set(asked) == {1, 2, 4}


@pytest.mark.parametrize("cost", [lambda n: n, lambda n: n * n // 100, lambda n: 10 * int(n**0.5)])
@pytest.mark.parametrize("limit", [63, 100, 500, 1000, 8000, 10**6])
def test_the_longest_length_is_the_last_multiple_that_fits(cost, limit) -> None:
    within = [length for length in range(64, 8193, 64) if cost(length) <= limit]
    assert _longest_within(64, 8192, cost, limit) == (within[-1] if within else 0)


def test_a_straight_line_needs_few_traces() -> None:
    asked = []

    def cost(length: int) -> int:
        asked.append(length)
        return 3_000_000 + 1217 * length

    assert _longest_within(64, 131072, cost, 10_000_000) == 5696
    assert len(asked) <= 4


@pytest.mark.parametrize(
    ("said", "gib"),
    [("RTX 3060", 12), ("RTX 3060 12GB", 12), ("rtx 3060 8gb", 8), ("NVIDIA GeForce RTX 4090", 24), ("A100 80 GB", 80)],
)
def test_cards_are_known_by_the_names_that_people_use(said, gib):
    assert card_named(said).gib == gib


def test_an_unknown_card_is_answered_with_the_nearest():
    with pytest.raises(InputError, match=r"--gpu: 'RTX 3096' is not in the table of cards; did you mean RTX 3090"):
        card_named("RTX 3096")


def test_a_card_computes_in_bfloat16_from_ampere_on():
    assert not card_named("RTX 2080 Ti").device().bf16
    assert card_named("RTX 3050").device().bf16


def test_sizes_are_binary():
    assert size_in_bytes("8GiB") == size_in_bytes("8 GB") == size_in_bytes("8192MiB") == 8 * GIB
    with pytest.raises(InputError, match="'much' is not a size"):
        size_in_bytes("much")


def test_between_what_is_needed_in_any_case_and_what_is_needed_to_be_sure_nobody_can_say() -> None:
    need = card_need(10 * GIB, 6 * GIB, 3 * GIB, 11 * GIB, (9, 0))
    gaps = GIB - 64 * 2**20 + int(LOADING_SHARE * 3 * GIB + MOVING_SHARE * 4 * GIB)
    assert need.least_bytes == 10 * GIB + CONTEXT_BYTES + 64 * 2**20  # two workspaces of 32 MiB
    assert need.total_bytes == need.least_bytes + gaps
    assert need.verdict(need.total_bytes) == "fits"
    assert need.verdict(need.total_bytes - 1) == need.verdict(need.least_bytes) == "too close to say"
    assert need.verdict(need.least_bytes - 1) == "does not fit"
    assert [need.fits(free) for free in (need.total_bytes, need.total_bytes - 1)] == [True, False]
    older = card_need(10 * GIB, 6 * GIB, 3 * GIB, 11 * GIB, (8, 6))
    assert older.workspace_bytes == 2 * 8.125 * 2**20


RECIPE = """\
# Why this recipe is as it is.
[data]
train = "rows.jsonl"
max_length = 1024    # most rows are shorter

[training]
batch_size = 8       # the effective one
optimizer = "adamw"
"""


def test_a_rewritten_recipe_keeps_comments_order_and_formatting():
    text = rewritten(RECIPE, {("data", "max_length"): 512, ("training", "micro_batch_size"): 2}, "to fit 8 GiB")
    assert text == RECIPE.replace("max_length = 1024", "max_length = 512") + "micro_batch_size = 2 # to fit 8 GiB\n"


def test_fit_takes_the_micro_batch_before_anything_that_costs_more(tmp_path, monkeypatch):
    monkeypatch.setenv("QTUNE_CACHE", str(tmp_path))
    config = tiny(layers=2)
    recipe = recipe_with(training={"batch_size": 4, "micro_batch_size": 4, "gradient_checkpointing": False})
    plan = make_plan(recipe, CARD)
    whole, single = (
        summarize(predict(config, recipe, plan.with_micro_batch(rows, ""), Longest(128))).need.total_bytes
        for rows in (4, 1)
    )
    enough = fit(config, recipe, CARD, whole)
    assert enough.fits
    assert enough.changes == {}
    smaller = fit(config, recipe, CARD, single)
    assert smaller.fits
    assert smaller.changes == {("training", "micro_batch_size"): 1}
    assert (smaller.plan.micro_batch_size, smaller.plan.accumulation_steps) == (1, 4)
    nothing = fit(config, recipe, CARD, GIB // 4)
    assert not nothing.fits
    assert ("training", "gradient_checkpointing") in nothing.changes


# --- the search, on a machine whose memory is a sum that can be done by head ----------------------------------------

MIB = 2**20
DRIVER = 545 * MIB


def head_sum(config, recipe: Recipe, plan: Plan, longest: Longest | None) -> SimpleNamespace:
    """1000 MiB of weights, 300 of embeddings; a row of 128 tokens takes 100, or 400 without checkpointing, and 30 less
    with activations on the host; moments 80 or 20, paged or not. Small loss tiles save 50 where embeddings on the card
    do not hide it."""
    assert longest is not None
    if plan.embeddings == "host" and "embed_tokens" in getattr(recipe.adapter, "target_modules", ()):
        raise ModelError(Problem("memory.embeddings", "trained"))
    row = longest.length * (100 if plan.gradient_checkpointing else 400) / 128
    row -= 30 if plan.activations == "host" else 0
    moments = 20 if plan.optimizer.endswith("8bit") else 80
    tile = 50 if plan.embeddings == "host" and plan.loss_tile_bytes == 64 * MIB else 0
    embeddings = 0 if plan.embeddings == "host" else 300
    traced = int((1000 + embeddings + plan.micro_batch_size * row + moments + tile) * MIB)
    return SimpleNamespace(need=Need(traced, traced, context_bytes=DRIVER))


@pytest.fixture
def by_head(monkeypatch) -> None:
    for place in ("fit", "budget"):
        monkeypatch.setattr(f"qtune.memory.{place}.predicted", head_sum)


def fitted(mib: int, *, allow_length: bool = False, **tables) -> Fitted:
    recipe = recipe_with(**{"training": {"batch_size": 8, "gradient_checkpointing": False}, **tables})
    return fit(tiny(), recipe, CARD, mib * MIB + DRIVER, allow_length=allow_length)


def tried(found: Fitted) -> list[tuple[str, int, str]]:
    return [(trial.what, trial.need.traced_bytes // MIB, trial.verdict) for trial in found.trials]


@pytest.mark.usefixtures("by_head")
def test_levers_are_pulled_one_after_the_other_and_what_saves_nothing_is_let_go() -> None:
    found = fitted(1100)
    assert tried(found) == [
        ("training.micro_batch_size = 1", 1780, "kept"),
        ("training.gradient_checkpointing = true", 1480, "kept"),
        ('training.optimizer = "adamw-8bit"', 1420, "kept"),
        ('memory.embeddings = "host"', 1170, "kept"),
        ('memory.activations = "host"', 1140, "kept"),
        # Tried again now that the embeddings do not hide it.
        ('training.optimizer = "paged-adamw-8bit"', 1140, "saves nothing"),
        ('memory.loss_tile = "16MiB"', 1090, "kept"),
    ]
    assert found.fits
    assert found.changes == {
        ("training", "gradient_checkpointing"): True,
        ("training", "optimizer"): "adamw-8bit",
        ("memory", "embeddings"): "host",
        ("memory", "activations"): "host",
        ("memory", "loss_tile"): "16MiB",
        ("training", "micro_batch_size"): 1,
    }


@pytest.mark.usefixtures("by_head")
def test_the_search_ends_where_it_fits_and_fills_what_is_left_with_rows() -> None:
    found = fitted(1800, training={"batch_size": 8, "micro_batch_size": 8, "gradient_checkpointing": False})
    assert [trial.what for trial in found.trials] == ["training.micro_batch_size = 1"]
    assert found.plan.micro_batch_size == 1
    found = fitted(1650)
    assert [trial.what for trial in found.trials][1:] == ["training.gradient_checkpointing = true"]
    assert found.changes["training", "micro_batch_size"] == found.plan.micro_batch_size == 2


@pytest.mark.usefixtures("by_head")
def test_where_nothing_fits_the_smallest_budget_that_would_is_named() -> None:
    nothing = fitted(500)
    assert not nothing.fits
    smallest = nothing.need.traced_bytes // MIB
    assert fitted(smallest).fits
    assert not fitted(smallest - 1).fits
    shorter = fitted(500, allow_length=True)
    assert not shorter.fits
    assert shorter.trials[-1].what == "data.max_length = 64"
    assert fitted(shorter.need.traced_bytes // MIB, allow_length=True).fits


@pytest.mark.usefixtures("by_head")
def test_rows_get_shorter_last_and_only_when_that_is_allowed() -> None:
    data = {"train": "rows.jsonl", "max_length": 1024}
    assert not fitted(1500, data=data).fits
    found = fitted(1500, data=data, allow_length=True)
    assert found.fits
    assert found.trials[-1].what == "data.max_length = 640"  # 1000 + 20 + 640 * 100 / 128 - 30 = 1490
    assert found.changes["data", "max_length"] == 640


@pytest.mark.usefixtures("by_head")
def test_a_lever_that_cannot_be_pulled_says_why() -> None:
    found = fitted(1100, adapter={"kind": "lora", "target_modules": ["q_proj", "embed_tokens"]})
    assert ('memory.embeddings = "host"', 1420, "not possible") in tried(found)
    assert ("memory", "embeddings") not in found.changes


@pytest.mark.usefixtures("by_head")
def test_embeddings_go_to_the_host_by_themselves_where_one_row_would_not_fit() -> None:
    def chosen(mib: int, **memory) -> Plan:
        budget = f"{(mib * MIB + DRIVER) / MIB}MiB"
        recipe = recipe_with(
            memory={"budget": budget, **memory}, training={"batch_size": 8, "micro_batch_size": "auto"}
        )
        return settled(tiny(), recipe, make_plan(recipe, CARD), Longest(128))

    assert chosen(1480).embeddings == "device"
    plan = chosen(1400)
    assert (plan.embeddings, plan.micro_batch_size) == ("host", 2)
    assert plan.reasons["memory", "embeddings"] == ("with them on the card one row would need 1.98 GiB of 1.90")
    assert chosen(1400, embeddings="device").embeddings == "device"


TEXT = """\
[model]
base = "tiny"   # small

[adapter]
kind = "lora"
rank = 8

[data]
train = "rows.jsonl"

[training]
epochs = 2      # twice
"""


@pytest.mark.usefixtures("by_head")
def test_the_written_recipe_has_what_was_set_on_the_command_line_too(tmp_path) -> None:
    file = tmp_path / "one.toml"
    (tmp_path / "rows.jsonl").touch()
    changes = ("training.steps=5", "adapter.kind=p-tuning", "training.batch_size=8")
    resolved = check_recipe(TEXT, file, changes)
    found = fit(tiny(), resolved.recipe, CARD, 1480 * MIB + DRIVER, Rows(Longest(128), "a test"))
    assert (
        fitted_text(resolved, found, file)
        == """\
[model]
base = "tiny"   # small

[adapter]
kind = "p-tuning"

[data]
train = "rows.jsonl"

[training]
steps = 5
batch_size = 8
micro_batch_size = 1 # to fit 1.98 GiB
"""
    )
    elsewhere = fitted_text(resolved, found, tmp_path / "other" / "two.toml")
    assert f'train = "{tmp_path / "rows.jsonl"}"' in elsewhere
    assert check_recipe(elsewhere, tmp_path / "other" / "two.toml").recipe.training.steps == 5


@pytest.mark.usefixtures("by_head")
def test_the_screen_shows_every_step_with_its_price() -> None:
    found, stream = fitted(1060), StringIO()
    screen = draw_fit(found, recipe_with(), {}, length_is_allowed=False)
    Console(file=stream, width=110, highlight=False).print(screen)
    lines = "\n".join(line.rstrip() for line in stream.getvalue().splitlines())
    assert (
        lines
        == """\
tiny on a card, 1.57 GiB
as it is, 2 x 128 tokens at once need 2.66 GiB: does not fit
length: data.max_length, every token scored

change                              a row needs  and then                 price
training.micro_batch_size = 1          2.66 GiB  2.27 GiB  does not fit   8 micro-batches make a step: the
                                                                          same gradient, a little slower
training.gradient_checkpointing =      2.27 GiB  1.98 GiB  does not fit   the forward is computed twice: a
true                                                                      third more time, same result
training.optimizer = "adamw-8bit"      1.98 GiB  1.92 GiB  does not fit   8-bit moments: results as with 32
                                                                          bits (arXiv:2110.02861)
memory.embeddings = "host"             1.92 GiB  1.67 GiB  does not fit   the head crosses the bus twice a
                                                                          micro-batch, same result; slower
                                                                          answers
memory.activations = "host"            1.67 GiB  1.65 GiB  does not fit   activations cross the bus out and
                                                                          back, same result
memory.loss_tile = "16MiB"             1.65 GiB  1.60 GiB  does not fit   smaller matrix products in the
                                                                          loss, same result
training.optimizer =                   1.60 GiB  1.60 GiB  saves nothing  left as it was
"paged-adamw-8bit"

does not fit 1.57 GiB; with all that saves, the smallest budget that would surely do is 1.60 GiB
shorter rows need less: --allow length"""
    )
    found, stream = fitted(1480), StringIO()
    changes = {".".join(map(str, path)): shown(value) for path, value in found.changes.items()}
    Console(file=stream, width=110, highlight=False).print(
        draw_fit(found, recipe_with(), changes, length_is_allowed=True)
    )
    assert stream.getvalue().splitlines()[-1] == (
        "fits 1.98 GiB with 1.98 GiB: training.gradient_checkpointing = true, training.micro_batch_size = 1"
    )
