"""Packing and micro-batches change the time that a run takes, not what is learned."""

import json

import pytest

from qtune.recipe.file import load_recipe
from qtune.training import train

PACKED = 9
"""Rows of 128 tokens that hold the 22 rows of conftest."""


def losses(recipe) -> list[float]:
    run_dir = train.run(load_recipe(recipe))
    records = map(json.loads, run_dir.metrics_file.read_text().splitlines())
    return [record["loss"] for record in records if record["kind"] == "train"]


@pytest.fixture
def unquantized():
    """float32 throughout: what differs is then the data alone."""
    return {"quantization": 'kind = "none"\ncompute_dtype = "float32"'}


@pytest.mark.slow
def test_a_packed_run_learns_what_the_same_rows_teach_unpacked(write_recipe, unquantized, capsys):
    rows = "validation = 0\n"
    every_row = "steps = 3\nlearning_rate = 1e-2\nbatch_size = {}\nmicro_batch_size = {}"
    plain = write_recipe("plain", training=every_row.format(22, 11), **unquantized)
    packed = write_recipe("packed", data="packing = true", training=every_row.format(PACKED, 1), **unquantized)
    for recipe in (plain, packed):
        recipe.write_text(recipe.read_text().replace("validation = 0.1\n", rows))
    of_plain = losses(plain)
    assert "\n22 training rows, 22 per step" in capsys.readouterr().err
    assert losses(packed) == pytest.approx(of_plain, rel=1e-3)
    assert f"\n22 training rows packed into {PACKED}, {PACKED} per step" in capsys.readouterr().err


@pytest.mark.slow
def test_the_size_of_the_micro_batch_does_not_change_what_is_learned(write_recipe, unquantized):
    training = "steps = 4\nlearning_rate = 1e-2\nbatch_size = 8\nmicro_batch_size = {}"
    by_one, by_four = (
        losses(write_recipe(f"by-{size}", training=training.format(size), **unquantized)) for size in (1, 4)
    )
    assert by_one == pytest.approx(by_four, rel=1e-4)
