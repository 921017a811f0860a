"""A file of another run, whole as it may be, is noticed wherever it is put; a run that is moved stays itself."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from test_run_drift import World, kept, world  # noqa: F401  fixtures

from qtune import manifest
from qtune.comparing.runs import compared_runs
from qtune.errors import RunError
from qtune.export.verification import Closeness, Limits, Proof, Verification, proof_today, seal_export
from qtune.export.verification import write_verification as write_proof
from qtune.manifest import SavedBy
from qtune.records import CHECKSUM, RUN_ID, sealed
from qtune.report.page import write_report
from qtune.run.drift import said_of
from qtune.run.finished import whole_adapter
from qtune.run.folder import RunDir
from qtune.run.history import history_of, identity_to_begin_with
from qtune.run.identity import identity_of, new_run_id, saved_by, write_of_run
from qtune.run.listing import list_runs
from qtune.run.lock import Continued, Lock, LockedDevice, read_lock, write_lock
from qtune.run.memory import RunMemory, measured_memory, read_memory, write_memory
from qtune.run.metrics import NoteRecord, TrainRecord, append_metric, forget_after, read_metrics, records_then
from qtune.run.resumption import begin_branch
from qtune.run.shown_rows import ShownRows, keep_rows, kept_rows
from qtune.training import depends, train
from qtune.training.best import kept_states
from qtune.training.checkpoints import newest_whole
from qtune.training.proof import prove
from qtune.tuned.evaluate import evaluate
from qtune.tuned.evaluation import read_evaluation
from qtune.tuned.forgotten import Forgetting
from qtune.tuned.task_scores import TaskScore, TaskScores, read_tasks


def step(number: int) -> TrainRecord:
    return TrainRecord(number, 4, 0.25 * number, float(number), 2.5, 0.5, 1e-3, 1.0, 100.0, 1, 1)


def save_checkpoint(run: RunDir, number: int) -> Path:
    folder = run.checkpoints / f"checkpoint-{number}"
    folder.mkdir(parents=True)
    (folder / "trained_state.safetensors").write_bytes(b"state")
    manifest.seal(folder, number, records=records_then(run.metrics_file), by=saved_by(run.path))
    return folder


def go_on(run: RunDir, after: int) -> None:
    """What a resumption does to the run's lock and records."""
    lock = read_lock(run)
    assert lock is not None
    part = Continued(after, "", "", {}, LockedDevice())
    write_lock(run, replace(lock, resumed=(*lock.resumed, part)))
    forget_after(run.metrics_file, after)


@pytest.fixture
def twins(tmp_path: Path) -> tuple[RunDir, RunDir]:
    """Two runs that say the same of themselves, word for word."""
    runs = RunDir(tmp_path / "one"), RunDir(tmp_path / "two")
    for run in runs:
        run.path.mkdir()
        run.resolved_file.write_text("")
        write_lock(run, Lock(run_id=new_run_id()))
        write_memory(run, RunMemory(measured={"device": "cpu"}))
        keep_rows(run, ShownRows((), 1, 1, 0, "x"))
        write_of_run(run, run.tasks_file, TaskScores("0.4", None, None, (TaskScore("arc", "acc", 0.25, 0.5),)))
        write_of_run(run, run.forgetting_file, Forgetting("x", ()))
        for number in (1, 2):
            append_metric(run.metrics_file, step(number))
        save_checkpoint(run, 2)
        append_metric(run.metrics_file, step(3))
        run.adapter.mkdir()
        (run.adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        manifest.seal(run.adapter, records=records_then(run.metrics_file), by=saved_by(run.path))
    return runs


def told(one: RunDir, other: RunDir) -> str:
    names = [str(identity_of(run.path).run_id)[:8] for run in (other, one)]  # type: ignore[union-attr]
    return f"is of another run, {names[0]}; this one is {names[1]}"


READERS: dict[str, Callable[[RunDir], object]] = {
    "memory.json": read_memory,
    "rows.json": kept_rows,
    "metrics.jsonl": history_of,
}


@pytest.mark.parametrize("name", READERS)
def test_a_record_of_a_twin_is_refused_by_its_reader(name: str, twins: tuple[RunDir, RunDir]) -> None:
    one, other = twins
    read, file = READERS[name], one.path / name
    before = read(one)
    shutil.copy(other.path / name, file)
    with pytest.raises(RunError) as caught:
        read(one)
    assert str(caught.value).startswith(f"{file}: {told(one, other)}: put ")
    file.unlink()
    if name == "metrics.jsonl":
        file.write_text("")
        for record in before:  # type: ignore[attr-defined]
            append_metric(file, record)
    else:
        assert read(one) is None


@pytest.mark.parametrize("read", [read_tasks, read_evaluation])
def test_figures_of_a_twin_are_left_out_in_a_sentence(
    read: Callable[[RunDir], object], twins: tuple[RunDir, RunDir], capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = twins
    file = one.tasks_file if read is read_tasks else one.eval_file
    shutil.copy(other.tasks_file, file)
    assert read(one) is None
    assert capsys.readouterr().err == (
        f"{file} is left out: it {told(one, other)}: put the run's own back, or remove it\n"
    )


def test_a_measurement_of_a_twin_is_none_to_profile(twins: tuple[RunDir, RunDir]) -> None:
    one, other = twins
    shutil.copy(other.memory_file, one.memory_file)
    with pytest.raises(RunError, match=r"memory\.json: is of another run"):
        measured_memory(one)


def test_a_record_that_does_not_say_of_which_run_it_is_is_refused_where_all_do(twins: tuple[RunDir, RunDir]) -> None:
    one, _ = twins
    values = {name: value for name, value in json.loads(one.memory_file.read_text()).items() if name != RUN_ID}
    one.memory_file.write_text(json.dumps(sealed(values)))
    own = str(identity_of(one.path).run_id)[:8]  # type: ignore[union-attr]
    with pytest.raises(RunError) as caught:
        read_memory(one)
    assert str(caught.value) == (
        f"{one.memory_file}: does not say of which run it is, and this one, {own}, has written that everywhere: put "
        "the run's own back, or remove it"
    )


def test_a_lock_of_a_twin_is_said_and_nothing_else_is_blamed(twins: tuple[RunDir, RunDir]) -> None:
    one, other = twins
    said = f"{one.lock_file}: {told(one, other)}: put the run's own back"
    shutil.copy(other.lock_file, one.lock_file)
    verbs: list[Callable[[RunDir], object]] = [history_of, whole_adapter, train.resume, prove]
    for verb in verbs:
        with pytest.raises(RunError) as caught:
            verb(one)
        assert str(caught.value) == said
    for read in (read_memory, kept_rows):
        with pytest.raises(RunError, match="is of another run"):
            read(one)


def test_a_lock_from_before_a_resumption_is_said(twins: tuple[RunDir, RunDir]) -> None:
    one, _ = twins
    before = one.lock_file.read_bytes()
    go_on(one, 2)
    append_metric(one.metrics_file, step(3))
    saved = save_checkpoint(one, 3)
    shutil.rmtree(one.adapter)
    history_of(one)
    one.lock_file.write_bytes(before)
    said = (
        f"{one.lock_file}: is an earlier one of this run: it knows of 0 resumptions, and {saved} was saved after 1; "
        f"put the later one back; if it is right as it is, remove {RUN_ID} and {CHECKSUM} from it"
    )
    verbs: list[Callable[[RunDir], object]] = [history_of, whole_adapter, train.resume, prove]
    for verb in verbs:
        with pytest.raises(RunError) as caught:
            verb(one)
        assert str(caught.value) == said


@pytest.mark.parametrize("with_records", [True, False])
def test_a_checkpoint_and_an_adapter_of_a_twin_are_said_with_and_without_records(
    twins: tuple[RunDir, RunDir], *, with_records: bool
) -> None:
    one, other = twins
    for folder in ("adapter", "checkpoints"):
        shutil.rmtree(one.path / folder)
        shutil.copytree(other.path / folder, one.path / folder)
    if not with_records:
        one.metrics_file.unlink()
    with pytest.raises(RunError, match="is not what was saved: it is of another run"):
        whole_adapter(one)
    with pytest.raises(RunError, match="checkpoint-2: it is of another run"):
        newest_whole(one.checkpoints)


def test_records_of_a_twin_or_without_their_beginning_are_not_blamed_on_the_adapter(
    twins: tuple[RunDir, RunDir], capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = twins
    own = one.metrics_file.read_text()
    shutil.copy(other.metrics_file, one.metrics_file)
    assert whole_adapter(one) == one.adapter
    assert capsys.readouterr().err.startswith(f"{one.metrics_file}: {told(one, other)}: put ")
    one.metrics_file.write_text(own.partition("\n")[2])
    assert whole_adapter(one) == one.adapter
    assert capsys.readouterr().err.startswith(f"{one.metrics_file}:1: does not follow what stands before it")


def test_a_kept_state_of_a_twin_is_no_result(twins: tuple[RunDir, RunDir]) -> None:
    one, other = twins
    for run in twins:
        folder = run.checkpoints / "best-2"
        folder.mkdir()
        (folder / "trained_state.safetensors").write_bytes(b"best")
        manifest.seal(folder, 2, by=saved_by(run.path))
    assert kept_states(one.checkpoints) == [one.checkpoints / "best-2"]
    shutil.rmtree(one.checkpoints / "best-2")
    shutil.copytree(other.checkpoints / "best-2", one.checkpoints / "best-2")
    assert kept_states(one.checkpoints) == []


def require_good(run: RunDir) -> None:
    whole_adapter(run)
    for read in (*READERS.values(), read_tasks):
        assert read(run) is not None
    assert newest_whole(run.checkpoints) == run.checkpoints / "checkpoint-2"


def test_a_run_that_is_renamed_moved_or_copied_stays_itself(
    twins: tuple[RunDir, RunDir], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, _ = twins
    shutil.copytree(one.path, tmp_path / "elsewhere" / "copied")
    require_good(RunDir(tmp_path / "elsewhere" / "copied"))
    one.path.rename(tmp_path / "renamed")
    require_good(RunDir(tmp_path / "renamed"))
    assert capsys.readouterr().err == ""


def test_a_run_of_an_older_version_is_read_as_it_was(twins: tuple[RunDir, RunDir]) -> None:
    one, other = twins
    lock = read_lock(one)
    assert lock is not None
    write_lock(one, replace(lock, run_id=None))
    shutil.copy(other.memory_file, one.memory_file)
    require_good(one)
    values = {name: value for name, value in json.loads(one.memory_file.read_text()).items() if name != RUN_ID}
    one.memory_file.write_text(json.dumps(sealed(values)))
    require_good(one)


def test_nothing_is_written_without_its_run_where_the_lock_cannot_be_read_for_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path)
    write_lock(run, Lock(run_id=new_run_id()))
    read = Path.read_text

    def refused(file: Path, *given: object, **named: object) -> str:
        if file == run.lock_file:
            raise OSError(5, "Input/output error", str(file))
        return read(file, *given, **named)  # type: ignore[arg-type]

    writers: list[Callable[[], object]] = [
        lambda: append_metric(run.metrics_file, step(1)),
        lambda: write_memory(run, RunMemory()),
        lambda: saved_by(run.path),
    ]
    for write in writers:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_text", refused)
            with pytest.raises(OSError, match="Input/output error"):
                write()
        write()
    assert history_of(run) == (step(1),)
    assert read_memory(run) == RunMemory()


def test_a_run_that_has_lost_its_lock_gets_its_identity_back(twins: tuple[RunDir, RunDir], tmp_path: Path) -> None:
    one, _ = twins
    own = identity_of(one.path).run_id  # type: ignore[union-attr]
    one.lock_file.unlink()
    assert identity_to_begin_with(one) == (own, ())
    shutil.rmtree(one.adapter)
    shutil.rmtree(one.checkpoints)
    assert identity_to_begin_with(one) == (own, ())
    older = RunDir(tmp_path / "older")
    older.path.mkdir()
    fresh, none = identity_to_begin_with(older)
    assert fresh not in (None, own)
    assert none == ()
    older.metrics_file.write_text('{"kind": "note", "message": "old"}\n')
    assert identity_to_begin_with(older) == (None, ())


def test_a_branch_is_another_run_which_goes_on_from_the_records_and_checkpoints_of_the_first(
    twins: tuple[RunDir, RunDir],
) -> None:
    one, _ = twins
    first, second = (
        begin_branch(one, one.checkpoints / "checkpoint-2"),
        begin_branch(one, one.checkpoints / "checkpoint-2"),
    )
    ids = {identity_of(run.path).run_id for run in (one, first, second)}  # type: ignore[union-attr]
    assert len(ids) == 3
    for branch in (first, second):
        go_on(branch, 2)
        assert [record.step for record in history_of(branch)] == [1, 2]  # type: ignore[union-attr]
        assert newest_whole(branch.checkpoints) == branch.checkpoints / "checkpoint-2"
        write_memory(branch, RunMemory(measured={"device": "cpu"}))
        append_metric(branch.metrics_file, NoteRecord(branch.name))
        save_checkpoint(branch, 3)
    third = begin_branch(first, first.checkpoints / "checkpoint-3")
    assert newest_whole(third.checkpoints) == third.checkpoints / "checkpoint-3"
    history_of(third)
    # What belongs to one of them belongs to no other.
    for here, there in ((first, one), (one, first), (second, first)):
        own = here.memory_file.read_bytes()
        shutil.copy(there.memory_file, here.memory_file)
        with pytest.raises(RunError, match="is of another run"):
            read_memory(here)
        here.memory_file.write_bytes(own)
    shutil.rmtree(second.checkpoints / "checkpoint-3")
    shutil.copytree(first.checkpoints / "checkpoint-3", second.checkpoints / "checkpoint-3")
    assert newest_whole(second.checkpoints) == second.checkpoints / "checkpoint-2"


def test_a_branch_of_a_run_that_has_lost_its_lock_is_another_run_too(twins: tuple[RunDir, RunDir]) -> None:
    one, _ = twins
    own = identity_of(one.path).run_id  # type: ignore[union-attr]
    one.lock_file.unlink()
    branches = [begin_branch(one, one.checkpoints / "checkpoint-2") for _ in range(2)]
    for branch in branches:
        identity = identity_of(branch.path)
        assert identity is not None
        assert identity.run_id != own
        assert identity.ancestors == (own,)
        go_on(branch, 2)
        assert len(history_of(branch)) == 2
        assert newest_whole(branch.checkpoints) == branch.checkpoints / "checkpoint-2"
    assert len({identity_of(branch.path).run_id for branch in branches}) == 2  # type: ignore[union-attr]


def test_a_branch_of_an_older_run_without_lock_stays_without(twins: tuple[RunDir, RunDir]) -> None:
    one, _ = twins
    one.lock_file.unlink()
    for folder in (one.adapter, one.checkpoints / "checkpoint-2"):
        file = folder / manifest.NAME
        values = {key: value for key, value in json.loads(file.read_text()).items() if key not in ("by", "records")}
        file.write_text(json.dumps(sealed(values)))
    assert not begin_branch(one, one.checkpoints / "checkpoint-2").lock_file.exists()


@pytest.mark.parametrize("is_own", [True, False])
def test_a_lock_that_is_written_again_leaves_the_runs_own_measurement(
    is_own: bool, twins: tuple[RunDir, RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = twins
    if not is_own:  # as one of an attempt that had no identity yet
        shutil.copy(other.memory_file, one.memory_file)
    one.lock_file.unlink()
    monkeypatch.setattr(depends, "lock_now", lambda *_: Lock())
    depends.begin_lock(None, one, None)  # type: ignore[arg-type]  neither is looked at
    assert read_memory(one) == (RunMemory(measured={"device": "cpu"}) if is_own else None)


def test_whoever_does_as_advised_turns_one_comparison_off_and_no_other(twins: tuple[RunDir, RunDir]) -> None:
    one, other = twins
    shutil.rmtree(one.adapter)
    shutil.copytree(other.adapter, one.adapter)
    file = one.adapter / manifest.NAME
    with pytest.raises(RunError, match='write "by": '):
        history_of(one)

    def edit(**changes: object) -> None:
        values = {name: value for name, value in json.loads(file.read_text()).items() if name != CHECKSUM} | changes
        file.write_text(json.dumps(values))

    edit(by={"run_id": str(identity_of(one.path).run_id), "part": 0})  # type: ignore[union-attr]
    with pytest.raises(RunError, match=f"remove records and {CHECKSUM} from "):
        history_of(one)  # its records were others, which the identity alone does not say
    edit(records=None)
    history_of(one)
    assert manifest.file_fault(one.adapter / "adapter_config.json") is None
    (one.adapter / "adapter_config.json").write_text('{"peft_type": "LoRA"}')
    assert manifest.file_fault(one.adapter / "adapter_config.json") is not None
    # And whose it is, is compared as before.
    edit(by={"run_id": new_run_id(), "part": 0})
    with pytest.raises(RunError, match="is of another run"):
        history_of(one)


# --- the end of the records of a run that has not ended ---------------------------------------------------------------


@pytest.fixture
def stopped(twins: tuple[RunDir, RunDir]) -> RunDir:
    """A run that was killed after its third step; the second is saved."""
    shutil.rmtree(twins[0].adapter)
    return twins[0]


def cut(run: RunDir, lines: int) -> None:
    run.metrics_file.write_text("".join(run.metrics_file.read_text().splitlines(keepends=True)[:lines]))


def test_records_that_are_missing_at_the_end_of_a_stopped_run_are_said(stopped: RunDir) -> None:
    cut(stopped, 2)  # what came after the checkpoint may not have been written
    history_of(stopped)
    cut(stopped, 1)
    said = (
        f"has 1 records, and had 2 when {stopped.checkpoints}/checkpoint-2 was saved; put the file back; if it is "
        f"right as it is, remove records and {CHECKSUM} from {stopped.checkpoints}/checkpoint-2/manifest.json"
    )
    with pytest.raises(RunError) as caught:
        history_of(stopped)
    assert str(caught.value) == f"{stopped.metrics_file}: {said}"
    listed = {one.name: one.state for one in list_runs(stopped.path.parent)}
    assert listed[stopped.name] == f"damaged: metrics.jsonl: {said}"
    stopped.metrics_file.unlink()
    with pytest.raises(RunError, match="has 0 records, and had 2"):
        history_of(stopped)


def test_a_kill_between_a_record_and_its_checkpoint_is_not_blamed(stopped: RunDir) -> None:
    append_metric(stopped.metrics_file, step(4))
    folder = stopped.checkpoints / "checkpoint-4"
    folder.mkdir()
    (folder / "trained_state.safetensors").write_bytes(b"half")
    (folder / ".saving").touch()
    assert len(history_of(stopped)) == 4


def test_a_run_that_goes_on_from_before_a_damaged_checkpoint_is_not_blamed(stopped: RunDir) -> None:
    append_metric(stopped.metrics_file, step(4))
    damaged = save_checkpoint(stopped, 4)
    (damaged / "trained_state.safetensors").write_bytes(b"STATE")
    go_on(stopped, 2)
    assert len(history_of(stopped)) == 2
    # Killed between the two writes of a resumption.
    append_metric(stopped.metrics_file, step(3))
    saved = save_checkpoint(stopped, 3)
    assert len(history_of(stopped)) == 3
    cut(stopped, 2)
    with pytest.raises(RunError, match=f"has 2 records, and had 3 when {saved} was saved"):
        history_of(stopped)


def test_an_adapter_that_is_being_made_again_does_not_speak_of_the_records(twins: tuple[RunDir, RunDir]) -> None:
    one, _ = twins
    history_of(one)
    go_on(one, 2)
    assert len(history_of(one)) == 2


def test_whoever_needs_no_records_says_that_some_are_missing_and_goes_on(
    twins: tuple[RunDir, RunDir], capsys: pytest.CaptureFixture[str]
) -> None:
    one, _ = twins
    cut(one, 2)
    assert whole_adapter(one) == one.adapter
    assert capsys.readouterr().err.startswith(
        f"{one.metrics_file}: has 2 records, and had 3 when {one.adapter} was saved"
    )


# --- exports ---------------------------------------------------------------------------------------------------------


def write_export(run: RunDir, weights: bytes) -> Path:
    folder = run.path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text("{}")
    seal_export(folder, run.path)
    close = Closeness(1, 0.0, 0.0, 1.0, 0.0)
    limits = Limits(1e-4, 0.99, "x")
    figures = Verification(
        True, (), "original", 1, "rows", close, close, {}, limits, {}, (), 0, "float32", streamed=False, seconds=1.0
    )
    write_proof(folder, figures)
    return folder


def failures(proof: Proof) -> tuple[str, ...]:
    assert not proof.verified
    return proof.failures


def test_an_export_and_a_proof_of_another_run_are_none_of_this(twins: tuple[RunDir, RunDir]) -> None:
    one, other = twins
    here, there = (write_export(run, weights) for run, weights in ((one, b"these"), (other, b"those")))
    assert proof_today(here, one.path).verified
    shutil.copy(there / "verify.json", here / "verify.json")
    assert failures(proof_today(here, one.path)) == ("its verify.json is of another folder than this one",)
    shutil.rmtree(here)
    shutil.copytree(there, here)
    assert failures(proof_today(here, one.path)) == (f"it {told(one, other)}",)


# --- real runs -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_record_that_a_run_writes_says_of_which_run_it_is(world: World) -> None:  # noqa: F811
    for run in (world.finished, world.stopped):
        own = identity_of(run.path)
        assert own is not None
        for file in run.path.rglob("*.json"):
            values = json.loads(file.read_text())
            if CHECKSUM in values:
                by = values.get(RUN_ID) or (values.get("by") or {}).get(RUN_ID)
                assert by == own.run_id, file
        assert json.loads(run.metrics_file.read_text().partition("\n")[0])["after"] == own.run_id
    assert identity_of(world.finished.path) != identity_of(world.stopped.path)


def test_a_report_with_a_record_of_another_run_is_refused_in_a_sentence(world: World) -> None:  # noqa: F811
    write_report(world.stopped)
    for name in ("metrics.jsonl", "memory.json", "lock.json"):
        file = world.stopped.path / name
        own = file.read_bytes()
        shutil.copy(world.finished.path / name, file)
        with pytest.raises(RunError, match="is of another run"):
            write_report(world.stopped)
        file.write_bytes(own)
    shutil.copy(world.finished.rows_file, world.stopped.rows_file)
    assert "They cannot be shown" in write_report(world.stopped).read_text()


def test_a_report_of_a_run_without_its_lock_says_so(world: World) -> None:  # noqa: F811
    world.finished.lock_file.unlink()
    said = "has no lock.json: what it was trained on cannot be compared"
    assert said_of(world.finished) == [said]
    world.stopped.lock_file.unlink()
    world.stopped.metrics_file.unlink()
    assert said_of(world.stopped) == [said]
    assert f"This run {said}" in write_report(world.finished).read_text()


def test_a_comparison_with_the_recipe_of_another_run_is_refused(
    world: World,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = world.finished.resolved_file.read_text()
    world.finished.resolved_file.write_text(text.replace("seed = 42", "seed = 7"))
    evaluate(world.finished, rows=2, max_new_tokens=2, accepted=("recipe",))
    assert capsys.readouterr().err.count("accepted: recipe: ") == 1
    with pytest.raises(RunError, match=r"recipe: resolved.toml says otherwise: training.seed 42 -> 7"):
        compared_runs([world.finished.path])
    capsys.readouterr()
    compared_runs([world.finished.path], rows=2, accepted=("recipe",))
    assert capsys.readouterr().err.count("accepted: recipe: ") == 1


def test_a_resumed_run_is_who_it_was_and_its_files_stay_its_own(world: World) -> None:  # noqa: F811
    run = world.stopped
    before = identity_of(run.path)
    train.resume(run)
    now = identity_of(run.path)
    assert before is not None
    assert now is not None
    assert (now.run_id, len(now.resumed)) == (before.run_id, 1)
    assert manifest_of(run.adapter) == SavedBy(str(now.run_id), 1)
    assert said_of(run) == []
    history_of(run)
    read_memory(run)


def manifest_of(folder: Path) -> SavedBy:
    return SavedBy(**json.loads((folder / manifest.NAME).read_text())["by"])


def test_a_stopped_run_whose_lock_is_gone_goes_on_as_itself(world: World) -> None:  # noqa: F811
    run = world.stopped
    before = identity_of(run.path)
    run.lock_file.unlink()
    train.resume(run)
    now = identity_of(run.path)
    assert before is not None
    assert now is not None
    assert now.run_id == before.run_id
    write_report(run)
    assert len(read_metrics(run.metrics_file)) > 4


@pytest.mark.slow
def test_a_run_that_goes_on_beside_one_without_lock_knows_what_it_goes_on_with(
    world: World,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    world.stopped.lock_file.unlink()
    capsys.readouterr()
    branch = train.resume(world.stopped, ["training.learning_rate=1e-5"])
    assert "what that began with cannot be compared" in capsys.readouterr().err
    lock = read_lock(branch)
    assert lock is not None
    assert lock.latest.contents is not None
    assert lock.latest.recipe is not None
    assert said_of(branch) == []
    evaluate(branch)
    assert "lock.json" not in capsys.readouterr().err
