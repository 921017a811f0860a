"""Checkpoints: which are complete, and that what they hold is finite."""

import contextlib
import re
import shutil
from pathlib import Path

import torch
from peft import PeftModel
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from qtune.adapter.state import STATE_FILE, trained_state
from qtune.errors import TrainingError
from qtune.run.folder import RunDir
from qtune.run.metrics import has_evaluation
from qtune.training.callbacks import after_divergence
from qtune.training.inputs import Inputs

CHECKPOINT = re.compile(r"checkpoint-[0-9]{1,12}")


def require_finite(model: PeftModel, step: int, checkpoints: Path) -> None:
    """Refuses to save what can only be thrown away: one NaN in a weight makes every later loss NaN.

    `checkpoints` is the folder of those that were saved before.

    Raises:
        TrainingError: a trained weight is infinite or no number.
    """
    if not all(bool(torch.isfinite(tensor).all()) for tensor in trained_state(model).values()):
        raise TrainingError(
            f"a trained weight is not a finite number at step {step}: training has diverged. "
            f"{after_divergence(complete_checkpoints(checkpoints))}"
        )


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    found = [path for path in _checkpoints(folder) if (path / STATE_FILE).is_file()]
    return sorted(found, key=step_of)


def _checkpoints(folder: Path) -> list[Path]:
    """Folders that are called as checkpoints are; what else somebody has put there, a "checkpoint-6.bak", is his."""
    return [path for path in folder.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name) and path.is_dir()]


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was made."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def remove_incomplete_checkpoints(folder: Path) -> None:
    """Removes what a killed save has left."""
    for path in _checkpoints(folder):
        if not (path / STATE_FILE).is_file():
            with contextlib.suppress(OSError):
                shutil.rmtree(path)


def is_last(checkpoint: Path) -> bool:
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    return state.global_step >= state.max_steps


def is_owed_evaluation(checkpoint: Path, inputs: Inputs, run_dir: RunDir) -> bool:
    """Whether the run was stopped between saving an epoch's last step and evaluating it."""
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    ends_epoch = float(state.epoch or 0).is_integer() or is_last(checkpoint)
    evaluates = inputs.recipe.training.eval_every == "epoch" and inputs.prepared.validation is not None
    return ends_epoch and evaluates and not has_evaluation(run_dir.metrics_file, state.global_step)
