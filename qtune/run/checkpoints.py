"""The checkpoints of a run by their names: which came to the end of their saving, and after which step."""

import re
from pathlib import Path

from qtune import manifest

TRAINED_STATE, OPTIMIZER = "trained_state.safetensors", "optimizer.safetensors"
CHECKPOINT = re.compile(r"checkpoint-[0-9]{1,12}")


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder whose saving came to its end, oldest first. What has happened to them since is for
    `training.checkpoints.newest_whole` to say."""
    return [path for path in named_checkpoints(folder) if path.is_dir() and _was_completed(path)]


def usable_checkpoints(folder: Path) -> list[Path]:
    """Those of which no file is gone or cut, by names and sizes alone: what is in them, `newest_whole` reads."""
    return [path for path in complete_checkpoints(folder) if manifest.lacks(path) is None]


def named_checkpoints(folder: Path) -> list[Path]:
    """Everything in a folder that is called as a checkpoint is, oldest first; checkpoint-6.bak is not."""
    found = [path for path in folder.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was made."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _was_completed(checkpoint: Path) -> bool:
    """A manifest comes last; versions that wrote none wrote the trained state last, and pickles before it."""
    if manifest.is_sealed(checkpoint):
        return True
    return (checkpoint / TRAINED_STATE).is_file() and not (checkpoint / OPTIMIZER).is_file()
