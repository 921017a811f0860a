"""A run of few steps is said to be one, with values that make more of them."""

import re

import pytest

from qtune.recipe.schema import Adapter, Lora, PromptTuning, PTuning, Training
from qtune.recipe.steps import FEW_STEPS, FEW_STEPS_OF_A_PROMPT, few_steps, few_steps_of_a_prompt

PROMPTS: list[Adapter] = [PromptTuning(kind="prompt-tuning"), PTuning(kind="p-tuning")]


def test_nine_steps_are_few_and_the_keys_that_make_more_of_them_are_named() -> None:
    assert few_steps(Training(), 142) == (
        "training: 9 steps are few (142 rows, 16 in a step); training.batch_size = 4 makes 36, "
        "training.epochs = 4 makes 36"
    )


@pytest.mark.parametrize(("rows", "batch"), [(1, 1), (3, 16), (25, 32), (142, 16), (142, 64), (200, 8), (29, 1)])
def test_what_is_proposed_is_no_run_of_few_steps(rows: int, batch: int) -> None:
    said = few_steps(Training(batch_size=batch), rows)
    assert said is not None
    ways = re.findall(r"training\.(\w+) = (\d+) makes (\d+)", said)
    assert ways
    for key, value, steps in ways:
        after = {
            "batch_size": Training(batch_size=int(value)),
            "epochs": Training(batch_size=batch, epochs=float(value)),
        }
        assert few_steps(after[key], rows) is None
        assert int(steps) >= FEW_STEPS


def test_steps_that_somebody_asked_for_and_runs_of_many_are_not_spoken_of() -> None:
    assert few_steps(Training(steps=3), 142) is None
    assert few_steps(Training(epochs=4.0), 142) is None
    assert few_steps(Training(), 16 * FEW_STEPS) is None


@pytest.mark.parametrize("adapter", PROMPTS, ids=lambda adapter: adapter.kind)
def test_a_soft_prompt_in_few_steps_of_many_rows_is_told_of_more_steps_of_the_same_rows(adapter: Adapter) -> None:
    said = few_steps_of_a_prompt(adapter, Training(steps=110, batch_size=8), 600)
    assert said is not None
    assert said.startswith("training: 110 steps are few for a soft prompt")
    assert "with training.batch_size = 4, training.steps = 220 the same rows" in said


@pytest.mark.parametrize(("rows", "batch"), [(142, 16), (3, 2), (700, 7), (1, 8), (599, 6)])
def test_what_is_proposed_for_a_soft_prompt_is_the_same_rows_in_more_steps(rows: int, batch: int) -> None:
    said = few_steps_of_a_prompt(PROMPTS[0], Training(batch_size=batch), rows)
    assert said is not None
    size = int(re.findall(r"training\.batch_size = (\d+)", said)[0])
    assert size < batch
    assert -(-rows // size) >= min(rows, FEW_STEPS_OF_A_PROMPT)


def test_a_lora_single_rows_and_many_steps_are_not_spoken_of() -> None:
    assert few_steps_of_a_prompt(Lora(), Training(steps=60, batch_size=8), 600) is None
    assert few_steps_of_a_prompt(PROMPTS[0], Training(steps=60, batch_size=1), 600) is None
    assert few_steps_of_a_prompt(PROMPTS[0], Training(batch_size=2), 2 * FEW_STEPS_OF_A_PROMPT) is None
