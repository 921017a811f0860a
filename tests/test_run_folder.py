"""A run's folder: names that are free, files that are whole, errors that say which run is meant."""

import os
import re
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import qtune
from qtune.cli import app
from qtune.commands.run import _say_others as say_others
from qtune.device.present import Device
from qtune.errors import InputError, ModelError, RunError
from qtune.plan import make_plan
from qtune.recipe.file import check_recipe
from qtune.recipe.schema import Model
from qtune.run.checkpoints import TRAINED_STATE
from qtune.run.folder import RunDir
from qtune.run.listing import list_runs
from qtune.run.owner import Owner
from qtune.run.resolved import resolved_text
from qtune.run.resumption import beginning_anew, newest_unfinished

CPU = Device("cpu", "CPU", 8 << 30, 6 << 30, bf16=False)


def started(directory: Path, name: str) -> RunDir:
    run = RunDir.create(directory, name, "# a recipe\n")
    run.write_text(run.resolved_file, "# resolved\n")
    return run


def finish(run: RunDir) -> None:
    run.adapter.mkdir()
    (run.adapter / "adapter_config.json").write_text("{}")


def test_a_taken_name_gets_the_next_number(tmp_path: Path) -> None:
    runs = [RunDir.create(tmp_path / "runs", "quick", "text") for _ in range(3)]
    assert [run.path.name for run in runs] == ["quick", "quick-2", "quick-3"]
    assert runs[2].recipe_file.read_text() == "text"


def test_open_wants_a_run_and_names_those_that_are_there(tmp_path: Path) -> None:
    run = started(tmp_path, "quick")
    assert RunDir.open(run.path) == run
    with pytest.raises(RunError) as caught:
        RunDir.open(tmp_path / "quikc")
    assert str(caught.value) == f"{tmp_path}/quikc: no such folder; runs there: {run.path}"
    (tmp_path / "other").mkdir()
    with pytest.raises(RunError) as caught:
        RunDir.open(tmp_path / "other")
    said = f"{tmp_path}/other: is not a run: it has no resolved.toml; runs there: {run.path}"
    assert str(caught.value) == said


def test_a_run_without_an_adapter_says_how_to_finish_it(tmp_path: Path) -> None:
    run = started(tmp_path, "quick")
    with pytest.raises(RunError) as caught:
        run.finished_adapter()
    assert str(caught.value) == f"{run.path}: has no adapter yet; finish it with: qtune run --resume {run.path}"
    finish(run)
    assert run.finished_adapter() == run.adapter


def test_the_newest_unfinished_run_of_a_name_is_found(tmp_path: Path) -> None:
    assert newest_unfinished(tmp_path / "none", "quick") is None
    first, second, third = (started(tmp_path, "quick") for _ in range(3))
    started(tmp_path, "quick-lora")
    started(tmp_path, "quickest")
    for age, run in enumerate((third, second, first)):
        os.utime(run.resolved_file, (time.time() - 60 * age,) * 2)
    finish(third)
    assert newest_unfinished(tmp_path, "quick") == second


def test_a_run_whose_model_was_never_loaded_is_not_gone_on_with_before_one_that_trained(tmp_path: Path) -> None:
    trained, dead = started(tmp_path, "quick"), started(tmp_path, "quick")
    trained.lock_file.write_text("{}")
    os.utime(trained.resolved_file, (time.time() - 60,) * 2)
    assert newest_unfinished(tmp_path, "quick") == trained
    dead.lock_file.write_text("{}")
    assert newest_unfinished(tmp_path, "quick") == dead


def test_a_name_may_hold_what_a_pattern_would_mean(tmp_path: Path) -> None:
    run = started(tmp_path, "try[1]")
    assert newest_unfinished(tmp_path, "try[1]") == run


def test_a_run_of_a_recipe_whose_name_only_looks_like_a_number_is_anothers(tmp_path: Path) -> None:
    """runs/tiny-2 is the second run of tiny.toml, or the first of tiny-2.toml."""
    (tmp_path / "rows.jsonl").write_text("{}\n")

    def started_from(name: str) -> RunDir:
        text = '[model]\nbase = "org/model"\n[data]\ntrain = "rows.jsonl"\n'
        resolved = check_recipe(text, tmp_path / f"{name}.toml")
        run = RunDir.create(tmp_path / "runs", resolved.run_name, text)
        run.write_text(run.resolved_file, resolved_text(resolved, make_plan(resolved.recipe, CPU)))
        return run

    first, other, second = (started_from(name) for name in ("tiny", "tiny-2", "tiny"))
    assert [run.path.name for run in (first, other, second)] == ["tiny", "tiny-2", "tiny-3"]
    for age, run in enumerate((other, second, first)):
        os.utime(run.resolved_file, (time.time() - 60 * age,) * 2)
    assert newest_unfinished(tmp_path / "runs", "tiny") == second
    assert newest_unfinished(tmp_path / "runs", "tiny-2") == other


def test_a_recipe_whose_run_has_ended_is_answered_with_that_run_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    text = '[model]\nbase = "org/model"\n[data]\ntrain = "rows.jsonl"\n'
    (tmp_path / "tiny.toml").write_text(text)

    def refusal() -> str:
        caught = CliRunner().invoke(app, ["run", "--resume", "tiny.toml"]).exception
        assert isinstance(caught, InputError)
        return str(caught)

    assert refusal() == "tiny.toml: has no run in runs to go on with; begin one with: qtune run tiny.toml"
    resolved = check_recipe(text, tmp_path / "tiny.toml")
    for age in (60, 0):
        run = RunDir.create(tmp_path / "runs", resolved.run_name, text)
        run.write_text(run.resolved_file, resolved_text(resolved, make_plan(resolved.recipe, CPU)))
        os.utime(run.resolved_file, (time.time() - age,) * 2)
        finish(run)
    (run.adapter / TRAINED_STATE).touch()
    said = refusal()
    assert said.startswith("tiny.toml: has no unfinished run; its latest, runs/tiny-2, has ended; ")
    command = said.rpartition("with: ")[2]
    assert command == "qtune run runs/tiny-2/resolved.toml --set adapter.start_from=runs/tiny-2"


def test_which_of_several_runs_a_recipe_goes_on_with_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    text = '[model]\nbase = "org/model"\n[data]\ntrain = "rows.jsonl"\n'
    resolved = check_recipe(text, tmp_path / "tiny.toml")
    runs = [RunDir.create(Path("runs"), resolved.run_name, text) for _ in range(6)]
    first, second, damaged, unbegun, at_work, ended = runs
    for age, run in enumerate(runs):
        run.write_text(run.resolved_file, resolved_text(resolved, make_plan(resolved.recipe, CPU)))
        os.utime(run.resolved_file, (time.time() - 60 * age,) * 2)
        run.lock_file.write_text("{}")
    damaged.resolved_file.write_text("[[[")
    unbegun.lock_file.unlink()
    finish(ended)
    owner = Owner(1, "elsewhere", 0.0, "then")
    monkeypatch.setattr("qtune.run.listing.owner_of", lambda run: owner if run.path == at_work.path else None)
    say_others("tiny.toml", first)
    said = "going on with runs/tiny, the latest of tiny.toml; others that could: runs/tiny-2\n"
    assert capsys.readouterr().err == said
    say_others("runs/tiny", first)
    assert capsys.readouterr().err == "", "that one was asked for"
    finish(second)
    say_others("tiny.toml", first)
    assert capsys.readouterr().err == ""


def test_keys_that_memory_had_decided_are_open_again_only_where_another_step_is_asked_for(tmp_path: Path) -> None:
    run = started(tmp_path, "quick")
    run.write_text(
        run.resolved_file,
        '[model]\nbase = "org/model"\n[data]\ntrain = "hub:a/b"\n[training]\n'
        "micro_batch_size = 2  # rule: the largest that fits\ngradient_checkpointing = 4  # rule: so many\n"
        '[output]\nname = "quick"  # rule: the recipe\'s file name\n',
    )
    begin = f"qtune run {run.resolved_file}"
    same = ("training.steps=9", "training.learning_rate=1e-4", "training.patience=2", "output.name=more")
    assert beginning_anew(run, same) == f"{begin} {' '.join(f'--set {change}' for change in same)}"
    for other in ("training.batch_size=6", "data.max_length=64", "adapter.kind=ia3", "memory.embeddings=host"):
        assert beginning_anew(run, ["training.steps=9", other]) == (
            f"{begin} --set training.micro_batch_size=auto --set training.gradient_checkpointing=auto "
            f"--set training.steps=9 --set {other}"
        )


def test_a_run_has_a_name_wherever_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = started(tmp_path, "quick")
    monkeypatch.chdir(run.path)
    assert {RunDir(Path(path)).name for path in (".", "../quick", "../quick/checkpoints/..")} == {"quick"}


def test_nobody_asks_a_path_of_a_run_for_its_name() -> None:
    """The name of "." is ""."""
    files = Path(qtune.__file__).parent.rglob("*.py")
    assert [file.name for file in files if re.search(r"\b(run|run_dir)\.path\.name\b", file.read_text())] == []


def test_foreign_files_among_checkpoints_are_passed_over_and_stay(tmp_path: Path) -> None:
    from qtune.adapter.state import STATE_FILE
    from qtune.run.checkpoints import complete_checkpoints
    from qtune.training.checkpoints import remove_incomplete_checkpoints

    for name in (
        "checkpoint-6",
        "checkpoint-12",
        "checkpoint-6.bak",
        "checkpoint-",
        "checkpoint-old",
        "checkpoint-9 copy",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / STATE_FILE).write_text("")
    (tmp_path / "checkpoint-7").write_text("a file")
    (tmp_path / "checkpoint-8").mkdir()
    (tmp_path / "checkpoint-5").symlink_to(tmp_path / "nowhere")
    (tmp_path / "checkpoint-4.bak").mkdir()
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-6", "checkpoint-12"]
    remove_incomplete_checkpoints(tmp_path)
    assert not (tmp_path / "checkpoint-8").exists()
    assert (tmp_path / "checkpoint-4.bak").is_dir()
    assert (tmp_path / "checkpoint-7").is_file()


def test_foreign_names_among_leftovers_are_passed_over(tmp_path: Path) -> None:
    from qtune.whole import clear_leftovers

    for name in (".model.partial-x", ".model.partial-12-zz", ".model.partial-999999999-ab12cd"):
        (tmp_path / name).write_text("")
    clear_leftovers(tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model.partial-12-zz", ".model.partial-x"]


def test_files_of_a_run_in_other_encodings_are_read_or_refused_in_one_sentence(tmp_path: Path) -> None:
    from qtune.run.lock import read_lock
    from qtune.run.metrics import read_metrics

    note = '{"kind": "note", "message": "café", "seconds": 0.0}\n'
    file = tmp_path / "metrics.jsonl"
    file.write_text(note, encoding="utf-8-sig")
    assert [one.message for one in read_metrics(file)] == ["café"]  # type: ignore[union-attr]
    file.write_text(note, encoding="utf-16")
    with pytest.raises(RunError, match=r"metrics\.jsonl:1: is no record of a run"):
        read_metrics(file)
    run = RunDir(tmp_path)
    for content in ("{}".encode("utf-16"), b'{"qtune": "\xe9"}', b"[" * 100_000):
        run.lock_file.write_bytes(content)
        with pytest.raises(RunError, match=r"lock\.json: cannot be read"):
            read_lock(run)
    run.lock_file.write_text("{}", encoding="utf-8-sig")
    assert read_lock(run) is not None


@pytest.mark.parametrize("what", ["a pipe", "a device without end"])
@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "lock.json", "adapter/adapter_config.json", "checkpoints/checkpoint-2/manifest.json"]
)
def test_what_may_never_end_among_the_files_of_a_run_is_named_and_not_read(
    name: str, what: str, tmp_path: Path
) -> None:
    run = RunDir.create(tmp_path, "run", "")
    run.resolved_file.write_text("")
    assert RunDir.open(run.path) == run
    file = run.path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    if what == "a pipe":
        os.mkfifo(file)
    else:
        file.symlink_to("/dev/zero")
    said = "is a pipe or a device, which may never end, and no file; remove it"
    with pytest.raises(RunError) as caught:
        RunDir.open(run.path)
    assert str(caught.value) == f"{file}: {said}"
    (listed,) = list_runs(tmp_path)
    assert listed.state == f"damaged: {name}: {said}"


def test_links_that_lead_to_themselves_are_left_for_who_reads_them(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "run", "")
    run.resolved_file.write_text("")
    (run.path / "again").symlink_to(run.path)
    (run.path / "self").symlink_to(run.path / "self")
    assert RunDir.open(run.path) == run


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_what_may_never_end_among_the_files_of_a_base_is_named_and_not_read(name: str, tmp_path: Path) -> None:
    from qtune.model.local import base_folder

    os.mkfifo(tmp_path / name)
    with pytest.raises(ModelError) as caught:
        base_folder(Model(base=str(tmp_path)))
    assert str(caught.value) == f"{tmp_path / name}: is a pipe or a device, which may never end, and no file; remove it"


@pytest.mark.parametrize("verb", ["chat", "eval", "export", "report", "compare"])
def test_a_verb_without_a_run_names_those_that_there_are(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "; there" not in CliRunner().invoke(app, [verb]).output
    for name in ("first", "second"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "resolved.toml").touch()
    assert CliRunner().invoke(app, [verb]).output.endswith("; there are runs/first, runs/second\n")


def test_a_mistyped_model_in_a_runs_folder_is_answered_with_what_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "first" / "model").mkdir(parents=True)
    (tmp_path / "runs" / "first" / "resolved.toml").touch()
    (tmp_path / "runs" / "first" / "model" / "config.json").touch()
    said = str(CliRunner().invoke(app, ["chat", "runs/first/modle"]).exception)
    assert said == "runs/first/modle: no such folder; did you mean 'runs/first/model'?"
    said = str(CliRunner().invoke(app, ["chat", "runs/first/xyz"]).exception)
    assert said == "runs/first/xyz: no such folder; runs/first holds runs/first/model"


@pytest.mark.parametrize("verb", [["chat"], ["eval"], ["export"], ["report"], ["profile"], ["run", "--resume"]])
def test_every_verb_names_the_runs_that_there_are_where_one_is_misspelt(
    verb: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("first", "second"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "resolved.toml").touch()
    said = {
        "runs/third": "runs/third: no such folder; runs there: runs/first, runs/second",
        "first": "first: no such folder; did you mean runs/first?",
    }
    wrong = "is neither a run (it has no resolved.toml) nor a model (no config.json)"
    wrong = wrong if verb == ["chat"] else "is not a run: it has no resolved.toml"
    said["others/none"] = f"others/none: {wrong}; runs there: others/third"
    (tmp_path / "others" / "none").mkdir(parents=True)
    (tmp_path / "others" / "third").mkdir()
    (tmp_path / "others" / "third" / "resolved.toml").touch()
    for target, expected in said.items():
        assert str(CliRunner().invoke(app, [*verb, target]).exception) == expected
