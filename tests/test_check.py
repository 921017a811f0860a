"""`qtune check`: what a run would meet, shown without training, and the exit code that the run would have."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from qtune.check import TIMED_STEPS, Check, batches_of, check
from qtune.cli import app
from qtune.data.figures import lengths_of
from qtune.data.samples import Piece, Sample
from qtune.device.present import present_device
from qtune.errors import DataError, GateError, RecipeError
from qtune.memory import predict
from qtune.memory.profile import profile
from qtune.recipe.file import load_recipe
from qtune.run.metrics import TrainRecord
from qtune.screens.check import _histogram, draw_check, draw_sample
from qtune.sizes import gib_text
from qtune.training.trainer import QloraTrainer


@pytest.fixture(autouse=True)
def untraced(request, monkeypatch):
    """Only what is about memory waits for a trace."""
    if "memory" not in request.node.name:
        monkeypatch.setattr("qtune.preflight.attempted", lambda *_: "not asked")


def examined(recipe, **keys) -> Check:
    return check(load_recipe(recipe), **keys)


def screen(result: Check) -> str:
    stream = io.StringIO()
    Console(file=stream, width=120, soft_wrap=True, highlight=False).print(draw_check(result))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def test_the_figures_are_those_of_the_rows(write_recipe):
    result = examined(write_recipe(training="batch_size = 8\nmicro_batch_size = 2"))
    train, validation = result.splits
    assert (train.examples, validation.examples) == (20, 2)
    rows = list(result.prepared.train)
    assert train.tokens == sum(len(row["input_ids"]) for row in rows)
    assert train.scored == sum(label != -100 for row in rows for label in row["labels"])
    assert sum(train.total.counts) == 20
    assert result.batches.steps == result.batches.steps_per_epoch == 3
    assert result.batches.padding_grouped < result.batches.padding_shuffled
    result.require()


def test_the_screen_shows_rows_as_the_model_sees_them(write_recipe):
    text = screen(examined(write_recipe()))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert (
        lines[lines.index("split source rows are weight rows bad dropped") + 1] == "train rows.jsonl messages 1 22 0 0"
    )
    assert "Chat template: the tokenizer's own; its turns end with <|im_end|>" in text
    assert "  <|im_start|>assistant\n  ⟦It is 1.<|im_end|>⟧" in text
    assert "not measured; qtune check --time loads the model" in text
    assert text.endswith("ok  nothing stands in the way of a run")


def test_a_scored_part_is_marked_without_colours_and_a_long_row_is_shortened():
    pieces = (
        Piece("<s>", False, True),
        Piece("Hi", False, False),
        Piece("x" * 3000, True, False),
        Piece("</s>", True, True),
    )
    drawn = draw_sample(Sample("a:1", 9, pieces)).plain
    assert drawn.startswith("<s>Hi⟦xxx")
    assert "… 1,511 characters …" in drawn
    assert drawn.endswith("xxx</s>⟧")


def test_errors_stop_as_they_would_stop_the_run(write_recipe):
    recipe = write_recipe(data="on_long_row = 'error'").read_text().replace("max_length = 128", "max_length = 30")
    file = write_recipe()
    file.write_text(recipe)
    result = examined(file)
    assert [finding.kind for finding in result.stopping] == ["too-long", "too-long"]
    assert "error  too-long: " in screen(result)
    with pytest.raises(GateError, match="too-long"):
        result.require()
    allowed = examined(file, allow=("too-long",))
    allowed.require()
    assert "allowed  too-long: " in screen(allowed)


@pytest.mark.parametrize("way", ["", "packing = true", "streaming = true"])
def test_a_row_that_is_too_long_to_be_trained_on_is_in_no_figure_but_its_own(write_recipe, rows_file, way):
    with rows_file.open("a") as file:
        talk = [{"role": "user", "content": "word " * 90}, {"role": "assistant", "content": "long " * 80}]
        file.write(f"{json.dumps({'messages': talk})}\n")
    recipe = write_recipe(data=way, training="batch_size = 8\nmicro_batch_size = 2")
    refused, dropped = (
        check(load_recipe(recipe, ["data.validation=0.0", f"data.on_long_row={how}"])) for how in ("error", "drop")
    )
    assert [finding.kind for finding in refused.stopping] == ["too-long"]
    (split,), batches = refused.splits, refused.batches
    assert (split.refused, batches.refused, split.examples) == (1, 1, 22)
    assert replace(split, refused=0) == dropped.splits[0]
    assert replace(batches, refused=0) == dropped.batches
    assert refused.samples == dropped.samples
    assert "tokens; 1 too long to be trained on\n" in (shown := screen(refused))
    assert shown.splitlines()[[line.startswith("split  examples") for line in shown.splitlines()].index(True)].endswith(
        "too long"
    )
    assert "too long" not in screen(dropped)
    allowed = check(load_recipe(recipe, ["data.validation=0.0", "data.on_long_row=error"]), ("too-long",))
    assert (allowed.splits[0].refused, allowed.batches.refused, allowed.splits[0].examples) == (0, 0, 23)


def test_where_every_row_is_too_long_no_figure_says_otherwise(write_recipe):
    changes = ["data.validation=0.0", "data.on_long_row=error", "data.max_length=5"]
    result = check(load_recipe(write_recipe(), changes))
    assert (result.splits[0].examples, result.batches.rows, result.batches.refused) == (0, 0, 22)
    assert (result.batches.steps_per_epoch, result.batches.padding_grouped, result.samples) == (0, 0.0, [])
    assert "0, 0 tokens; 22 too long to be trained on" in screen(result)


def test_bad_rows_are_reported_with_everything_else(write_recipe, rows_file):
    with rows_file.open("a") as file:
        file.write('{"messages": []}\n')
    result = examined(write_recipe())
    assert "error  bad-rows: 1 bad row, each named with the error" in screen(result)
    with pytest.raises(DataError, match=r"rows\.jsonl:23: messages is empty"):
        result.require()


def test_a_file_without_a_row_is_one_sentence_and_no_tables_of_zeros(write_recipe, rows_file):
    recipe = write_recipe()
    rows_file.write_text("\n")
    done = CliRunner().invoke(app, ["check", str(recipe)])
    assert isinstance(done.exception, DataError)
    assert "holds no row" in str(done.exception)
    assert "Tokens" not in done.stdout
    assert json.loads(CliRunner().invoke(app, ["check", "--json", str(recipe)]).stdout)["problems"]


def test_json_holds_what_the_screen_shows(write_recipe):
    result = examined(write_recipe())
    value = json.loads(result.to_json())
    assert value["stops"] == []
    assert [finding["kind"] for finding in value["findings"]] == ["few-rows"]
    assert "; fewer show that all runs, and not what can be learned" in screen(result)
    assert "learns them by heart: collect a few hundred" in screen(result)
    assert value["splits"][0]["tokens"] == result.splits[0].tokens
    assert value["sources"] == [
        {
            "name": "rows.jsonl",
            "split": "train",
            "format": "messages",
            "weight": 1.0,
            "rows": 22,
            "bad": 0,
            "dropped": 0,
        }
    ]
    assert {"key": "adapter.rank", "value": "4", "origin": "tiny.toml:8"} in value["values"]


def test_the_disk_is_that_of_checkpoints_and_export(write_recipe):
    from qtune.adapter.attach import attach_adapter
    from qtune.model.load import load_base
    from qtune.model.quantization import count_parameters

    result = examined(write_recipe())
    recipe = result.resolved.recipe
    model = attach_adapter(load_base(recipe.model, recipe.quantization, result.plan), recipe.adapter, result.plan)
    count = count_parameters(model)
    assert result.disk.export_bytes == 2 * (count.total - count.trainable)
    # Three checkpoints, the adapter, and the state of the best evaluation beside the one before it.
    assert result.disk.checkpoints_bytes == count.trainable * (3 * (8 + 8) + 4 + 2 * 4)
    for keys in ('result = "last"', 'eval_every = "never"'):
        alone = examined(write_recipe(training=keys))
        assert alone.disk.checkpoints_bytes == count.trainable * (3 * (8 + 8) + 4)


def test_the_memory_is_what_a_run_predicts_and_is_traced_only_once(write_recipe, monkeypatch):
    recipe = write_recipe(training="batch_size = 4\nmicro_batch_size = 2")
    result = examined(recipe)
    resolved = load_recipe(recipe)
    expected = profile(resolved, present_device()).forecast.prediction
    assert result.memory.prediction == expected

    monkeypatch.setattr("qtune.memory.cached.predict", lambda *_: pytest.fail("traced again"))
    again = examined(recipe)
    value = json.loads(again.to_json())["memory"]
    assert value["peak"]["bytes"] == expected.peak.bytes
    assert value["needed_bytes"] == expected.need.total_bytes
    assert value["fits"] is True
    assert "timeline" not in value
    length, budget = max(len(row["input_ids"]) for row in again.prepared.train), again.plan.device.free_bytes
    peak = expected.peak.bytes / 2**20
    assert (
        f" memory {peak:.1f} MiB at the peak of a step, traced ({expected.peak.phase}, 2 x {length} tokens), "
        f"of {budget / 2**30:.2f} GiB: fits; the process and its libraries come on top, and a run's own figures "
        "include them time "
    ) in " ".join(screen(again).split())


@pytest.mark.slow
def test_memory_that_will_not_do_is_a_warning_and_one_that_is_not_known_is_said(write_recipe, monkeypatch):
    recipe = write_recipe()
    found = check(load_recipe(recipe, ["memory.budget=1MiB", "adapter.rank=64"]))
    rows = found.plan.micro_batch_size
    need = gib_text(found.memory.prediction.need.total_bytes)
    what = "one row is" if rows == 1 else f"{rows} rows are"
    warning = f"warning  memory: {what} predicted to need {need} of 1.0 MiB; qtune fit shows"
    assert warning in screen(found)

    def fails(*_):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr("qtune.memory.forecast.predicted", fails)
    result = examined(recipe)
    assert "not known, the step could not be traced: RuntimeError: no such kernel\n" in screen(result)
    assert json.loads(result.to_json())["memory"] == {"untraced": "RuntimeError: no such kernel"}
    result.require()


@pytest.mark.slow
def test_memory_that_comes_too_close_to_say_is_a_warning_of_its_own(write_recipe, monkeypatch, tmp_path):
    monkeypatch.setenv("QTUNE_CACHE", str(tmp_path / "cache"))
    original = predict.summarize

    def with_gaps(*given, **named):
        found = original(*given, **named)
        return replace(found, need=replace(found.need, gap_bytes=2**30))

    monkeypatch.setattr("qtune.memory.cached.summarize", with_gaps)
    drawn = " ".join(screen(check(load_recipe(write_recipe(), ["memory.budget=512MiB"]))).split())
    assert "of 0.50 GiB: too close to say" in drawn
    assert " GiB of 0.50 GiB, too close to say; qtune fit shows what would help" in drawn


@pytest.mark.parametrize("kind", ["p-tuning", "prompt-tuning", "prefix-tuning", "ia3"])
def test_every_adapter_can_be_checked(write_recipe, kind):
    assert examined(write_recipe(adapter=f'kind = "{kind}"')).disk.checkpoints_bytes > 0


def test_a_timing_takes_the_steps_of_the_run(write_recipe, monkeypatch):
    """Its own trainer: with checkpointing, the loss that is right for the model, and its micro-batches."""
    steps = []

    def training_step(self, model, inputs, num_items_in_batch=None):
        head = model.get_base_model().model
        steps.append((inputs["input_ids"].shape[0], model.training, head.gradient_checkpointing, self.args.max_steps))
        return original(self, model, inputs, num_items_in_batch)

    original = QloraTrainer.training_step
    monkeypatch.setattr(QloraTrainer, "training_step", training_step)
    recipe = write_recipe(training="batch_size = 8\nmicro_batch_size = 2\ngradient_checkpointing = true")
    before = set(recipe.parent.rglob("*"))
    result = examined(recipe, timed=True)
    assert steps == [(2, True, True, TIMED_STEPS)] * 2 * TIMED_STEPS
    assert " s per step, measured on a few micro-batches" in screen(result)
    assert set(recipe.parent.rglob("*")) == before


def test_the_seconds_of_a_step_are_those_of_its_tokens_at_the_speed_that_was_measured(write_recipe, monkeypatch):
    def told(file):
        speeds = (1.0, 50.0, 100.0, 100.0)  # the first step is slow, and does not count
        return tuple(
            TrainRecord(step, 4, 0.1, 1.0, 1.0, 0.5, 1e-4, 1.0, speed, 1, 2) for step, speed in enumerate(speeds, 1)
        )

    monkeypatch.setattr("qtune.check.read_metrics", told)
    result = examined(write_recipe(training="batch_size = 4\nmicro_batch_size = 2"), timed=True)
    tokens = sum(len(row["input_ids"]) for row in result.prepared.train) / 20 * 4
    assert result.step_seconds == pytest.approx((tokens / 50 + tokens / 100 + tokens / 100) / 3)


def test_where_relative_paths_start_from_is_said_where_those_are_two_places(write_recipe, monkeypatch, tmp_path):
    result = examined(write_recipe())
    assert f"Paths in [data] start from {tmp_path}; model.base, adapter.start_from and output.directory from" in screen(
        result
    )
    monkeypatch.chdir(tmp_path)
    assert "start from" not in screen(examined(write_recipe()))


def test_packed_rows_are_counted_as_packed(write_recipe):
    result = examined(write_recipe(data="packing = true", training="batch_size = 2"))
    assert result.batches.rows == len(result.prepared.train) < 20
    assert batches_of(result.resolved.recipe, result.plan, result.prepared, result.splits[0]) == result.batches
    packed, rows = len(result.prepared.train), len(result.prepared.examples["train"])
    assert f"{rows} packed into {packed}, " in screen(result)
    assert "of 2 packed rows in micro-batches" in screen(result)


@pytest.mark.parametrize(
    ("values", "edges", "counts"),
    [
        ([5], (5, 6), (1,)),
        ([1, 2, 2, 9], (1, 3, 5, 7, 9, 11), (3, 0, 0, 0, 1)),
        ([], (0, 1), (0,)),
    ],
)
def test_histograms_have_whole_bins_and_lose_nothing(values, edges, counts):
    lengths = lengths_of(np.array(values))
    assert (lengths.edges, lengths.counts) == (edges, counts)


def test_the_command_prints_and_returns_the_exit_code_of_the_error(write_recipe):
    recipe = write_recipe()
    result = CliRunner().invoke(app, ["check", str(recipe), "--json", "--set", "data.max_length=20"])
    assert isinstance(result.exception, GateError)
    assert json.loads(result.stdout)["stops"] == ["too-long"]
    allowed = CliRunner().invoke(
        app, ["check", str(recipe), "--rows", "0", "--set", "data.max_length=20", "--allow", "too-long"]
    )
    assert allowed.exit_code == 0


def test_a_trace_that_fails_does_not_hide_what_is_wrong(write_recipe, rows_file, monkeypatch):
    def fails(*given):
        raise RuntimeError("no trace")

    recipe = write_recipe()
    rows_file.unlink()
    monkeypatch.setattr("qtune.check.shipped_geometry", fails)
    ended = CliRunner().invoke(app, ["check", str(recipe)])
    assert isinstance(ended.exception, RecipeError), ended.exception
    assert "no such file" in str(ended.exception)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.slow
def test_where_memory_is_short_all_remedies_are_shown_with_the_lines_that_fit(write_recipe) -> None:
    training = "batch_size = 4\nmicro_batch_size = 4\ngradient_checkpointing = false"
    recipe = write_recipe(training=f'{training}\n[memory]\nbudget = "1MiB"')
    result = examined(recipe)
    assert not isinstance(result.memory, str), result.memory
    assert result.ways is not None
    ways = json.loads(result.to_json())["ways_to_fit"]
    assert any(way["changes"].get("training.micro_batch_size", 4) < 4 for way in ways["single"])
    shown = screen(result)
    assert "What would make it fit" in shown
    assert 'training.optimizer = "adamw-8bit"' in shown
    assert "length" in shown
    assert "(rows.jsonl:" in " ".join(shown.split())
    roomy = write_recipe("roomy", training=training)
    assert json.loads(examined(roomy).to_json())["ways_to_fit"] is None


def test_a_bin_of_one_length_is_named_by_it_and_stands_in_its_column() -> None:
    screen = Console(file=io.StringIO(), width=80)
    screen.print(_histogram("answer tokens", lengths_of(np.array([9, 10, 10, 12]))))
    rows = screen.file.getvalue().splitlines()[1:]  # type: ignore[attr-defined]
    assert [row.split()[0] for row in rows] == ["9", "10", "11", "12"]
    assert not any(" to " in row for row in rows)
    wide = Console(file=io.StringIO(), width=80)
    wide.print(_histogram("answer tokens", lengths_of(np.arange(100))))
    assert all(" to " in row for row in wide.file.getvalue().splitlines()[1:])  # type: ignore[attr-defined]
