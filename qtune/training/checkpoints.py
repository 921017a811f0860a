"""Checkpoints: which are whole, that what they hold is finite, and which one a run goes on from."""

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from qtune import console, manifest
from qtune.adapter.state import STATE_FILE, trained_state
from qtune.errors import Problem, RunError, TrainingError, first_line
from qtune.run.checkpoints import OPTIMIZER, named_checkpoints, step_of, usable_checkpoints
from qtune.run.folder import RunDir
from qtune.run.metrics import foreign, has_evaluation
from qtune.training.callbacks import after_divergence
from qtune.training.inputs import Inputs
from qtune.training.saved_state import RANDOM, SCHEDULE, load_state

SAVING = ".saving"
"""A file that is in a checkpoint until it is sealed. It tells a save that was killed from a manifest that was lost."""


def require_finite(model: PeftModel, step: int, checkpoints: Path) -> None:
    """Refuses to save what can only be thrown away: one NaN in a weight makes every later loss NaN.

    `checkpoints` is the folder of those that were saved before.

    Raises:
        TrainingError: a trained weight is infinite or no number.
    """
    if not all(bool(torch.isfinite(tensor).all()) for tensor in trained_state(model).values()):
        raise TrainingError(
            f"a trained weight is not a finite number at step {step}: training has diverged. "
            f"{after_divergence(usable_checkpoints(checkpoints))}"
        )


def remove_incomplete_checkpoints(folder: Path) -> None:
    """Removes what a killed save has left: not sealed, and still marked, or without the trained state.

    A checkpoint that has lost its manifest otherwise stays: a person may know what has become of it.
    """
    for path in named_checkpoints(folder):
        if not path.is_dir() or manifest.is_sealed(path):
            continue
        if os.path.lexists(path / SAVING) or not os.path.lexists(path / STATE_FILE):
            with contextlib.suppress(OSError):
                shutil.rmtree(path)


def begin_saving(checkpoint: Path) -> None:
    """Marks a new folder as one that is being written."""
    checkpoint.mkdir(parents=True)
    (checkpoint / SAVING).touch()


def end_saving(checkpoint: Path) -> None:
    """Takes the mark off a folder that is sealed, where it no longer says anything."""
    with contextlib.suppress(OSError):
        (checkpoint / SAVING).unlink()


def newest_whole(folder: Path) -> Path | None:
    """The checkpoint that a run goes on from; None where none was saved. Those that are not whole are said, and left.

    Raises:
        RunError: some were saved, and none of them is whole.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise RunError(Problem(str(folder), "is no folder; checkpoints were kept there"))
    damaged: list[Problem] = []
    for path in reversed(named_checkpoints(folder)):
        said = fault_of(path)
        if said is None:
            if not manifest.is_sealed(path):
                console.say(
                    f"{path} is of an older version and has no {manifest.NAME}: whether its files are those that were "
                    "saved cannot be told; they can be read, and are of one step"
                )
            return path
        console.say(f"{path} is not whole: {said}; it is left as it is, and the one before it is looked at")
        if not _is_unsealed(path):  # a save that was killed before its last file is no damage
            damaged.append(Problem(str(path), said))
    if damaged:
        advice = f"{len(damaged)} are there" if len(damaged) > 1 else "there is no other"
        raise RunError(
            [*damaged, Problem(str(folder), f"no checkpoint is whole ({advice}); begin again with qtune run")]
        )
    return None


def _is_unsealed(checkpoint: Path) -> bool:
    """Whether a checkpoint of this version has no manifest, which comes last."""
    return checkpoint.is_dir() and (checkpoint / OPTIMIZER).exists() and not manifest.is_sealed(checkpoint)


def fault_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None where it is whole, as far as its version lets that be told."""
    if not checkpoint.is_dir():
        return "it is no folder"
    step = step_of(checkpoint)
    if manifest.is_sealed(checkpoint) or _is_unsealed(checkpoint):
        return manifest.fault(checkpoint, step) or foreign(RunDir(checkpoint.parents[1]).metrics_file, checkpoint)
    return _older_fault(checkpoint, step)


def _older_fault(checkpoint: Path, step: int) -> str | None:
    """What can be checked without a manifest: every part is there, can be read and is of this step."""
    try:
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if state.global_step != step:
            return f"{TRAINER_STATE_NAME} is of step {state.global_step}, not {step}"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{TRAINER_STATE_NAME} cannot be read: {first_line(error)}"
    try:
        tensors = load_file(checkpoint / STATE_FILE)
    except (OSError, SafetensorError, ValueError) as error:
        return f"{STATE_FILE} cannot be read: {first_line(error)}"
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        return f"{STATE_FILE} holds numbers that are not finite"
    for name in (OPTIMIZER, SCHEDULE, RANDOM):
        try:
            found: Any = load_state(checkpoint, name)
        except RunError as error:
            return str(error)
        if found is None:
            return f"it has no {name.partition('.')[0]} state"
        if name == SCHEDULE and isinstance(found, dict) and found.get("last_epoch") != step:
            return f"its schedule is of step {found.get('last_epoch')}, not {step}"
    return None


def make_room(checkpoint: Path) -> None:
    """Moves aside what has the name of a checkpoint that is about to be saved: one that was not whole."""
    if not os.path.lexists(checkpoint):
        return
    for number in range(1, 10_000):
        aside = checkpoint.with_name(f"damaged-{checkpoint.name}" + (f"-{number}" if number > 1 else ""))
        if not os.path.lexists(aside):
            checkpoint.rename(aside)
            return


def remove_older(checkpoint: Path, kept: int) -> None:
    """Keeps this checkpoint and so many in all of those that came before it. One with files that are gone or cut is
    none of these, and stays: a run cannot go on from it, and was told that it is left."""
    earlier = [path for path in usable_checkpoints(checkpoint.parent) if step_of(path) <= step_of(checkpoint)]
    for path in earlier[:-kept]:
        shutil.rmtree(path, ignore_errors=True)


def is_last(checkpoint: Path) -> bool:
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    return state.global_step >= state.max_steps


def is_owed_evaluation(checkpoint: Path, inputs: Inputs, run_dir: RunDir) -> bool:
    """Whether the run was stopped between saving an epoch's last step and evaluating it."""
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    ends_epoch = float(state.epoch or 0).is_integer() or is_last(checkpoint)
    evaluates = inputs.recipe.training.eval_every == "epoch" and inputs.prepared.validation is not None
    return ends_epoch and evaluates and not has_evaluation(run_dir.metrics_file, state.global_step)
