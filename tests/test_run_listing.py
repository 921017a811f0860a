"""`qtune list`: the runs of a folder, finished or not, damaged or not, without loading anything heavy."""

import json
import os
import shlex
import shutil
import time
from pathlib import Path

import pytest
from conftest import run_qtune
from test_run_summary import looked, trained
from typer.testing import CliRunner

from qtune.cli import app
from qtune.errors import RunError
from qtune.manifest import seal
from qtune.run.folder import RunDir
from qtune.run.listing import list_runs, listed_folder, said_of_next, said_of_stopped
from qtune.run.metrics import NoteRecord, append_metric
from qtune.run.owner import Owner
from qtune.run.resumption import has_taken_all
from qtune.screens.listing import age_text

RESOLVED = '[model]\nbase = "org/model"  # recipe\n\n[adapter]\nkind = "lora"  # default\n'


def made(directory: Path, name: str, *records, age: float = 0) -> RunDir:
    run_dir = RunDir(directory / name)
    run_dir.path.mkdir(parents=True)
    run_dir.resolved_file.write_text(RESOLVED)
    for record in records:
        append_metric(run_dir.metrics_file, record)
    for file in (run_dir.resolved_file, run_dir.metrics_file):
        if file.exists():
            os.utime(file, (time.time() - age,) * 2)
    return run_dir


def seal_checkpoint(run: RunDir, step: int) -> None:
    checkpoint = run.checkpoints / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    seal(checkpoint, step)


def test_the_state_and_figures_are_those_of_each_runs_files(tmp_path: Path) -> None:
    done = made(tmp_path, "done", trained(1, 3.0, 1), trained(20, 1.0, 9), looked(10, 1.5, 5), looked(20, 2.0, 9))
    (done.adapter / "adapter_config.json").parent.mkdir()
    (done.adapter / "adapter_config.json").write_text("{}" + " " * 98)
    (done.adapter / "adapter_model.safetensors").write_text("weights")
    made(tmp_path, "stopped", trained(7, 3.0, 1), age=60)
    made(tmp_path, "dead", age=120)
    broken = made(tmp_path, "broken", age=180)
    broken.resolved_file.write_text("[model\n")
    os.utime(broken.resolved_file, (time.time() - 180,) * 2)
    (tmp_path / "no run").mkdir()
    runs = list_runs(tmp_path)
    assert [run.name for run in runs] == ["done", "stopped", "dead", "broken"]
    first, second, third, last = runs
    assert (first.state, third.state) == ("finished, 20 steps", "stopped before the first step")
    assert second.state == "stopped at step 7 of 20; no step is saved"
    assert [one.resume is not None for one in runs] == [False, True, True, False]
    assert last.state.startswith("damaged: resolved.toml: cannot be read: ")
    assert (first.base, first.adapter, last.base) == ("org/model", "lora", None)
    assert (first.loss_start, first.loss_end, first.validation) == (3.0, 1.0, 1.5)
    files = [done.resolved_file, done.metrics_file, *done.adapter.iterdir()]
    assert first.size_bytes == sum(len(file.read_bytes()) for file in files)


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("lost", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_finished_run_that_lost_a_file_of_its_adapter_says_which_and_how_to_save_it_again(
    tmp_path: Path, lost: str, sealed: bool
) -> None:
    run = made(tmp_path, "done", trained(20, 1.0, 9))
    run.adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (run.adapter / name).write_text("{}")
    if sealed:
        seal(run.adapter)
    checkpoint = run.checkpoints / "checkpoint-20"
    checkpoint.mkdir(parents=True)
    seal(checkpoint, 20)
    (whole,) = list_runs(tmp_path)
    assert (whole.state, whole.lost, whole.resume) == ("finished, 20 steps", None, None)
    (run.adapter / lost).unlink()
    if not sealed and lost == "adapter_config.json":
        return  # which tells an older version's run that has ended from one that has not
    (found,) = list_runs(tmp_path)
    assert found.state == f"finished, 20 steps, but of its adapter {lost} is missing"
    assert found.resume == f"qtune run --resume {run.path}"
    said = CliRunner().invoke(app, ["list", str(tmp_path)]).stdout
    assert f"save the adapter of done again: qtune run --resume {run.path}" in said
    (run.path / "model").mkdir()  # that an export is there is no news to who has lost what would be exported
    refused = CliRunner().invoke(app, ["export", str(run.path)])
    wanted = f"{lost} is missing" if sealed else "adapter_config.json describes no adapter"
    assert f"is not what was saved: {wanted}" in str(refused.exception)
    assert "is there already" not in str(refused.exception)
    (run.adapter / lost).write_text("{} ")
    if sealed:
        assert list_runs(tmp_path)[0].lost == f"{lost} has 3 bytes, 2 were saved"
        shutil.rmtree(checkpoint)
        said = CliRunner().invoke(app, ["list", str(tmp_path)]).stdout
        assert "no checkpoint is left" in said
        assert "save the adapter of" not in said
        assert f"train done again: qtune run {run.resolved_file}" in said


@pytest.mark.parametrize(
    ("saved", "state"),
    [
        ((), "stopped at step 7 of 20; no step is saved"),
        ((5, 6), "stopped at step 7 of 20; step 6 is saved"),
        ((5, 7), "stopped at step 7 of 20"),
        ((5, 9), "stopped at step 9 of 20"),
    ],
)
def test_a_stopped_run_says_which_step_is_saved_and_how_to_go_on(
    tmp_path: Path, saved: tuple[int, ...], state: str
) -> None:
    run = made(tmp_path / "my runs", "stopped", trained(7, 3.0, 1))
    for step in saved:
        checkpoint = run.checkpoints / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        seal(checkpoint, step)
    (run.checkpoints / "checkpoint-12").mkdir(parents=True)  # a save that was killed
    (found,) = list_runs(tmp_path / "my runs")
    assert found.state == state
    assert found.resume is not None
    assert shlex.split(found.resume) == ["qtune", "run", "--resume", str(run.path)]


def test_a_newest_checkpoint_that_was_cut_is_not_said_to_be_saved(tmp_path: Path) -> None:
    run = made(tmp_path, "run", trained(5, 3.0, 1))
    for step in (3, 6):
        checkpoint = run.checkpoints / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "trained_state.safetensors").write_text("weights")
        seal(checkpoint, step)
    (run.checkpoints / "checkpoint-6" / "trained_state.safetensors").write_text("w")
    (listed,) = list_runs(tmp_path)
    assert listed.state == "stopped at step 5 of 20; step 3 is saved"
    assert listed.resume == f"qtune run --resume {run.path}"


def test_where_another_run_begins_the_one_that_was_stopped_is_named_with_the_way_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(tmp_path, "mine", trained(7, 3.0, 1))
    assert said_of_stopped(tmp_path, "mine") is None, "no model was loaded, so there is nothing to go on with"
    run.lock_file.write_text("{}")
    told = f"{run.path} was stopped at step 7 of 20; no step is saved; it goes on with: qtune run --resume {run.path}"
    assert said_of_stopped(tmp_path, "mine") == told
    assert said_of_stopped(tmp_path, "other") is None
    with monkeypatch.context() as patch:
        patch.setattr("qtune.run.listing.owner_of", lambda run: Owner(1, "elsewhere", 0.0, "then"))
        assert said_of_stopped(tmp_path, "mine") is None, "it trains"
    (run.adapter / "adapter_config.json").parent.mkdir()
    (run.adapter / "adapter_config.json").write_text("{}")
    assert said_of_stopped(tmp_path, "mine") is None, "it has ended"


def test_where_another_run_begins_one_without_its_adapter_is_named_in_a_sentence(tmp_path: Path) -> None:
    run = made(tmp_path, "mine", trained(20, 3.0, 1))
    run.lock_file.write_text("{}")
    seal_checkpoint(run, 20)
    told = f"{run.path} is not finished: 20 steps taken, no adapter; it goes on with: qtune run --resume {run.path}"
    assert said_of_stopped(tmp_path, "mine") == told


@pytest.mark.parametrize("log", ["all", "seldom"])
def test_a_run_is_at_its_end_by_whatever_tells_so(tmp_path: Path, log: str) -> None:
    """Not each step is logged: an evaluation, an early end or a checkpoint tells as well."""
    last = {"all": trained(20, 1.0, 9), "seldom": trained(18, 1.0, 9)}[log]
    run = made(tmp_path, "mine", last)
    assert has_taken_all(run) is (log == "all")
    append_metric(run.metrics_file, looked(20, 1.5, 9))
    assert has_taken_all(run)
    saved = made(tmp_path, "saved", trained(18, 1.0, 9))
    seal_checkpoint(saved, 18)
    assert not has_taken_all(saved)
    seal_checkpoint(saved, 20)
    assert has_taken_all(saved)
    early = made(tmp_path, "early", trained(4, 1.0, 9), NoteRecord("stopped at step 4", 9.0, ended_step=4))
    assert has_taken_all(early)


def test_a_name_that_is_taken_is_said_with_the_one_that_is_free(tmp_path: Path) -> None:
    assert said_of_next(tmp_path, "mine") == []
    made(tmp_path, "mine")
    (tmp_path / "mine-2").symlink_to("nowhere")
    (told,) = said_of_next(tmp_path, "mine")
    assert told == f"{tmp_path / 'mine'} is there: a new run will be {tmp_path / 'mine-3'}"
    assert RunDir.create(tmp_path, "mine", "").path == tmp_path / "mine-3"


@pytest.mark.parametrize(
    ("words", "taken"),
    [
        (["check"], "mine"),
        (["run"], "mine"),
        (["run", "--seeds", "2"], "mine-seed42"),
        (["run", "--set", "output.name=other"], "other"),
    ],
)
def test_check_and_run_say_that_a_name_is_taken_before_they_load_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], taken: str
) -> None:
    class LoadingError(Exception):
        pass

    def load(_: object) -> None:
        raise LoadingError

    monkeypatch.setattr("qtune.commands.shared.import_libraries", load)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "r.toml").write_text(
        '[model]\nbase = "builtin:smollm2-135m-instruct"\n[data]\ntrain = "rows.jsonl"\n[output]\nname = "mine"\n'
    )
    made(tmp_path / "runs", taken)
    result = CliRunner().invoke(app, [words[0], "r.toml", *words[1:]])
    assert isinstance(result.exception, LoadingError)
    assert result.stderr == f"runs/{taken} is there: a new run will be runs/{taken}-2\n"


def test_a_run_that_trains_at_this_moment_is_not_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path, "trains", trained(7, 3.0, 1))
    monkeypatch.setattr("qtune.run.listing.owner_of", lambda run: Owner(1, "elsewhere", 0.0, "then"))
    (found,) = list_runs(tmp_path)
    assert (found.state, found.resume) == ("training, step 7 of 20", None)


def test_below_the_table_stands_the_whole_command_for_each_stopped_run(tmp_path: Path) -> None:
    folder = tmp_path / ("a folder with a name that is longer than a line of a terminal has room for" * 2)
    run = made(folder, "stopped", trained(7, 3.0, 1))
    lines = CliRunner().invoke(app, ["list", str(folder)]).output.splitlines()
    assert f"go on with stopped: {shlex.join(['qtune', 'run', '--resume', str(run.path)])}" in lines


def test_a_folder_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"none: no such folder$"):
        list_runs(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"file: is a file, no folder$"):
        list_runs(tmp_path / "file")


def test_before_the_first_run_there_are_none_and_that_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    listed = CliRunner().invoke(app, ["list"])
    assert (listed.exit_code, listed.output) == (0, "no runs in runs\n")
    assert CliRunner().invoke(app, ["list", "--json"]).output == "[]\n"
    assert isinstance(CliRunner().invoke(app, ["list", "elsewhere"]).exception, RunError)


def test_what_a_run_takes_away_meanwhile_counts_as_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made(tmp_path, "trains", trained(1, 3.0, 1))
    before = list_runs(tmp_path)[0].size_bytes
    (run.checkpoints / "checkpoint-1").mkdir(parents=True)
    gone = run.checkpoints / "checkpoint-1" / "state.safetensors"
    gone.write_bytes(b"0" * 100)
    ask = os.stat

    def taken_away(path, **options):
        """Gone as soon as a link would be told from a file; else the moment after it was asked for."""
        is_it = os.fspath(path) == str(gone)
        if is_it and not options.get("follow_symlinks", True):
            gone.unlink(missing_ok=True)
        found = ask(path, **options)
        if is_it:
            gone.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(os, "stat", taken_away)
    assert list_runs(tmp_path)[0].size_bytes == before


@pytest.mark.parametrize(
    ("seconds", "text"), [(5, "now"), (60, "1 min"), (3599, "59 min"), (7200, "2 h"), (200_000, "2 d")]
)
def test_ages_are_in_the_largest_whole_unit(seconds: float, text: str) -> None:
    assert age_text(seconds) == text


def test_the_folder_of_one_run_lists_that_run(tmp_path: Path) -> None:
    """It said that there were no runs in it."""
    one = made(tmp_path, "one", trained(7, 3.0, 1))
    made(tmp_path, "two")
    assert [run.name for run in list_runs(one.path)] == ["one"]
    listed = CliRunner().invoke(app, ["list", str(one.path)])
    assert listed.exit_code == 0
    assert "stopped at step 7 of 20" in listed.output
    assert f"Runs in {tmp_path}\n" in listed.output.replace("\n\n", "\n")
    assert "two" not in listed.output
    # A stray resolved.toml makes no run of a folder of runs.
    (tmp_path / "resolved.toml").write_text(RESOLVED)
    assert {run.name for run in list_runs(tmp_path)} == {"one", "two"}
    assert listed_folder(tmp_path) == tmp_path


def test_the_folder_around_a_run_is_named_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = made(tmp_path / "runs", "one", trained(7, 3.0, 1))
    monkeypatch.chdir(tmp_path)
    for named, around in (
        ("runs/one", "runs"),
        ("runs/one/../one/", "runs"),
        ("runs", "runs"),
        (one.path, one.path.parent),
    ):
        assert listed_folder(Path(named)) == Path(around)
    monkeypatch.chdir(one.path)
    assert listed_folder(Path()) == Path("..")


@pytest.mark.slow
def test_the_command_shows_a_table_or_json(tmp_path: Path) -> None:
    made(tmp_path, "mine", trained(20, 1.25, 9))
    shown = run_qtune("list", tmp_path)
    assert shown.returncode == 0
    line = next(line for line in shown.stdout.splitlines() if line.startswith("mine"))
    assert "20 steps taken, no adapter; no checkpoint is left" in line
    assert "1.25 -> 1.25" in line
    (found,) = json.loads(run_qtune("list", tmp_path, "--json").stdout)
    assert (found["name"], found["loss_end"]) == ("mine", 1.25)
    (tmp_path / "empty").mkdir()
    assert run_qtune("list", tmp_path / "empty").stdout == f"no runs in {tmp_path / 'empty'}\n"


def test_a_base_that_all_runs_share_stands_once_above_them(tmp_path: Path) -> None:
    made(tmp_path, "a_run_with_a_long_name", trained(1, 3.0, 1))
    made(tmp_path, "second", trained(1, 3.0, 1))
    alike = CliRunner().invoke(app, ["list", str(tmp_path)], env={"COLUMNS": "200"}).stdout
    assert alike.startswith(f"Runs in {tmp_path}, all on org/model\n")
    assert "base" not in alike.splitlines()[1]
    other = made(tmp_path, "third")
    other.resolved_file.write_text(RESOLVED.replace("org/model", "org/other"))
    both = CliRunner().invoke(app, ["list", str(tmp_path)], env={"COLUMNS": "200"}).stdout
    assert both.count("org/model") == 2
    assert both.count("org/other") == 1
