"""Streamed rows teach what the same rows teach in memory, and a run goes on from any step as if it had not stopped."""

import json
import shutil

import numpy as np
import pytest
from conftest import WriteRecipe, warm_qtune_process
from test_training_train import assert_same_run, course, run, wait_for_step

from qtune.check import check
from qtune.data import stream, stream_blocks, stream_choice, stream_index
from qtune.data.batches import StepSampler
from qtune.data.held_out import held_out_rows
from qtune.errors import RecipeError, RunError
from qtune.memory.longest import longest_rows
from qtune.model.load import load_tokenizer
from qtune.recipe.file import load_recipe
from qtune.run.checkpoints import complete_checkpoints, step_of
from qtune.run.folder import RunDir
from qtune.run.lock import read_lock
from qtune.training import train
from qtune.training.proof import prove
from qtune.training.shown_rows import rows_of
from qtune.tuned.evaluate import evaluate

pytestmark = pytest.mark.slow

TRAINING = (
    "epochs = 2\nbatch_size = 4\nmicro_batch_size = 2\nlearning_rate = 1e-2\ncheckpoint_every = 1\n"
    "keep_checkpoints = 99\nsample_answers = 0\nrehearse = true"
)
"""20 rows: five steps in each of two epochs."""
WINDOWS = "streaming = true\nshuffle_rows = 7"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_blocks, "BATCH_ROWS", 3)
    # Another test may have kept an index of the same rows, in its blocks.
    monkeypatch.setattr(stream_index, "VERSION", "blocks of three rows")


@pytest.mark.parametrize(
    "adapter",
    ['kind = "lora"\nrank = 4', 'kind = "prompt-tuning"\nvirtual_tokens = 4\nresidual = true\ninitialization = "rows"'],
)
def test_rows_that_are_shuffled_all_together_train_what_they_train_in_memory(
    write_recipe: WriteRecipe, adapter: str
) -> None:
    whole = run(write_recipe(training=TRAINING, adapter=adapter))
    streamed = run(write_recipe(training=TRAINING, adapter=adapter, data="streaming = true"), "output.name=streamed")
    assert_same_run(streamed, whole)


def test_rows_in_the_order_of_their_file_train_what_this_order_trains_in_memory(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_order(self: StepSampler) -> np.ndarray:
        steps = np.split(np.arange(len(self)), range(self.batch_size, len(self), self.batch_size))
        return np.concatenate([step[np.argsort(-self.lengths[step], kind="stable")] for step in steps])

    streamed = run(write_recipe(training=TRAINING, data="streaming = true\nshuffle_rows = 0"), "output.name=streamed")
    with monkeypatch.context() as patch:
        patch.setattr(StepSampler, "order", in_order)
        whole = run(write_recipe(training=TRAINING))
    assert_same_run(streamed, whole)


def stopped_after(run_dir: RunDir, step: int) -> RunDir:
    """A copy of a finished run as it stood when this step had been saved."""
    copy = RunDir(run_dir.path.with_name(f"stopped-{step}"))
    shutil.copytree(run_dir.path, copy.path)
    shutil.rmtree(copy.adapter)
    for checkpoint in complete_checkpoints(copy.checkpoints):
        if step_of(checkpoint) > step:
            shutil.rmtree(checkpoint)
    return copy


def test_a_streamed_run_goes_on_exactly_from_any_step_and_reads_nothing_that_is_past(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = TRAINING.replace("epochs = 2", "steps = 7").replace("rehearse = true", "rehearse = false")
    recipe = write_recipe(adapter='kind = "lora"\nrank = 2\ndropout = 0.1', training=training, data=WINDOWS)
    unbroken = run(recipe)
    read: list[int] = []
    keep = stream.RowStream._keep

    def noted(self: stream.RowStream, block: int, examples: object) -> None:
        read.append(block)
        keep(self, block, examples)

    monkeypatch.setattr(stream.RowStream, "_keep", noted)
    for step in range(1, 7):
        read.clear()
        assert_same_run(train.resume(stopped_after(unbroken, step)), unbroken)
        # Windows of seven rows, blocks of three: step 4 of an epoch takes rows 12 to 15, the first of window 1.
        first_window = [0, 0, 1, 1, 2][step % 5]
        assert read[0] >= 7 * first_window // 3


def test_sigkill_does_not_change_what_is_learned_from_a_stream(write_recipe: WriteRecipe) -> None:
    training = "steps = 12\nbatch_size = 4\nmicro_batch_size = 2\nlearning_rate = 1e-2\ncheckpoint_every = 1"
    recipe = write_recipe(training=f"{training}\nsample_answers = 0", data=WINDOWS)
    unbroken = run(recipe, "output.name=unbroken")
    broken = RunDir(recipe.parent / "runs" / "tiny")
    killed = warm_qtune_process("run", recipe)
    wait_for_step(killed, broken.metrics_file, 3)
    killed.kill()
    killed.communicate()
    train.resume(broken)
    assert_same_run(broken, unbroken)


def test_a_stream_that_has_changed_is_not_gone_on_with(write_recipe: WriteRecipe) -> None:
    training = TRAINING.replace("epochs = 2", "steps = 3").replace("rehearse = true", "rehearse = false")
    recipe = write_recipe(training=training, data=WINDOWS)
    finished = run(recipe)
    assert prove(finished).endswith("checkpoint-3, bit for bit")
    stopped = stopped_after(finished, 2)
    rows = recipe.parent / "rows.jsonl"
    rows.write_text(rows.read_text().replace("It is 1.", "It is one."))
    with pytest.raises(RunError, match="rows: the training rows are not those that the run began with"):
        train.resume(stopped)
    with pytest.raises(RecipeError, match="shuffle_rows"):
        train.resume(stopped, ["data.shuffle_rows=3"])


def test_a_full_disk_makes_a_run_stream_and_the_run_stays_a_streamed_one(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    training = TRAINING.replace("epochs = 2", "steps = 3").replace("rehearse = true", "rehearse = false")
    recipe = write_recipe(training=training, data="shuffle_rows = 7")
    with monkeypatch.context() as patch:
        patch.setattr(stream_choice, "LARGEST_SHARE", 0.0)
        streamed = run(recipe)
    said = capsys.readouterr().err
    assert "the training rows are streamed: prepared rows would take about" in said
    assert "streaming = true  # rule: prepared rows would take about" in streamed.resolved_file.read_text()
    assert_same_run(train.resume(stopped_after(streamed, 2)), streamed)
    whole = run(recipe, "output.name=whole")
    assert "streaming = false  # default" in whole.resolved_file.read_text()
    assert course(whole) != course(streamed)


def test_every_verb_works_on_a_streamed_run(write_recipe: WriteRecipe) -> None:
    """What they say of the rows is what they say of the same rows in memory."""
    training = TRAINING.replace("epochs = 2", "steps = 3")
    told = {}
    for streams in ("true", "false"):
        recipe = write_recipe(f"streams-{streams}", training=training, data=f"streaming = {streams}")
        resolved = load_recipe(recipe)
        run_dir = train.run(resolved)
        assert read_lock(run_dir) is not None
        checked = json.loads(check(resolved).to_json())
        shown = rows_of(run_dir, read_lock(run_dir).training_rows_blake2b)
        assert not shown.changed
        evaluated = evaluate(run_dir, rows=4, max_new_tokens=4)
        asked = evaluate(run_dir, rows=4, data_file=recipe.parent / "rows.jsonl", max_new_tokens=4)
        told[streams] = (
            [checked[key] for key in ("splits", "batches", "samples", "findings", "sources")],
            shown,
            (evaluated.tuned.loss, evaluated.base.loss, asked.tuned.loss, asked.rows),
            longest_rows(resolved).longest,
            held_out_rows(resolved.recipe, load_tokenizer(resolved.recipe.model), resolved.folder)[1]["place"],
        )
    assert told["true"] == told["false"]


@pytest.mark.parametrize(
    ("train", "more", "message"),
    [
        (
            '"rows.jsonl"',
            "packing = true",
            "packing fits rows together by the lengths of all of them; set packing = false",
        ),
        (
            '["rows.jsonl", { path = "b.jsonl", weight = 2.0 }]',
            "",
            "a stream gives each row once an epoch; remove weight",
        ),
        ('"hub:owner/name"', "", "a hub dataset is fetched to this disk whole; name files, or remove the key"),
        ('[{ hub = "owner/name" }]', "", "a hub dataset is fetched to this disk whole; name files, or remove the key"),
    ],
)
def test_what_cannot_be_streamed_is_refused_by_name(
    write_recipe: WriteRecipe, train: str, more: str, message: str
) -> None:
    recipe = write_recipe(data=f"streaming = true\n{more}")
    recipe.write_text(recipe.read_text().replace('train = "rows.jsonl"', f"train = {train}"))
    (recipe.parent / "b.jsonl").touch()
    with pytest.raises(RecipeError) as raised:
        load_recipe(recipe)
    assert f"data.streaming = true: {message}" in str(raised.value)
