"""What qtune keeps in its cache is compared before it is used: other bytes are said in a line, and made again."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import WriteRecipe
from test_memory_trace import CARD, recipe_with, tiny
from test_model_builtin import tiny as built_in  # noqa: F401  a fixture
from test_model_builtin import write_gguf
from test_timing import RATES

from qtune import manifest
from qtune.device.cards import card_named
from qtune.device.rates import data_sheet_rates
from qtune.errors import InputError, ModelError
from qtune.memory.cached import predicted, traced_work
from qtune.memory.predict import Longest
from qtune.model import as_made, builtin, from_gguf
from qtune.model.builtin import cached_folder
from qtune.model.from_gguf import gguf_folder
from qtune.model.local import base_folder
from qtune.plan import make_plan
from qtune.preflight import examine
from qtune.recipe.file import load_recipe
from qtune.recipe.schema import Model
from qtune.records import CHECKSUM, sealed
from qtune.timing.known import keep_rates, known_rates


def flipped(place: float) -> Callable[[bytes], bytes]:
    """One bit of the byte at a share of the whole."""

    def damage(content: bytes) -> bytes:
        at = int(place * (len(content) - 1))
        return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]

    return damage


def of_another_version(content: bytes) -> bytes:
    """Good JSON with a good checksum, and with nothing in it that is known."""
    return json.dumps(sealed({"of": "another version"})).encode()


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "a bit at the start": flipped(0.0),
    "a bit in the middle": flipped(0.5),
    "a bit at the end": flipped(1.0),
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "no UTF-8": lambda content: b"\xff\xfe" + content,
}
ALL = {**DAMAGES, "of another version": of_another_version}


def damage(file: Path, how: Callable[[bytes], bytes]) -> None:
    """Damages a file and leaves its time as it was."""
    state = file.stat()
    file.write_bytes(how(file.read_bytes()))
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that is empty."""
    monkeypatch.setenv("QTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("qtune.preflight.attempted", lambda *_: "not asked")
    return tmp_path / "cache"


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["", "packing = true"])
def test_encoded_and_packed_rows_that_have_changed_are_said_and_made_again(
    write_recipe: WriteRecipe, cache: Path, packing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    written = write_recipe(data=packing)
    os.environ["QTUNE_CACHE"] = str(cache)  # monkeypatched by both fixtures
    recipe = load_recipe(written)
    whole = examine(recipe).prepared.train[:]
    names = [file.relative_to(cache) for file in sorted((cache / "examples").rglob("*")) if file.is_file()]
    assert {name.name for name in names} == {"about.json", "examples.arrow", *(["packed.arrow"] if packing else [])}
    # Packed rows first: once the rows below them are made again, they are packed under another name.
    names.sort(key=lambda name: not (cache / name).with_name("packed.arrow").is_file())
    for name in names:
        ways = ALL if name.name == "about.json" else {way: DAMAGES[way] for way in ("a bit in the middle", "cut")}
        for way, how in ways.items():
            damage(cache / name, how)
            capsys.readouterr()
            assert examine(recipe).prepared.train[:] == whole, (name, way)
            said = f"{(cache / name).parent} is not what was kept there; its rows are made again\n"
            assert said in capsys.readouterr().err, (name, way)


def test_a_row_that_a_bit_turns_into_another_is_never_trained_on(write_recipe: WriteRecipe, cache: Path) -> None:
    """Ids are plain numbers in the file: every one of them can be another, and the file is as good as before."""
    written = write_recipe()
    os.environ["QTUNE_CACHE"] = str(cache)
    recipe = load_recipe(written)
    whole = examine(recipe).prepared.train[:]
    (file,) = (cache / "examples").glob("*/examples.arrow")
    content = file.read_bytes()
    ids = whole["input_ids"][0]
    at = content.index(b"".join(one.to_bytes(4, "little") for one in ids[:8]))
    file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    assert examine(recipe).prepared.train[:] == whole


def test_damaged_rows_in_a_cache_of_another_user_are_not_used(
    write_recipe: WriteRecipe, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = write_recipe()
    os.environ["QTUNE_CACHE"] = str(cache)
    recipe = load_recipe(written)
    examine(recipe)
    (file,) = (cache / "examples").glob("*/examples.arrow")
    damage(file, flipped(0.5))
    remove = shutil.rmtree

    def refused(path: Path, **how: bool) -> None:
        if Path(path) == file.parent:
            raise PermissionError(1, "Operation not permitted")
        remove(path, **how)

    monkeypatch.setattr(shutil, "rmtree", refused)
    with pytest.raises(InputError, match=r"examples: the cache cannot be written: .* is not what was written; QTUNE_C"):
        examine(recipe)


def test_rows_of_another_file_in_the_place_of_these_are_never_trained_on(
    write_recipe: WriteRecipe, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whole, with every checksum right, and under a name that says something else."""
    written = write_recipe(data="packing = true")
    os.environ["QTUNE_CACHE"] = str(cache)
    recipe, other = load_recipe(written), load_recipe(written, ["data.max_length=60"])
    folders = []
    for one in (recipe, other):
        before = set((cache / "examples").glob("*"))
        prepared = examine(one).prepared
        folders.append((prepared.train[:], set((cache / "examples").glob("*")) - before))
    (whole, ours), (_, theirs) = folders
    for kind in ("examples.arrow", "packed.arrow"):
        (here,), (there,) = ([folder for folder in some if (folder / kind).is_file()] for some in (ours, theirs))
        shutil.rmtree(here)
        shutil.copytree(there, here)
    assert examine(recipe).prepared.train[:] == whole
    assert capsys.readouterr().err.count(" is not what was kept there; its rows are made again\n") >= 1


def test_a_step_that_was_traced_for_another_batch_is_no_answer(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_with()
    plan = make_plan(recipe, CARD)
    files, found = [], []
    for length in (64, 96):
        before = set((cache / "memory").glob("*"))
        found.append(predicted(tiny(1), recipe, plan, Longest(length)).need)
        files += set((cache / "memory").glob("*")) - before
    shutil.copy(files[1], files[0])
    assert predicted(tiny(1), recipe, plan, Longest(64)).need == found[0]
    assert f"{files[0]} is not what was kept there; it is traced again\n" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("room", ["memory", "work"])
def test_what_was_traced_and_has_changed_is_said_and_traced_again(
    room: str, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_with()
    plan, longest = make_plan(recipe, CARD), Longest(64)
    trace: Callable[[], object] = {
        "memory": lambda: replace(predicted(tiny(1), recipe, plan, longest), seconds=0.0),
        "work": lambda: traced_work(tiny(1), recipe, plan, longest),
    }[room]
    before = trace()
    (file,) = (cache / room).iterdir()
    for way, how in ALL.items():
        damage(file, how)
        assert trace() == before, way
        assert f"{file} is not what was kept there; it is traced again\n" in capsys.readouterr().err, way
    assert trace() == before
    assert capsys.readouterr().err == ""


def test_rates_that_are_not_those_that_were_measured_are_said_and_not_used(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = card_named("H100").device()
    for way, how in ALL.items():
        file = keep_rates(card, replace(RATES, moved=float(1 + len(way))))
        damage(file, how)
        assert known_rates(card) == data_sheet_rates(card_named("H100")), way
        known_rates(card)
        said = f"{file} is not what was measured, and is not used; qtune doctor --measure measures again\n"
        assert capsys.readouterr().err == said, way


def test_rates_that_an_older_version_measured_are_used(cache: Path) -> None:
    card = card_named("H100").device()
    file = keep_rates(card, RATES)
    values = json.loads(file.read_text())
    del values[CHECKSUM]
    file.write_text(json.dumps(values))
    assert known_rates(card) == RATES


# --- models ----------------------------------------------------------------------------------------------------------


def copied(file: Path, folder: Path) -> None:
    """In place of a conversion, which takes seconds."""
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(file.read_bytes())
    (folder / "config.json").write_text('{"layers": 1}')


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch, built_in: tuple) -> list[Path]:  # noqa: F811
    """The folders that were made."""
    made: list[Path] = []

    def convert(file: Path, folder: Path) -> None:
        made.append(folder)
        copied(file, folder)

    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(built_in[1]))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setattr(builtin, "run_conversion", lambda model, file, folder: convert(file, folder))
    monkeypatch.setattr(from_gguf, "convert", convert)
    return made


KEPT = ("model.safetensors", "config.json", "manifest.json")


@pytest.mark.slow
@pytest.mark.parametrize("name", KEPT)
def test_a_built_in_model_that_has_changed_is_said_and_made_again(
    name: str,
    tmp_path: Path,
    built_in: tuple,  # noqa: F811
    conversions: list[Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = cached_folder(built_in[0], tmp_path)
    damage(folder / name, flipped(0.5))
    later(folder)
    assert cached_folder(built_in[0], tmp_path) == folder
    assert manifest.fault(folder) is None
    assert len(conversions) == 2
    said = capsys.readouterr().err
    assert said.count(f"{folder} is not what was kept there: ") == 1
    assert said.count("; it is made again\n") == 1


def later(folder: Path) -> None:
    """Another process, which remembers nothing."""
    as_made._damage.cache_clear()


def test_the_folder_of_another_gguf_file_in_the_place_of_this_is_made_again(
    tmp_path: Path, cache: Path, conversions: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "one.gguf", tmp_path / "two.gguf"]
    for number, file in enumerate(files):
        write_gguf(file)
        file.write_bytes(file.read_bytes() + bytes(32 * number))
    here, there = (gguf_folder(file) for file in files)
    before = (here / "model.safetensors").read_bytes()
    shutil.rmtree(here)
    shutil.copytree(there, here)
    later(here)
    assert (gguf_folder(files[0]) / "model.safetensors").read_bytes() == before
    said = f"{here} is not what was kept there: it was made as {there.name}, which is something else; it is made again"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("way", DAMAGES)
def test_a_gguf_files_folder_that_has_changed_is_said_and_made_again(
    name: str, way: str, tmp_path: Path, cache: Path, conversions: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(file)
    folder = gguf_folder(file)
    before = {one.name: one.read_bytes() for one in folder.iterdir()}
    damage(folder / name, DAMAGES[way])
    later(folder)
    assert gguf_folder(file) == folder
    assert {one.name: one.read_bytes() for one in folder.iterdir()} == before
    assert len(conversions) == 2
    assert f"{folder} is not what was kept there: " in capsys.readouterr().err
    assert gguf_folder(file) == folder
    assert capsys.readouterr().err == ""


def test_a_damaged_folder_of_another_user_is_not_used(
    tmp_path: Path, cache: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(file)
    folder = gguf_folder(file)
    damage(folder / "config.json", flipped(0.5))
    later(folder)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(InputError) as caught:
        gguf_folder(file)
    assert str(caught.value) == (
        f"{cache / 'gguf'}: the cache cannot be written: Permission denied; QTUNE_CACHE can name another folder"
    )


def test_a_gguf_file_with_other_bytes_of_the_same_size_and_time_is_another(
    tmp_path: Path, cache: Path, conversions: list[Path]
) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(file)
    first = gguf_folder(file)
    damage(file, flipped(1.0))
    from_gguf._key.cache_clear()
    second = gguf_folder(file)
    assert second != first
    assert (second / "model.safetensors").read_bytes() == file.read_bytes()


def test_a_folder_of_the_cache_from_before_there_were_manifests_gets_one(
    tmp_path: Path, cache: Path, conversions: list[Path]
) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(file)
    folder = gguf_folder(file)
    (folder / manifest.NAME).unlink()
    assert gguf_folder(file) == folder
    damage(folder / "config.json", flipped(0.5))
    later(folder)
    gguf_folder(file)
    assert len(conversions) == 2


def test_a_bit_between_the_blocks_of_a_large_file_is_found_where_its_weights_are_loaded(
    tmp_path: Path, cache: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "SMALL_BYTES", 1024)
    monkeypatch.setattr(manifest, "BLOCKS", 3)
    monkeypatch.setattr(manifest, "BLOCK_BYTES", 256)
    file = tmp_path / "model.gguf"
    write_gguf(file)
    folder = gguf_folder(file)
    damage(folder / "model.safetensors", flipped(0.5))
    later(folder)
    gguf_folder(file)
    assert len(conversions) == 2, "a block of it is other"
    damage(folder / "model.safetensors", flipped(0.3))
    later(folder)
    assert base_folder(Model(base=str(file))) == str(folder)
    with pytest.raises(ModelError) as caught:
        as_made.require_as_made(folder, whole=True)
    assert str(caught.value) == (
        f"{folder}: is not what was kept there: model.safetensors is not what was saved: its SHA-256 is another; "
        "remove it, and it is made again"
    )
