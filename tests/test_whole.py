"""A file or folder is there complete or not at all, whoever else writes, whenever the writer dies."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qtune.whole import clear_leftovers, passing, whole, write_text


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "deep" / "values.json"
    write_text(file, "old")

    def broken(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="No space left"):
        write_text(file, "new and longer")
    assert file.read_text() == "old"
    assert names(file.parent) == ["values.json"]


def test_a_text_file_can_be_read_by_whom_the_user_lets_read(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_text(tmp_path / "shared", "text")
    finally:
        os.umask(before)
    assert (tmp_path / "shared").stat().st_mode & 0o777 == 0o644


def test_a_passing_folder_goes_with_its_block_and_what_a_kill_leaves_of_it_is_cleared(tmp_path: Path) -> None:
    killed = """
import os, signal, sys
from pathlib import Path
from qtune.whole import passing
with passing(Path(sys.argv[1])) as folder:
    (folder / "large").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    path = tmp_path / "rehearsal"
    subprocess.run([sys.executable, "-c", killed, str(path)], check=False)
    (left,) = tmp_path.glob(".rehearsal.*/large")
    with passing(path) as folder:
        clear_leftovers(path)
        assert not left.parent.exists()
        assert names(tmp_path) == [folder.name], "a living process keeps its own"
    assert names(tmp_path) == []


def test_an_old_folder_is_seen_until_the_new_one_is_complete(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "old").touch()
    with whole(folder) as partial:
        partial.mkdir()
        (partial / "new").touch()
        assert names(folder) == ["old"]
    assert names(folder) == ["new"]
    assert names(tmp_path) == ["model"]


def test_a_block_that_fails_leaves_the_old_and_nothing_of_the_new(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "old").touch()

    def fail_half_way() -> None:
        with whole(folder) as partial:
            partial.mkdir()
            (partial / "new").touch()
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()
    assert names(tmp_path) == ["model"]
    assert names(folder) == ["old"]


@pytest.mark.parametrize("is_folder", [False, True])
def test_of_two_equal_results_the_one_that_was_there_first_stays(tmp_path: Path, is_folder: bool) -> None:
    path = tmp_path / "cached"

    def make(where: Path, text: str) -> None:
        if is_folder:
            where.mkdir()
        (where / "value" if is_folder else where).write_text(text)

    with whole(path, keep_existing=True) as partial:
        make(partial, "second")
        make(path, "first")
    assert (path / "value" if is_folder else path).read_text() == "first"
    assert names(tmp_path) == ["cached"]


def test_what_a_killed_writer_left_is_cleared_but_not_what_a_live_one_makes(tmp_path: Path) -> None:
    code = f"""
import os
from pathlib import Path
from qtune.whole import whole
with whole(Path({str(tmp_path / "out")!r})) as partial:
    partial.write_text("half")
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert len(names(tmp_path)) == 1
    with whole(tmp_path / "out") as partial:
        partial.write_text("mine")
        clear_leftovers(tmp_path / "out")
        assert names(tmp_path) == [partial.name]
    assert names(tmp_path) == ["out"]


def test_what_is_refused_is_named_as_people_know_it(tmp_path: Path) -> None:
    def opened_as_a_file() -> None:
        with whole(tmp_path / "file") as partial:
            partial.mkdir()
            partial.open("w")

    with pytest.raises(IsADirectoryError) as opened:
        opened_as_a_file()
    assert str(opened.value) == f"[Errno 21] Is a directory: '{tmp_path / 'file'}'"
    with pytest.raises(FileNotFoundError) as renamed, whole(tmp_path / "file"):
        pass
    assert str(renamed.value) == f"[Errno 2] No such file or directory: '{tmp_path / 'file'}'"
