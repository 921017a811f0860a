"""Keys that are not there, answered with those that are meant."""

import pytest

from qtune.recipe.meant_keys import KEYS, TABLES, advice, keys_meant, table_meant
from qtune.recipe.schema import Recipe


def test_every_key_that_is_offered_is_one_and_no_other_name_is_a_key_of_its_table() -> None:
    for (table, key), others in KEYS.items():
        assert f"{table}.{key}" in keys_meant(key)
        for other in others:
            assert f"{table}.{other}" not in keys_meant(other), other
    assert TABLES.keys() <= Recipe.model_fields.keys()
    names = [other for others in TABLES.values() for other in others]
    assert len(names) == len(set(names)), "one word means one table"
    assert not set(names) & Recipe.model_fields.keys()


@pytest.mark.parametrize(
    ("path", "said"),
    [
        (("training", "lr"), "here that is: training.learning_rate"),
        (("training", "max_seq_length"), "here that is: data.max_length"),
        (("training", "max_length"), "here that is: data.max_length"),
        (("adapter", "lora-alpha"), "here that is: adapter.alpha"),
        (("adapter", "learning_rate"), "here that is: training.learning_rate"),
        (("output", "path"), "here that is: output.directory"),
        (("data", "path"), "here that is: data.train"),
        (("lora",), "here that is: [adapter]"),
        (("learning_rate",), "it stands in a table: training.learning_rate"),
        (("lr",), "it stands in a table: training.learning_rate"),
        (("adapter", "virtual_tokens"), 'that is a key of kind = "p-tuning" or "prompt-tuning" or "prefix-tuning"'),
        (("quantization", "double_quantization"), 'that is a key of kind = "nf4" or "fp4"'),
        (("training", "frobnicate"), None),
        (("frobnicate",), None),
        (("data", "train", 0, "lr"), None),
    ],
)
def test_a_key_that_is_not_there_is_answered_with_the_one_that_is_meant(
    path: tuple[str | int, ...], said: str | None
) -> None:
    assert advice(path) == said


def test_the_keys_of_a_table_by_another_name_are_told_with_it() -> None:
    said = advice(("lora",), {"r": 8, "lora_alpha": 16, "lr": 1e-4, "frobnicate": 1, "dropout": 0.1})
    assert said == (
        "here that is: [adapter], and its r: adapter.rank, and its lora_alpha: adapter.alpha, and its lr: "
        "training.learning_rate, and its dropout: adapter.dropout"
    )


def test_a_table_of_no_tool_means_none() -> None:
    assert table_meant("frobnicate") is None
