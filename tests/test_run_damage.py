"""Damaged checkpoints and adapters, two processes on one run, and proof that a run repeats."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import run_warm_qtune, warm_qtune_process
from safetensors.torch import load_file, save_file
from test_run_drift import Killed, World, edit_json, kept, said, world  # noqa: F401  fixtures

from qtune import manifest
from qtune.adapter.state import STATE_FILE
from qtune.errors import Interrupted, RunError, TrainingError
from qtune.export.export import Options, export_run
from qtune.records import plain
from qtune.run.checkpoints import OPTIMIZER, complete_checkpoints, step_of
from qtune.run.finished import whole_adapter
from qtune.run.folder import RunDir
from qtune.run.identity import saved_by
from qtune.run.listing import list_runs
from qtune.run.lock import Continued, read_lock, write_lock
from qtune.run.metrics import forget_after
from qtune.run.owner import FILE, Owner, owned, owner_of
from qtune.run.resumption import begin_branch, no_way_on
from qtune.training import proof, train
from qtune.training.checkpoints import fault_of, newest_whole, remove_older
from qtune.training.proof import _pairs, prove
from qtune.training.saved_state import RANDOM, SCHEDULE, load_tree, save_tree
from qtune.tuned.chat import open_session
from qtune.tuned.evaluate import evaluate

PARTS = (STATE_FILE, OPTIMIZER, SCHEDULE, RANDOM, "trainer_state.json", manifest.NAME)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def to_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def dangle(file: Path) -> None:
    file.unlink()
    file.symlink_to("nowhere")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "half": halve,
    "flipped": flip,
    "folder": to_folder,
    "dangling": dangle,
}


def adapter_of(run: RunDir) -> dict[str, torch.Tensor]:
    return load_file(run.adapter / STATE_FILE)


def assert_same_adapter(one: RunDir, other: RunDir) -> None:
    ours, theirs = adapter_of(one), adapter_of(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_is_not_whole_is_named_left_and_passed_over(
    part: str,
    damage: str,
    world: World,  # noqa: F811
    capsys: pytest.CaptureFixture,
) -> None:
    last, before = world.stopped.checkpoints / "checkpoint-2", world.stopped.checkpoints / "checkpoint-1"
    DAMAGES[damage](last / part)
    assert newest_whole(world.stopped.checkpoints) == before
    err = capsys.readouterr().err
    assert f"{last} is not whole: " in err
    assert last.is_dir()


def test_a_run_goes_on_exactly_from_the_one_before(world: World, capsys: pytest.CaptureFixture) -> None:  # noqa: F811
    last = world.stopped.checkpoints / "checkpoint-2"
    flip(last / OPTIMIZER)
    kept_bytes = (last / OPTIMIZER).read_bytes()
    run = train.resume(world.stopped)
    assert f"{last} is not whole: {OPTIMIZER} is not what was saved: its SHA-256 is another" in capsys.readouterr().err
    assert_same_adapter(run, world.finished)
    # It was in the way when step 2 was saved again, and stands beside it.
    assert (world.stopped.checkpoints / "damaged-checkpoint-2" / OPTIMIZER).read_bytes() == kept_bytes


def test_a_checkpoint_of_another_step_is_none_of_this(world: World) -> None:  # noqa: F811
    one, two = (world.stopped.checkpoints / f"checkpoint-{step}" for step in (1, 2))
    shutil.copy(one / OPTIMIZER, two / OPTIMIZER)
    assert "optimizer.safetensors" in str(fault_of(two))
    shutil.rmtree(two)
    shutil.copytree(one, two)
    assert fault_of(two) == "it was saved after step 1, not 2"


def test_a_checkpoint_of_another_run_is_passed_over_and_not_taken_for_one_that_is_saved(
    world: World,  # noqa: F811
    capsys: pytest.CaptureFixture,
) -> None:
    run, other = world.stopped, world.finished
    last = run.checkpoints / "checkpoint-4"
    shutil.copytree(other.checkpoints / "checkpoint-4", last)
    theirs = (last / manifest.NAME).read_bytes()
    resumed = train.resume(run)
    said = f"{last} is not whole: it is of another run, "
    assert said in capsys.readouterr().err
    assert_same_adapter(resumed, other)
    assert (last.parent / "damaged-checkpoint-4" / manifest.NAME).read_bytes() == theirs
    assert fault_of(last) is None


def test_a_cut_checkpoint_is_neither_counted_among_those_that_are_kept_nor_removed(tmp_path: Path) -> None:
    folders = [tmp_path / f"checkpoint-{step}" for step in (3, 6, 9, 12)]
    for step, folder in zip((3, 6, 9, 12), folders, strict=True):
        folder.mkdir()
        (folder / OPTIMIZER).write_text("moments")
        manifest.seal(folder, step)
    (folders[1] / OPTIMIZER).write_text("mom")
    remove_older(folders[2], 2)
    assert [folder.is_dir() for folder in folders] == [True, True, True, True]
    remove_older(folders[3], 2)
    assert [folder.is_dir() for folder in folders] == [False, True, True, True]


@pytest.mark.parametrize(
    "name", ["checkpoint-6.bak", "checkpoint-", "checkpoint-x", "checkpoint-2 (copy)", "checkpoint--3"]
)
def test_a_foreign_name_is_no_checkpoint(name: str, world: World) -> None:  # noqa: F811
    shutil.copytree(world.stopped.checkpoints / "checkpoint-2", world.stopped.checkpoints / name)
    assert newest_whole(world.stopped.checkpoints) == world.stopped.checkpoints / "checkpoint-2"
    (world.stopped.checkpoints / "checkpoint-9").write_text("a note")
    assert newest_whole(world.stopped.checkpoints) == world.stopped.checkpoints / "checkpoint-2"


def test_with_no_whole_checkpoint_left_there_is_one_clear_error(world: World) -> None:  # noqa: F811
    states = [world.stopped.checkpoints / f"checkpoint-{step}" / STATE_FILE for step in (1, 2)]
    content = states[0].read_bytes()
    for state in states:
        state.unlink()
    text = said(lambda: train.resume(world.stopped))
    faults = f"checkpoint-1: {STATE_FILE} is missing, checkpoint-2: {STATE_FILE} is missing"
    assert f"{world.stopped.path}: no checkpoint is whole ({faults}); train it again with: qtune run " in text
    (listed,) = [one for one in list_runs(world.stopped.path.parent) if one.name == world.stopped.name]
    assert listed.resume is None
    assert listed.anew is not None
    assert text.endswith(listed.anew)
    wanted = said(lambda: whole_adapter(world.stopped))
    has_none = f"has no adapter, and no checkpoint is whole ({faults})"
    assert wanted == f"{world.stopped.path}: {has_none}; train it again with: {listed.anew}"
    for state in states:  # of the right size, and something else
        state.write_bytes(bytes(len(content)))
    text = said(lambda: train.resume(world.stopped))
    assert f"{world.stopped.checkpoints}: no checkpoint is whole (2 are there); begin again with qtune run" in text


@pytest.mark.parametrize("lost", ["adapter_model.safetensors", "adapter_config.json", "everything", "the folder"])
def test_an_ended_run_without_a_checkpoint_is_not_trained_anew_in_its_place(lost: str, world: World) -> None:  # noqa: F811
    run = world.finished
    shutil.rmtree(run.checkpoints)
    if lost == "everything":
        for file in run.adapter.iterdir():
            if file.name not in ("adapter_config.json", manifest.NAME):
                file.unlink()
    elif lost == "the folder":
        shutil.rmtree(run.adapter)
    else:
        (run.adapter / lost).unlink()
    before = run.metrics_file.read_bytes()
    text = said(lambda: train.resume(run))
    assert f"{run.path}: no checkpoint is left; train it again with: qtune run {run.resolved_file}" in text
    assert run.metrics_file.read_bytes() == before
    (listed,) = [one for one in list_runs(run.path.parent) if one.name == run.name]
    assert listed.state.endswith("; no checkpoint is left")
    assert (listed.resume, listed.anew) == (None, text.partition("again with: ")[2])
    if lost != "adapter_config.json":
        assert "no checkpoint is left; train it again with: " in said(lambda: whole_adapter(run))
    run.exported.mkdir()
    (run.exported / "config.json").touch()
    text = said(lambda: train.resume(run))
    assert f"; its export is there (qtune chat {run.exported}); train it again with: qtune run " in text
    (listed,) = [one for one in list_runs(run.path.parent) if one.name == run.name]
    assert listed.state.endswith("; no checkpoint is left, but its export is there")


def test_a_run_whose_adapters_folder_is_gone_has_taken_its_steps_and_saves_it_again(world: World, capsys) -> None:  # noqa: F811
    run = world.finished
    trained = adapter_of(run)
    shutil.rmtree(run.adapter)
    (listed,) = [one for one in list_runs(run.path.parent) if one.name == run.name]
    assert listed.state == "4 steps taken, no adapter"
    assert listed.lost is not None
    assert listed.resume is not None
    told = f"{run.adapter}: is not there, though all steps were taken; {listed.resume} saves it again from the last"
    assert told in said(lambda: whole_adapter(run))
    capsys.readouterr()
    train.resume(run)
    again_from = "is not there, though all steps were taken; it is made again from the last checkpoint"
    assert f"{run.adapter} {again_from}" in capsys.readouterr().err
    again = adapter_of(run)
    assert all(torch.equal(tensor, trained[name]) for name, tensor in again.items())


def test_an_adapter_that_is_made_again_and_stopped_is_listed_where_it_stopped(world: World, capsys) -> None:  # noqa: F811
    """The run has not ended any more: it was called finished, with the losses of the steps that it had taken again."""
    run = world.finished
    trained = adapter_of(run)
    (run.adapter / "adapter_model.safetensors").unlink()
    first, *later = complete_checkpoints(run.checkpoints)
    for checkpoint in later:
        shutil.rmtree(checkpoint)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qtune.training.train._load_and_train", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(Interrupted):
            train.resume(run)
    assert f"what is left of {run.adapter} is kept as {run.path / 'adapter.damaged'}" in capsys.readouterr().err
    (listed,) = [one for one in list_runs(run.path.parent) if one.name == run.name]
    assert listed.state.startswith(f"stopped at step {step_of(first)} of ")
    assert listed.resume is not None
    train.resume(run)
    assert whole_adapter(run) == run.adapter
    again = adapter_of(run)
    assert all(torch.equal(tensor, trained[name]) for name, tensor in again.items())


@pytest.mark.parametrize("make", [lambda path: path.write_text("x"), lambda path: path.symlink_to("nowhere")])
def test_what_is_no_folder_of_checkpoints_is_said(make: Callable[[Path], object], world: World) -> None:  # noqa: F811
    shutil.rmtree(world.stopped.checkpoints)
    make(world.stopped.checkpoints)
    assert "is no folder; checkpoints were kept there" in said(lambda: train.resume(world.stopped))


def test_a_run_that_was_resumed_from_a_step_had_saved_it(world: World) -> None:  # noqa: F811
    run = world.stopped
    forget_after(run.metrics_file, 1)
    shutil.rmtree(run.checkpoints)
    assert no_way_on(run) is None
    lock = read_lock(run)
    assert lock is not None
    for step, said_of_it in ((0, None), (1, "no checkpoint is left")):
        part = Continued(step, lock.qtune, lock.python, lock.packages, lock.device)
        write_lock(run, replace(lock, resumed=(part,)))
        assert no_way_on(run) == said_of_it


@pytest.mark.parametrize("logged", [2, 1])
def test_a_stopped_run_whose_checkpoints_are_gone_is_not_begun_anew_over_its_records(
    logged: int,
    world: World,  # noqa: F811
    capsys: pytest.CaptureFixture,
) -> None:
    run = world.stopped
    forget_after(run.metrics_file, logged)
    shutil.rmtree(run.checkpoints)
    records = run.metrics_file.read_bytes()
    (listed,) = [one for one in list_runs(run.path.parent) if one.name == run.name]
    if logged == 2:  # behind step 1, after which one was due
        assert f"{run.path}: no checkpoint is left; train it again with: " in said(lambda: train.resume(run))
        assert (listed.resume, listed.anew) == (None, f"qtune run {run.resolved_file}")
        assert listed.state.endswith("; no step is saved; no checkpoint is left")
        assert run.metrics_file.read_bytes() == records
        return
    assert listed.resume is not None  # it may have been killed before it had saved
    train.resume(run)
    aside = run.path / "metrics.before-1.jsonl"
    told = capsys.readouterr().err
    assert f"resuming {run.path} from its beginning: no step of it is saved" in told
    assert f"what it has logged so far is kept as {aside}" in told
    assert aside.read_bytes() == records
    assert_same_adapter(run, world.finished)


def test_a_first_save_that_was_killed_before_its_manifest_is_made_again(world: World, capsys) -> None:  # noqa: F811
    shutil.rmtree(world.stopped.checkpoints / "checkpoint-2")
    first = world.stopped.checkpoints / "checkpoint-1"
    (first / manifest.NAME).unlink()
    forget_after(world.stopped.metrics_file, 1)  # no step was taken behind it
    run = train.resume(world.stopped)
    assert f"{first} is not whole: its manifest.json is missing" in capsys.readouterr().err
    assert_same_adapter(run, world.finished)


# --- checkpoints of older versions ---------------------------------------------------------------------------------


def make_older(checkpoint: Path) -> None:
    """As versions before manifests saved it: pickles, and the trained state last."""
    (checkpoint / manifest.NAME).unlink()
    for ours, theirs in ((OPTIMIZER, "optimizer.pt"), (SCHEDULE, "scheduler.pt"), (RANDOM, "rng_state.pth")):
        torch.save(load_tree(checkpoint / ours), checkpoint / theirs)
        (checkpoint / ours).unlink()


def test_a_checkpoint_of_an_older_version_is_read_safely_and_exactly(world: World, capsys) -> None:  # noqa: F811
    for step in (1, 2):
        make_older(world.stopped.checkpoints / f"checkpoint-{step}")
    run = train.resume(world.stopped)
    assert "is of an older version and has no manifest.json" in capsys.readouterr().err
    assert_same_adapter(run, world.finished)


class Marks:
    """A pickle that writes a file when it is read."""

    def __init__(self, file: Path) -> None:
        self.file = str(file)

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_what_can_be_checked_of_an_older_checkpoint_is(file: str, world: World) -> None:  # noqa: F811
    checkpoint = world.stopped.checkpoints / "checkpoint-2"
    make_older(checkpoint)
    assert fault_of(checkpoint) is None
    content = (checkpoint / file).read_bytes()
    (checkpoint / file).unlink()
    assert "it has no " in str(fault_of(checkpoint))
    (checkpoint / file).write_bytes(content[:100])
    assert "holds no state that can be read" in str(fault_of(checkpoint))
    torch.save(Marks(world.home / "ran"), checkpoint / file)
    assert "holds no state that can be read" in str(fault_of(checkpoint))
    assert not (world.home / "ran").exists()
    (checkpoint / file).write_bytes(content)
    edit_json(checkpoint / "trainer_state.json", global_step=1)
    assert fault_of(checkpoint) == "trainer_state.json is of step 1, not 2"


def test_a_state_is_read_as_it_was_saved(tmp_path: Path) -> None:
    tree = {
        0: {"step": torch.tensor(3.0), "moments": torch.randn(2, 3, dtype=torch.bfloat16)},
        "groups": [{"lr": 1e-3 / 3, "betas": (0.9, 0.999), "nothing": None, "on": True, "far": float("inf")}],
        ("a", 1): torch.arange(5, dtype=torch.uint8),
    }
    save_tree(tmp_path / "state.safetensors", tree)
    again = load_tree(tmp_path / "state.safetensors")
    assert again.keys() == tree.keys()
    assert again["groups"] == tree["groups"]
    assert isinstance(again["groups"][0]["betas"], tuple)
    assert torch.equal(again[0]["moments"], tree[0]["moments"])  # type: ignore[index]
    assert torch.equal(again["a", 1], tree["a", 1])


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_state_that_is_none_is_one_sentence(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "state.safetensors").write_bytes(content)
    with pytest.raises(RunError, match="holds no state that can be read"):
        load_tree(tmp_path / "state.safetensors")


def test_a_checkpoint_holds_no_pickle(world: World) -> None:  # noqa: F811
    checkpoint = world.finished.checkpoints / "checkpoint-4"
    assert {file.suffix for file in checkpoint.iterdir()} <= {".safetensors", ".json", ".jinja", ".md", ".txt"}


# --- proof ---------------------------------------------------------------------------------------------------------


def test_the_last_steps_of_a_run_are_repeated_bit_for_bit(world: World) -> None:  # noqa: F811
    before = {file: file.read_bytes() for file in world.finished.path.rglob("*") if file.is_file()}
    sentence = prove(world.finished)
    assert sentence.startswith("steps 4 to 4 were repeated: all ")
    assert sentence.endswith(f"are those of {world.finished.checkpoints}/checkpoint-4, bit for bit")
    assert {file: file.read_bytes() for file in world.finished.path.rglob("*") if file.is_file()} == before


def test_steps_that_led_elsewhere_are_no_proof(world: World) -> None:  # noqa: F811
    last = world.finished.checkpoints / "checkpoint-4"
    state = load_file(last / STATE_FILE)
    name = min(state)
    save_file(state | {name: state[name] + 1e-3}, last / STATE_FILE)
    manifest.seal(last, 4, by=saved_by(world.finished.path))
    with pytest.raises(TrainingError, match=rf"led elsewhere: 1 of .* the first of them the adapter's {name}"):
        prove(world.finished)


def test_what_is_on_one_side_alone_is_no_proof(world: World) -> None:  # noqa: F811
    last = world.finished.checkpoints / "checkpoint-4"
    state = load_tree(last / OPTIMIZER)
    first = min(state["state"])
    del state["state"][first]["exp_avg"]
    save_tree(last / OPTIMIZER, state)
    manifest.seal(last, 4, by=saved_by(world.finished.path))
    with pytest.raises(TrainingError, match=rf"1 places of .* missing on one side, .* state\.{first}\.exp_avg"):
        prove(world.finished)


def test_states_are_compared_place_by_place() -> None:
    one = torch.ones(2)
    assert _pairs({"a": [one, 1.5]}, {"a": [one, 1.5]}, "s") == [("s.a.0", (one, one))]
    for saved, again, place in (
        ({"a": one}, {}, "s.a"),
        ({}, {"a": one}, "s.a"),
        ([one], [one, one], "s"),
        (one, 1.0, "s"),
        ({"lr": 0.1}, {"lr": 0.2}, "s.lr"),
        (one, torch.ones(3), "s"),
    ):
        assert _pairs(saved, again, "s") == [(place, None)]


def test_a_branch_with_nothing_of_its_own_has_nothing_to_repeat(world: World) -> None:  # noqa: F811
    branch = begin_branch(world.stopped, world.stopped.checkpoints / "checkpoint-2")
    lock = read_lock(branch)
    assert lock is not None
    slower = {**(lock.recipe or {}), "training.learning_rate": 1e-9}
    write_lock(branch, lock.resumed_as(replace(lock, recipe=slower), 2))
    with pytest.raises(
        RunError, match=r"went on otherwise from step 2 \(training.learning_rate\), so steps 1 to 2 cannot"
    ):
        prove(branch)


def test_steps_that_several_processes_took_are_not_proven_by_one(world: World) -> None:  # noqa: F811
    lock = read_lock(world.finished)
    assert lock is not None
    write_lock(world.finished, replace(lock, device=replace(lock.device, processes=2)))
    with pytest.raises(RunError, match="steps 4 to 4 were taken by 2 processes, which add their gradients in another"):
        prove(world.finished)
    # From step 3 on it was one again, and those steps can be repeated.
    write_lock(world.finished, replace(lock, device=replace(lock.device, processes=2)).resumed_as(lock, 3))
    assert prove(world.finished).startswith("steps 4 to 4 were repeated")


def test_steps_are_repeated_with_the_outliers_that_they_had(world: World, monkeypatch) -> None:  # noqa: F811
    seen: list[int] = []
    original = proof.make_trainer

    def make_trainer(inputs, run_dir, model, tiled, metrics, *rest, **more):
        seen.append(len(metrics.outliers._losses))
        return original(inputs, run_dir, model, tiled, metrics, *rest, **more)

    monkeypatch.setattr(proof, "make_trainer", make_trainer)
    prove(world.finished)
    assert seen == [3]  # step 4 is repeated


# --- the adapter at the end ----------------------------------------------------------------------------------------

ADAPTER_DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    **{f"weights {name}": ("adapter_model.safetensors", change) for name, change in DAMAGES.items()},
    **{f"config {name}": ("adapter_config.json", change) for name, change in DAMAGES.items()},
    "config edited": ("adapter_config.json", lambda file: edit_json(file, lora_alpha=64)),
}


@pytest.mark.parametrize("name", ADAPTER_DAMAGES)
def test_a_damaged_adapter_is_one_sentence_everywhere(name: str, world: World) -> None:  # noqa: F811
    file, change = ADAPTER_DAMAGES[name]
    run = world.finished
    change(run.adapter / file)
    for verb in (
        lambda: evaluate(run),
        lambda: open_session(str(run.path)),
        lambda: export_run(run, Options()),
        lambda: export_run(run, Options(adapter_only=True)),
    ):
        text = said(verb)
        assert text.startswith(f"{run.adapter}: is not what was saved: {file} ")
        assert text.endswith(f"qtune run --resume {run.path} saves it again from the last checkpoint")
        assert "\n" not in text


@pytest.mark.parametrize("name", ["weights flipped", "config missing", "config folder"])
@pytest.mark.slow
def test_the_way_out_makes_the_adapter_again(name: str, world: World) -> None:  # noqa: F811
    file, change = ADAPTER_DAMAGES[name]
    change(world.finished.adapter / file)
    stopped = train.resume(world.stopped)
    assert_same_adapter(train.resume(world.finished), stopped)
    evaluate(world.finished, max_new_tokens=2)


def test_an_adapter_without_a_manifest_is_checked_as_far_as_it_goes(world: World, capsys) -> None:  # noqa: F811
    run = world.finished
    (run.adapter / manifest.NAME).unlink()
    evaluate(run, max_new_tokens=2)
    assert "is of an older version and has no manifest.json" in capsys.readouterr().err
    halve(run.adapter / "adapter_model.safetensors")
    assert "adapter_model.safetensors cannot be read" in said(lambda: evaluate(run))


def test_a_report_shows_a_recipe_in_another_encoding_as_far_as_it_goes(world: World) -> None:  # noqa: F811
    from qtune.report.page import write_report

    world.finished.recipe_file.write_bytes(b"\xff\xfe" + world.finished.recipe_file.read_text().encode("utf-16-le"))
    assert write_report(world.finished).is_file()


# --- two processes -------------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from qtune.run.folder import RunDir
from qtune.run.owner import owned
with owned(RunDir(Path(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(600)
"""


def holding(run: RunDir) -> subprocess.Popen[str]:
    """A process that has the run's folder."""
    root = str(Path(__file__).parent.parent)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.slow
def test_a_second_resume_says_who_has_the_run_and_a_dead_owner_does_not_count(world: World) -> None:  # noqa: F811
    process = holding(world.stopped)
    try:
        who = f"belongs to process {process.pid}, which is training there since "
        assert said(lambda: train.resume(world.stopped)).startswith(f"{world.stopped.path}: {who}")
        text = said(lambda: export_run(world.stopped, Options()))
        assert f"has no adapter yet: it {who}" in text
        done = run_warm_qtune("report", world.stopped.path, "--no-trace")
        assert done.returncode == 0
        assert f"belongs to process {process.pid}" in done.stderr
        assert f"belongs to process {process.pid}" in world.stopped.report.read_text()
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert (world.stopped.path / FILE).is_file()
    assert owner_of(world.stopped) is None
    assert train.resume(world.stopped).is_finished
    assert not (world.stopped.path / FILE).exists()


@pytest.mark.slow
def test_two_resumes_at_once_are_one_run(world: World) -> None:  # noqa: F811
    both = [warm_qtune_process("run", "--resume", world.stopped.path) for _ in range(2)]
    ends = [(process.communicate(), process.returncode) for process in both]
    codes = sorted(code for _, code in ends)
    assert codes[0] == 0
    assert codes[1] == 2, ends
    errors = "".join(err for (_, err), code in ends if code)
    assert "belongs to process" in errors or "has ended; there is nothing to resume" in errors
    assert "Traceback" not in errors
    assert_same_adapter(world.stopped, world.finished)


def test_where_files_cannot_be_locked_the_process_is_looked_for(
    world: World,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    import psutil

    monkeypatch.setattr("fcntl.flock", unsupported)
    run, parent = world.stopped, os.getppid()
    started = psutil.Process(parent).create_time()
    file = run.path / FILE

    def write(**changes: object) -> None:
        owner = Owner(parent, socket.gethostname(), started, "then")
        file.write_text(json.dumps({**plain(owner), **changes}))

    write()
    with pytest.raises(RunError, match=f"belongs to process {parent}, which is training there since then"), owned(run):
        pass
    # The same number, given to another process since.
    write(process_started=started - 1000)
    with owned(run):
        assert json.loads(file.read_text())["pid"] == os.getpid()
    write(host="elsewhere", process_started=0.0)
    with pytest.raises(RunError, match=f"process {parent} on elsewhere"), owned(run):
        pass
    file.write_text("half a na")
    with owned(run):
        pass


def test_an_owner_that_ends_leaves_no_file(world: World) -> None:  # noqa: F811
    with owned(world.stopped):
        assert owner_of(world.stopped) is None or owner_of(world.stopped).pid != os.getpid()  # type: ignore[union-attr]
    assert not (world.stopped.path / FILE).exists()
