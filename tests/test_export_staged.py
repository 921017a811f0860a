"""An output folder is there complete, or not at all."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qtune.errors import ExportError, InputError
from qtune.export.shards import Planned, write_shards
from qtune.export.staged import refuse_existing, staged_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_folder_appears_when_the_work_is_done(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "new" / "out", 0) as work:
        (work / "weights").write_text("w")
        assert not (tmp_path / "new" / "out").exists()
    assert (tmp_path / "new" / "out" / "weights").read_text() == "w"
    assert names(tmp_path / "new") == ["out"]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fail_half_way() -> None:
        with staged_folder(tmp_path / "out", 0) as work:
            (work / "weights").write_text("w")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()
    assert names(tmp_path) == []


def test_an_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with (
        pytest.raises(InputError, match=r"out: is there already; another --output, or --force to replace it$"),
        staged_folder(tmp_path / "out", 0),
    ):
        pytest.fail("the work must not begin")


@pytest.mark.parametrize("below", ["", "/deep/model"])
@pytest.mark.parametrize("force", [False, True])
def test_a_file_is_no_place_for_a_folder_whatever_force_says(tmp_path: Path, below: str, force: bool) -> None:
    (tmp_path / "precious").write_text("kept")
    with pytest.raises(InputError, match=r"precious: is a file, and an export is a folder; another --output$"):
        refuse_existing(Path(f"{tmp_path / 'precious'}{below}"), force=force)
    assert (tmp_path / "precious").read_text() == "kept"


def test_force_replaces_the_whole_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with staged_folder(tmp_path / "out", 0, force=True) as work:
        (work / "new").touch()
        assert names(tmp_path / "out") == ["old"]
    assert names(tmp_path / "out") == ["new"]
    assert names(tmp_path) == ["out"]


def test_force_keeps_the_old_folder_when_the_work_fails(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with pytest.raises(RuntimeError), staged_folder(tmp_path / "out", 0, force=True):
        raise RuntimeError
    assert names(tmp_path / "out") == ["old"]


def test_a_disk_that_is_too_small_is_noticed_before_the_work(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match=r"needs 1048576\.06 GiB, the disk has [0-9.]+ GiB free$"),
        staged_folder(tmp_path / "out", 2**50),
    ):
        pytest.fail("the work must not begin")
    assert names(tmp_path) == []


def test_a_disk_that_is_full_is_noticed_while_weights_are_written(tmp_path: Path) -> None:
    """Every write to /dev/full fails as a write to a full disk does."""

    def fill_the_disk() -> None:
        with staged_folder(tmp_path / "out", 0) as work:
            (work / "model.safetensors").symlink_to("/dev/full")
            planned = Planned("a", torch.float32, (4096,))
            write_shards(work, [[planned]], lambda _: torch.zeros(4096))

    with pytest.raises(ExportError, match=f"^{tmp_path}: the disk is full; nothing was left behind$"):
        fill_the_disk()
    assert names(tmp_path) == []


def half_done_export(folder: Path) -> subprocess.Popen[str]:
    """A process that has begun to write `folder`/out and waits."""
    code = f"""
import time
from pathlib import Path
from qtune.export.staged import staged_folder
with staged_folder(Path({str(folder)!r}) / "out", 0) as work:
    (work / "weights").write_text("w")
    print("ready", flush=True)
    for _ in range(600):  # a signal that comes just before a sleep waits for its end
        time.sleep(0.1)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_terminated_export_leaves_nothing(tmp_path: Path) -> None:
    process = half_done_export(tmp_path)
    assert process.stdout is not None
    process.terminate()
    assert process.wait() == 128 + signal.SIGTERM
    process.stdout.close()
    assert names(tmp_path) == []


def test_a_disk_that_fills_up_is_a_clear_error_and_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(ExportError, match="the disk is full; nothing was left behind"),
        staged_folder(tmp_path / "out", 0),
    ):
        raise OSError(28, "No space left on device")
    assert names(tmp_path) == []


def test_a_killed_export_leaves_no_folder_of_that_name_and_the_next_one_clears_up(tmp_path: Path) -> None:
    process = half_done_export(tmp_path)
    assert process.stdout is not None
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    (left,) = names(tmp_path)
    assert left.startswith(f".out.partial-{process.pid}-")
    with staged_folder(tmp_path / "out", 0):
        pass
    assert names(tmp_path) == ["out"]


def test_an_export_that_still_runs_keeps_its_work(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        (tmp_path / f".out.partial-{other.pid}").mkdir()
        with staged_folder(tmp_path / "out", 0):
            pass
        assert names(tmp_path) == [f".out.partial-{other.pid}", "out"]
    finally:
        other.communicate(b"\n")
