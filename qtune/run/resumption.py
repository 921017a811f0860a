"""A stopped run: which one is meant, and the few values of its recipe that may change: never what is learned."""

import os
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from qtune import manifest
from qtune.errors import Problem, RecipeError, RunError
from qtune.recipe.file import Origin, Resolved, is_finished_run, leaves
from qtune.recipe.schema import KeyPath, Recipe
from qtune.recipe.text import show_value
from qtune.run.checkpoints import TRAINED_STATE, complete_checkpoints, step_of, usable_checkpoints
from qtune.run.folder import RunDir
from qtune.run.history import identity_to_begin_with
from qtune.run.identity import new_run_id
from qtune.run.lock import read_lock
from qtune.run.resolved import NAME, read_resolved, read_values
from qtune.run.summary import summary_of

BUDGET, MICRO_BATCH = ("memory", "budget"), ("training", "micro_batch_size")
CHECKPOINTING = ("training", "gradient_checkpointing")
KEEP_DEQUANTIZED = ("memory", "keep_dequantized")
BY_MEMORY = (MICRO_BATCH, CHECKPOINTING, KEEP_DEQUANTIZED)
"""What a run settles by the memory that there is."""

CHANGEABLE: tuple[KeyPath, ...] = (
    # How a step's memory is spent: the gradient is the same, but for the order in which it is summed.
    MICRO_BATCH,
    CHECKPOINTING,
    ("training", "lean_step"),
    BUDGET,
    ("memory", "embeddings"),
    ("memory", "activations"),
    ("memory", "layers"),
    KEEP_DEQUANTIZED,
    ("memory", "loss_tile"),
    ("quantization", "keep_copy"),
    # When something is measured, said or saved between two steps.
    ("training", "log_every"),
    ("training", "eval_every"),
    ("training", "sample_answers"),
    ("training", "checkpoint_every"),
    ("training", "checkpoint_minutes"),
    ("training", "keep_checkpoints"),
    ("training", "trackers"),
    ("training", "rehearse"),
    # What the gate lets through (the rows themselves must be the same), and what an export writes afterwards.
    ("data", "allow"),
    ("output", "gguf"),
)
"""Keys that do not decide which adapter comes out. Every other one does: the optimizer's state and the schedule of the
learning rate are in the checkpoint, and rows, weights and the adapter are what they were made for."""


RATE = ("training", "learning_rate")

SAME_STEP = {
    ("adapter", "start_from"),
    *(
        ("training", key)
        for key in (
            "epochs", "steps", "learning_rate", "schedule", "warmup", "weight_decay", "max_gradient_norm", "seed",
            "log_every", "eval_every", "evaluate_first", "result", "patience", "checkpoint_every", "checkpoint_minutes",
            "keep_checkpoints", "rehearse", "skip_outlier_steps", "trackers",
        )
    ),
}  # fmt: skip
"""Keys of another number of steps, other factors in them, or what is done between two of them."""


def lowers_rate(run_dir: RunDir, changes: Sequence[str]) -> bool:
    """Whether the changes ask for a lower learning rate than the run's: what is done after it has diverged."""
    if not any(change.partition("=")[0].strip() == ".".join(RATE) for change in changes):
        return False
    before, after = (read_resolved(run_dir, some).recipe.training.learning_rate for some in ((), changes))
    return isinstance(before, float) and isinstance(after, float) and after < before


def begin_branch(run_dir: RunDir, checkpoint: Path) -> RunDir:
    """A new run beside another, with its last complete checkpoint and its records: what goes on from there is its own.

    Raises:
        RunError: its folder cannot be made.
    """
    from qtune.run.lock import Lock, read_lock, write_lock  # numpy, for which a list of runs need not wait

    text = run_dir.recipe_file.read_text(encoding="utf-8", errors="replace") if run_dir.recipe_file.is_file() else ""
    branch = RunDir.create(run_dir.path.parent, run_dir.name, text)
    if run_dir.metrics_file.is_file():
        shutil.copy2(run_dir.metrics_file, branch.metrics_file)
    lock = read_lock(run_dir)
    if lock is None:  # lost: who the run was is known by its files, and the branch must not pass for it
        run_id, ancestors = identity_to_begin_with(run_dir)
        lock = None if run_id is None else Lock(run_id=run_id, ancestors=ancestors)
    if lock is not None:
        write_lock(branch, lock.branched(new_run_id()))
    initial = run_dir.checkpoints / "initial"
    step = int(checkpoint.name.rpartition("-")[2])
    best = [path for path in kept_folders(run_dir.checkpoints) if kept_step(path) <= step]
    for folder in (checkpoint, initial, *best):
        if folder.is_dir():
            shutil.copytree(folder, branch.checkpoints / folder.name)
    # Last, for it is what makes a folder a run.
    branch.write_text(branch.resolved_file, run_dir.resolved_file.read_text(encoding="utf-8"))
    return branch


_KEPT = re.compile(r"best-[0-9]{1,12}")


def kept_step(path: Path) -> int:
    """The step whose state a folder best-STEP holds."""
    return int(path.name.removeprefix("best-"))


def kept_folders(folder: Path) -> list[Path]:
    """The folders best-STEP among the checkpoints of a run, the earliest first."""
    return sorted((path for path in folder.glob("best-*") if _KEPT.fullmatch(path.name)), key=kept_step)


def resumed_recipe(run_dir: RunDir, changes: Sequence[str] = ()) -> Resolved:
    """What was decided when the run began (resolved.toml), changed by `--set` texts; origins as they were written.

    A budget that changes lets the micro-batch, the layers that are computed twice and those that keep their weights
    dequantized follow from memory again, where they did so before.

    Raises:
        RecipeError: a change is wrong, or would make another run.
    """
    before = read_resolved(run_dir)
    if not changes:
        return before
    after = read_resolved(run_dir, changes)
    old, new = dict(leaves(before.recipe)), dict(leaves(after.recipe))
    changed = [path for path in dict.fromkeys([*old, *new]) if old.get(path) != new.get(path)]
    kinds = {path[0] for path in changed if path[1] == "kind"}  # another kind has other keys: it alone is named
    changeable = (*CHANGEABLE, RATE) if lowers_rate(run_dir, changes) else CHANGEABLE
    refused = [path for path in changed if path not in changeable and (path[0] not in kinds or path[1] == "kind")]
    if refused:
        asked = {change.partition("=")[0].strip() for change in changes}
        named = [
            path for path in refused if ".".join(map(str, path)) in asked
        ]  # others follow from them: epochs of steps
        raise RecipeError([_refusal(path, new, run_dir, changes) for path in named or refused])
    # What was set to the value that it has keeps its origin too.
    origins = {**after.origins, **{path: before.origins[path] for path in old if path not in changed}}
    if BUDGET in changed:
        open_again = [path for path in BY_MEMORY if path not in changed and before.origins[path].source == "rule"]
        recipe = after.recipe
        for path in open_again:
            table = getattr(recipe, str(path[0])).model_copy(update={str(path[1]): "auto"})
            recipe = recipe.model_copy(update={str(path[0]): table})
        after = replace(after, recipe=recipe)
    return replace(after, origins=origins | dict.fromkeys(changed, Origin("--set", "on resuming")))


def resuming(run_dir: RunDir, *more: str) -> str:
    """The command that goes on with a run; it can be pasted where a path has a space."""
    return shlex.join(["qtune", "run", "--resume", str(run_dir.path), *more])


def beginning_anew(run_dir: RunDir, changes: Sequence[str] = (), *, is_settled: bool = False) -> str:
    """The command for a new run with this one's values, changed by `--set` texts: from resolved.toml, whose paths hold
    from anywhere. What followed from memory follows from it again where other values may take another amount;
    `is_settled`: it was thought of, and stays."""
    changed = {change.partition("=")[0].strip() for change in changes}
    is_settled = is_settled or all(_leaves_memory(key) for key in changed)
    values = [value for value in read_values(run_dir) if value.origin.source == "rule"]
    # Where no weights stay dequantized, no memory was spent on them.
    by_rule = {value.path for value in values if value.path != KEEP_DEQUANTIZED or value.text != "false"}
    open_again = [".".join(map(str, path)) for path in BY_MEMORY if path in by_rule and not is_settled]
    words = [f"{key}=auto" for key in open_again if key not in changed]
    if asked_name(run_dir) is None:  # else a run of another name would begin; a name that is taken gets a number
        words.append(f"output.name={run_dir.name}")
    told = (word for one in (*words, *changes) for word in ("--set", one))
    return shlex.join(["qtune", "run", str(run_dir.resolved_file), *told])


def no_way_on(run_dir: RunDir) -> str | None:
    """Why a run cannot go on, nor have its adapter made again, in words that follow its name; None where it can, as far
    as names and sizes of files tell. One that has saved nothing starts over, unless it has ended, or its records show
    that it had saved: then there were steps, and records of them, that another run must not take the place of.

    Raises:
        RunError: those records are damaged.
    """
    if usable_checkpoints(run_dir.checkpoints):
        return None
    saved = complete_checkpoints(run_dir.checkpoints)
    if os.path.lexists(run_dir.checkpoints) and not run_dir.checkpoints.is_dir():
        return f"{run_dir.checkpoints.name} is no folder; checkpoints were kept there"
    if not saved:
        has_ended = run_dir.is_finished or manifest.is_sealed(run_dir.adapter) or has_taken_all(run_dir)
        return "no checkpoint is left" if has_ended or _had_saved(run_dir) else None
    faults = ", ".join(f"{one.name}: {manifest.lacks(one)}" for one in saved)
    return f"no checkpoint is whole ({faults})"


def _had_saved(run_dir: RunDir) -> bool:
    """Whether it was resumed from a checkpoint once, or a step was logged behind one after which a checkpoint was due:
    then there was one, since a run that cannot save ends. Where its recipe cannot be read, which is told by whoever
    needs it, nothing was due.

    Raises:
        RunError: lock.json or the records are damaged.
    """
    lock = read_lock(run_dir)
    if lock is not None and any(part.from_step for part in lock.resumed):
        return True
    try:
        values = {one.path: one.plain_text for one in read_values(run_dir)}
    except RunError:
        return False
    every, logged = values.get(("training", "checkpoint_every"), ""), summary_of(run_dir)
    return logged.epoch > 1 if every == "epoch" else every.isdigit() and logged.step > int(every)


def has_taken_all(run_dir: RunDir) -> bool:
    """Whether no step is left to take, by the run's records or a checkpoint of its last step: one without an adapter
    has lost it, or was killed just before it was saved.

    Raises:
        RunError: the records are damaged.
    """
    summary = summary_of(run_dir)
    saved = max(map(step_of, complete_checkpoints(run_dir.checkpoints)), default=0)
    return summary.ended_step is not None or 0 < summary.steps <= max(summary.reached, saved)


def trained_again(run_dir: RunDir) -> str:
    """What trains the same again, in words; without a command where the recipe of the run is lost too. Who has exported
    it need not."""
    there = (
        f"its export is there ({shlex.join(['qtune', 'chat', str(run_dir.exported)])}); "
        if is_exported(run_dir)
        else ""
    )
    try:
        return f"{there}train it again with: {beginning_anew(run_dir)}"
    except RunError:
        return f"{there}train it again with qtune run"


def is_exported(run_dir: RunDir) -> bool:
    """Whether a model was exported into the run; what it is worth its verify.json says."""
    return (run_dir.exported / "config.json").is_file()


def require_way_on(run_dir: RunDir) -> None:
    """Refuses what cannot go on, before anything heavy is done for it.

    Raises:
        RunError: `no_way_on` says why.
    """
    if (said := no_way_on(run_dir)) is not None:
        raise RunError(Problem(str(run_dir.path), f"{said}; {trained_again(run_dir)}"))


def require_start(run_dir: RunDir, recipe: Recipe) -> str | None:
    """A sentence where the run that this one has started from is gone; a checkpoint holds all that it has given.

    Raises:
        RunError: no step is saved, so that it is needed again.
    """
    earlier = recipe.adapter.start_from
    if earlier is None or is_finished_run(earlier):
        return None
    if usable_checkpoints(run_dir.checkpoints):
        return (
            f"{earlier}, which this run has started from, is no longer there; the checkpoint holds all that it has "
            "given, but which validation rows it had seen can no longer be told"
        )
    message = (
        f"adapter.start_from = {show_value(earlier)}: is no longer a finished run; put it back there, for no step of "
        "this run is saved, and it begins again as that one has ended"
    )
    raise RunError(Problem(str(run_dir.resolved_file), message))


def _leaves_memory(key: str) -> bool:
    """Whether a step takes the same memory with any value of a key, so that what memory had decided still holds."""
    table, _, name = key.partition(".")
    return table == "output" or (table, name) in SAME_STEP


def nothing_to_resume(run_dir: RunDir, changes: Sequence[str] = ()) -> Problem:
    """What to say of a run that has ended, with the command for a new one that goes on from its adapter.

    changes: `--set` texts that were asked for, more steps as a rule.
    """
    message = "has ended; there is nothing to resume"
    if (run_dir.adapter / TRAINED_STATE).is_file():  # a start like PiSSA's changes the base, and keeps no state
        command = beginning_anew(run_dir, (f"adapter.start_from={run_dir.path}", *changes))
        message += f". A new run goes on from its adapter with: {command}"
    return Problem(str(run_dir.path), message)


def unfinished_runs(directory: Path, name: str) -> list[RunDir]:
    """The runs of recipes called `name` that have started and not ended, the latest first; their folders are NAME,
    NAME-2, …"""
    ours = [run for run in _runs_of(directory, name) if not run.is_finished]
    return sorted(ours, key=lambda run: (run.has_begun, run.resolved_file.stat().st_mtime), reverse=True)


def unfinished_seeds(directory: Path, name: str) -> list[RunDir]:
    """The runs that `--seeds` has made of recipes called `name` (NAME-seed42, NAME-seed43 …) and that have not ended,
    the first seed first."""
    pattern = re.compile(re.escape(name) + r"-seed(\d+)")
    seeds = {int(match[1]) for path in directory.glob("*") if (match := pattern.match(path.name))}
    return [run for seed in sorted(seeds) for run in unfinished_runs(directory, f"{name}-seed{seed}")]


def newest_unfinished(directory: Path, name: str) -> RunDir | None:
    """The first of `unfinished_runs`."""
    return next(iter(unfinished_runs(directory, name)), None)


def newest_finished(directory: Path, name: str) -> RunDir | None:
    """The latest run of recipes called `name` that has ended."""
    ours = [run for run in _runs_of(directory, name) if run.is_finished]
    return max(ours, key=lambda run: run.resolved_file.stat().st_mtime, default=None)


def _runs_of(directory: Path, name: str) -> list[RunDir]:
    """The runs of recipes called `name`.

    NAME-2 may as well be the first run of a recipe called so: resolved.toml tells (of older versions it does not).
    """
    pattern = re.compile(re.escape(name) + r"(-\d+)?")
    runs = [RunDir(path) for path in directory.glob("*") if pattern.fullmatch(path.name)]
    return [run for run in runs if run.resolved_file.is_file() and asked_name(run) in (None, name)]


def asked_name(run_dir: RunDir) -> str | None:
    """What the recipe of a run is called; None where that cannot be read."""
    with suppress(RunError):
        return next((value.plain_text for value in read_values(run_dir) if value.path == NAME), None)
    return None


def _refusal(path: KeyPath, values: Mapping[KeyPath, Any], run_dir: RunDir, changes: Sequence[str]) -> Problem:
    key = ".".join(map(str, path))
    may = ", ".join(".".join(map(str, one)) for one in CHANGEABLE)
    place = f"--set {key}" if path in values else key
    message = (
        "decides what is learned, so the rest would not be the same run; start a new one with: "
        f"{beginning_anew(run_dir, changes)} (on resuming these may change: {may})"
    )
    return Problem(place, message)
