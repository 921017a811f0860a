"""A run of few steps, or of few held-out rows, is said to be one, with values that make more of them."""

import re
from typing import Any

import pytest

from qtune.recipe.schema import Adapter, Data, Lora, PromptTuning, PTuning, Training
from qtune.recipe.steps import (
    FEW_STEPS,
    FEW_STEPS_OF_A_PROMPT,
    FEWEST,
    few_held_out,
    few_steps,
    few_steps_of_a_prompt,
    first_share,
    held_out_rows,
    kept_checkpoints,
)

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


@pytest.mark.parametrize("rows", [25, 30, 49, 60, 89, 99, 100, 142, 1000])
def test_a_recipe_begins_with_enough_held_out_rows_for_an_interval(rows: int) -> None:
    share = first_share(rows)
    assert held_out_rows(share, rows) >= FEWEST
    assert few_held_out(Data(train="a.jsonl", validation=share), rows, held_out_rows(share, rows)) is None


def test_of_few_rows_no_more_than_a_fifth_is_held_out_and_never_the_only_one() -> None:
    assert [first_share(rows) for rows in (1, 2, 10, 24)] == [0.0, 0.2, 0.2, 0.2]
    assert first_share(100) == Data.model_fields["validation"].default


@pytest.mark.parametrize(("held_out", "said"), [(0, "0 of 60 rows are held out"), (12, "12 of 60 rows are held out")])
def test_a_share_that_rows_with_one_prompt_make_another_is_told(held_out: int, said: str) -> None:
    found = str(few_held_out(Data(train="a.jsonl", validation=0.05), 60, held_out))
    assert said in found
    assert "data.validation = 0.05 means 3, for rows that ask the same first stay together" in found
    assert few_held_out(Data(train="a.jsonl", validation=0.05), 200, 12) is None


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"keep_checkpoints": 2, "epochs": 3.0}, 2),
        ({"keep_checkpoints": 1000, "epochs": 3.0}, 4),  # one each, and one by the clock
        ({"keep_checkpoints": 1000, "epochs": 2.5, "checkpoint_minutes": None}, 3),
        ({"keep_checkpoints": 1000, "steps": 60, "checkpoint_every": 7, "checkpoint_minutes": None}, 9),
        ({"keep_checkpoints": 1000, "steps": 1, "checkpoint_minutes": None}, 1),
    ],
)
def test_no_more_checkpoints_are_counted_than_a_run_makes(changes: dict[str, Any], kept: int) -> None:
    assert kept_checkpoints(Training(batch_size=8, **changes), 100) == kept
    assert kept_checkpoints(Training(batch_size=8, **changes), 0) <= kept


def test_few_held_out_rows_are_told_with_a_share_that_is_enough() -> None:
    data = Data(train="a.jsonl", validation=0.05)
    said = few_held_out(data, 60, 3)
    assert said == (
        "data: 3 rows are held out, too few to tell a change of their loss from noise; data.validation = 0.09 makes 5"
    )
    (share,) = re.findall(r"data\.validation = (\S+)", said)
    assert held_out_rows(float(share), 60) >= FEWEST
    assert few_held_out(data, 20, 1) is None  # a gate's finding
    assert few_held_out(Data(train="a.jsonl", validation=0.0), 60, 0) is None
    own_file = Data(train="a.jsonl", validation="b.jsonl")
    assert few_held_out(own_file, 63, 3) == (
        "data: 3 rows are held out, too few to tell a change of their loss from noise; 5 are enough"
    )
