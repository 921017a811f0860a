"""Fitting: the largest value that stays inside a budget, cards by name, and a recipe's text that keeps its comments."""

import json
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from test_memory_trace import CARD, CPU, predict, recipe_with, tiny
from typer.testing import CliRunner, Result

from qtune import cli
from qtune.device.cards import card_named
from qtune.errors import InputError, ModelError, Problem
from qtune.memory.allowance import Need, card_need
from qtune.memory.budget import EMBEDDINGS, largest_that_fits, settled
from qtune.memory.fit import Fitted, _longest_within, fit, fitted_text, largest_micro_batch, longest_that_fits
from qtune.memory.forecast import forecast
from qtune.memory.longest import Rows
from qtune.memory.predict import Longest, summarize
from qtune.plan import Plan, make_plan
from qtune.recipe.file import check_recipe
from qtune.recipe.parse import changed
from qtune.recipe.schema import Recipe
from qtune.recipe.text import rewritten
from qtune.run.resolved import text_for
from qtune.screens.levers import in_words, lines_of
from qtune.screens.memory import draw_fit
from qtune.sizes import size_in_bytes

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


def test_rows_that_go_together_on_a_processor_are_as_many_as_its_memory_allows() -> None:
    # In float32 two groups of four are preferred there.
    quantization = {"compute_dtype": "bfloat16"}
    recipe = recipe_with(training={**AUTO, "batch_size": 8, "gradient_checkpointing": False}, quantization=quantization)
    rows = Rows(Longest(128), "a test")
    limits = dict.fromkeys((1, 2, 4, 8), 0)
    for size in limits:
        traced = predict(tiny(), recipe, make_plan(recipe, CPU).with_micro_batch(size), rows.longest)
        limits[size] = summarize(traced).need.total_bytes
    assert forecast(tiny(), recipe, replace(CPU, free_bytes=limits[8]), rows).plan.micro_batch_size == 8
    found = forecast(tiny(), recipe, replace(CPU, free_bytes=limits[8] - 1), rows)
    assert (found.plan.micro_batch_size, found.plan.accumulation_steps) == (4, 2)
    assert found.prediction.need.total_bytes == limits[4]


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
    with pytest.raises(InputError, match=r"--gpu: 'RTX 3096' is not in the table of cards; did you mean 'RTX 3090'"):
        card_named("RTX 3096")


def test_a_card_computes_in_bfloat16_from_ampere_on():
    assert not card_named("RTX 2080 Ti").device().bf16
    assert card_named("RTX 3050").device().bf16


def test_sizes_are_binary():
    assert {size_in_bytes(text, "--vram") for text in ("8GiB", "8 GB", "8192MiB", "8")} == {8 * GIB}
    with pytest.raises(InputError, match="'much' is not a size"):
        size_in_bytes("much", "--vram")


def test_between_what_is_needed_in_any_case_and_what_is_needed_to_be_sure_nobody_can_say() -> None:
    resting = card_need(10 * GIB, 10 * GIB, 0, 11 * GIB, (9, 0))  # nothing was quantized, nothing comes and goes
    assert resting.least_bytes - resting.context_bytes == 10 * GIB + 64 * 2**20  # two workspaces of 32 MiB
    assert resting.total_bytes - resting.context_bytes == 11 * GIB  # whatever the allocator holds
    need = card_need(10 * GIB, 6 * GIB, 3 * GIB, 11 * GIB, (9, 0))
    assert need.least_bytes == resting.least_bytes
    assert need.total_bytes > resting.total_bytes  # reading weights and moving tensors leaves holes
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


def test_a_key_that_is_taken_out_takes_the_comment_above_it_along_and_no_other():
    old = RECIPE.replace("batch_size = 8 ", "# Why eight,\n# and no more.\nbatch_size = 8 ")
    new = rewritten(old, {("training", "batch_size"): None}, "")
    assert new == RECIPE.replace("batch_size = 8       # the effective one\n", "")


def test_the_commands_above_a_recipe_of_init_are_those_of_the_file_that_is_written(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    resolved = check_recipe(
        f"# Train with `qtune run sub/one.toml`, not `qtune run two.toml`.\n{TEXT}", tmp_path / "one.toml"
    )
    new = text_for(resolved, tmp_path / "three.toml")
    assert new.startswith(f"# Train with `qtune run {tmp_path / 'three.toml'}`, not `qtune run two.toml`.\n")


def test_a_whole_share_of_a_step_is_not_called_the_largest_that_fits() -> None:
    """More would fit, and there is no more: four processes have one row each of four."""
    config = tiny(layers=1)
    recipe = recipe_with(training={"batch_size": 1, "micro_batch_size": "auto"})
    plan = settled(config, recipe, make_plan(recipe, CARD), Longest(64))
    assert plan.reasons["training", "micro_batch_size"].startswith("the whole share of a step fits at once: ")


@pytest.mark.slow
def test_fit_takes_the_micro_batch_before_anything_that_costs_more(tmp_path, monkeypatch):
    monkeypatch.setenv("QTUNE_CACHE", str(tmp_path))
    config = tiny(layers=2)
    training = {"batch_size": 4, "micro_batch_size": 4, "gradient_checkpointing": False}
    # Of so small a model the embeddings are a few pages of the allocator more or less, which run would try first.
    recipe = recipe_with(training=training, memory={"embeddings": "device"})
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
    longest = longest or Longest(plan.max_length)
    if plan.embeddings == "host" and "embed_tokens" in getattr(recipe.adapter, "target_modules", ()):
        raise ModelError(Problem("memory.embeddings", "trained"))
    row = longest.length * (100 if plan.gradient_checkpointing else 400) / 128
    row -= 30 if plan.activations == "host" else 0
    moments = 20 if plan.optimizer.endswith("8bit") else 80
    tile = 50 if plan.embeddings == "host" and plan.loss_tile_bytes == 64 * MIB else 0
    embeddings = {"host": 0, "int8": 160}.get(plan.embeddings, 300)
    traced = int((1000 + embeddings + plan.micro_batch_size * row + moments + tile) * MIB)
    waiting = 300 * MIB if plan.embeddings == "host" else 0
    return SimpleNamespace(need=Need(traced, traced, context_bytes=DRIVER), work=[], layers=2, host_bytes=waiting)


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
        ('memory.embeddings = "host"', 1930, "kept"),  # what a run does by itself comes first
        ("training.micro_batch_size = 1", 1530, "kept"),
        ("training.gradient_checkpointing = true", 1230, "kept"),
        ('training.optimizer = "adamw-8bit"', 1170, "kept"),
        ('training.optimizer = "paged-adamw-8bit"', 1170, "saves nothing"),
        ('memory.loss_tile = "16MiB"', 1120, "kept"),
        ('memory.activations = "host"', 1090, "kept"),
    ]
    assert found.fits
    assert found.changes == {
        ("training", "gradient_checkpointing"): True,
        ("training", "optimizer"): "adamw-8bit",
        ("memory", "loss_tile"): "16MiB",
        ("memory", "activations"): "host",
        ("training", "micro_batch_size"): 1,
    }
    assert found.left == {("memory", "embeddings"): "host"}


def test_every_step_is_told_before_it_is_traced_whichever_way_it_is_searched_for(monkeypatch) -> None:
    happened: list[str] = []

    def traced(*asked) -> SimpleNamespace:
        happened.append("traced")
        return head_sum(*asked)

    for place in ("fit", "budget"):
        monkeypatch.setattr(f"qtune.memory.{place}.predicted", traced)
    recipe = recipe_with(training={"batch_size": 8, "gradient_checkpointing": False})
    found = fit(tiny(), recipe, CARD, 1050 * MIB + DRIVER, allow_length=True, tell=happened.append)
    levers = [trial.what for trial in found.trials if trial.what.startswith(("memory.", "training.optimizer"))]
    assert levers
    assert [lever for lever in levers if not any(lever in words for words in happened)] == []
    plan = make_plan(recipe, CARD)
    longest_that_fits(tiny(), recipe, plan, 2000 * MIB + DRIVER, tell=happened.append)
    largest_micro_batch(tiny(), recipe, plan, 3000 * MIB + DRIVER, Longest(128), happened.append)
    assert len(happened) > 20
    assert happened[1::2] == ["traced"] * (len(happened) // 2)
    assert all(" tokens" in words for words in happened[::2])


@pytest.mark.usefixtures("by_head")
def test_a_lever_that_another_one_hides_is_tried_again() -> None:
    """On the card the embeddings hide what smaller tiles of the loss save."""
    found = fitted(1120, memory={"embeddings": "device"})
    assert [(what, verdict) for what, _, verdict in tried(found)][-4:] == [
        ('memory.embeddings = "host"', "kept"),
        ('memory.activations = "host"', "not needed"),  # the tiles alone are enough
        ('training.optimizer = "paged-adamw-8bit"', "saves nothing"),
        ('memory.loss_tile = "16MiB"', "kept"),
    ]


def test_what_a_later_lever_has_made_needless_is_given_back(monkeypatch) -> None:
    def with_layers_away(config, recipe: Recipe, plan: Plan, longest: Longest | None) -> SimpleNamespace:
        found = head_sum(config, recipe, plan, longest)
        away = 900 * MIB if plan.layers == "host" else 0
        traced = found.need.traced_bytes - away
        return SimpleNamespace(need=Need(traced, traced, context_bytes=DRIVER), work=[], layers=2, host_bytes=0)

    for place in ("fit", "budget"):
        monkeypatch.setattr(f"qtune.memory.{place}.predicted", with_layers_away)
    found = fitted(600, training={"batch_size": 1, "micro_batch_size": 1, "gradient_checkpointing": False})
    pulled = {what for what, _, verdict in tried(found) if verdict == "kept"}
    given_back = {what for what, _, verdict in tried(found) if verdict == "not needed"}
    # 100 of weights, 300 of embeddings, 400 of a row and 80 of moments: with the layers away checkpointing is enough.
    assert found.changes == {("memory", "layers"): "host", ("training", "gradient_checkpointing"): True}
    own = 'memory.embeddings = "host"'  # what a run would have tried by itself, before
    assert pulled == {own, 'memory.layers = "host"', "training.gradient_checkpointing = true"}
    assert {'training.optimizer = "adamw-8bit"', 'memory.activations = "host"'} & given_back
    assert found.need.traced_bytes == 580 * MIB


@pytest.mark.usefixtures("by_head")
def test_the_search_ends_where_it_fits_and_fills_what_is_left_with_rows() -> None:
    found = fitted(1800, training={"batch_size": 8, "micro_batch_size": 8, "gradient_checkpointing": False})
    assert [trial.what for trial in found.trials] == ['memory.embeddings = "host"', "training.micro_batch_size = 1"]
    # One row fits with the embeddings on the card too, where they are faster.
    assert found.changes == {("training", "micro_batch_size"): 1}
    assert found.left == {("memory", "embeddings"): "device"}
    found = fitted(1420)
    assert [trial.what for trial in found.trials][2:] == ["training.gradient_checkpointing = true"]
    assert found.plan.micro_batch_size == 2  # as the recipe says
    assert found.changes == {("training", "gradient_checkpointing"): True}
    assert fitted(1540).changes == {("training", "micro_batch_size"): 1}


AUTO = {"batch_size": 8, "micro_batch_size": "auto", "gradient_checkpointing": False}


@pytest.mark.usefixtures("by_head")
@pytest.mark.parametrize(("mib", "rows", "embeddings"), [(4580, 8, "device"), (2200, 2, "device"), (1600, 1, "host")])
def test_what_a_run_settles_by_itself_is_left_to_it(mib: int, rows: int, embeddings: str) -> None:
    found = fitted(mib, training=AUTO)
    assert found.fits
    assert found.changes == {}
    assert (found.plan.micro_batch_size, found.plan.embeddings) == (rows, embeddings)
    assert found.left == {("training", "micro_batch_size"): rows, ("memory", "embeddings"): embeddings}


@pytest.mark.slow
@pytest.mark.usefixtures("by_head")
@pytest.mark.parametrize("mib", range(1090, 2300, 40))
@pytest.mark.parametrize("given", [{}, {"training": AUTO}, {"memory": {"embeddings": "device"}}])
def test_the_plan_is_the_one_that_a_run_makes_of_the_recipe_that_was_written(mib: int, given: dict) -> None:
    recipe = recipe_with(**{"training": {"batch_size": 8, "gradient_checkpointing": False}, **given})
    found = fitted(mib, **given)
    if not found.fits:
        return
    budget = f"{(mib * MIB + DRIVER) / MIB}MiB"
    written = changed(recipe, {**found.changes, ("memory", "budget"): budget})
    plan = settled(tiny(), written, make_plan(written, CARD), Longest(128))
    assert (plan.micro_batch_size, plan.embeddings) == (found.plan.micro_batch_size, found.plan.embeddings)
    assert head_sum(None, written, plan, Longest(128)).need.total_bytes <= mib * MIB + DRIVER
    is_open = {("training", "micro_batch_size"): recipe.training.micro_batch_size, EMBEDDINGS: recipe.memory.embeddings}
    assert not {key for key, value in is_open.items() if value == "auto"} & found.changes.keys()


@pytest.mark.usefixtures("by_head")
def test_on_a_processor_a_run_settles_the_micro_batch_so_that_the_recipe_leaves_it() -> None:
    recipe = recipe_with(training=AUTO)
    assert make_plan(recipe, CPU).micro_batch_size > 1
    found = fit(tiny(), recipe, CPU, 1800 * MIB + DRIVER)
    assert found.changes == {}
    assert found.left[("training", "micro_batch_size")] == found.plan.micro_batch_size == 1
    assert EMBEDDINGS not in found.left


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
"""
    )
    # Nothing but what --set has changed: the run settles the rest.
    assert found.changes == {}
    elsewhere = fitted_text(resolved, found, tmp_path / "other" / "two.toml")
    assert f'train = "{tmp_path / "rows.jsonl"}"' in elsewhere
    assert check_recipe(elsewhere, tmp_path / "other" / "two.toml").recipe.training.steps == 5


def test_sources_with_tables_of_their_own_stay_on_their_line(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    text = TEXT.replace('"rows.jsonl"', '[{ path = "rows.jsonl", weight = 2.0 }] # twice\nmax_length = 64')
    resolved = check_recipe(text, tmp_path / "one.toml")
    moved = text_for(resolved, tmp_path / "other" / "two.toml")
    (line,) = (line for line in moved.splitlines() if line.startswith("train"))
    assert line == f'train = [{{ path = "{tmp_path / "rows.jsonl"}", weight = 2.0, format = "auto" }}] # twice'
    assert check_recipe(moved, tmp_path / "other" / "two.toml").recipe.data.max_length == 64


@pytest.mark.usefixtures("by_head")
def test_the_screen_says_what_a_fit_takes_of_the_computers_own_memory() -> None:
    told = "what waits in the computer's own memory takes 0.29 GiB of it"
    assert told in screen(fitted(1120, memory={"embeddings": "host"}))
    assert told.partition(" takes")[0] not in screen(fitted(9000))


@pytest.mark.usefixtures("by_head")
def test_the_screen_shows_every_step_with_its_price() -> None:
    assert (
        screen(fitted(1060))
        == """\
tiny on a card, 1.57 GiB
as qtune run would do it, 2 x 128 tokens at once need 2.42 GiB: does not fit
length: data.max_length, every token scored

tried                               a row needs  and then                 price
memory.embeddings = "host"             2.66 GiB  2.42 GiB  does not fit   the head crosses the bus twice a
                                                                          micro-batch, same result; slower
                                                                          answers
training.micro_batch_size = 1          2.42 GiB  2.03 GiB  does not fit   8 micro-batches make a step: the
                                                                          same gradient, a little slower
training.gradient_checkpointing =      2.03 GiB  1.73 GiB  does not fit   the forward is computed twice:
true                                                                      more time, same result
training.optimizer = "adamw-8bit"      1.73 GiB  1.67 GiB  does not fit   8-bit moments: results as with 32
                                                                          bits (arXiv:2110.02861)
memory.loss_tile = "16MiB"             1.67 GiB  1.63 GiB  does not fit   smaller matrix products in the
                                                                          loss, same result
memory.activations = "host"            1.63 GiB  1.60 GiB  does not fit   activations cross the bus out and
                                                                          back, same result
memory.layers = "host"                 1.60 GiB  1.60 GiB  saves nothing  left as it was
training.optimizer =                   1.60 GiB  1.60 GiB  saves nothing  left as it was
"paged-adamw-8bit"

does not fit 1.57 GiB; with all that saves, the smallest budget that would surely do is 1.60 GiB
shorter rows need less: --allow length"""
    )
    assert screen(fitted(1480)).splitlines()[-4:] == [
        "fits 1.98 GiB with 1.83 GiB, 2 rows at once: training.gradient_checkpointing = true",
        "qtune run settles by itself, as far as there is room:",
        '  memory.embeddings = "host"  # embeddings and head wait in the computer\'s memory',
        "what waits in the computer's own memory takes 0.29 GiB of it",
    ]
    assert screen(fitted(1600, training=AUTO)).splitlines()[-5:-1] == [
        "fits 2.09 GiB as it is",
        "qtune run settles by itself, as far as there is room:",
        "  training.micro_batch_size = 1  # 1 row of a step at once",
        '  memory.embeddings = "host"     # embeddings and head wait in the computer\'s memory',
    ]


@pytest.mark.usefixtures("by_head")
def test_what_nearly_fills_the_card_is_not_rounded_to_all_of_it() -> None:
    """One row needs so much; the budget is half a MiB more, then half a MiB less."""
    trial = next(trial for trial in fitted(1480).trials if trial.what == "training.gradient_checkpointing = true")
    config, recipe = tiny(), recipe_with(training={"batch_size": 8, "gradient_checkpointing": False})
    sizes = (trial.need.total_bytes + part for part in (MIB // 2, -MIB // 2))
    enough, little = (screen(fit(config, recipe, CARD, size)).splitlines() for size in sizes)
    assert enough[0] == "tiny on a card, 1.734 GiB"
    (kept,) = (line for line in enough if line.startswith("training.gradient_checkpointing"))
    assert "1.733 GiB  fits" in kept
    assert "fits 1.734 GiB with 1.733 GiB, 1 row at once: training.gradient_checkpointing = true," in enough
    assert little[0] == "tiny on a card, 1.7329 GiB"
    (refused,) = (line for line in little if line.startswith("training.gradient_checkpointing"))
    assert "1.7334 GiB  does not fit" in refused


def test_a_number_of_layers_is_told_of_how_many_and_what_for() -> None:
    plan = make_plan(recipe_with(), CARD).with_checkpointing(24, "so many are enough")
    left = {("training", "micro_batch_size"): 4, ("training", "gradient_checkpointing"): 24, ("memory", "none"): 3}
    assert list(lines_of(left, plan, 30)) == [
        "  training.micro_batch_size = 4         # 4 rows of a step at once",
        "  training.gradient_checkpointing = 24  # the first 24 of 30 layers are computed twice and keep little, "
        "the others keep everything",
        "  memory.none = 3",
    ]
    assert in_words(("training", "gradient_checkpointing"), True, 30).startswith("every layer is computed twice")
    assert in_words(("training", "gradient_checkpointing"), False, 30).startswith("every layer keeps")


def screen(found: Fitted) -> str:
    stream = StringIO()
    drawn = draw_fit(found, recipe_with(), length_is_allowed=False)
    Console(file=stream, width=110, highlight=False).print(drawn)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def fit_command(write_recipe, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`qtune fit` on the tiny model, of which each byte is counted by head."""
    for place in ("fit", "budget"):
        monkeypatch.setattr(f"qtune.memory.{place}.predicted", head_sum)
    monkeypatch.setattr("qtune.memory.fit.longest_rows", lambda _: Rows(Longest(128), "a test"))

    def call(recipe: Path, mib: int, *options: str) -> Result:
        vram = f"{(mib * MIB + DRIVER) / MIB}MiB"
        return CliRunner().invoke(cli.app, ["fit", str(recipe), "--vram", vram, *options], env={"COLUMNS": "200"})

    return call


def test_the_command_writes_nothing_where_nothing_is_changed_and_says_so(write_recipe, fit_command) -> None:
    recipe = write_recipe(training="batch_size = 8")
    before = set(recipe.parent.iterdir())
    done = fit_command(recipe, 1480)
    assert done.exit_code == 0, done.output
    assert "nothing to change, so nothing is written" in done.stderr
    assert set(recipe.parent.iterdir()) == before


def test_a_file_that_was_asked_for_is_written_also_where_nothing_is_changed(write_recipe, fit_command) -> None:
    recipe = write_recipe(training="batch_size = 8")
    wanted = recipe.parent / "wanted.toml"
    done = fit_command(recipe, 1480, "--output", str(wanted))
    assert done.exit_code == 0, done.output
    assert f"written: {wanted}, unchanged" in done.stderr
    assert wanted.read_text() == recipe.read_text()


@pytest.mark.parametrize("more", [(), ("--max", "length"), ("--max", "batch")])
def test_a_card_that_holds_no_process_of_cuda_is_refused_before_a_trace(
    more: tuple[str, ...], write_recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qtune.memory.fit.predicted", lambda *_: pytest.fail("traced"))
    monkeypatch.setattr("qtune.memory.budget.predicted", lambda *_: pytest.fail("traced"))
    done = CliRunner().invoke(cli.app, ["fit", str(write_recipe()), "--vram", "400MiB", *more])
    assert "400 MiB: CUDA's own part of a process takes 772 MiB before there is a model" in str(done.exception)


def test_a_file_that_is_there_is_replaced_only_by_force(write_recipe, fit_command) -> None:
    recipe = write_recipe(training="batch_size = 8\nmicro_batch_size = 8")
    assert fit_command(recipe, 1480).exit_code == 0
    beside = recipe.with_suffix(".fit.toml")
    edited = beside.read_text() + "# edited\n"
    beside.write_text(edited)
    refused = fit_command(recipe, 1480)
    assert refused.exit_code == 2
    assert "is there already" in " ".join(refused.stderr.split())
    assert beside.read_text() == edited
    assert fit_command(recipe, 1480, "--force").exit_code == 0
    assert "micro_batch_size = 1" in beside.read_text()
    assert "# edited" not in beside.read_text()


def test_the_changes_can_be_had_as_json_and_are_written_all_the_same(write_recipe, fit_command) -> None:
    recipe = write_recipe(training="batch_size = 8\nmicro_batch_size = 8")
    done = fit_command(recipe, 1480, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (
        found["changes"] == {"training.micro_batch_size": found["micro_batch_size"]} == {"training.micro_batch_size": 1}
    )
    assert found["not_enough"] == {}
    assert found["asked_bytes"] > found["budget_bytes"]
    assert (found["fits"], found["budget_bytes"]) == (True, 1480 * MIB + DRIVER)
    assert found["needed_bytes"] <= found["budget_bytes"]
    assert found["problems"] == []
    assert "micro_batch_size = 1" in recipe.with_suffix(".fit.toml").read_text()
    refused = fit_command(recipe, 900, "--json", "--force")
    assert refused.exit_code == 1
    none = json.loads(refused.stdout)
    assert (none["fits"], none["verdict"], none["changes"]) == (False, "does not fit", {})
    assert none["not_enough"]
    assert none["needed_bytes"] > none["budget_bytes"]


@pytest.mark.parametrize("what", ["length", "batch"])
def test_the_largest_value_can_be_had_as_json_and_that_nothing_fits_is_an_exit_code(
    write_recipe, fit_command, what: str
) -> None:
    recipe = write_recipe(training="batch_size = 8\nmicro_batch_size = 8")
    text, found = (fit_command(recipe, 1480, "--max", what, *more) for more in ((), ("--json",)))
    assert text.exit_code == found.exit_code == 0, found.output
    largest = json.loads(found.stdout)
    assert f"{largest['key']} = {largest['value']}" in text.stdout
    assert largest["value"] > 0
    assert largest["budget_bytes"] == 1480 * MIB + DRIVER
    text, none = (fit_command(recipe, 900, "--max", what, *more) for more in ((), ("--json",)))
    assert text.exit_code == none.exit_code == 1
    assert text.stdout.startswith("not even ")
    assert json.loads(none.stdout)["value"] == 0


@pytest.mark.parametrize("options", [["--output", "x.toml"], ["--allow", "length"], ["--force"]])
def test_max_refuses_what_it_would_ignore(write_recipe, fit_command, options: list[str]) -> None:
    refused = fit_command(write_recipe(), 1480, "--max", "length", *options)
    assert refused.exit_code == 2
    assert f"{options[0]}: --max only says a value" in " ".join(refused.stderr.split())
