"""manifest.json: what a folder of a run was when it was saved, file by file; written last, so that it says "whole".

A disk, a copy or a person may change files later. Whoever reads such a folder asks first, and uses none that differs.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from qtune.errors import RunError
from qtune.run.records import read_record, write_record
from qtune.whole import sync_folder

NAME = "manifest.json"


@dataclass(frozen=True)
class SavedFile:
    """One file as it was saved."""

    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The files of a folder by their names."""

    files: dict[str, SavedFile]
    step: int | None = None
    """Of a checkpoint: the step after which it was made."""


def seal(folder: Path, step: int | None = None) -> None:
    """Writes the manifest of a folder that is complete, once everything in it has reached the disk."""
    files = {}
    for file in sorted(folder.iterdir()):
        # Notes for people may be edited.
        if file.is_file() and file.name != NAME and file.suffix != ".md" and not file.name.startswith("."):
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            files[file.name] = SavedFile(file.stat().st_size, digest)
    sync_folder(folder)
    write_record(folder / NAME, Manifest(files, step))
    sync_folder(folder.parent)


def is_sealed(folder: Path) -> bool:
    """Whether a folder has a manifest, whatever it says."""
    return os.path.lexists(folder / NAME)


def fault(folder: Path, step: int | None = None) -> str | None:
    """What is wrong with a sealed folder, the first of it, in words that follow its name; None where it is whole.

    step: the one that the folder claims to be of.
    """
    try:
        manifest = read_record(folder / NAME, Manifest)
    except RunError as error:
        return f"its {NAME} {error.problems[0].message}"
    if manifest is None:
        return f"its {NAME} is missing"
    if step is not None and manifest.step != step:
        return f"it was saved after step {manifest.step}, not {step}"
    for name, saved in manifest.files.items():
        if Path(name).name != name:
            return f"its {NAME} names {name!r}, which is no file in it"
        if (said := _file_fault(folder / name, saved)) is not None:
            return f"{name} {said}"
    return None


def _file_fault(file: Path, saved: SavedFile) -> str | None:
    try:
        found = file.stat().st_size
        if not file.is_file():
            return "is no file"
        if found != saved.nbytes:
            return f"has {found:,} bytes, {saved.nbytes:,} were saved"
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if digest == saved.sha256 else "is not what was saved: its SHA-256 is another"
