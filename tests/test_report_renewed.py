"""A run's page says what the last verb has found: each that adds a record to a run renews the page that is there."""

import errno
import os
import shutil
from pathlib import Path

import pytest
from export_models import tiny_run
from typer.testing import CliRunner

from qtune.cli import app
from qtune.errors import RunError, VerificationError
from qtune.export import export as export_stage
from qtune.export.verification import mark_unverified
from qtune.records import write_record
from qtune.report.page import renewed_reports, write_report
from qtune.run.folder import RunDir
from qtune.tuned import tasks as tasks_stage
from qtune.tuned.task_scores import TaskScore, TaskScores

# peft 0.21.2 asks transformers 5.23 for the name that it is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

NOT_EXPORTED, PROVEN = "Not exported", "Proven"
EVALUATED = "4 of 12 validation rows"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return tiny_run(tmp_path_factory.mktemp("made"), quantization='kind = "none"\ncompute_dtype = "float32"')


@pytest.fixture
def run(made: RunDir, tmp_path: Path) -> RunDir:
    """A finished run with a page, nothing else known of it."""
    copied = RunDir(tmp_path / "run")
    shutil.copytree(made.path, copied.path)
    write_report(copied)
    return copied


def said_by(*words: str | Path) -> str:
    """What a verb that ends well says beside its results."""
    done = CliRunner().invoke(app, [*map(str, words)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stderr


def page_of(run: RunDir) -> str:
    return run.report.read_text(encoding="utf-8")


def test_an_evaluation_stands_on_the_page_at_once(run: RunDir) -> None:
    assert EVALUATED not in page_of(run)
    assert "report" not in said_by("eval", run.path, "--rows", "4", "--max-new-tokens", "2")
    assert EVALUATED in page_of(run)


def test_a_comparison_stands_on_the_page_of_each_run(run: RunDir, tmp_path: Path) -> None:
    other = RunDir(tmp_path / "other")
    shutil.copytree(run.path, other.path)
    said_by("compare", run.path, other.path, "--rows", "4")
    for one in (run, other):
        assert EVALUATED in page_of(one)


def test_a_benchmark_stands_on_the_page_at_once(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate_tasks(run_dir: RunDir, *_: object, **__: object) -> TaskScores:
        found = TaskScores("0.4", None, None, (TaskScore("own_choices", "acc", 0.25, 0.75),))
        write_record(run_dir.tasks_file, found)
        return found

    monkeypatch.setattr(tasks_stage, "evaluate_tasks", evaluate_tasks)
    said_by("eval", run.path, "--tasks", "own_choices")
    assert "own_choices" in page_of(run)


def test_a_proven_export_stands_on_the_page_at_once_and_so_does_its_proof_anew(run: RunDir) -> None:
    assert NOT_EXPORTED in page_of(run)
    said_by("export", run.path)
    assert NOT_EXPORTED not in page_of(run)
    assert PROVEN in page_of(run)
    run.report.write_text("old")
    os.utime(run.report, ns=(0, 0))
    said_by("export", "--verify-only", run.path / "model")
    assert PROVEN in page_of(run)


def test_an_export_that_is_not_proven_fails_and_stands_on_the_page(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export_run(run_dir: RunDir, *_: object) -> Path:
        (run_dir.path / "model").mkdir()
        mark_unverified(run_dir.path / "model", "another model answers")
        raise VerificationError("it is not the trained model")

    monkeypatch.setattr(export_stage, "export_run", export_run)
    done = CliRunner().invoke(app, ["export", str(run.path)])
    assert isinstance(done.exception, VerificationError)
    assert "another model answers" in page_of(run)


def test_a_page_that_cannot_be_written_is_said_and_costs_the_verb_nothing(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, write_text = page_of(run), RunDir.write_text

    def full(self: RunDir, file: Path, text: str) -> None:
        if file == self.report:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        write_text(self, file, text)

    monkeypatch.setattr(RunDir, "write_text", full)
    said = said_by("eval", run.path, "--rows", "4", "--max-new-tokens", "2")
    assert "the report was not written" in said
    assert f"try again with: qtune report {run.path}" in said
    assert page_of(run) == before


def test_no_page_is_made_where_there_was_none(run: RunDir) -> None:
    run.report.unlink()
    said_by("eval", run.path, "--rows", "4", "--max-new-tokens", "2")
    assert not run.report.exists()


def test_a_page_stays_as_it_is_where_nothing_was_added(run: RunDir) -> None:
    run.report.write_text("as it was")
    with pytest.raises(RunError), renewed_reports(run):
        raise RunError([])
    assert page_of(run) == "as it was"
