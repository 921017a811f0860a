"""The end of a run: where it is, what it learned, what it took, and the next commands."""

import shlex
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from conftest import run_warm_qtune
from rich.console import Console

from qtune.run.folder import RunDir
from qtune.run.listing import list_runs
from qtune.run.metrics import EvalRecord, NoteRecord, TrainRecord, append_metric, forget_after
from qtune.run.summary import Losses, summary_of
from qtune.screens.listing import draw_runs
from qtune.screens.run import spread_text, summary_text
from qtune.sizes import GIB
from qtune.training.display import plain_line
from qtune.verdicts.curves import rate
from qtune.verdicts.facts import read_facts
from qtune.verdicts.learning import learned


def trained(step: int, loss: float, seconds: float, peak: int = GIB) -> TrainRecord:
    return TrainRecord(step, 20, step / 20, seconds, loss, 0.5, 1e-4, 1.0, 100.0, peak, peak)


def looked(step: int, loss: float, seconds: float) -> EvalRecord:
    return EvalRecord(step, 20, step / 20, seconds, loss, 0.75)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run_dir = RunDir(tmp_path / "mine")
    run_dir.path.mkdir()
    return run_dir


def written(run_dir: RunDir, *records: TrainRecord | EvalRecord | NoteRecord) -> str:
    for record in records:
        append_metric(run_dir.metrics_file, record)
    return summary_text(summary_of(run_dir)).replace(str(run_dir.path), "RUN")


def test_the_summary_is_made_of_the_runs_own_records(run: RunDir) -> None:
    losses = [3.0, 2.0, *[1.5] * 16, 0.5, 0.25]
    records = [trained(step, loss, 3.0 * step) for step, loss in enumerate(losses, 1)]
    text = written(run, *records[:10], looked(10, 1.0, 31), *records[10:], looked(20, 1.25, 63))
    assert text.splitlines() == [
        "RUN: 20 steps in 1:03",
        "training loss 1.90 -> 1.05 (means of the first and the last 5 logged steps)",
        "validation loss 1.2500, accuracy 75.0%; the best was 1.0000 at step 10",
        "  qtune eval RUN    # base against tuned on held-out rows",
        "  qtune chat RUN    # talk to it",
        "  qtune export RUN  # a plain model for transformers, vLLM and Ollama",
    ]


def test_the_training_loss_at_the_end_is_one_figure_wherever_it_is_said(run: RunDir) -> None:
    run.resolved_file.write_text('[model]\nbase = "org/model"\n\n[adapter]\nkind = "lora"\n')
    losses = [4.0 / step + 0.01 * (step % 7) for step in range(1, 241)]
    said = written(run, *(replace(trained(step, loss, 3.0 * step), steps=240) for step, loss in enumerate(losses, 1)))
    start, end = sum(losses[:20]) / 20, sum(losses[216:]) / 24
    over = "(means of the first 20 and the last 24 logged steps)"
    assert f"training loss {start:#.3g} -> {end:#.3g} {over}" in said
    facts = read_facts(run)
    assert f"from {start:#.3g} to {end:#.3g} {over}" in learned(facts).sentence
    assert f" to {end:#.3g} (means of the first 20 and the last 24 logged steps)" in rate(facts).sentence
    (listed,) = list_runs(run.path.parent)
    assert (listed.loss_start, listed.loss_end) == pytest.approx((start, end))
    shown = StringIO()
    Console(file=shown, width=200).print(draw_runs([listed], run.path.parent, 0.0))
    assert f"{start:#.3g} -> {end:#.3g}" in shown.getvalue()


@pytest.mark.parametrize(
    ("values", "start", "end", "over"),
    [
        ([1.5], 1.5, 1.5, "the only logged step"),
        ([3.0, 1.0], 3.0, 1.0, "first and last logged step"),
        ([3.0, 2.0, 1.0], 3.0, 1.0, "first and last logged step"),
        ([4.0, 2.0, 9.0, 1.0, 0.0], 3.0, 0.5, "means of the first and the last 2 logged steps"),
        ([2.0] * 5 + [9.0] * 40 + [1.0] * 5, 2.0, 1.0, "means of the first and the last 5 logged steps"),
    ],
)
def test_start_and_end_never_overlap_and_say_what_they_are_means_of(
    values: list[float], start: float, end: float, over: str
) -> None:
    losses = Losses(values)
    assert (losses.start, losses.end, losses.taken_over) == (start, end, over)


def test_a_whole_line_of_a_command_can_be_pasted_however_long_a_runs_name_is(tmp_path: Path) -> None:
    for name in ("a", "a very long name of a run-2"):
        run_dir = RunDir(tmp_path / name)
        run_dir.path.mkdir()
        lines = [line for line in written(run_dir, trained(1, 2.0, 1.0)).splitlines() if line.startswith("  qtune")]
        assert len(lines) == 3
        for line in lines:
            program, verb, *rest = shlex.split(line, comments=True)
            assert (program, len(rest), verb in ("eval", "chat", "export")) == ("qtune", 1, True), line


def test_the_parts_of_a_resumed_run_are_added_and_the_best_at_the_end_is_not_said_twice(run: RunDir) -> None:
    text = written(run, trained(10, 2.0, 60), NoteRecord("stopped", 61), trained(20, 1.0, 30), looked(20, 1.0, 31))
    assert "20 steps in 1:32" in text
    assert "the best" not in text


def test_a_run_that_ended_early_took_the_steps_that_it_took(run: RunDir) -> None:
    run.resolved_file.write_text("[model]\n")
    (run.adapter / "adapter_config.json").parent.mkdir()
    (run.adapter / "adapter_config.json").write_text("{}")
    (run.adapter / "adapter_model.safetensors").write_text("")
    text = written(run, trained(2, 2.0, 17), looked(2, 3.0, 17), NoteRecord("stopped", 17, None, 2))
    assert text.startswith("RUN: 2 of 20 steps in 0:17\n")
    assert list_runs(run.path.parent)[0].state == "finished, 2 of 20 steps"
    forget_after(run.metrics_file, 2)
    assert summary_of(run).ended_step == 2
    forget_after(run.metrics_file, 1)
    assert summary_of(run).ended_step is None


def test_a_loss_that_is_no_number_is_not_the_best(run: RunDir) -> None:
    written(run, trained(1, 2.0, 1), looked(1, float("nan"), 1), looked(2, 3.0, 2))
    best = summary_of(run).best
    assert best is not None
    assert best.step == 2


def test_the_validation_loss_is_of_the_rows_that_the_verdict_judges_and_which_these_are_is_said(run: RunDir) -> None:
    """Two rows of twelve, which training saw, are learned by heart: over all rows the last evaluation is the best."""

    def partly_seen(step: int, of_all: float, of_unseen: float) -> EvalRecord:
        return replace(looked(step, of_all, step), group_losses=(of_unseen,) * 10, group_tokens=(7,) * 10, left_out=2)

    records = partly_seen(10, 1.2, 1.0), partly_seen(20, 1.1, 1.25)
    text = written(run, trained(1, 3.0, 1.0), *records)
    left_out = "(2 validation rows left out, for training saw their prompts)"
    told = f"validation loss 1.2500 {left_out}, accuracy 75.0% of all rows"
    assert text.splitlines()[2] == f"{told}; the best was 1.0000 at step 10"
    assert plain_line(records[1], None) == f"step 20: {told}"
    run.resolved_file.write_text('[model]\nbase = "org/model"\n')
    assert list_runs(run.path.parent)[0].validation == 1.0
    facts = read_facts(run)
    assert (
        "validation ended at 1.25" in learned(replace(facts, validation=facts.validation[1:], train=FALLING)).sentence
    )
    several = spread_text([summary_of(run), summary_of(run)])
    assert "\nvalidation loss of rows that training has not seen: mean 1.2500, standard deviation" in several
    assert f"\n  {run.name}: " in several


FALLING = tuple(trained(step, 3.0 - 0.1 * step, step) for step in range(1, 21))


@pytest.mark.slow
def test_a_run_says_its_folder_when_it_begins_and_what_came_of_it_when_it_ends(write_recipe, tmp_path: Path) -> None:
    recipe = write_recipe(training="steps = 2\nbatch_size = 2")
    earlier = RunDir(tmp_path / "runs" / "tiny")
    earlier.path.mkdir(parents=True)
    earlier.resolved_file.write_text('[adapter]\nkind = "lora"\n')
    earlier.lock_file.write_text("{}")
    written(earlier, trained(4, 2.0, 1.0))
    process = run_warm_qtune("run", recipe)
    run_dir = tmp_path / "runs" / "tiny-2"
    assert process.stdout == f"{run_dir}\n"
    assert f"{tmp_path / 'runs' / 'tiny'} is there: a new run will be {run_dir}\n" in process.stderr
    assert f"this run is {run_dir}\n" in process.stderr
    assert f"{earlier.path} was stopped at step 4 of 20; no step is saved; it goes on with: " in process.stderr
    begins, ends = process.stderr.index("this run is"), process.stderr.index("training loss")
    assert begins < process.stderr.index("step 1/2") < ends
    assert process.stderr.rstrip().splitlines()[-1].split("  ")[1].startswith(f"qtune export {run_dir}")
