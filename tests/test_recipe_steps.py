"""A run of few steps is said to be one, with values that make more of them."""

import re

import pytest

from qtune.recipe.schema import Training
from qtune.recipe.steps import FEW_STEPS, few_steps


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
