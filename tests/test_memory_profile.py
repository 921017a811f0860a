"""`qtune profile RECIPE`: the longest batch comes from the data where it can be read, and it says where from."""

import json
from io import StringIO
from pathlib import Path

import pytest
import torch
from conftest import ROWS, WriteRecipe
from rich.console import Console
from test_memory_trace import CPU

from qtune.data.prepare import prepare
from qtune.device.present import is_out_of_memory
from qtune.errors import ModelError
from qtune.memory.longest import longest_of, longest_rows
from qtune.memory.predict import Longest
from qtune.memory.profile import profile, trace_run
from qtune.model.load import load_config, load_tokenizer
from qtune.preflight import foreseen
from qtune.recipe.file import load_recipe
from qtune.screens.memory import draw_forecast
from qtune.training import train


def tokens_of(row: dict, tokenizer) -> int:
    return len(tokenizer.apply_chat_template(row["messages"], tokenize=True)["input_ids"])


def test_the_longest_row_and_the_most_scored_tokens_are_those_of_the_data(write_recipe: WriteRecipe) -> None:
    resolved = load_recipe(write_recipe())
    tokenizer = load_tokenizer(resolved.recipe.model)
    found = longest_rows(resolved)
    everything = sorted(tokens_of(row, tokenizer) for row in ROWS)
    assert max(found.longest.length, found.longest.evaluated) == everything[-1]
    prepared = prepare(resolved.recipe.data, tokenizer, resolved.folder, seed=resolved.recipe.training.seed)
    labels = [labels for split in prepared.examples.values() for labels in split["labels"]]
    assert found.longest.scored == max(sum(label != -100 for label in row) for row in labels)
    trained = list(prepared.examples["train"])
    decides = next(row for row in trained if row["length"] == found.longest.length)
    assert found.known_from == (
        f"the longest of {len(prepared.train)} training rows ({decides['place']}); "
        f"at most {found.longest.scored} tokens of a row are scored"
    )


def test_a_row_that_the_gate_refuses_for_its_length_decides_nothing_unless_it_is_allowed(
    write_recipe: WriteRecipe, rows_file: Path
) -> None:
    usual = longest_rows(load_recipe(write_recipe(data="")))
    long = {"messages": [{"role": "user", "content": "long " * 300}, {"role": "assistant", "content": "Yes."}]}
    rows_file.write_text(rows_file.read_text() + json.dumps(long) + "\n")
    resolved = load_recipe(write_recipe(), ["data.validation=0"])
    found = longest_rows(resolved)
    assert found.longest.length <= resolved.recipe.data.max_length
    assert found.longest.length >= usual.longest.length
    assert ", 1 beyond max_length left out; " in found.known_from
    tokens = tokens_of(long, load_tokenizer(resolved.recipe.model))
    allowed = longest_rows(load_recipe(write_recipe(), ["data.validation=0", 'data.allow=["too-long"]']))
    assert allowed.longest.length == tokens > resolved.recipe.data.max_length
    assert f"({rows_file.name}:{len(ROWS) + 1})" in allowed.known_from
    rows_file.write_text(json.dumps(long) + "\n")
    alone = longest_rows(load_recipe(write_recipe(), ["data.validation=0"]))
    assert alone.longest.length == resolved.recipe.data.max_length
    assert alone.known_from.endswith("the rows cannot be read: each is longer than max_length = 128")


def test_packed_rows_count_as_they_are_packed(write_recipe: WriteRecipe) -> None:
    resolved = load_recipe(write_recipe(data="packing = true"))
    recipe = resolved.recipe
    prepared = prepare(recipe.data, load_tokenizer(recipe.model), resolved.folder, seed=recipe.training.seed)
    found = longest_of(prepared, recipe.data).longest
    assert found.length == max(map(len, prepared.train["input_ids"])) > found.evaluated
    assert found.scored == max(sum(label != -100 for label in labels) for labels in prepared.train["labels"])


def test_without_rows_the_length_is_the_most_that_can_come_and_says_why(write_recipe: WriteRecipe, rows_file) -> None:
    recipe = write_recipe()
    rows_file.unlink()
    found = longest_rows(load_recipe(recipe, need_rows=False))
    assert found.longest == Longest(128)
    assert found.known_from == (
        "data.max_length, every token scored; the rows cannot be read: rows.jsonl: no such file"
    )


def test_a_config_alone_is_enough(write_recipe: WriteRecipe, tiny_model, tmp_path) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((tiny_model / "config.json").read_text())
    resolved = load_recipe(write_recipe(), [f"model.base={tmp_path / 'bare'}"])
    found = profile(resolved, CPU)
    assert found.forecast.rows.longest == Longest(128)
    assert found.forecast.rows.known_from.startswith("data.max_length, every token scored; the rows cannot be read: ")


def test_a_length_that_is_given_stands_for_the_data(write_recipe: WriteRecipe) -> None:
    found = longest_rows(load_recipe(write_recipe()), 77)
    assert found.longest == Longest(77)
    assert found.known_from == "--length, every token scored"


def test_a_model_that_a_run_would_refuse_is_profiled_and_that_is_said(write_recipe: WriteRecipe) -> None:
    resolved = load_recipe(write_recipe(quantization="minimum_share = 0.9"))
    found = profile(resolved, CPU)
    refusals = foreseen(resolved.recipe, load_config(resolved.recipe.model), found.forecast.plan)
    with pytest.raises(ModelError) as refused:
        train.run(resolved)
    assert [str(refusal) for refusal in refusals] == [str(refused.value)]
    screen = StringIO()
    Console(file=screen, width=900).print(draw_forecast(found, refusals))
    assert f"qtune run would refuse this: {refused.value}" in screen.getvalue()


def test_a_forecast_is_plain_json_and_adds_up(write_recipe: WriteRecipe) -> None:
    found = profile(load_recipe(write_recipe()), CPU).forecast
    kept = json.loads(json.dumps(found.to_json()))
    assert kept["peak"]["bytes"] == sum(kept["peak"]["alive"].values()) == found.prediction.peak.bytes
    assert kept["needed_bytes"] == found.prediction.need.total_bytes
    assert kept["budget_bytes"] == CPU.free_bytes
    highest = max(sum(column) for column in zip(*kept["timeline"].values(), strict=True))
    assert highest == pytest.approx(kept["peak"]["bytes"])


def test_every_way_of_running_out_of_memory_is_recognized() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60, dtype=torch.uint8)  # PyTorch's own CPU allocator says no
    assert is_out_of_memory(refused.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(OSError("can't allocate memory"))


@pytest.mark.slow
def test_a_run_is_compared_with_the_batches_that_it_measured(write_recipe: WriteRecipe) -> None:
    run_dir = train.run(load_recipe(write_recipe(training="steps = 2\nbatch_size = 4\nmicro_batch_size = 2")))
    measured = json.loads(run_dir.memory_file.read_text())["measured"]
    assert measured["largest_batch"]["forward"]["rows"] == 2
    assert measured["largest_batch"]["eval"].keys() == {"rows", "length", "scored", "padded"}
    found = trace_run(run_dir)
    assert found.prediction is not None
    for phase in ("forward", "backward", "optimizer", "eval"):
        seen = measured["phases"][phase]["tensor_peak_bytes"]
        assert found.prediction.by_phase[phase].bytes == pytest.approx(seen, rel=0.05), phase
