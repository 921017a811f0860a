"""A finished run's adapter: there, and what was saved."""

import json
import os
import shlex
import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open

from qtune import console, manifest
from qtune.errors import Problem, RunError, first_line
from qtune.run.folder import RunDir
from qtune.run.history import require_own_lock, said_of_records
from qtune.run.metrics import foreign
from qtune.run.owner import owner_of
from qtune.run.resumption import has_taken_all, no_way_on, resuming, trained_again

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
GONE = "is not there, though all steps were taken"
"""What is said of an adapter that was lost with its folder, or never saved."""


def whole_adapter(run_dir: RunDir) -> Path:
    """The folder of a run's adapter, file by file what was saved.

    Raises:
        RunError: training has not ended, or something of the adapter is damaged, or it is another run's.
    """
    require_own_lock(run_dir)
    if (said := adapter_fault(run_dir)) is not None:
        raise RunError(Problem(str(run_dir.adapter), f"is not what was saved: {said}; {_saved_again(run_dir)}"))
    if not run_dir.is_finished and (owner := owner_of(run_dir)) is not None:
        raise RunError(Problem(str(run_dir.path), f"has no adapter yet: it belongs to {owner}"))
    if not run_dir.is_finished and (why := no_way_on(run_dir)) is not None:
        raise RunError(Problem(str(run_dir.path), f"has no adapter, and {why}; {trained_again(run_dir)}"))
    if adapter_lack(run_dir) == GONE:
        raise RunError(Problem(str(run_dir.adapter), f"{GONE}; {_saved_again(run_dir)}"))
    folder = run_dir.finished_adapter()
    if (said := said_of_records(run_dir)) is not None:
        console.say(said)
    if not manifest.is_sealed(folder):
        console.say(
            f"{folder} is of an older version and has no {manifest.NAME}: whether it is what was saved cannot be told"
        )
    return folder


def _saved_again(run_dir: RunDir) -> str:
    """What makes an adapter again, in words."""
    if (why := no_way_on(run_dir)) is not None:
        return f"{why}; {trained_again(run_dir)}"
    return f"{resuming(run_dir)} saves it again from the last checkpoint"


def require_adapter(run_dir: RunDir) -> None:
    """`whole_adapter`'s refusal of a run without an adapter, or of one that lacks a file, before anything heavy is
    imported or another fault is told; its bytes are not read.

    Raises:
        RunError: training has not ended, or something of the adapter is lost.
    """
    if not run_dir.is_finished or adapter_lack(run_dir) is not None:
        whole_adapter(run_dir)


def set_aside(run_dir: RunDir) -> None:
    """Puts what is left of an adapter that is about to be made again out of its place, in the run's folder: until it is
    made, the run has not ended."""
    if os.path.lexists(run_dir.adapter):
        rest = run_dir.path / "adapter.damaged"
        shutil.rmtree(rest, ignore_errors=True)
        run_dir.adapter.rename(rest)
        console.say(f"what is left of {run_dir.adapter} is kept as {rest}")


def said_of_end(run_dir: RunDir) -> str:
    """What to say of a run where something stops the command after its adapter was saved."""
    report = shlex.join(["qtune", "report", str(run_dir.path)])
    return f"{run_dir.path} has ended, and is saved; its report: {report}"


def adapter_lack(run_dir: RunDir) -> str | None:
    """What is not there of an adapter that was saved, by the names and sizes of its files alone; None: nothing, or none
    was saved. It is for lists: whether the bytes are those that were saved, `adapter_fault` says."""
    folder = run_dir.adapter
    if manifest.is_sealed(folder):
        return manifest.lacks(folder)
    if not run_dir.is_finished:
        return GONE if has_taken_all(run_dir) else None
    return f"{WEIGHTS} is missing" if not (folder / WEIGHTS).is_file() else None


def adapter_fault(run_dir: RunDir) -> str | None:
    """What is wrong with a run's adapter, as far as its version lets that be told; None where there is none."""
    folder = run_dir.adapter
    if manifest.is_sealed(folder):
        return manifest.fault(folder) or foreign(run_dir.metrics_file, folder)
    if not run_dir.is_finished:
        return None
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(values, dict) or "peft_type" not in values:
            return f"{CONFIG} describes no adapter"
    except (OSError, ValueError, RecursionError) as error:
        return f"{CONFIG} cannot be read: {first_line(error)}"
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as stored:
            if not list(stored.keys()):
                return f"{WEIGHTS} is empty"
    except (OSError, SafetensorError) as error:
        return f"{WEIGHTS} cannot be read: {first_line(error)}"
    return None
