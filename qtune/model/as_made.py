"""Model folders that qtune has made itself, in its cache or as an export: whether they are what was written."""

import functools
from pathlib import Path

from qtune import console, manifest
from qtune.cache import cache_folder
from qtune.errors import ModelError, Problem, RunError
from qtune.sizes import GIB


def damage_of(folder: Path, *, whole: bool = False) -> str | None:
    """What is not as it was written, in words that follow the folder's name; None where all is, and where nobody or
    another program has written its manifest.json.

    whole: every byte is read; otherwise of files beyond `manifest.SMALL_BYTES` blocks alone. While no size and no time
    of a file changes, nor what its manifest says, the answer of this process stands.
    """
    return _damage(folder, _state(folder), whole) if manifest.is_ours(folder) else None


def require_as_made(folder: Path, *, whole: bool = False) -> None:
    """Refuses a folder of the cache or an exported one whose files have changed since; other folders say nothing of
    what they were.

    Raises:
        ModelError: a file is missing, or is not what was written.
    """
    if (said := damage_of(folder, whole=whole)) is None:
        return
    if folder.absolute().is_relative_to(cache_folder().absolute()):
        raise ModelError(Problem(str(folder), f"is not what was kept there: {said}; remove it, and it is made again"))
    raise ModelError(Problem(str(folder), f"is not what was exported: {said}; {manifest.IF_CHANGED}"))


def fault_of_kept(folder: Path) -> str | None:
    """What of a folder of the cache is not as it was put there, in words that follow its name; None where all is.

    One of an older version, which had no manifest, gets one: from here on it is compared with what it is now.
    """
    if not manifest.is_sealed(folder):
        _seal_as_it_is(folder)
        return None
    try:
        return _damage(folder, _state(folder), False)
    except RunError as error:  # another user's, and his alone
        return error.problems[0].message


def say_made_again(folder: Path, said: str) -> None:
    """A line about a folder of the cache that cannot be used."""
    console.say(f"{folder} is not what was kept there: {said}; it is made again")


def _seal_as_it_is(folder: Path) -> None:
    try:
        manifest.seal(folder)
    except OSError:  # another user's cache, or a full disk
        return


def _state(folder: Path) -> tuple[tuple[str, int, int | bytes], ...]:
    """(name, size, time) of each file; of the manifest its bytes, for its time says when the folder was used last."""
    found: list[tuple[str, int, int | bytes]] = []
    for file in sorted(folder.rglob("*")):
        try:
            state = file.stat()
            is_manifest = file == folder / manifest.NAME
            found.append((str(file), state.st_size, file.read_bytes() if is_manifest else state.st_mtime_ns))
        except OSError:  # a dangling link, or not for this user
            continue
    return tuple(found)


def is_made_of_it(name: str) -> bool:
    """Whether a file of an export was made of the others, for another program: who removes it has lost nothing of the
    model, and it can be made again."""
    return name.endswith(".gguf") or name == "Modelfile"


ADDED = {".safetensors", ".bin", ".jinja", ".py"}
ADDED_NAMES = {"adapter_config.json", "generation_config.json", "model.safetensors.index.json", "added_tokens.json"}
"""Files that a loader reads where they are there: one that has come in since makes another model."""


def _added(folder: Path) -> str | None:
    """The first file that was not there when the folder was written, and that a loader reads."""
    saved = manifest.files_of(folder)
    for file in sorted(folder.iterdir()):
        if file.name not in saved and (file.suffix in ADDED or file.name in ADDED_NAMES):
            return f"{file.name} has come in since"
    return None


@functools.cache
def _damage(folder: Path, state: tuple[tuple[str, int, int | bytes], ...], whole: bool) -> str | None:
    if not (whole and sum(nbytes for _, nbytes, _ in state) > GIB):
        return manifest.fault(folder, quick=not whole, may_lack=is_made_of_it) or _added(folder)
    with console.progress(f"reading {folder}: is it what was written?"):
        return manifest.fault(folder, may_lack=is_made_of_it) or _added(folder)
