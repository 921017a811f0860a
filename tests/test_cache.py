"""The cache may be read-only, full, or another user's: what can be read is used, and what cannot be kept is said."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import WriteRecipe
from test_memory_trace import CARD, recipe_with, tiny

from qtune.data import store
from qtune.disk import bytes_in
from qtune.errors import InputError
from qtune.memory.cached import predicted
from qtune.model.from_gguf import gguf_folder
from qtune.plan import make_plan
from qtune.preflight import examine
from qtune.recipe.file import load_recipe


@pytest.fixture(autouse=True)
def untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtune.preflight.attempted", lambda *_: "not asked")


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache inside a file: nobody, not even root, can make it."""
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "cache"
    monkeypatch.setenv("QTUNE_CACHE", str(folder))
    return folder


def said(folder: Path) -> str:
    return f"{folder}: the cache cannot be written: Not a directory; QTUNE_CACHE can name another folder"


@pytest.mark.parametrize("packing", ["", "packing = true"])
def test_a_cache_that_cannot_be_written_is_one_error_with_the_way_out(
    write_recipe: WriteRecipe, nowhere: Path, monkeypatch: pytest.MonkeyPatch, packing: str
) -> None:
    recipe = write_recipe(data=packing)
    monkeypatch.setenv("QTUNE_CACHE", str(nowhere))
    with pytest.raises(InputError) as caught:
        examine(load_recipe(recipe))
    assert str(caught.value) == said(nowhere / "examples")


def test_a_prediction_that_cannot_be_kept_is_made_all_the_same(nowhere: Path) -> None:
    recipe = recipe_with()
    assert predicted(tiny(), recipe, make_plan(recipe, CARD)).peak.bytes > 0


def test_a_gguf_file_that_cannot_be_unpacked_into_the_cache_says_so(nowhere: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(InputError) as caught:
        gguf_folder(file)
    assert str(caught.value) == said(nowhere / "gguf")


@pytest.mark.parametrize("packing", ["", "packing = true"])
def test_what_another_user_has_made_is_used_though_its_time_cannot_be_set(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch, packing: str
) -> None:
    recipe = load_recipe(write_recipe(data=packing))
    rows = len(examine(recipe).prepared.train)

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "utime", refused)
    monkeypatch.setattr(store, "write_store", lambda *_: pytest.fail("made again"))
    assert len(examine(recipe).prepared.train) == rows


def test_a_disk_that_is_full_is_said_while_rows_are_kept(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(write_recipe())
    monkeypatch.setenv("QTUNE_CACHE", str(tmp_path / "full"))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store.pa, "OSFile", full)
    with pytest.raises(InputError, match="the cache cannot be written: No space left on device; QTUNE_CACHE can name"):
        examine(recipe)


def test_a_file_of_rows_that_cannot_be_read_is_not_blamed_on_the_cache(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(write_recipe())
    monkeypatch.setenv("QTUNE_CACHE", str(tmp_path / "new"))

    def broken(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(store.pa, "OSFile", broken)
    with pytest.raises(OSError, match="Input/output error"):
        examine(recipe)


def test_what_other_processes_take_away_while_the_cache_is_counted_is_nothing(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe()
    cache = tmp_path / "shared"
    monkeypatch.setenv("QTUNE_CACHE", str(cache))
    for name in (".unfinished-1/rows", "other/gone", "other/kept"):
        (cache / "examples" / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / "examples" / name).write_text("12345")
    listed, looked_at = os.scandir, Path.stat

    def scandir(folder="."):
        if ".unfinished-1" in str(folder):
            raise FileNotFoundError(folder)
        return listed(folder)

    def stat(path: Path, **how):
        if path.name == "gone":
            raise FileNotFoundError(path)
        return looked_at(path, **how)

    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(Path, "stat", stat)
    assert bytes_in(cache / "examples") == len("12345")
    preflight = examine(load_recipe(recipe))
    assert preflight.disk is not None
    assert preflight.disk.cache_bytes > len("12345")


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["", "packing = true"])
@pytest.mark.parametrize(
    "damage",
    [lambda text: b"", lambda text: text[: len(text) // 2], lambda text: text[:-8]],
    ids=["empty", "half", "end"],
)
def test_what_a_power_cut_has_left_in_the_cache_is_made_again(
    write_recipe: WriteRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    packing: str,
    damage: Callable[[bytes], bytes],
) -> None:
    recipe = load_recipe(write_recipe(data=packing))
    monkeypatch.setenv("QTUNE_CACHE", str(tmp_path / "cut"))
    whole = examine(recipe).prepared.train[:]
    files = [file for file in (tmp_path / "cut" / "examples").rglob("*") if file.is_file()]
    assert {file.name for file in files} >= {"about.json", "examples.arrow"}
    for file in files:
        before = file.read_bytes()
        file.write_bytes(damage(before))
        assert examine(recipe).prepared.train[:] == whole, file


def test_a_cache_that_takes_a_store_and_does_not_show_it_is_said(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(write_recipe())
    monkeypatch.setenv("QTUNE_CACHE", str(tmp_path / "new"))
    monkeypatch.setattr(store, "rename_unless_there", lambda *_: None)
    with pytest.raises(InputError, match=r"the cache cannot be written: .* is not what was written; QTUNE_CACHE can"):
        examine(recipe)


def test_rates_that_cannot_be_kept_are_said_and_stop_nothing(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from test_timing import HERE, RATES

    from qtune import doctor

    monkeypatch.setattr("qtune.timing.measure.measured_rates", lambda device: RATES)
    doctor.measure_rates(HERE)
    assert f"what was measured is not kept: {said(nowhere / 'rates')}" in capsys.readouterr().err
