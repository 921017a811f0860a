"""A digit that a disk, a copy or a hand has changed in the files of a run or of an export is said, wherever it is."""

import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import FUZZ_SEED, FUZZED
from kept_folder import KeptFolder
from safetensors.torch import load_file, save_file
from test_run_drift import RECIPE, World, kept, world  # noqa: F401  fixtures

from qtune import manifest
from qtune.errors import InputError, ModelError, Problem, QtuneError, RunError, VerificationError
from qtune.export.export import Options, export_run, verify_only
from qtune.export.verification import VERIFICATION, damage_of, proof_today, read_proof
from qtune.model.load import load_config, load_tokenizer
from qtune.preflight import examine
from qtune.recipe.file import Resolved, load_recipe
from qtune.recipe.schema import Model
from qtune.records import CHECKSUM
from qtune.report.page import write_report
from qtune.run.drift import said_of
from qtune.run.folder import RunDir
from qtune.run.lock import read_lock
from qtune.run.memory import read_memory
from qtune.run.metrics import AFTER, NoteRecord, append_metric, read_metrics
from qtune.run.resolved import resolved_recipe
from qtune.run.shown_rows import kept_rows
from qtune.training import train
from qtune.tuned.chat import open_session
from qtune.tuned.evaluate import evaluate
from qtune.tuned.evaluation import read_evaluation
from qtune.verdicts.of_run import attempt_verdicts


@pytest.fixture(scope="module")
def exported(kept: KeptFolder) -> Path:  # noqa: F811
    """The export of the finished run, verified; with its evaluation it is in the copy that `world` restores."""
    run = RunDir.open(kept.folder / "runs" / "finished")
    evaluate(run, rows=2, max_new_tokens=2)
    export_run(run, Options())
    shutil.rmtree(kept.copy)
    shutil.copytree(kept.folder, kept.copy)
    return run.path / "model"


READERS: dict[str, Callable[[RunDir], object]] = {
    "metrics.jsonl": lambda run: read_metrics(run.metrics_file),
    "memory.json": read_memory,
    "lock.json": read_lock,
    "eval.json": read_evaluation,
    "rows.json": kept_rows,
    "model/verify.json": lambda run: read_proof(run.path / "model"),
    "model/manifest.json": lambda run: require_whole(run.path / "model"),
    "adapter/manifest.json": lambda run: require_whole(run.adapter),
}


def require_whole(folder: Path) -> None:
    if (said := manifest.fault(folder)) is not None:
        raise RunError(Problem(str(folder / manifest.NAME), said))


SEALED = ("model/manifest.json", "adapter/manifest.json")


def places_of_digits(text: str) -> list[int]:
    """Where the digits of numbers and hashes stand; those of the checksum's name make it an old file."""
    return [found.start() for found in re.finditer(r"\d", text.replace(CHECKSUM, "-" * len(CHECKSUM)))]


def another(digit: str) -> str:
    return str((int(digit) + 1) % 10)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "metrics.jsonl" else []) for name in READERS]
)
def test_no_digit_of_a_record_can_change_without_a_word(name: str, exported: Path, world: World) -> None:  # noqa: F811
    run = world.finished
    file = run.path / name
    text, before = file.read_text(), READERS[name](run)
    places = places_of_digits(text)
    for place in places[:: max(1, len(places) // 150)]:
        file.write_text(text[:place] + another(text[place]) + text[place + 1 :])
        said, now = "", None
        try:
            now = READERS[name](run)
        except RunError as error:
            said = str(error)
        # A digit beyond what a float can hold leaves the number what it was.
        same = name not in SEALED and now == before
        assert str(file) in said or same, f"{text[max(0, place - 60) : place]} -> {another(text[place])}"


def test_a_changed_digit_is_named_with_its_line_and_the_way_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    for second in (1.0, 2.0, 3.0):
        append_metric(file, NoteRecord("said", second))
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], lines[1].replace("2.0", "7.0"), lines[2], ""]))
    with pytest.raises(RunError) as caught:
        read_metrics(file)
    assert str(caught.value) == (
        f"{file}:2: is no record of a run: it is not what was written, for its checksum is another; if it is right as "
        "it is, remove crc32, or remove the line, and after and crc32 from the next one"
    )
    # Both ways out lead out.
    last = {name: value for name, value in json.loads(lines[2]).items() if name not in (AFTER, CHECKSUM)}
    file.write_text("\n".join([lines[0], json.dumps(last), ""]))
    assert [record.seconds for record in read_metrics(file)] == [1.0, 3.0]
    values = {name: value for name, value in json.loads(lines[1]).items() if name != CHECKSUM}
    file.write_text("\n".join([lines[0], json.dumps(values | {"seconds": 7.0}), lines[2], ""]))
    assert [record.seconds for record in read_metrics(file)] == [1.0, 7.0, 3.0]


def test_records_that_an_editor_has_saved_in_its_own_way_are_what_they_were(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    append_metric(file, NoteRecord("µ \ud800 \u2028", 1.0))
    before = read_metrics(file)
    values = json.loads(file.read_text())
    file.write_text(json.dumps(dict(sorted(values.items())), separators=(",", ":")) + "\r\n")
    assert read_metrics(file) == before


def test_no_value_of_resolved_toml_can_change_without_a_word(exported: Path, world: World) -> None:  # noqa: F811
    """By the lock, which keeps the values; where something is, is asked by its contents."""
    run = world.finished
    text = run.resolved_file.read_text()
    assert said_of(run) == []
    silent = []
    for found in re.finditer(r"(?m)^(?!train|validation|base|directory|name)[a-z_.]+ = ([^#\n]*)", text):
        for digit in re.finditer(r"\d", found[1]):
            place = found.start(1) + digit.start()
            run.resolved_file.write_text(text[:place] + another(text[place]) + text[place + 1 :])
            try:
                if not said_of(run):
                    silent.append(found[0])
            except QtuneError:
                pass
    assert silent == []


def damaged_texts(text: str, generator: random.Random, count: int) -> Iterator[bytes]:
    """A file with some of its characters changed, taken out, doubled, swapped, cut off, or of other values."""
    odd = ["", "9", "-", "e9", "null", "NaN", "true", '"', "{", "}", "[", "]", ":", ",", "\n", "\0", "é", "=", "#"]
    for _ in range(count):
        found = text
        for _ in range(generator.choice((1, 1, 2, 5))):
            at = generator.randrange(len(found) or 1)
            to = at + generator.choice((0, 1, 1, 4, 40))
            change = generator.randrange(4)
            if change == 0:
                found = found[:at] + generator.choice(odd) + found[to:]
            elif change == 1:
                found = found[:to] + found[at:]
            elif change == 2:
                found = found[:at] + found[to:][::-1][:8] + found[to:]
            else:
                found = found[:at] if generator.random() < 0.2 else found[:at] + found[to:]
        yield found.encode(generator.choice(("utf-8", "utf-8", "utf-8", "utf-16", "utf-8-sig")))


FILES = {**READERS, "resolved.toml": resolved_recipe}


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_no_random_damage_to_a_file_of_a_run_ends_in_anything_but_its_values_or_a_sentence(
    name: str,
    exported: Path,
    world: World,  # noqa: F811
) -> None:
    run, generator, said = world.finished, random.Random(f"{FUZZ_SEED} {name}"), 0
    file = run.path / name
    text, before = file.read_text(), FILES[name](run)
    for content in damaged_texts(text, generator, 200 * FUZZED):
        if b"crc32" in text.encode() and b"crc32" not in content.replace(b"\0", b""):
            continue  # without the name of its checksum a record is one of an older version, or one that was edited
        lines = [line.replace(b"\0", b"") for line in content.split(b"\n") if line.strip()]
        if name == "metrics.jsonl" and any(b'"crc32"' not in line for line in lines[:-1]):
            continue  # and so is each of its lines
        file.write_bytes(content)
        now = None
        try:
            now = FILES[name](run)
        except RunError as error:
            said += str(file) in str(error)
            continue
        if name == "metrics.jsonl":  # a last line that was cut off is left out, and empty lines are none
            assert isinstance(now, tuple)
            assert now == before[: len(now)], content  # where it ends, the adapter's manifest says
        elif name != "resolved.toml":  # whose values the lock keeps
            assert now == before, content
    assert said


# --- exports ---------------------------------------------------------------------------------------------------------


def flip_a_bit(file: Path, place: float) -> None:
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    file.write_bytes(content)


def test_an_exports_manifest_names_all_that_a_loader_reads(exported: Path, world: World) -> None:  # noqa: F811
    values = json.loads((exported / manifest.NAME).read_text())
    files = {file.name for file in exported.iterdir()}
    assert set(values["files"]) == files - {manifest.NAME, VERIFICATION, "README.md"}
    assert manifest.fault(exported) is None


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"])
def test_one_flipped_bit_of_an_export_is_said_by_chat_report_and_verification(
    name: str,
    exported: Path,
    world: World,  # noqa: F811
) -> None:
    # The last byte of the weights is the low half of a number: what it changes, no comparison of outputs would see.
    flip_a_bit(exported / name, 1.0 if name == "model.safetensors" else 0.5)
    said = f"{name} is not what was saved: its SHA-256 is another"
    with pytest.raises(ModelError) as caught:
        open_session(str(exported))
    assert str(caught.value) == (
        f"{exported}: is not what was exported: {said}; export it again; if it is right as it is, remove its "
        "manifest.json"
    )
    page = write_report(world.finished).read_text()
    assert f"it is not what was exported: {said}" in page
    verdict = next(one for one in attempt_verdicts(world.finished) if one.question == "export")
    assert verdict.standing == "bad"
    with pytest.raises(VerificationError, match=re.escape(said)):
        verify_only(exported, world.finished)
    proof = read_proof(exported)
    assert not proof.verified
    assert any(said in failure for failure in proof.failures)


def test_an_export_that_is_what_it_was_is_verified_again(exported: Path, world: World) -> None:  # noqa: F811
    assert verify_only(exported, world.finished) == exported
    assert proof_today(exported, world.finished.path).verified
    open_session(str(exported))


@pytest.mark.parametrize(
    "text",
    [
        '{"files": ["model"]}',
        "[]",
        "not JSON",
        '{"files": {"config.json": {"sha256": "0", "size": 1}}}',
        '{"files": {}}',
    ],
)
def test_the_manifest_of_another_program_is_none_of_ours(text: str, world: World) -> None:  # noqa: F811
    (world.base / manifest.NAME).write_text(text)
    open_session(str(world.base))


@pytest.mark.parametrize("name", ["/etc/passwd", "../rows.jsonl", "."])
def test_a_manifest_that_names_files_elsewhere_is_refused(name: str, tmp_path: Path) -> None:
    from qtune.records import write_record

    write_record(tmp_path / manifest.NAME, manifest.Manifest({name: manifest.SavedFile(0, "")}))
    assert manifest.fault(tmp_path) == f"its manifest.json names {name!r}, which is no file in it"


def test_files_in_folders_of_a_sealed_folder_are_sealed_too(tmp_path: Path) -> None:
    (tmp_path / "model" / "more").mkdir(parents=True)
    (tmp_path / "model" / "more" / "tool.jinja").write_text("x")
    manifest.seal(tmp_path / "model")
    (tmp_path / "model" / "more" / "tool.jinja").write_text("y")
    assert str(manifest.fault(tmp_path / "model")).startswith("more/tool.jinja is not what was saved")


def test_a_manifest_of_another_program_says_nothing_of_an_export(exported: Path) -> None:
    (exported / manifest.NAME).write_text('{"name": "a page", "icons": []}')
    assert damage_of(exported) is None
    manifest.add_to_seal(exported, [exported / "config.json"])
    assert json.loads((exported / manifest.NAME).read_text()) == {"name": "a page", "icons": []}


def test_an_edited_file_that_changes_no_figure_is_said_with_what_to_do(
    exported: Path,
    world: World,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = exported / "generation_config.json"
    file.write_text(f"{file.read_text()} ")
    monkeypatch.chdir(exported)
    with pytest.raises(VerificationError) as caught:
        verify_only(Path(), world.finished)
    assert "is not the trained model" not in str(caught.value)
    assert "computes what the trained model does all the same: export it again; if it is right" in str(caught.value)
    card = (exported / "README.md").read_text()
    assert f"# {world.finished.name}\n" in card
    assert "NOT VERIFIED, for the reasons below" in card


@pytest.fixture
def on_export(exported: Path, world: World, tmp_path: Path) -> Resolved:  # noqa: F811
    """A recipe whose base is the exported model."""
    file = tmp_path / "on_export.toml"
    file.write_text(RECIPE.format(home=world.home, data="").replace(f'"{world.base}"', f'"{exported}"'))
    return load_recipe(file, [f"output.directory={tmp_path}/runs", "training.steps=1"])


def test_an_exported_model_is_a_base_like_any_other(on_export: Resolved) -> None:
    assert evaluate(train.run(on_export), rows=1, max_new_tokens=1).rows == 1


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"])
def test_an_exported_model_that_has_changed_is_no_base(name: str, on_export: Resolved, exported: Path) -> None:
    flip_a_bit(exported / name, 1.0 if name == "model.safetensors" else 0.5)
    model = on_export.recipe.model
    for verb in (lambda: examine(on_export), lambda: load_config(model), lambda: load_tokenizer(model)):
        with pytest.raises(InputError) as caught:
            verb()
        assert str(caught.value) == (
            f"{exported}: is not what was exported: {name} is not what was saved: its SHA-256 is another; export it "
            "again; if it is right as it is, remove its manifest.json"
        )


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "model-00002-of-00002.safetensors", "model.safetensors.index.json", "modeling_x.py"]
)
def test_a_file_that_has_come_into_an_export_since_is_said(name: str, exported: Path, world: World) -> None:  # noqa: F811
    (exported / "notes.md").write_text("notes")
    (exported / "done-Q4_K_M.gguf").write_text("made by another program")
    assert damage_of(exported) is None
    (exported / name).write_text("{}")
    said = f"is not what was exported: {name} has come in since"
    assert damage_of(exported) == f"it {said}"
    with pytest.raises(ModelError, match=re.escape(said)):
        open_session(str(exported))


def test_an_adapter_beside_a_base_is_not_put_on_it_without_a_word(world: World) -> None:  # noqa: F811
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(world.finished.adapter / name, world.base)
    for verb in (lambda: load_config(Model(base=str(world.base))), lambda: open_session(str(world.finished.path))):
        with pytest.raises(ModelError) as caught:
            verb()
        assert str(caught.value) == (
            f"{world.base}: has an adapter beside the model, which would be put on it; move adapter_config.json "
            "elsewhere"
        )


def test_a_run_on_an_exported_model_that_has_changed_since_stops(on_export: Resolved, exported: Path) -> None:
    run = train.run(on_export)
    flip_a_bit(exported / "generation_config.json", 0.5)
    for verb in (
        lambda: evaluate(run),
        lambda: open_session(str(run.path)),
        lambda: export_run(run, Options()),
        lambda: train.run(on_export),
    ):
        with pytest.raises(
            InputError, match=r"is not what was exported: generation_config\.json is not what was saved"
        ):
            verb()
    assert "generation_config.json is not what was saved" in write_report(run).read_text()


def test_a_damaged_adapter_is_none_to_start_from(exported: Path, world: World, tmp_path: Path) -> None:  # noqa: F811
    file = tmp_path / "further.toml"
    file.write_text(
        RECIPE.format(home=world.home, data="").replace("rank = 4", f'rank = 4\nstart_from = "{world.finished.path}"')
    )
    examine(load_recipe(file)).require()
    for name in ("trained_state.safetensors", "adapter_model.safetensors", "adapter_config.json"):
        content = (world.finished.adapter / name).read_bytes()
        flip_a_bit(world.finished.adapter / name, 0.9)
        with pytest.raises(InputError, match=f"is not what was saved: {name} is not what was saved: its SHA-256"):
            examine(load_recipe(file)).require()
        (world.finished.adapter / name).write_bytes(content)


# --- adapters alone --------------------------------------------------------------------------------------------------


def test_an_adapter_that_is_exported_alone_is_compared_file_by_file(
    exported: Path,
    world: World,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = export_run(world.finished, Options(adapter_only=True, output=tmp_path / "alone"))
    files = {file.name for file in folder.iterdir()} - {manifest.NAME, "README.md"}
    assert set(json.loads((folder / manifest.NAME).read_text())["files"]) == files
    assert verify_only(folder, world.finished) == folder
    assert "is what was exported, and its adapter is that of" in capsys.readouterr().err
    for name in sorted({*files, manifest.NAME}):
        content = (folder / name).read_bytes()
        flip_a_bit(folder / name, 0.5)
        with pytest.raises(VerificationError, match=f"it is not what was exported: .*{re.escape(name)} "):
            verify_only(folder, world.finished)
        with pytest.raises(ModelError, match=f"is not what was exported: .*{re.escape(name)} "):
            open_session(str(folder))
        (folder / name).write_bytes(content)


def test_the_adapter_of_another_run_is_not_this_runs(exported: Path, world: World, tmp_path: Path) -> None:  # noqa: F811
    folder = export_run(world.finished, Options(adapter_only=True, output=tmp_path / "alone"))
    other = {name: tensor + 1 for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    save_file(other, folder / "adapter_model.safetensors")
    (folder / manifest.NAME).unlink()
    with pytest.raises(VerificationError) as caught:
        verify_only(folder, world.finished)
    assert str(caught.value) == (
        f"{folder} is not the adapter of {world.finished.path}: adapter_model.safetensors differ"
    )
