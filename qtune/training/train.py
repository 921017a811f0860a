"""What happens on `qtune run`, stage by stage; and on again from a run's last complete checkpoint.

recipe     TOML and --set -> Resolved, every value with its origin; given by the command     recipe/file.py
inputs     all that can stop a run before a weight is read: plan, rows, gate, memory          preflight.py
folder     runs/NAME, with the recipe as given and as resolved                                run/folder.py
model      the base in 4 bits, a fresh adapter on it, how that starts                         training/build.py
lock       versions, base, rows: what the run depends on                                      run/lock.py
trainer    TRL's, with our loss, order of rows, metrics and checkpoints                       training/trainer.py
steps      until the last one or Ctrl-C; where memory runs out it is said what would have fit training/ran_out.py
adapter    saved whole: its presence is what makes a run finished                             adapter/state.py
report     one page, written by the command after the run                                     report/page.py
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor

from qtune import console
from qtune.adapter.starts import kept_start
from qtune.adapter.state import save_adapter, trained_state
from qtune.disk import told
from qtune.errors import (
    Failure,
    GateError,
    InputError,
    Interrupted,
    OutOfMemory,
    PeerLostError,
    Problem,
    RunError,
    TrainingError,
)
from qtune.manifest import seal, skipped_until
from qtune.memory.measured.failure_text import failure_text
from qtune.memory.measured.meter import Meter
from qtune.model.contents import Contents
from qtune.recipe.file import Resolved
from qtune.recipe.schema import Recipe
from qtune.run.checkpoints import step_of, usable_checkpoints
from qtune.run.drift import known_kinds
from qtune.run.finished import GONE, adapter_fault, adapter_lack, said_of_end, set_aside
from qtune.run.folder import RunDir
from qtune.run.history import require_own_lock
from qtune.run.identity import saved_by
from qtune.run.lock import read_lock
from qtune.run.metrics import forget_after, kept_before, read_metrics, records_then, require_records_of
from qtune.run.owner import owned, require_free
from qtune.run.resolved import resolved_text
from qtune.run.resumption import (
    begin_branch,
    beginning_anew,
    lowers_rate,
    nothing_to_resume,
    require_start,
    require_way_on,
    resumed_recipe,
    resuming,
)
from qtune.run.shown_rows import keep_rows
from qtune.run.summary import training_losses
from qtune.startup.launched import launched
from qtune.training.adapter_card import adapter_card
from qtune.training.best import KeepBest
from qtune.training.build import build_model, make_trainer
from qtune.training.callbacks import Metrics, StopOnSignal
from qtune.training.checkpoints import (
    is_last,
    is_owed_evaluation,
    newest_whole,
    remove_incomplete_checkpoints,
    require_finite,
)
from qtune.training.depends import base_now, begin_lock, blame_drift, go_on_with, require_unchanged
from qtune.training.display import TrainingDisplay
from qtune.training.follow import Beginning, Course, ending_together, follow, require_same_files
from qtune.training.inputs import Inputs, batch_in_words, gather, require_allocator, seen_validation
from qtune.training.meeting import joined
from qtune.training.outcome import has_diverged, require_change, require_gradients, rise_of
from qtune.training.ran_out import explained, measured, seeing_out_of_memory
from qtune.training.ranks import Ranks
from qtune.training.rehearsal import is_worth_it, rehearse
from qtune.training.sample_answers import SampleAnswers
from qtune.training.shown_rows import shown_rows
from qtune.whole import whole

log = logging.getLogger(__name__)


def run(
    resolved: Resolved,
    allow: tuple[str, ...] = (),
    *,
    snapshot: bool = False,
    accepted: tuple[str, ...] = (),
    whole_weights: bool = False,
) -> RunDir:
    """Trains a recipe into a new run folder.

    snapshot: of the CUDA allocator, beside the other files of the run. accepted: drifts of the base of the run that it
    starts from. whole_weights: whether lock.json gets a hash of every byte of the base's weights.

    Raises:
        InputError: the recipe's data or model cannot be used.
        GateError: the data would train the wrong thing, and `allow` or [data] allow does not waive it.
        WorkError: training failed. Interrupted: the user stopped it; the state is saved.
    """
    known_kinds(accepted)
    # What is waived on the command line is part of the run: resolved.toml keeps it for --resume.
    resolved = resolved.allowing(allow)
    with joined(resolved.recipe, accepted) as ranks:
        if not ranks.is_leader:
            return follow(ranks, lambda: resolved, accepted)
        return _run(ranks, resolved, snapshot=snapshot, accepted=accepted, whole_weights=whole_weights)


def _run(ranks: Ranks, resolved: Resolved, *, snapshot: bool, accepted: tuple[str, ...], whole_weights: bool) -> RunDir:
    with ending_together(ranks), told(TrainingError):
        if snapshot:
            require_allocator()
        inputs = gather(resolved, accepted=accepted)
        recipe = inputs.recipe
        run_dir = RunDir.create(Path(recipe.output.directory), resolved.run_name, resolved.text)
    console.say(f"this run is {run_dir.path}")
    with owned(run_dir):
        with ending_together(ranks), told(TrainingError):
            run_dir.write_text(run_dir.resolved_file, resolved_text(resolved, inputs.plan))
            if whole_weights:
                begin_lock(inputs, run_dir, base_now(inputs, whole=True))
        _train(ranks, inputs, run_dir, None, snapshot)
    return run_dir


def resume(
    run_dir: RunDir,
    changes: Sequence[str] = (),
    allow: tuple[str, ...] = (),
    *,
    snapshot: bool = False,
    accepted: tuple[str, ...] = (),
    whole_weights: bool = False,
) -> RunDir:
    """Goes on with a run from its last complete checkpoint, exactly as if it had never stopped.

    changes: `--set` texts, of keys that do not decide what is learned (`resumption.CHANGEABLE`); or a lower learning
    rate, with which a new run goes on beside this one, from its last whole checkpoint. accepted: kinds of drift
    (`run.drift`) that it goes on with. whole_weights: whether every byte of the base's weights is compared.

    Raises:
        RunError: the run has ended, another process has it, none of its checkpoints is whole, or something that it
            depends on is not what it was.
        RecipeError: a change would make another run.
        InputError, WorkError, Interrupted: as `run`.
    """
    known_kinds(accepted)
    with joined(accepted=accepted) as ranks:
        if not ranks.is_leader:
            return follow(ranks, lambda: resumed_recipe(run_dir, changes).allowing(allow), accepted)
        return _resume(
            ranks, run_dir, changes, allow, snapshot=snapshot, accepted=accepted, whole_weights=whole_weights
        )


def _resume(
    ranks: Ranks,
    run_dir: RunDir,
    changes: Sequence[str],
    allow: tuple[str, ...],
    *,
    snapshot: bool,
    accepted: tuple[str, ...],
    whole_weights: bool,
) -> RunDir:
    with ending_together(ranks):
        if snapshot:
            require_allocator()
        inputs, base = _to_go_on_with(run_dir, changes, allow, accepted, whole_weights=whole_weights)
        if lowers_rate(run_dir, changes):
            # Before there is a branch, which would stay behind, and be the latest run, where something has changed.
            require_unchanged(inputs, run_dir, accepted, base)
            run_dir = _branched(run_dir, changes)
    with owned(run_dir):
        with ending_together(ranks), told(TrainingError, lambda: _way_on(run_dir)):
            remove_incomplete_checkpoints(run_dir.checkpoints)
            run_dir.clear_leftovers()
            checkpoint = newest_whole(run_dir.checkpoints)
            step = step_of(checkpoint) if checkpoint else 0
            if checkpoint is not None:
                require_records_of(run_dir.metrics_file, len(read_metrics(run_dir.metrics_file)), checkpoint)
            go_on_with(inputs, run_dir, step, accepted, base, is_changed=bool(changes or allow))
            begins = f"from step {step}{_without(checkpoint)}" if step else "from its beginning: no step of it is saved"
            console.say(f"resuming {run_dir.path} {begins}")
            set_aside(run_dir)
            if checkpoint is None and (kept := kept_before(run_dir.metrics_file)) is not None:
                console.say(f"what it has logged so far is kept as {kept}")
            forget_after(run_dir.metrics_file, step)
        _train(ranks, inputs, run_dir, checkpoint, snapshot)
    return run_dir


def _to_go_on_with(
    run_dir: RunDir, changes: Sequence[str], allow: tuple[str, ...], accepted: tuple[str, ...], *, whole_weights: bool
) -> tuple[Inputs, Contents]:
    """Everything that a run needs to go on, and what its base's files hold."""
    require_free(run_dir)
    require_own_lock(run_dir)
    lost = adapter_fault(run_dir) if run_dir.is_finished else adapter_lack(run_dir)
    if run_dir.is_finished and lost is None:
        raise RunError(nothing_to_resume(run_dir))
    require_way_on(run_dir)
    if lost is not None:
        told_of = lost if lost == GONE else f"is not what was saved: {lost}"
        console.say(f"{run_dir.adapter} {told_of}; it is made again from the last checkpoint")
    with told(TrainingError, lambda: _way_on(run_dir)):
        # resolved.toml holds what was decided, so that another card or a newer rule cannot change it half way.
        resolved = resumed_recipe(run_dir, changes).allowing(allow)
        if (gone := require_start(run_dir, resolved.recipe)) is not None:
            console.say(gone)
        try:
            inputs = gather(resolved, run_dir, accepted=accepted)
        except (InputError, GateError):
            blame_drift(run_dir, accepted)
            raise
        return inputs, base_now(inputs, whole=whole_weights)


def _without(checkpoint: Path | None) -> str:
    """Which steps' updates are not in a checkpoint, in words."""
    skipped = () if checkpoint is None else skipped_until(checkpoint)
    if not skipped:
        return ""
    shown = ", ".join(map(str, skipped[:8])) + (f" and {len(skipped) - 8} more" if len(skipped) > 8 else "")
    return f", without the skipped update{'s' if len(skipped) > 1 else ''} of step {shown}"


def _branched(run_dir: RunDir, changes: Sequence[str]) -> RunDir:
    """A new run that goes on from another's last whole checkpoint; that one stays as it is."""
    checkpoint = newest_whole(run_dir.checkpoints)
    if checkpoint is None:
        message = f"has no checkpoint to go on from; begin again with: {beginning_anew(run_dir, changes)}"
        raise RunError(Problem(str(run_dir.path), message))
    with told(TrainingError):
        branch = begin_branch(run_dir, checkpoint)
    console.say(f"another learning rate makes another run: {branch.path}; {run_dir.path} stays as it is")
    return branch


def _train(ranks: Ranks, inputs: Inputs, run_dir: RunDir, checkpoint: Path | None, snapshot: bool) -> None:
    """Trains, or says why memory ran out and what would have fit."""
    failure: Failure | None = None
    file = run_dir.snapshot_file if snapshot else None
    meter = Meter(torch.device(inputs.plan.device.torch_name), snapshot=file)
    try:
        with told(TrainingError, lambda: _way_on(run_dir)):
            _load_and_train(ranks, inputs, run_dir, checkpoint, meter)
    except OutOfMemory as error:
        log.debug("memory ran out", exc_info=True)
        failure = error.failure
        if failure is None:
            raise
    except PeerLostError as error:
        raise TrainingError(f"{error}\n{_way_on(run_dir)}") from error
    except KeyboardInterrupt as error:
        raise Interrupted(_stopped_at_once(run_dir)) from error
    finally:
        inputs.prepared.close()
    # Outside of the handler nothing holds the failed step's frames, and with them the model, any longer.
    if failure is not None:
        raise OutOfMemory(failure_text(explained(failure, inputs, run_dir).to_json()), failure)


def _stopped_at_once(run_dir: RunDir) -> str:
    """What is left where nobody waited for the end of the step."""
    return f"stopped at once\n{_way_on(run_dir)}"


def _way_on(run_dir: RunDir) -> str:
    """What is saved of a run that was stopped, and the command that goes on from there; after the adapter was saved
    there is nothing to go on with."""
    if run_dir.is_finished and adapter_fault(run_dir) is None:
        return said_of_end(run_dir)
    if not run_dir.path.is_dir():
        return f"{run_dir.path} is no longer there; if it was moved, go on where it is now: qtune run --resume FOLDER"
    saved = usable_checkpoints(run_dir.checkpoints)
    command = _resuming(run_dir)
    if not saved:
        return f"no step was saved yet, so it starts over at the first one, in the same folder, with: {command}"
    return f"step {step_of(saved[-1])} is saved, and what came after it is not\ngo on with: {command}"


def _resuming(run_dir: RunDir) -> str:
    started = launched()
    several = ["--processes", str(started.processes)] if started.processes == started.local_processes > 1 else []
    return resuming(run_dir, *several)


def _load_and_train(ranks: Ranks, inputs: Inputs, run_dir: RunDir, checkpoint: Path | None, meter: Meter) -> None:
    ranks.told(Course(run_dir, inputs.plan, checkpoint))
    require_same_files(ranks, inputs)
    display = TrainingDisplay()
    metrics = _metrics(inputs, run_dir, meter, display)
    saved = False
    stop = StopOnSignal(lambda: metrics.note("stopping after this step; once more stops at once"))
    with measured(meter, inputs, run_dir), seeing_out_of_memory(meter):
        meter.enter("load")
        model, tiled = build_model(inputs, after=step_of(checkpoint) if checkpoint else 0)
        initial = _keep_beginnings(model, inputs, run_dir)
        metrics.seen = seen_validation(inputs)
        best = _best(inputs.recipe, run_dir, metrics)
        answers = _asks(inputs, metrics)
        ended = checkpoint is not None and (is_last(checkpoint) or best.stopped_early)
        beginning = Beginning(
            _evaluates_first(inputs, run_dir, checkpoint),
            rehearses=checkpoint is None and is_worth_it(inputs),
            takes_steps=not ended,
        )
        ranks.told(beginning)
        trainer = make_trainer(
            inputs, run_dir, model, tiled, metrics, stop, evaluate_first=beginning.evaluates_first, best=best,
            answers=answers, ranks=ranks,
        )  # fmt: skip
        if beginning.rehearses:
            with console.waiting("rehearsing once what the run will do"):
                rehearsed = rehearse(trainer, inputs, run_dir, has_initial=initial is not None)
            console.say(str(rehearsed))
        before = {name: tensor.cpu().clone() for name, tensor in trained_state(model).items()} if not checkpoint else {}
        with display, stop.listening():
            if checkpoint is not None and ended:
                trainer.take_state_of(checkpoint)
            else:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            if trainer.comparison is not None:
                metrics.note(f"{trainer.comparison}")
            if trainer.state.global_step >= trainer.state.max_steps or best.stopped_early:
                meter.enter("save")
                _settle(model, trainer.state.global_step, before, best, metrics, run_dir)
                _save(model, inputs, run_dir, initial)
                saved = True
                best.forget()
    ranks.told(saved)  # the others stay until everything is
    if not saved:  # the folder may have been finished before, with an adapter that is damaged
        raise Interrupted(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}, which is saved\n"
            f"go on with: {_resuming(run_dir)}"
        )


def _metrics(inputs: Inputs, run_dir: RunDir, meter: Meter, display: TrainingDisplay) -> Metrics:
    return Metrics(
        run_dir.metrics_file,
        display.show,
        meter,
        lambda: usable_checkpoints(run_dir.checkpoints),
        lambda step: batch_in_words(inputs, step),
        scales_loss=inputs.plan.loss_scaling,
        beside=display.beside,
    )


def _keep_beginnings(model: PeftModel, inputs: Inputs, run_dir: RunDir) -> Path | None:
    """What the run depends on and begins with, into its folder; where the adapter's start is, if it has to be kept."""
    if read_lock(run_dir) is None:
        begin_lock(inputs, run_dir, base_now(inputs))
    keep_rows(run_dir, shown_rows(inputs.prepared, inputs.recipe))
    return kept_start(model, inputs.recipe, run_dir.checkpoints / "initial")


def _best(recipe: Recipe, run_dir: RunDir, metrics: Metrics) -> KeepBest:
    return KeepBest(
        run_dir.checkpoints,
        recipe.training,
        lambda said, step: metrics.note(said, ended_step=step),
        read_metrics(run_dir.metrics_file),
        metrics.judged,
    )


def _evaluates_first(inputs: Inputs, run_dir: RunDir, checkpoint: Path | None) -> bool:
    """Whether the held-out rows are asked before the next step: at the beginning where the recipe has it so, or since
    the checkpoint that the run goes on from is owed its evaluation."""
    if checkpoint is None:
        return inputs.recipe.training.evaluate_first
    return is_owed_evaluation(checkpoint, inputs, run_dir)


def _settle(
    model: PeftModel, step: int, before: dict[str, Tensor], best: KeepBest, metrics: Metrics, run_dir: RunDir
) -> None:
    """What is asked of a run before its adapter is saved, and which state is saved.

    before: the adapter's tensors as the run began with them; empty where it went on from a checkpoint.

    Raises:
        TrainingError: nothing was learned, or what was learned is no number.
    """
    require_finite(model, step, run_dir.checkpoints)
    records = read_metrics(run_dir.metrics_file)
    require_gradients(records)
    if before:
        require_change(before, trained_state(model))
    losses, vocabulary = training_losses(records), model.config.get_text_config().vocab_size
    if rise := rise_of(losses, vocabulary):
        metrics.note(rise, diverged=has_diverged(losses, vocabulary))
    if said := best.take(model, records, step):
        metrics.note(said, best.chosen)
    metrics.settle()


def _asks(inputs: Inputs, metrics: Metrics) -> SampleAnswers | None:
    """What has the model answer at each evaluation; nobody where no process can go through the layers alone."""
    if inputs.plan.layers != "sharded":
        return SampleAnswers(inputs, metrics.answered, metrics.note, metrics.beside)
    if inputs.recipe.training.sample_answers:
        metrics.note('no sample answers: with memory.layers = "sharded" one process alone cannot ask the model')
    return None


def _save(model: PeftModel, inputs: Inputs, run_dir: RunDir, initial: Path | None) -> None:
    """The adapter appears whole: its folder is renamed last, and its presence is what makes a run finished."""
    run_dir.require_there()
    with whole(run_dir.adapter) as partial:
        save_adapter(model, partial, initial)
        inputs.tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(adapter_card(inputs, run_dir.name), encoding="utf-8")
        seal(partial, records=records_then(run_dir.metrics_file), by=saved_by(run_dir.path))
    run_dir.clear_leftovers()
