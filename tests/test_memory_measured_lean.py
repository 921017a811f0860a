"""Traced memory of today's step against a real card: twelve runs on an H200, whose figures are in measured/h200.json.

The runs shared the card but for the last, so what the device had in use is known of that one alone; a context is what
it had beyond the allocator's reserve there.
"""

import json
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools" / "gpu"))

from runs import ALONE, GEOMETRIES, RUNS, Run

from qtune.device.cards import card_named
from qtune.memory.predict import Longest, Prediction, predict, summarize
from qtune.memory.tracing import categories
from qtune.memory.tracing import step as steps
from qtune.memory.tracing import trace as tracing
from qtune.memory.tracing.cuda import workspace_bytes
from qtune.plan import make_plan
from qtune.recipe.parse import parse_recipe
from qtune.recipe.schema import Recipe
from qtune.sizes import MIB
from qtune.startup.allocator import VARIABLES

GIB = 2**30
H200: dict[str, Any] = json.loads((Path(__file__).parent / "measured" / "h200.json").read_text(encoding="utf-8"))
CARD = card_named("H200").device()

CLOSE = 0.005
"""What a prediction may be off, of the measured bytes."""

pytestmark = pytest.mark.slow
BY_NAME: dict[str, Run] = {run.name: run for run in (*RUNS, ALONE)}
# Both tests of a run stand together, so that it is traced once.
each_run = pytest.mark.parametrize("name", BY_NAME, scope="module")


@pytest.fixture(autouse=True)
def as_the_runs_were(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Expandable segments; the embeddings' output was held until the end of the step, which is let go of since then."""
    tracing._built.clear()
    monkeypatch.setattr(steps, "free_inputs", lambda model: None)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(VARIABLES[0], "expandable_segments:True")
    yield
    tracing._built.clear()


@cache
def predicted(name: str) -> Prediction:
    """For the batch that was measured."""
    run, batch = BY_NAME[name], H200["runs"][name]["batch"]
    tables = run.recipe("models", "data", "runs")
    tables["data"]["max_length"] = batch["length"]
    if run is ALONE:  # the card had room for everything
        tables["training"] |= {"gradient_checkpointing": False}
    recipe = parse_recipe(tables)
    assert isinstance(recipe, Recipe), recipe
    longest = Longest(batch["length"], -(-batch["scored"] // batch["rows"]), equal=not batch["padded"])
    return predict(LlamaConfig(**GEOMETRIES[run.model], pad_token_id=0), recipe, make_plan(recipe, CARD), longest)


@each_run
def test_traced_bytes_are_what_the_allocator_of_the_card_counted(name: str) -> None:
    history, measured = predicted(name).history, H200["runs"][name]["by_phase"]
    for phase in ("forward", "backward", "optimizer"):
        at = history.peak(phase)
        counted = measured[phase]["allocated_peak_bytes"] - 2 * workspace_bytes(CARD.capability)
        # A run's largest batch may have come in the first step, before there was a state of the optimizer.
        state = at.alive.get(categories.OPTIMIZER, 0) if phase != "optimizer" else 0
        off = min(abs(at.bytes / counted - 1), abs((at.bytes - state) / counted - 1))
        # The forward's peak is a matter of which of a run's batches had the most scored tokens.
        assert off < (2 * CLOSE if phase == "forward" else CLOSE), (phase, at.bytes / GIB, counted / GIB)


@each_run
def test_the_need_is_never_less_than_the_card_used_and_at_most_four_per_cent_more(name: str) -> None:
    need = summarize(predicted(name)).need
    (alone,) = H200["alone"].values()
    reserved = max(phase["reserved_peak_bytes"] for phase in H200["runs"][name]["by_phase"].values())
    used = reserved + (alone["device_used_gib"] - alone["reserved_gib"]) * GIB
    assert used <= need.total_bytes <= 1.04 * used


@each_run
def test_what_the_allocator_holds_unused_comes_of_the_tensors_alone(name: str) -> None:
    """A play of their sizes and order, without a ledger, logging or shards of a checkpoint, leaves as much."""
    need, measured = summarize(predicted(name)).need, H200["runs"][name]["by_phase"].values()
    played = predicted(name).reserved_bytes - need.traced_bytes - need.workspace_bytes
    reserved = max(phase["reserved_peak_bytes"] for phase in measured)
    unused = reserved - max(phase["allocated_peak_bytes"] for phase in measured)
    assert abs(played - unused) < 40 * MIB, (played / MIB, unused / MIB)
