"""A line of metrics.jsonl that is taken out, doubled, moved or another run's is noticed; what a kill has cut is not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qtune import manifest
from qtune.errors import RunError
from qtune.records import CHECKSUM, write_record
from qtune.run.finished import whole_adapter
from qtune.run.folder import RunDir
from qtune.run.history import history_of
from qtune.run.measured_adapter import WEIGHTS, adapter_name
from qtune.run.metrics import (
    AFTER,
    EvalRecord,
    Metric,
    NoteRecord,
    TrainRecord,
    append_metric,
    forget_after,
    read_metrics,
    records_then,
    require_records_of,
    seconds_of,
)
from qtune.tuned.task_scores import TaskScore, TaskScores, read_tasks

RECORDS: tuple[Metric, ...] = (
    NoteRecord("begun"),
    TrainRecord(1, 4, 0.25, 1.0, 2.5, 0.5, 1e-3, 1.0, 100.0, 1, 1),
    TrainRecord(2, 4, 0.5, 2.0, 2.4, 0.5, 1e-3, 1.0, 100.0, 1, 1),
    EvalRecord(2, 4, 0.5, 2.5, 2.3, 0.5),
    TrainRecord(3, 4, 0.75, 3.0, 2.2, 0.5, 1e-3, 1.0, 100.0, 1, 1),
    NoteRecord("the adapter is that of step 2", 3.5, 2),
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A run's records."""
    file = tmp_path / "metrics.jsonl"
    for record in RECORDS:
        append_metric(file, record)
    return file


def said(file: Path) -> str:
    with pytest.raises(RunError) as caught:
        read_metrics(file)
    return str(caught.value)


def broken_at(file: Path, line: int) -> str:
    return (
        f"{file}:{line}: does not follow what stands before it: lines are missing, doubled or in another order; put "
        "them back; if it is right as it is, remove after and crc32 from the line"
    )


CHANGES: dict[str, tuple[Callable[[list[str]], list[str]], int]] = {
    "the first is missing": (lambda lines: lines[1:], 1),
    "one is missing": (lambda lines: lines[:3] + lines[4:], 4),
    "some are missing": (lambda lines: lines[:1] + lines[4:], 2),
    "one is doubled": (lambda lines: lines[:3] + lines[2:], 4),
    "the last is doubled": (lambda lines: [*lines, lines[-1]], 7),
    "all are doubled": (lambda lines: lines * 2, 7),
    "two have changed places": (lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]], 3),
    "in the other order": (lambda lines: lines[::-1], 1),
    "the last came first": (lambda lines: [lines[-1], *lines[:-1]], 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_lines_that_are_not_all_there_in_their_order_are_said(change: str, file: Path) -> None:
    how, line = CHANGES[change]
    assert read_metrics(file) == RECORDS
    file.write_text("\n".join([*how(file.read_text().splitlines()), ""]))
    assert said(file) == broken_at(file, line)


def test_a_line_of_another_run_is_said(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    for number, record in enumerate(RECORDS):
        append_metric(other, NoteRecord("another") if number == 0 else record)
    lines, theirs = file.read_text().splitlines(), other.read_text().splitlines()
    file.write_text("\n".join([*lines[:2], theirs[2], *lines[3:], ""]))
    assert said(file) == broken_at(file, 3)


def test_the_way_out_leads_out(file: Path) -> None:
    lines = file.read_text().splitlines()
    values = json.loads(lines[3])
    plain = json.dumps({name: value for name, value in values.items() if name not in (AFTER, CHECKSUM)})
    file.write_text("\n".join([lines[0], plain, *lines[4:], ""]))
    assert read_metrics(file) == (RECORDS[0], *RECORDS[3:])
    append_metric(file, RECORDS[4])
    assert read_metrics(file) == (RECORDS[0], *RECORDS[3:], RECORDS[4])


@pytest.mark.parametrize("kept", [0.01, 0.5, 0.99])
def test_a_last_line_that_a_kill_has_cut_is_left_out_and_the_run_goes_on_after_the_one_before(
    kept: float, file: Path
) -> None:
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]) + lines[-1][: int(kept * len(lines[-1]))])
    assert read_metrics(file) == RECORDS[:-1]
    forget_after(file, 3)
    append_metric(file, RECORDS[5])
    assert file.read_text() == "".join(lines)


def test_a_last_line_without_its_end_is_compared_with_the_one_before(file: Path) -> None:
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines))
    assert read_metrics(file) == RECORDS
    file.write_text("\n".join([*lines[:4], lines[5]]))
    assert said(file) == broken_at(file, 5)


def test_lines_of_an_older_version_are_read_and_those_after_them_are_compared(file: Path) -> None:
    older = ['{"kind": "note", "message": "old"}', '{"kind": "note", "message": "older", "seconds": 1.0}']
    file.write_text("\n".join([*older, ""]))
    for record in RECORDS:
        append_metric(file, record)
    assert read_metrics(file)[2:] == RECORDS
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:4], *lines[5:], ""]))
    assert said(file) == broken_at(file, 5)
    file.write_text("\n".join([*older[::-1], *lines[2:], ""]))
    assert read_metrics(file)[2:] == RECORDS


def test_a_run_that_is_resumed_has_records_that_follow_each_other(file: Path) -> None:
    """Those from the first later step on are gone: a note's 4 seconds were added to a run that began again at 0."""
    for record in (NoteRecord("goes on", 4.0), NoteRecord("of its end", 4.5, diverged=True), NoteRecord("last", 5.0)):
        append_metric(file, record)
    before = file.read_text().splitlines()
    forget_after(file, 3)
    kept = (*RECORDS[:5], NoteRecord("goes on", 4.0), NoteRecord("last", 5.0))
    assert read_metrics(file) == kept
    assert file.read_text().splitlines()[:5] == before[:5]
    forget_after(file, 2)
    assert file.read_text().splitlines() == before[:4]
    kept = RECORDS[:4]
    assert read_metrics(file) == kept
    assert seconds_of(kept) == 2.5
    forget_after(file, 0)
    assert read_metrics(file) == RECORDS[:1]
    for record in RECORDS[1:4]:
        append_metric(file, record)
    for record in RECORDS[4:]:
        append_metric(file, record)
    assert read_metrics(file) == (*kept, *RECORDS[4:])


def test_a_line_longer_than_what_is_read_at_once_is_followed(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    records = [NoteRecord("ä" * length) for length in (8192, 1, 20_000, 8100)]
    for record in records:
        append_metric(file, record)
    assert read_metrics(file) == tuple(records)
    assert [json.loads(line)[AFTER] for line in file.read_text().splitlines()[1:]] == [
        json.loads(line)[CHECKSUM] for line in file.read_text().splitlines()[:-1]
    ]


# --- the end of the file ---------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run with a checkpoint after four records, which ended after six."""
    run = RunDir(tmp_path / "run")
    for folder in (run.checkpoints / "checkpoint-2", run.adapter):
        folder.mkdir(parents=True)
    for number, record in enumerate(RECORDS, 1):
        append_metric(run.metrics_file, record)
        if number == 4:
            manifest.seal(run.checkpoints / "checkpoint-2", 2, records=records_then(run.metrics_file))
    manifest.seal(run.adapter, records=records_then(run.metrics_file))
    return run


def test_records_that_are_missing_at_the_end_are_said(run: RunDir) -> None:
    assert history_of(run) == RECORDS
    lines = run.metrics_file.read_text().splitlines(keepends=True)
    run.metrics_file.write_text("".join(lines[:4]))
    checkpoint = run.checkpoints / "checkpoint-2"
    require_records_of(run.metrics_file, 4, checkpoint)
    with pytest.raises(RunError) as caught:
        history_of(run)
    assert str(caught.value) == (
        f"{run.metrics_file}: has 4 records, and had 6 when {run.adapter} was saved; put the file back; if it is right "
        f"as it is, remove records and crc32 from {run.adapter}/manifest.json"
    )
    run.metrics_file.write_text("".join(lines[:3]))
    with pytest.raises(RunError, match=f"has 3 records, and had 4 when {checkpoint} was saved"):
        require_records_of(run.metrics_file, 3, checkpoint)
    run.metrics_file.unlink()
    with pytest.raises(RunError, match="has 0 records, and had 4"):
        require_records_of(run.metrics_file, 0, checkpoint)


def test_a_checkpoint_or_an_adapter_of_another_run_is_said(run: RunDir) -> None:
    run.metrics_file.unlink()
    for record in (NoteRecord("another"), *RECORDS[1:]):
        append_metric(run.metrics_file, record)
    read_metrics(run.metrics_file)
    for folder in (run.adapter, run.checkpoints / "checkpoint-2"):
        with pytest.raises(RunError) as caught:
            require_records_of(run.metrics_file, len(RECORDS), folder)
        assert str(caught.value) == (
            f"{folder}: it is not of this run: when it was saved, record 1 of metrics.jsonl was another (if it "
            f"is right as it is, remove records and crc32 from {folder}/manifest.json)"
        )


def test_an_adapter_of_another_run_is_none_of_this(run: RunDir, tmp_path: Path) -> None:
    (run.adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    manifest.seal(run.adapter, records=records_then(run.metrics_file))
    whole_adapter(run)
    other = RunDir(tmp_path / "other")
    other.path.mkdir()
    for record in (NoteRecord("another"), *RECORDS[1:]):
        append_metric(other.metrics_file, record)
    shutil.copytree(run.adapter, other.adapter)
    with pytest.raises(
        RunError,
        match=f"{other.adapter}: is not what was saved: it is not of this run: when it was saved, record 1 of metrics",
    ):
        whole_adapter(other)
    other.metrics_file.write_text(other.metrics_file.read_text().partition("\n")[0] + "\n")
    with pytest.raises(RunError, match="it is not of this run"):
        whole_adapter(other)
    # Nor is one of the same beginning.
    other.metrics_file.write_text(run.metrics_file.read_text().partition("\n")[0] + "\n")
    for record in (NoteRecord("another"), *RECORDS[2:]):
        append_metric(other.metrics_file, record)
    with pytest.raises(RunError, match="it is not of this run: when it was saved, record 6 of"):
        whole_adapter(other)
    # Records decide nothing that an adapter computes: without them it is used.
    other.metrics_file.unlink()
    assert whole_adapter(other) == other.adapter


def test_the_way_out_of_missing_records_leads_out(run: RunDir) -> None:
    lines = run.metrics_file.read_text().splitlines(keepends=True)
    run.metrics_file.write_text("".join(lines[:4]))
    file = run.adapter / manifest.NAME
    values = {name: value for name, value in json.loads(file.read_text()).items() if name not in ("records", CHECKSUM)}
    file.write_text(json.dumps(values))
    assert history_of(run) == RECORDS[:4]
    assert manifest.fault(run.adapter) is None


@pytest.mark.parametrize("text", ['{"files": {}}', "not JSON", '{"name": "a page"}', ""])
def test_a_manifest_that_does_not_say_leaves_the_records_as_they_are(text: str, run: RunDir) -> None:
    (run.adapter / manifest.NAME).write_text(text)
    run.metrics_file.write_text("")
    assert history_of(run) == ()


def test_figures_of_another_adapter_are_none_of_this_runs(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = RunDir(tmp_path / "other")
    for one, weights in ((run, b"these"), (other, b"those")):
        one.adapter.mkdir(parents=True, exist_ok=True)
        (one.adapter / WEIGHTS).write_bytes(weights)
        manifest.seal(one.adapter)
        scores = TaskScores("0.4", None, None, (TaskScore("arc", "acc", 0.25, 0.5),), adapter_name(one))
        write_record(one.tasks_file, scores)
        assert read_tasks(one) == scores
    shutil.copy(other.tasks_file, run.tasks_file)
    assert read_tasks(run) is None
    said = f"{run.tasks_file} is left out: it was measured of another adapter than the one that is here\n"
    assert capsys.readouterr().err == said
    # An older version did not say of which adapter its figures are.
    older = TaskScores("0.4", None, None, ())
    write_record(run.tasks_file, older)
    assert read_tasks(run) == older
    (run.adapter / manifest.NAME).unlink()
    shutil.copy(other.tasks_file, run.tasks_file)
    assert read_tasks(run) == read_tasks(other)


def test_a_file_that_this_user_may_not_read_is_no_damage(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    (run.adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    manifest.seal(run.adapter)
    opened = Path.open

    def refused(file: Path, *given: object, **named: object) -> object:
        if file.name == "adapter_config.json":
            raise PermissionError(13, "Permission denied", str(file))
        return opened(file, *given, **named)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(RunError) as caught:
        whole_adapter(run)
    assert str(caught.value) == (
        f"{run.adapter}/adapter_config.json: cannot be read: Permission denied; give yourself the right to it"
    )
