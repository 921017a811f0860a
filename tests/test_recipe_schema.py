"""The schema: every key is documented and obeyed, values cannot change, numbers are taken as people write them."""

import re
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel, ValidationError

import qtune
from qtune.recipe.faults import Fault, Faulty
from qtune.recipe.parse import parse_recipe
from qtune.recipe.schema import DEFAULT_KINDS, Adapter, FileSource, HubSource, Quantization, Recipe, Table, kinds_of

SMALLEST = {"model": {"base": "org/model"}, "data": {"train": "rows.jsonl"}}


def parsed(**tables: dict) -> Recipe:
    return parse_recipe({name: {**SMALLEST.get(name, {}), **tables.get(name, {})} for name in {*SMALLEST, *tables}})


def faults(**tables: dict) -> list[Fault]:
    with pytest.raises(Faulty) as refused:
        parsed(**tables)
    return list(refused.value.faults)


def tables(table: type[BaseModel] = Table) -> list[type[BaseModel]]:
    return [found for child in table.__subclasses__() for found in (child, *tables(child))]


KEYS = [(table, name) for table in tables() if table is not Recipe for name in table.model_fields]


@pytest.mark.parametrize(("table", "name"), KEYS, ids=[f"{table.__name__}.{name}" for table, name in KEYS])
def test_every_key_is_documented_and_some_other_module_obeys_it(table: type[BaseModel], name: str) -> None:
    description = table.model_fields[name].description
    assert description
    assert description[0].isupper() or description[0] == '"'
    assert description.endswith((".", ")", "…"))
    package = Path(qtune.__file__).parent
    readers = [file for file in package.rglob("*.py") if file.parent.name != "recipe"]
    assert any(re.search(rf"\.{name}\b|getattr\(.*{name}", file.read_text()) for file in readers), "nobody reads it"


def test_every_table_is_documented_and_knows_only_its_keys() -> None:
    for table in tables():
        assert table.__doc__
        assert table.model_config["extra"] == "forbid"
        assert table.model_config["frozen"]


def test_a_recipe_cannot_be_changed() -> None:
    recipe = parsed()
    with pytest.raises(ValidationError, match="frozen"):
        recipe.training.epochs = 2.0  # type: ignore[misc]


def test_whole_numbers_are_taken_where_fractions_are_meant_but_not_the_reverse() -> None:
    assert parsed(training={"epochs": 2}).training.epochs == 2.0
    assert parsed(data={"validation": 0}).data.validation == 0.0
    assert faults(training={"batch_size": 2.0}) == [Fault(("training", "batch_size"), "must be a whole number")]


def test_each_kind_is_a_table_of_its_own_and_a_missing_kind_means_the_usual_one() -> None:
    kinds = {
        name: [kind for table in get_args(union) for kind in kinds_of(table)]
        for name, union in (("quantization", Quantization), ("adapter", Adapter))
    }
    assert kinds == {
        "quantization": ["nf4", "fp4", "int8", "none"],
        "adapter": ["lora", "p-tuning", "prompt-tuning", "prefix-tuning", "ia3"],
    }
    for name, table_kinds in kinds.items():
        for kind in table_kinds:
            assert getattr(parsed(**{name: {"kind": kind}}), name).kind == kind
        assert getattr(parsed(**{name: {}}), name).kind == DEFAULT_KINDS[name]
        assert getattr(parsed(), name).kind == DEFAULT_KINDS[name]


def test_sources_are_names_files_and_hub_datasets_in_any_mixture() -> None:
    train = ["a.jsonl", {"path": "b.jsonl", "weight": 2}, {"hub": "owner/name", "split": "train[:9]"}]
    assert parsed(data={"train": train}).data.train == (
        "a.jsonl",
        FileSource(path="b.jsonl", weight=2.0),
        HubSource(hub="owner/name", split="train[:9]"),
    )
    assert parsed(data={"validation": "v.jsonl"}).data.validation == "v.jsonl"


@pytest.mark.parametrize(
    ("data", "path", "message"),
    [
        ({"train": []}, ("data", "train"), "must not be empty"),
        ({"train": ""}, ("data", "train"), "must not be empty"),
        ({"train": [{"pth": "x"}]}, ("data", "train", 0, "pth"), "no such key in [data.train.0]; did you mean 'path'?"),
        ({"train": [{"hub": "name"}]}, ("data", "train", 0, "hub"), "must look like owner/name"),
        ({"train": [{"path": "x", "weight": 0}]}, ("data", "train", 0, "weight"), "must be greater than 0"),
        ({"validation": 1.5}, ("data", "validation"), "must be less than 1"),
        ({"validation": True}, ("data", "validation"), "must be a number"),
        ({"columns": {"instruction": 3}}, ("data", "columns", "instruction"), "must be a text in quotes"),
    ],
)
def test_a_source_that_is_none_is_named_by_its_place_in_the_list(data: dict, path: tuple, message: str) -> None:
    assert Fault(path, message) in faults(data=data)


@pytest.mark.parametrize("size", ["0GiB", "0.0 MiB", "00GiB", "0.5MiB"])
@pytest.mark.parametrize("key", ["budget", "loss_tile"])
def test_a_size_of_nothing_is_refused_where_it_is_written(key: str, size: str) -> None:
    expected = 'must be "auto" or at least "1MiB"' if key == "budget" else 'must be at least "1MiB"'
    assert faults(memory={key: size}) == [Fault(("memory", key), expected)]


@pytest.mark.parametrize("size", ["0.5GiB", "1MiB", "8 GiB", "0.0625GiB"])
def test_a_size_below_one_is_as_good_as_any(size: str) -> None:
    assert parsed(memory={"budget": size, "loss_tile": size}).memory.budget == size


def test_a_gguf_of_an_adapter_that_no_model_can_hold_is_refused_in_the_recipe() -> None:
    refused = faults(adapter={"kind": "prefix-tuning"}, output={"gguf": "f16"})
    assert [fault.path for fault in refused] == [("output", "gguf")]
    for kind in ("lora", "p-tuning", "prompt-tuning", "ia3"):
        assert parsed(adapter={"kind": kind}, output={"gguf": "f16"}).output.gguf == "f16"


def test_values_that_cannot_go_together_are_said_beside_keys_that_are_wrong() -> None:
    wrong = faults(training={"batch_size": 4, "micro_batch_size": 3}, data={"train": "rows.jsonl", "max_lenght": 9})
    assert [fault.path for fault in wrong] == [("data", "max_lenght"), ("training", "micro_batch_size")]
    # In a table with a fault the rest may be meant otherwise, and another base or kind has other rules.
    assert [fault.path for fault in faults(training={"batch_size": 4, "micro_batch_size": 3, "epocs": 2})] == [
        ("training", "epocs")
    ]
    undecided = faults(quantization={"kind": "nf5"}, adapter={"kind": "lora", "initialization": "pissa"})
    assert [fault.path for fault in undecided] == [("quantization", "kind")]
