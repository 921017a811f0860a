"""Traced memory against a real card: eleven runs on an H100, whose figures are in measured/h100.json.

The card's allocator says what a phase took at most; two cuBLAS workspaces are in it beside the tensors. The run's own
ledger, which names what is alive, ran over some steps only: what a kernel takes for itself it did not see, and where
its batch was not the largest, the record says so.
"""

import json
import sys
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools" / "gpu"))

from measured_step import with_the_step_that_was_measured  # noqa: F401  a fixture of every test
from runs import GEOMETRIES, RUNS, Run

from qtune.device.cards import card_named
from qtune.memory.predict import Longest, build, predict, summarize, training_step
from qtune.memory.tracing import categories
from qtune.memory.tracing import trace as tracing
from qtune.memory.tracing.cuda import workspace_bytes
from qtune.memory.tracing.trace import Traced, trace
from qtune.memory.trl_step import trace_trl
from qtune.plan import Plan, make_plan
from qtune.recipe.parse import parse_recipe
from qtune.recipe.schema import Recipe
from qtune.startup.allocator import VARIABLES

GIB = 2**30
H100: dict[str, Any] = json.loads((Path(__file__).parent / "measured" / "h100.json").read_text(encoding="utf-8"))
MEASURED: dict[str, Any] = H100["runs"]
CARD = card_named("H100").device()

CLOSE = 0.005
"""What a prediction may be off, of the measured bytes."""

BY_NAME = {run.name: run for run in RUNS}
# All tests of a run stand together, so that it is traced once.
each_run = pytest.mark.parametrize("run", RUNS, ids=[run.name for run in RUNS], scope="module")


@pytest.fixture(autouse=True)
def with_expandable_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the runs had them."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(VARIABLES[0], "expandable_segments:True")


def prepared(run: Run, batch: dict[str, Any]) -> tuple[LlamaConfig, Recipe, Plan, Longest]:
    """What a prediction is made of, for the batch that was measured."""
    tables = run.recipe("models", "data", "runs")
    tables["data"]["max_length"] = batch["length"]
    tables["training"] = {**tables.get("training", {}), "lean_step": False}
    recipe = parse_recipe(tables)
    assert isinstance(recipe, Recipe), recipe
    longest = Longest(batch["length"], -(-batch["scored"] // batch["rows"]), equal=not batch["padded"])
    return LlamaConfig(**GEOMETRIES[run.model], pad_token_id=0), recipe, make_plan(recipe, CARD), longest


@cache
def traced(name: str) -> Traced:
    return predict(*prepared(BY_NAME[name], MEASURED[name]["batch"]))


def seen_by_the_ledger(run: Run, monkeypatch: pytest.MonkeyPatch) -> Traced:
    """As the run's own ledger saw its step: without what kernels take for themselves, its own batch."""
    monkeypatch.setattr(tracing, "workspace", lambda func, args, cuda: [])
    batch = MEASURED[run.name]["batch"]
    if MEASURED[run.name]["ledger"].get("batch") == "unpadded":
        batch = batch | {"padded": 0}
    config, recipe, plan, longest = prepared(run, batch)
    step = training_step(recipe, plan, longest)
    if categories.OPTIMIZER not in MEASURED[run.name]["ledger"]["alive"]:  # it saw the first step
        step = replace(step, optimizer=None)
    made, step = partial(build, recipe=recipe, plan=plan), replace(step, eval_batch=None)
    # What repeats is traced once, as for a search: `traced` executes every layer of the same models.
    return trace(config, made, step, card=CARD.capability, plays_allocator=False)


@pytest.mark.slow
@each_run
def test_traced_bytes_are_what_the_allocator_of_the_card_counted(run: Run) -> None:
    history, measured = traced(run.name).history, MEASURED[run.name]["by_phase"]
    found = {phase: history.peak(phase).bytes for phase in ("forward", "backward", "optimizer")}
    beside = 2 * workspace_bytes(CARD.capability)
    state = 0
    if categories.OPTIMIZER not in MEASURED[run.name]["ledger"]["alive"]:
        # Its largest batch came in the first step, before there was a state of the optimizer.
        state = history.peak("backward").alive.get(categories.OPTIMIZER, 0)
    for phase in found:
        counted = measured[phase]["allocated_peak_bytes"] - beside
        expected = found[phase] - (state if phase != "optimizer" else 0)
        # The forward's peak is a matter of which of a run's batches had the most scored tokens.
        tolerance = 2 * CLOSE if phase == "forward" else CLOSE
        either = min(abs(expected / counted - 1), abs(found[phase] / counted - 1))
        assert either < tolerance, (phase, expected / GIB, counted / GIB)


@pytest.mark.slow
@each_run
def test_traced_bytes_by_category_are_what_the_ledger_of_the_run_saw(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = MEASURED[run.name]["ledger"]
    if ledger.get("batch") == "shorter":
        pytest.skip("the ledger did not run over this run's largest batch")
    history, alive = seen_by_the_ledger(run, monkeypatch).history, ledger["alive"]
    total = sum(alive.values())
    assert history.peak(ledger["phase"]).bytes == pytest.approx(total, rel=CLOSE)
    if run.name == "1b-int8":
        return  # which of two moments of the step is the fuller one depends on how many columns are outliers
    at_peak = history.peak(ledger["phase"]).alive
    for name in {*at_peak, *alive}:
        assert at_peak.get(name, 0) == pytest.approx(alive.get(name, 0), abs=CLOSE * total), name


@pytest.mark.slow
@each_run
def test_the_need_is_never_less_than_the_card_used_and_at_most_four_per_cent_more(run: Run) -> None:
    need = summarize(traced(run.name)).need
    context = max(one["device_used_gib"] - one["reserved_gib"] for one in H100["alone"].values())
    reserved = max(phase["reserved_peak_bytes"] for phase in MEASURED[run.name]["by_phase"].values())
    used = reserved + context * GIB
    assert used <= need.total_bytes <= 1.04 * used


@pytest.mark.slow
@pytest.mark.parametrize("script", H100["trl"], ids=lambda script: f"{script['rows']}x{script['length']}")
def test_trl_as_it_comes_is_traced_as_the_card_counted_it(script: dict[str, Any]) -> None:
    rows, length = script["rows"], script["length"]
    run = Run("trl", script["model"], length, rows)
    batch = {"rows": rows, "length": length, "scored": rows * length, "padded": 0}
    config, recipe, plan, longest = prepared(run, batch)
    found = trace_trl(config, recipe, plan, training_step(recipe, plan, longest), CARD.capability)
    counted = script["allocated_gib"] * GIB - 2 * workspace_bytes(CARD.capability)
    assert found.history.peak().bytes == pytest.approx(counted, rel=CLOSE)
