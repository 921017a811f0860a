"""A folder is put back as its copy is, whatever was done to it."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from kept_folder import KeptFolder


def contents(folder: Path) -> dict[str, object]:
    """Links by where they lead, folders by their rights, files by these and what is in them."""
    return {
        str(path.relative_to(folder)): path.readlink()
        if path.is_symlink()
        else (path.stat().st_mode, path.read_bytes() if path.is_file() else "folder")
        for path in folder.rglob("*")
    }


def swap(one: Path, other: Path) -> None:
    one.rename(one.with_name("between"))
    other.rename(one)
    one.with_name("between").rename(other)


def to_folder(file: Path) -> None:
    file.unlink(missing_ok=True)
    (file / "inner").mkdir(parents=True)
    (file / "inner" / "more").write_text("x")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "nothing": lambda world: None,
    "same size": lambda world: (world / "a.json").write_text("B"),
    "same size, back in time": lambda world: ((world / "a.json").write_text("B"), os.utime(world / "a.json", (1, 1))),
    "appended": lambda world: (world / "in" / "b.json").write_text("{} and more"),
    "files swapped": lambda world: swap(world / "a.json", world / "c.json"),
    "rights": lambda world: (world / "a.json").chmod(0o600),
    "a folder's rights": lambda world: (world / "in").chmod(0o500),
    "deleted": lambda world: (world / "in" / "b.json").unlink(),
    "folder deleted": lambda world: shutil.rmtree(world / "in"),
    "more files": lambda world: to_folder(world / "in" / "new"),
    "file to folder": lambda world: to_folder(world / "a.json"),
    "folder to file": lambda world: (shutil.rmtree(world / "in"), (world / "in").write_text("x")),
    "link to file": lambda world: ((world / "link").unlink(), (world / "link").write_text("x")),
    "link elsewhere": lambda world: ((world / "link").unlink(), (world / "link").symlink_to("nowhere")),
    "folder behind a link": lambda world: ((world / "empty").rmdir(), (world / "empty").symlink_to(world / "in")),
    "everything": lambda world: [shutil.rmtree(world), world.mkdir()],
}


@pytest.mark.parametrize("way", DAMAGE)
def test_it_is_as_it_was(way: str, tmp_path: Path) -> None:
    copy, world = tmp_path / "copy", tmp_path / "world"
    (copy / "in").mkdir(parents=True)
    (copy / "empty").mkdir()
    for name, text in (("a.json", "A"), ("c.json", "C"), ("in/b.json", "{}")):
        (copy / name).write_text(text)
        os.utime(copy / name, (1e9, 1e9))  # a copy is older than what is done to the folder
    (copy / "link").symlink_to("in")
    shutil.copytree(copy, world, symlinks=True)
    kept, before = KeptFolder(world, copy), contents(copy)
    for _ in range(3):  # damaged as soon as it was put back, when the clock of the file system may not have gone on
        DAMAGE[way](world)
        kept.put_back()
        assert contents(world) == before
    assert contents(copy) == before


def test_what_is_untouched_is_not_written_again(tmp_path: Path) -> None:
    copy, world = tmp_path / "copy", tmp_path / "world"
    copy.mkdir()
    for name in "abc":
        (copy / name).write_text(name)
    shutil.copytree(copy, world)
    kept = KeptFolder(world, copy)
    kept.put_back()
    places = {file.name: file.stat().st_ino for file in world.iterdir()}
    (tmp_path / "d").hardlink_to(world / "b")  # nothing new can have b's inode
    (world / "b").unlink()
    (world / "more").touch()
    kept.put_back()
    again = {file.name: file.stat().st_ino for file in world.iterdir()}
    assert {name for name in places if places[name] != again[name]} == {"b"}
    assert again.keys() == places.keys()
