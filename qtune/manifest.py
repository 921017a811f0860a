"""manifest.json: what a folder of a run was when it was saved, file by file; written last, so that it says "whole".

A disk, a copy or a person may change files later. Whoever reads such a folder asks first, and uses none that differs.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from qtune.errors import Problem, RunError
from qtune.records import CHECKSUM, read_record, write_record
from qtune.sizes import MIB
from qtune.whole import sync_folder

NAME = "manifest.json"
IF_CHANGED = f"export it again; if it is right as it is, remove its {NAME}"
"""What to do about an exported folder that has changed."""

SMALL_BYTES = 64 * MIB
"""A file up to this size is read whole, however little time there is."""
BLOCKS, BLOCK_BYTES = 1024, 4096
"""What is read of a larger one then: a fraction of a second on a solid-state disk, whatever its size."""


@dataclass(frozen=True)
class SavedFile:
    """One file as it was saved."""

    nbytes: int
    sha256: str
    sampled: str | None = None
    """Of blocks that are spread over a large file; None for a small one, and in manifests of older versions."""


@dataclass(frozen=True)
class RecordsThen:
    """The lines of a run's metrics.jsonl at some time."""

    lines: int
    first: str | None
    """The checksum of the first of them, which tells one run from another; None where it had none."""
    last: str | None


@dataclass(frozen=True)
class SavedBy:
    """The run that saved a folder (`run.identity`)."""

    run_id: str
    part: int
    """How often it had been resumed."""


@dataclass(frozen=True)
class Manifest:
    """The files of a folder by their names."""

    files: dict[str, SavedFile]
    step: int | None = None
    """Of a checkpoint: the step after which it was made."""
    skipped: tuple[int, ...] = ()
    """Of a checkpoint: the steps until then whose updates were left out, for they stood out."""
    records: RecordsThen | None = None
    """Of a checkpoint or an adapter: what the run had told until then."""
    by: SavedBy | None = None
    """None in manifests of older versions, and of what is no run's."""
    name: str | None = None
    """Of a folder in the cache, whose name says what is in it; others may be called anything."""


def seal(
    folder: Path,
    step: int | None = None,
    *,
    skipped: Iterable[int] = (),
    left_out: Iterable[str] = (),
    records: RecordsThen | None = None,
    by: SavedBy | None = None,
    name: str | None = None,
) -> None:
    """Writes the manifest of a folder that is complete, once everything in it has reached the disk.

    left_out: files that change later, and have a checksum of their own. records: what the run has told until now. by:
    the run that it is of. name: what it will be called, where the name says what is in it.
    """
    names = [name for name in _names(folder) if name not in left_out]
    manifest = Manifest({name: _as_saved(folder / name) for name in names}, step, tuple(skipped), records, by, name)
    for inside in {(folder / name).parent for name in names} | {folder}:
        sync_folder(inside)
    write_record(folder / NAME, manifest)
    sync_folder(folder.parent)


def add_to_seal(folder: Path, files: Iterable[Path]) -> None:
    """Notes files that came into a sealed folder later; a folder without a manifest of ours stays without.

    Raises:
        RunError: the manifest is damaged.
    """
    manifest = read_record(folder / NAME, Manifest) if is_ours(folder) else None
    if manifest is not None:
        more = {file.relative_to(folder).as_posix(): _as_saved(file) for file in files}
        write_record(folder / NAME, replace(manifest, files=manifest.files | more))


def _names(folder: Path) -> Iterator[str]:
    """Files of a folder, relative to it. Notes for people may be edited."""
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        if file.is_file() and name != Path(NAME) and file.suffix != ".md" and not any(p[0] == "." for p in name.parts):
            yield name.as_posix()


def _as_saved(file: Path) -> SavedFile:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    nbytes = file.stat().st_size
    return SavedFile(nbytes, digest, sampled(file) if nbytes > SMALL_BYTES else None)


def sampled(file: Path) -> str:
    """A hash of a file: of all of it where it is small, else of blocks at even distances from its first byte to its
    last.

    Raises:
        OSError: it cannot be read.
    """
    with file.open("rb") as stream:
        nbytes = os.fstat(stream.fileno()).st_size
        if nbytes <= SMALL_BYTES:
            return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        digest = hashlib.blake2b(digest_size=16)
        for number in range(BLOCKS):
            stream.seek(number * (nbytes - BLOCK_BYTES) // (BLOCKS - 1))
            digest.update(stream.read(BLOCK_BYTES))
    return digest.hexdigest()


def is_sealed(folder: Path) -> bool:
    """Whether a folder has a manifest, whatever it says."""
    return os.path.lexists(folder / NAME)


def skipped_until(checkpoint: Path) -> tuple[int, ...]:
    """The steps whose updates are not in a checkpoint; none where an older version did not say.

    Raises:
        RunError: its manifest is damaged.
    """
    manifest = read_record(checkpoint / NAME, Manifest)
    return () if manifest is None else manifest.skipped


def is_ours(folder: Path) -> bool:
    """Whether a folder that may be anybody's has a manifest of this program: others have files of that name, too."""
    try:
        text = (folder / NAME).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return is_sealed(folder) and (folder / "verify.json").is_file()
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return '"sha256"' in text or (folder / "verify.json").is_file()
    return isinstance(values, dict) and (CHECKSUM in values or _is_of_saved_files(values.get("files")))


def _is_of_saved_files(files: object) -> bool:
    """Whether files are described as here: a manifest without its checksum, which was removed to correct another line
    of it, still says what they were."""
    described = files.values() if isinstance(files, dict) else ()
    return bool(described) and all(isinstance(one, dict) and {"nbytes", "sha256"} <= one.keys() for one in described)


def fault(
    folder: Path,
    step: int | None = None,
    *,
    quick: bool = False,
    may_lack: Callable[[str], bool] = lambda name: False,
) -> str | None:
    """What is wrong with a sealed folder, the first of it, in words that follow its name; None where it is whole.

    step: the one that the folder claims to be of. quick: of large files only blocks are read. may_lack: whether a file
    of this name may be missing.

    Raises:
        RunError: a file is there, and this user may not read it.
    """
    try:
        manifest = read_record(folder / NAME, Manifest)
    except RunError as error:
        return f"its {NAME} {error.problems[0].message}"
    if manifest is None:
        return f"its {NAME} is missing"
    if step is not None and manifest.step != step:
        return f"it was saved after step {manifest.step}, not {step}"
    if manifest.name not in (None, folder.name):
        return f"it was made as {manifest.name}, which is something else"
    for name, saved in manifest.files.items():
        place = PurePosixPath(name)
        if place.is_absolute() or ".." in place.parts or not place.parts:
            return f"its {NAME} names {name!r}, which is no file in it"
        if may_lack(name) and not os.path.lexists(folder / name):
            continue
        if (said := _file_fault(folder / name, saved, quick=quick)) is not None:
            return f"{name} {said}"
    return None


def lacks(folder: Path) -> str | None:
    """Which file of a sealed folder is not there or has another size, in words; None where there is none, and where the
    manifest does not tell. No file is read but the manifest: `fault` says more, and takes its time."""
    try:
        manifest = read_record(folder / NAME, Manifest)
    except RunError:
        return None
    for name, saved in ({} if manifest is None else manifest.files).items():
        try:
            found = (folder / name).stat().st_size
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError:
            continue
        if found != saved.nbytes:
            return f"{name} has {found:,} bytes, {saved.nbytes:,} were saved"
    return None


def files_of(folder: Path) -> frozenset[str]:
    """The names of the files that a sealed folder had.

    Raises:
        RunError: its manifest is damaged.
    """
    manifest = read_record(folder / NAME, Manifest)
    return frozenset() if manifest is None else frozenset(manifest.files)


def file_fault(file: Path) -> str | None:
    """What is wrong with one file of a sealed folder; None where it is whole, and where the manifest, a damaged one
    too, does not name it."""
    try:
        manifest = read_record(file.parent / NAME, Manifest) if is_ours(file.parent) else None
    except RunError:
        return None
    saved = None if manifest is None else manifest.files.get(file.name)
    return None if saved is None else _file_fault(file, saved, quick=False)


def _file_fault(file: Path, saved: SavedFile, *, quick: bool) -> str | None:
    try:
        found = file.stat().st_size
        if not file.is_file():
            return "is no file"
        if found != saved.nbytes:
            return f"has {found:,} bytes, {saved.nbytes:,} were saved"
        if quick and found > SMALL_BYTES:
            is_same = saved.sampled in (None, sampled(file))
            return None if is_same else "is not what was saved: blocks of it are others"
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError:
        return "is missing"
    except PermissionError as error:  # which says nothing of what is in it
        message = f"cannot be read: {error.strerror}; give yourself the right to it"
        raise RunError(Problem(str(file), message)) from error
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if digest == saved.sha256 else "is not what was saved: its SHA-256 is another"
