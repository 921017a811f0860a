"""Where an export goes, and the run that an exported folder is inside of; known before anything heavy is imported."""

import shlex
from collections.abc import Collection
from pathlib import Path

from qtune.errors import InputError, Problem
from qtune.export.staged import refuse_existing
from qtune.export.verification import of_another_run, read_proof
from qtune.run.folder import EXPORTED, RunDir
from qtune.run.resolved import resolved_recipe

UNVERIFIED = ".unverified"
"""Behind the name of a file that was not proven."""


def output_folder(run: RunDir, output: Path | None, *, alone: bool) -> Path:
    """The folder that an export is written to.

    output: what --output says. alone: whether the adapter is written without its base model.
    """
    return output or run.path / ("adapter-export" if alone else EXPORTED)


def refuse_existing_output(
    run: RunDir,
    output: Path | None,
    *,
    adapter_only: bool,
    force: bool,
    gguf: str | None = None,
    given: Collection[str] = (),
) -> None:
    """`refuse_existing` for the folder that `output_folder` will name; to a verified export of the run, a GGUF file of
    type `gguf` can be added.

    given: the options as they were written on a command line.

    Raises:
        InputError: it is there and `force` is not given. RunError: the run's recipe cannot be read.
    """
    alone = adapter_only or resolved_recipe(run).adapter.export == "alone"
    folder = output_folder(run, output, alone=alone)
    if gguf is None or alone or force or not folder.exists():
        refuse_existing(folder, force=force)
        return
    if not is_verified_export(run, folder):
        verifying = shlex.join(["qtune", "export", str(run.path), "--verify-only", str(folder)])
        message = "is there already, and is no verified export of this run, to which a GGUF file could be added"
        raise InputError(Problem(str(folder), f"{message}; {verifying} verifies it, --force replaces it"))
    known = read_proof(folder).gguf.get(gguf)
    if known is not None and not known.failures and (folder / known.file).is_file():
        message = "is there already, and was verified; --force exports all of it again"
        raise InputError(Problem(str(folder / known.file), message))
    if made_with := [option for option in OF_THE_WHOLE if option in given]:
        message = f"{folder} is a verified export, to which llama.cpp's files alone are added; --force exports it again"
        raise InputError([Problem(option, message) for option in made_with])


OF_THE_WHOLE = ("--dtype", "--base", "--compare-bases", "--no-verify", "--verify")
"""Options that say how the whole model is exported."""


def is_verified_export(run: RunDir, folder: Path) -> bool:
    """Whether a folder says that it was verified as the export of this very run; its bytes are not read for it."""
    return read_proof(folder).verified and of_another_run(folder, run.path) is None


def run_around(folder: Path) -> RunDir:
    """The run that an exported folder is inside of.

    Raises:
        InputError: it is inside none.
    """
    for parent in folder.resolve().parents:
        if (parent / "resolved.toml").is_file():
            return RunDir.open(parent)
    if (folder / EXPORTED).is_dir() and (folder / "resolved.toml").is_file():
        command = shlex.join(["qtune", "export", str(folder), "--verify-only", str(folder / EXPORTED)])
        raise InputError(
            Problem(str(folder), f"is a run, and not what was exported of it; verify that with: {command}")
        )
    raise InputError(Problem(str(folder), "is not inside a run; name the run: qtune export RUN --verify-only DIR"))


def require_exported(folder: Path) -> None:
    """There is a folder to verify.

    Raises:
        InputError: there is none.
    """
    if not folder.is_dir():
        raise InputError(Problem(str(folder), "no such folder; --verify-only names one that was exported before"))
