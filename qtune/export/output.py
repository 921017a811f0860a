"""Where an export goes, and the run that an exported folder is inside of; known before anything heavy is imported."""

from pathlib import Path

from qtune.errors import InputError, Problem
from qtune.export.staged import refuse_existing
from qtune.run.folder import RunDir
from qtune.run.resolved import resolved_recipe

EXPORTED = "model"
"""What an export is called inside of its run."""


def output_folder(run: RunDir, output: Path | None, *, alone: bool) -> Path:
    """The folder that an export is written to.

    output: what --output says. alone: whether the adapter is written without its base model.
    """
    return output or run.path / ("adapter-export" if alone else EXPORTED)


def refuse_existing_output(run: RunDir, output: Path | None, *, adapter_only: bool, force: bool) -> None:
    """`refuse_existing` for the folder that `output_folder` will name.

    Raises:
        InputError: it is there and `force` is not given. RunError: the run's recipe cannot be read.
    """
    alone = adapter_only or resolved_recipe(run).adapter.export == "alone"
    refuse_existing(output_folder(run, output, alone=alone), force=force)


def run_around(folder: Path) -> RunDir:
    """The run that an exported folder is inside of.

    Raises:
        InputError: it is inside none.
    """
    for parent in folder.resolve().parents:
        if (parent / "resolved.toml").is_file():
            return RunDir.open(parent)
    raise InputError(Problem(str(folder), "is not inside a run; name the run: qtune export RUN --verify-only DIR"))


def require_exported(folder: Path) -> None:
    """There is a folder to verify.

    Raises:
        InputError: there is none.
    """
    if not folder.is_dir():
        raise InputError(Problem(str(folder), "no such folder; --verify-only names one that was exported before"))
