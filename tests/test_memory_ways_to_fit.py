"""All remedies at once: each change alone, and those that fit together at the least loss of time."""

import tomllib
from dataclasses import replace
from types import SimpleNamespace

import pytest
from test_memory_fit import MIB, head_sum
from test_memory_trace import CARD, recipe_with, tiny

from qtune.memory import kept_layers
from qtune.memory import ways_to_fit as stage
from qtune.memory.allowance import Need
from qtune.memory.budget import MICRO_BATCH
from qtune.memory.forecast import Forecast, forecast
from qtune.memory.longest import Rows
from qtune.memory.predict import Longest
from qtune.memory.ways_to_fit import Way, WaysToFit, ways_to_fit
from qtune.plan import Plan, make_plan
from qtune.recipe.parse import changed, parse_recipe
from qtune.recipe.schema import Recipe
from qtune.screens.memory import draw_ways

pytestmark = pytest.mark.slow

# On the machine of `head_sum`: the driver's 545 MiB, weights 1000, embeddings 300, moments 80, and 400 a row.
PINNED = {"batch_size": 8, "micro_batch_size": 2, "gradient_checkpointing": False, "optimizer": "adamw"}
AS_IT_IS = 545 + 1000 + 300 + 80 + 2 * 400
SECONDS = {"checkpointing": 10.0, "activations": 3.0, "embeddings": 2.0, "row": 1.0}


def timed_sum(config: object, recipe: Recipe, plan: Plan, longest: Longest | None) -> SimpleNamespace:
    """`head_sum` with the seconds of a micro-batch in the place of its work."""
    found = head_sum(config, recipe, plan, longest)
    took = SECONDS["row"] * plan.micro_batch_size
    took += SECONDS["checkpointing"] if plan.gradient_checkpointing else 0
    took += SECONDS["activations"] if plan.activations == "host" else 0
    took += SECONDS["embeddings"] if plan.embeddings == "host" else 0
    found.work = took
    return found


@pytest.fixture(autouse=True)
def by_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtune.memory.budget.predicted", timed_sum)
    monkeypatch.setattr(stage, "rates_of", lambda device: "rates")
    monkeypatch.setattr(kept_layers, "known_rates", lambda device: "rates")
    for place in (stage, kept_layers):
        monkeypatch.setattr(place, "seconds", lambda prediction, count, rates: prediction.work * count)


def asked(mib: int, **tables: dict) -> WaysToFit:
    recipe = recipe_with(training=PINNED, memory={"embeddings": "device"}, **tables)
    rows, plan = Rows(Longest(128), "rows.jsonl:7"), make_plan(recipe, CARD)
    before = timed_sum(None, recipe, plan, rows.longest)
    return ways_to_fit(tiny(), recipe, Forecast(plan, rows, before, mib * MIB))  # type: ignore[arg-type]


def needs(way: Way) -> int:
    return way.need.total_bytes // MIB


def test_each_change_is_told_before_it_is_traced() -> None:
    recipe = recipe_with(training=PINNED, memory={"embeddings": "device"})
    rows, plan = Rows(Longest(128), "rows.jsonl:7"), make_plan(recipe, CARD)
    before = timed_sum(None, recipe, plan, rows.longest)
    told: list[str] = []
    found = ways_to_fit(tiny(), recipe, Forecast(plan, rows, before, 1500 * MIB), told.append)  # type: ignore[arg-type]
    assert found.single
    changes = [way.words for way in found.single if MICRO_BATCH not in way.changes and len(way.changes) == 1]
    assert [words for words in changes if not any(words in one for one in told)] == []


def test_each_change_is_traced_alone_and_what_saves_nothing_is_left_out() -> None:
    ways = asked(2500)
    found = {way.words: (needs(way), way.is_enough, way.pace) for way in ways.single}
    assert found == {
        # Half the rows at once, eight micro-batches instead of four: as long.
        "training.micro_batch_size = 1": (AS_IT_IS - 400, True, 1.0),
        # Both layers computed twice; one would not do, or is not needed: the machine knows no half.
        "training.gradient_checkpointing = 1": (AS_IT_IS - 600, True, 6.0),
        'training.optimizer = "adamw-8bit"': (AS_IT_IS - 60, False, 1.0),
        'training.optimizer = "paged-adamw-8bit"': (AS_IT_IS - 60, False, 1.0),
        'memory.embeddings = "host"': (AS_IT_IS - 300 + 50, True, 2.0),
        'memory.activations = "host"': (AS_IT_IS - 60, False, 2.5),
        'memory.embeddings = "int8"': (AS_IT_IS - 140, False, 1.0),
    }
    # Loss tiles are hidden by the embeddings, which stay on the card.
    assert not any("loss_tile" in word for word in found)


def test_the_best_is_the_fastest_that_fits_and_not_the_first() -> None:
    assert asked(2500).best is not None
    assert asked(2500).best.changes == {MICRO_BATCH: 1}  # type: ignore[union-attr]
    # With one row at once and 8-bit moments, which cost no time, before embeddings on the host, which do.
    best = asked(AS_IT_IS - 460).best
    assert best is not None
    assert best.changes == {MICRO_BATCH: 1, ("training", "optimizer"): "adamw-8bit"}
    assert (needs(best), best.is_enough, best.pace) == (AS_IT_IS - 460, True, 1.0)


def test_what_changes_the_model_is_shown_and_left_to_the_user() -> None:
    """8-bit embeddings would be the quicker way here: 140 MiB less, and no time."""
    ways = asked(AS_IT_IS - 400 - 60 - 140)
    shown = {way.words: way.price for way in ways.single}
    assert "changes the model" in shown['memory.embeddings = "int8"']
    assert ways.best is not None
    assert ways.best.changes["memory", "embeddings"] == "host"


def test_a_change_that_saves_only_beside_another_one_is_found() -> None:
    """Loss tiles, embeddings, one row, 8-bit moments and checkpointing are all needed for the smallest of budgets."""
    least = 545 + 1000 + 0 + 20 + 100 - 30
    best = asked(least).best
    assert best is not None
    assert needs(best) == least
    assert best.changes["memory", "loss_tile"] == "16MiB"
    assert asked(least - 1).best is None


def test_the_lines_are_a_recipe_that_means_the_same() -> None:
    best = asked(545 + 1000 + 20 + 100 - 30).best
    assert best is not None
    pasted = tomllib.loads(best.lines)
    assert {(table, key): value for table, keys in pasted.items() for key, value in keys.items()} == best.changes
    recipe = recipe_with(training=PINNED)
    whole = recipe.model_dump(mode="json", exclude_none=True)
    for table, keys in pasted.items():
        whole[table].update(keys)
    assert parse_recipe(whole) == changed(recipe, best.changes)


def test_the_screen_lists_them_and_ends_with_the_lines(capsys: pytest.CaptureFixture[str]) -> None:
    from qtune import console

    console.out(draw_ways(asked(AS_IT_IS - 460), (AS_IT_IS - 460) * MIB, 30))
    shown = capsys.readouterr().out
    assert 'memory.embeddings = "host"' in shown
    assert "+100% time" in shown
    ended = 'in the recipe:\n[training]\nmicro_batch_size = 1\noptimizer = "adamw-8bit"\n'
    assert shown.endswith(ended)
    console.out(draw_ways(WaysToFit((), None), MIB, 30))
    assert "shorter rows do (data.max_length), or a larger card" in capsys.readouterr().out


def test_layers_that_are_computed_twice_are_told_of_how_many_and_sizes_apart(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from qtune import console

    need = Need(1500 * MIB, 1500 * MIB)
    way = Way({("training", "gradient_checkpointing"): 24}, "the forward is computed twice", need, True, 1.3)
    console.out(draw_ways(WaysToFit((way,), way), 1500 * MIB + 1000, 30))
    shown = " ".join(capsys.readouterr().out.split())
    assert "Fits with 1.464844 GiB of 1.464845 GiB, +30% time; in the recipe:" in shown
    told = "the first 24 of 30 layers are computed twice and keep little, the others keep everything"
    assert shown.endswith(f"[training] gradient_checkpointing = 24 # {told}")
    assert "the forward is computed twice: the first 24 of 30 layers" in shown


def test_a_way_out_of_a_real_forecast_is_what_a_run_of_the_changed_recipe_is_predicted_to_need(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("QTUNE_CACHE", str(tmp_path))
    config, recipe = tiny(layers=2), recipe_with(training={**PINNED, "batch_size": 2}, memory={"embeddings": "device"})
    rows = Rows(Longest(128), "given")
    whole = forecast(config, recipe, CARD, rows)
    unfit = replace(whole, budget_bytes=whole.prediction.need.total_bytes - 1)
    best = ways_to_fit(config, recipe, unfit).best
    assert best is not None
    after = forecast(config, changed(recipe, best.changes), CARD, rows)
    assert after.prediction.need == best.need
    assert best.need.total_bytes < whole.prediction.need.total_bytes


def layers_cost(config: object, recipe: Recipe, plan: Plan, longest: Longest | None) -> SimpleNamespace:
    """`timed_sum` in which half of the weights can wait on the host, for a lot of time."""
    found = timed_sum(config, recipe, plan, longest)
    if plan.layers == "host":
        found.need = replace(found.need, traced_bytes=found.need.traced_bytes - 500 * MIB)
        found.work += 100.0
    return found


def test_layers_wait_on_the_host_where_all_else_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtune.memory.budget.predicted", layers_cost)
    alone = {way.words: way.is_enough for way in asked(2500).single}
    assert alone['memory.layers = "host"'] is True
    # Much is lost by it: nothing else may be enough.
    best = asked(2500).best
    assert best is not None
    assert ("memory", "layers") not in best.changes
    least = 545 + 1000 + 0 + 20 + 100 - 30
    assert ("memory", "layers") not in asked(least).best.changes  # type: ignore[union-attr]
    for budget in (least - 1, least - 500):
        last = asked(budget).best
        assert last is not None
        assert last.changes["memory", "layers"] == "host"
        assert (last.is_enough, needs(last) <= budget) == (True, True)
    assert asked(least - 501).best is None
