"""What the allocator takes for a step, counted by hand: tensors as large as segments of their own."""

import pytest
from transformers import LlamaConfig

from qtune.device.cards import card_named
from qtune.memory.predict import Longest, build, training_step
from qtune.memory.tracing import categories
from qtune.memory.tracing.caching_allocator import ExpandableSegments, FixedSegments
from qtune.memory.tracing.ledger import STILL_ALIVE, Life
from qtune.memory.tracing.reserved import STEPS, StepLives, reserved_bytes
from qtune.memory.tracing.step import Step
from qtune.memory.tracing.trace import Build, lives, trace
from qtune.plan import make_plan
from qtune.recipe.parse import parse_recipe
from qtune.recipe.schema import Recipe
from qtune.sizes import MIB

WORKSPACE = 32 * MIB


def life(size: int, born: int, died: int, phase: str, category: str = "") -> Life:
    return Life(size * MIB, born, died, "made", phase, "", category)


def step(activations: int, *, evaluates: int = 0, accumulates: bool = False, updates: bool = True) -> StepLives:
    """Weights of 100 MiB, a gradient and a state of 40 each, and an update with 60 of its own."""
    resting = [life(100, 0, STILL_ALIVE, "static"), life(40, 1, STILL_ALIVE, "first step", categories.OPTIMIZER)]
    if accumulates:  # the gradient is there before the micro-batch, which adds to it
        body = [
            *resting,
            life(40, 2, 3, "first micro-batch", categories.GRADIENTS),
            life(activations, 3, 3, "forward"),
        ]
    else:
        body = [*resting, life(activations, 2, 3, "forward"), life(40, 3, 3, "backward", categories.GRADIENTS)]
    if evaluates:
        body.append(life(evaluates, 4, 4, "eval"))
    return StepLives(body, [*resting, life(60, 2, 2, "optimizer")] if updates else [])


@pytest.mark.parametrize("evaluates", [0, 10])
def test_gradients_are_there_during_the_update(evaluates: int) -> None:
    # 100 + 40 + 40 + 60 and two workspaces; the activations' 20 lie in a segment where only the evaluation's 10 fit.
    steps = [step(20, evaluates=evaluates)] * 3
    assert reserved_bytes(steps, WORKSPACE, FixedSegments()) == (240 + 20) * MIB + 2 * WORKSPACE


def test_an_evaluation_comes_when_the_gradients_are_gone() -> None:
    # Its 40 fit where the gradient was.
    steps = [step(20, evaluates=40)] * 3
    assert reserved_bytes(steps, WORKSPACE, FixedSegments()) == (240 + 20) * MIB + 2 * WORKSPACE


@pytest.mark.parametrize("count", [1, 3])
def test_gradients_of_earlier_micro_batches_are_there_in_every_step(count: int) -> None:
    # The backward's workspace is not asked for: there is no tick of a backward in this body.
    steps = [step(20, accumulates=True)] * count
    assert reserved_bytes(steps, WORKSPACE, FixedSegments()) == (240 + 20) * MIB + WORKSPACE


def test_without_an_optimizer_there_is_no_update() -> None:
    body = [one for one in step(20).body if one.category != categories.OPTIMIZER]
    shifted = [Life(one.size, n, n + 1, one.op, one.phase, "", one.category) for n, one in enumerate(body)]
    shifted[0].died = STILL_ALIVE
    steps = [StepLives(shifted)] * 2
    assert reserved_bytes(steps, WORKSPACE, FixedSegments()) == (100 + 20 + 40) * MIB + 2 * WORKSPACE


def test_the_state_takes_what_the_activations_have_left() -> None:
    # With 200 of activations, which are free by then: state and update find their place in them.
    assert reserved_bytes([step(200)], WORKSPACE, FixedSegments()) == (100 + 200 + 40) * MIB + 2 * WORKSPACE


@pytest.mark.parametrize(("empties_cache", "update"), [(False, 60), (True, 0)])
def test_what_is_handed_back_after_a_step_is_not_there_for_the_next(empties_cache: bool, update: int) -> None:
    # The first step takes 60, where the state moves in, 40 for the gradient and 60 for the update; the second one's 200
    # fit nowhere, and its gradient and its update find a place.
    found = reserved_bytes([step(60), step(200)], WORKSPACE, FixedSegments(), empties_cache=empties_cache)
    assert found == (100 + 60 + 40 + update + 200) * MIB + 2 * WORKSPACE


def test_it_is_handed_back_while_the_gradients_are_there() -> None:
    # The first step's 20 and 60 go back; 30 go where the first gradient was, of which 10 are left, and the second
    # gradient, of 40, takes others. Handed back behind the gradients, it would be 10 less.
    found = reserved_bytes([step(20), step(30)], WORKSPACE, FixedSegments(), empties_cache=True)
    assert found == (100 + 40 + 40 + 40 + 60) * MIB + 2 * WORKSPACE


CONFIG = LlamaConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    vocab_size=512,
    pad_token_id=0,
)


def traced_step(**training: int) -> tuple[Build, Step]:
    """A LoRA's step on an H100, and how its model is built."""
    recipe = parse_recipe(
        {
            "model": {"base": "traced"},
            "data": {"train": "rows.jsonl", "max_length": 512},
            "training": {"gradient_checkpointing": False, **training},
        }
    )
    assert isinstance(recipe, Recipe)
    plan = make_plan(recipe, card_named("H100").device())
    return lambda config: build(config, recipe, plan), training_step(recipe, plan, Longest(512))


def test_a_traced_step_lets_go_of_its_gradients_before_its_evaluation() -> None:
    """What the rule hangs on: gradients die at the last tick before the evaluation's."""
    body, _ = lives(CONFIG, *traced_step(batch_size=1))
    end = next(tick for tick, one in enumerate(body) if one.phase == "eval")
    gradients = [one for one in body if one.category == categories.GRADIENTS]
    assert gradients
    assert {one.died for one in gradients} == {end - 1}


@pytest.mark.parametrize("training", [{"batch_size": 2}, {"batch_size": 8, "micro_batch_size": 2}], ids=["one", "four"])
def test_the_tensors_that_are_played_are_those_that_were_traced(training: dict[str, int]) -> None:
    """At the fullest moment of the play as many bytes are used as at the trace's, and the two workspaces."""
    made, step = traced_step(**training)
    allocator = ExpandableSegments()
    reserved_bytes([lives(CONFIG, made, step)] * STEPS, WORKSPACE, allocator)
    assert allocator.allocated_peak == trace(CONFIG, made, step).history.peak().bytes + 2 * WORKSPACE
    assert allocator.allocated_peak <= allocator.peak
