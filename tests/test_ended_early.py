"""A run that ended early or no better than guessing: its verdicts agree with its notes, and a comparison says so."""

from dataclasses import replace
from pathlib import Path

import pytest
from test_run_listing import made
from test_run_summary import looked, trained
from test_verdicts import evaluation

from qtune.comparing.runs import ComparedRun
from qtune.comparing.table import compare, explanation
from qtune.run.folder import RunDir
from qtune.run.metrics import NoteRecord, forget_after, read_metrics
from qtune.run.summary import Losses
from qtune.training.outcome import has_diverged, rise_of
from qtune.tuned.forgotten import Forgetting, PieceLoss
from qtune.verdicts.facts import read_facts
from qtune.verdicts.of_run import verdicts


@pytest.fixture
def ended(tmp_path: Path) -> RunDir:
    """Ended at step 2 of 20, and no better than guessing then."""
    end = NoteRecord("stopped at step 2", 2.0, ended_step=2)
    diverged = NoteRecord("the loss ended above its start", 2.0, diverged=True)
    records = trained(1, 3.2, 1), looked(1, 12.0, 1), trained(2, 13.3, 2), looked(2, 16.0, 2), end, diverged
    run = made(tmp_path, "mine", *records)
    run.adapter.mkdir()
    (run.adapter / "adapter_config.json").write_text("{}")
    return run


def test_the_verdicts_of_a_run_that_diverged_agree_with_its_note(ended: RunDir) -> None:
    learned, _, rate, *_ = verdicts(read_facts(ended))
    assert (learned.standing, learned.answer) == ("bad", "Diverged")
    assert "from 3.20 to 13.3" in learned.sentence
    assert (rate.standing, rate.answer) == ("bad", "Too high")


def test_a_rise_in_too_few_steps_is_not_told_as_a_fall_to_come(tmp_path: Path) -> None:
    run = made(tmp_path, "rose", trained(1, 1.0, 1), trained(2, 1.5, 2))
    assert verdicts(read_facts(run))[0].sentence.endswith("too early to tell a rise")


def test_what_has_diverged_is_what_the_sentence_says() -> None:
    for values, is_guessing in (([2.0, 7.0], True), ([2.0, 3.0], False), ([6.9, 7.0], False)):
        losses = Losses(values)
        assert has_diverged(losses, 1000) == is_guessing == ("has diverged" in str(rise_of(losses, 1000)))


def test_a_run_whose_end_is_made_again_says_anew_whether_it_has_diverged(ended: RunDir) -> None:
    forget_after(ended.metrics_file, 2)
    assert [one.message for one in read_metrics(ended.metrics_file) if isinstance(one, NoteRecord)] == [
        "stopped at step 2"
    ]


def test_a_comparison_says_which_runs_ended_early_and_which_saw_rows_in_training() -> None:
    text = Forgetting("a", (PieceLoss(5, 3.0, 3.0), PieceLoss(5, 3.0, 3.0)))
    asked = evaluation([2.0] * 12, [1.0] * 12, (0, 6))
    settings = {"quantization": {"kind": "nf4"}}
    first = ComparedRun("runs/x", 1, "base", "lora", settings, 10, 1.0, 1, None, asked, text)
    second = replace(first, run="runs/y", settings={**settings, "rank": 8}, ended_early="4 of 9 steps")
    found = compare([first, replace(second, evaluation=replace(asked, rows_trained_on=3))])
    assert (found.rows_trained_on, found.ended_early) == ({"runs/y": 3}, {"runs/y": "4 of 9 steps"})
    said = " / ".join(explanation(found))
    assert "runs/y: training saw the prompts of 3 of the 12 rows" in said
    assert "runs/y has ended early: it took 4 of 9 steps" in said
    assert "runs/x" not in said
