"""Full and broken disks: one sentence with the way out, nothing lost, and the first error is told.

Every operation of every verb: `test_disk_everywhere.py`.
"""

import errno
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import WriteRecipe, run_warm
from safetensors import SafetensorError
from warm import COMMAND

from qtune import whole
from qtune.disk import WAYS_OUT, refusal_of, told
from qtune.errors import ExportError, QtuneError, TrainingError, WorkError
from qtune.export.staged import staged_folder
from qtune.memory.measured.meter import Meter
from qtune.recipe.file import load_recipe
from qtune.run.checkpoints import complete_checkpoints
from qtune.run.folder import RunDir
from qtune.run.metrics import NoteRecord, append_metric, read_metrics
from qtune.training import train
from qtune.training.callbacks import Metrics

WRITING = os.O_WRONLY | os.O_RDWR
CHANGES = ("os.rename", "os.mkdir", "os.truncate", "os.link", "os.symlink")


class Disk:
    """Counts what this process does to files below a folder, and refuses one of its operations."""

    def __init__(self) -> None:
        self.folder = ""
        self.done: list[str] = []
        self.refused: Callable[[int], bool] = lambda number: False
        self.number = errno.ENOSPC

    def hear(self, event: str, arguments: tuple) -> None:
        if not self.folder or (event != "open" and event not in CHANGES) or not isinstance(arguments[0], (str, Path)):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & WRITING):
            return
        if not str(arguments[0]).startswith(self.folder):
            return
        self.done.append(f"{event} {arguments[0]}")
        if self.refused(len(self.done)):
            raise OSError(self.number, os.strerror(self.number), str(arguments[0]))


HEARING = Disk()
sys.addaudithook(HEARING.hear)


@contextmanager
def disk(folder: Path, refused: Callable[[int], bool], number: int = errno.ENOSPC) -> Iterator[Disk]:
    """A disk that refuses the operations of these numbers, counted from 1, below a folder."""
    HEARING.folder, HEARING.done, HEARING.refused, HEARING.number = str(folder), [], refused, number
    try:
        yield HEARING
    finally:
        HEARING.folder = ""


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "a/b"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        Exception("No space left on device (os error 28)"),
        OSError("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device"),
        RuntimeError(
            "[enforce fail at inline_container.cc:747] . open file failed with strerror: No space left on device"
        ),
    ],
    ids=["Python", "safetensors", "tokenizers", "Arrow", "PyTorch"],
)
def test_a_full_disk_is_recognized_whoever_says_it(error: Exception) -> None:
    said = refusal_of(error)
    assert said is not None
    assert said.endswith("No space left on device; free some of it, or name another place")


def test_other_errors_are_none_of_a_disk() -> None:
    for error in (
        ValueError("x"),
        OSError("can't load"),
        RuntimeError("shape"),
        ConnectionError("refused"),
        KeyError(28),
    ):
        assert refusal_of(error) is None
    assert refusal_of(RuntimeError("[enforce fail at inline_container.cc:626] . unexpected pos 64 vs 0")) is not None


def test_every_number_has_a_way_out_that_is_a_sentence_of_its_own() -> None:
    assert all(way and not way.endswith(".") for way in WAYS_OUT.values())


def test_what_is_told_keeps_the_first_reason_and_adds_the_way_on() -> None:
    with (
        pytest.raises(TrainingError, match=r"^f: Input/output error; the disk .*\ngo on so$") as caught,
        told(TrainingError, "go on so"),
    ):
        raise OSError(errno.EIO, "Input/output error", "f")
    assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(WorkError, match="mine"), told(TrainingError):
        raise WorkError("mine")


def test_a_cleanup_that_fails_does_not_hide_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stuck(path: Path) -> None:
        raise OSError(errno.EIO, "stuck")

    monkeypatch.setattr(whole, "_remove", stuck)

    def write() -> None:
        with whole.whole(tmp_path / "file") as partial:
            partial.write_text("half")
            raise OSError(errno.ENOSPC, "No space left")

    with pytest.raises(OSError, match="No space left"):
        write()


def test_a_record_that_could_not_be_written_whole_is_not_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    append_metric(file, NoteRecord("first"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 10, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            append_metric(file, NoteRecord("second"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    append_metric(file, NoteRecord("third"))
    assert [record.message for record in read_metrics(file)] == ["first", "third"]  # type: ignore[union-attr]


def test_records_wait_while_the_disk_is_full_and_are_written_in_their_order(tmp_path: Path) -> None:
    import torch

    shown: list[str] = []
    metrics = Metrics(
        tmp_path / "metrics.jsonl", lambda record: shown.append(record.message), Meter(torch.device("cpu"))
    )  # type: ignore[union-attr]
    metrics.note("first")
    with disk(tmp_path, lambda number: True):
        metrics.note("second")
        metrics.note("third")
        with pytest.raises(OSError, match="No space left"):
            metrics.settle()
    metrics.note("fourth")
    assert [record.message for record in read_metrics(metrics.file)] == ["first", "second", "third", "fourth"]  # type: ignore[union-attr]
    assert sum("its records wait in memory" in message for message in shown) == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES])
def test_an_export_onto_such_a_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path, number: int) -> None:
    with pytest.raises(ExportError, match="nothing was left behind"), staged_folder(tmp_path / "model", 0):
        raise OSError(number, os.strerror(number), "shard")
    assert list(tmp_path.iterdir()) == []


def test_a_run_whose_folder_cannot_be_made_takes_no_name(tmp_path: Path) -> None:
    for refused in (2, 4):  # the others make sure of folders that are there already
        with (
            disk(tmp_path, lambda number, at=refused: number == at),
            pytest.raises(QtuneError, match=r"cannot be made: .*No space left"),
        ):
            RunDir.create(tmp_path, "tiny", "")
        assert list(tmp_path.iterdir()) == []


TRAINING = "steps = 4\nbatch_size = 4\ncheckpoint_every = 1\neval_every = 2\nkeep_checkpoints = 2"


@pytest.mark.slow
def test_a_run_that_may_write_no_large_files_says_so_and_keeps_its_last_checkpoint(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    """A limit of the system meets every writer: Python's, and those of safetensors, tokenizers and PyTorch."""
    recipe = write_recipe(training=TRAINING)
    for kibibytes in (0, 2, 8, 60, 200):
        most = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({kibibytes << 10}, {kibibytes << 10}))\n"
        ended = run_warm(most + COMMAND, "run", recipe, "--set", f"output.name=small{kibibytes}")
        assert "Traceback" not in ended.stderr, ended.stderr
        run = RunDir(tmp_path / "runs" / f"small{kibibytes}")
        assert ended.returncode in ((0,) if run.is_finished else (1, 2)), ended.stderr
        if not run.is_finished:
            assert any(words in ended.stderr for words in ("too large", "written", "temporary directory"))
            assert all(
                (path / "trained_state.safetensors").stat().st_size for path in complete_checkpoints(run.checkpoints)
            )


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=["full", "broken"])
def test_reports_evaluations_and_exports_onto_a_failing_disk_are_one_sentence_each(
    write_recipe: WriteRecipe, tmp_path: Path, number: int
) -> None:
    from qtune.export.export import Options, export_run
    from qtune.report.page import write_report
    from qtune.tuned.evaluate import evaluate

    done = train.run(load_recipe(write_recipe(training="steps = 2\nbatch_size = 4")))
    before = {file: file.read_bytes() for file in done.path.rglob("*") if file.is_file()}
    for verb in (
        lambda: write_report(done),
        lambda: export_run(done, Options()),
        lambda: export_run(done, Options(adapter_only=True)),
    ):
        with (
            disk(done.path, lambda at: True, number),
            pytest.raises(QtuneError, match=f"{os.strerror(number)}|the disk is full"),
        ):
            verb()
        assert {file: file.read_bytes() for file in done.path.rglob("*") if file.is_file()} == before
    with disk(done.path, lambda at: True, number):
        assert evaluate(done, rows=2, max_new_tokens=2).rows == 2, "what was asked for minutes is shown all the same"
    assert not done.eval_file.exists()
