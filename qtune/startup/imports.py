"""The large libraries, imported at once: without looking for reference cycles among what stays."""

from __future__ import annotations

import functools
import gc
import importlib
import shlex
import sys
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from qtune.errors import LibraryError, first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

LIBRARIES = ("torch", "bitsandbytes", "datasets", "transformers", "peft")
"""Each after those that it imports itself, so that the first one that fails is the one that is broken."""


def import_libraries(waiting: Callable[[str], AbstractContextManager[Callable[[str], None]]] | None = None) -> None:
    """Imports torch, bitsandbytes, transformers, peft and datasets; later import statements find them there.

    They make some 750,000 objects, which all stay: looking through them for reference cycles, a thousand times, is a
    sixth of the time.

    waiting: how it is said what is waited for, and for which of them (`console.waiting`); where all of them are there
    already, nothing is.

    Raises:
        LibraryError: one of them is not installed, or cannot be imported.
    """
    is_said = waiting is not None and any(name not in sys.modules for name in LIBRARIES)
    shown = waiting("loading the libraries") if is_said and waiting is not None else nullcontext(_told_nothing)
    with shown as tell, no_collection():
        for number, name in enumerate(LIBRARIES, 1):
            tell(f"{name}, {number} of {len(LIBRARIES)}")
            try:
                importlib.import_module(name)
            except Exception as error:  # the code of others, which fails in every way
                raise _refused(name, error) from error
    freeze_once()


def _told_nothing(part: str) -> None:
    pass


def _refused(library: str, error: Exception) -> LibraryError:
    """What is said of a library that cannot be imported: its version, why, and the command that puts it right."""
    from importlib import metadata

    try:
        version = metadata.version(library)
    except metadata.PackageNotFoundError:
        return LibraryError(library, "is not installed", f"pip install {_bounded(library)}")
    why = f"{type(error).__name__}: {first_line(error)}"
    again = f"pip install --force-reinstall {_bounded(library)}, or what it misses"
    return LibraryError(library, f"version {version} cannot be imported ({why})", again)


def _bounded(library: str) -> str:
    """A library with the bounds that we were tested with, as pip takes it from a shell."""
    from importlib import metadata

    from packaging.requirements import Requirement

    try:
        ours = [Requirement(line) for line in metadata.requires("qtune") or ()]
    except metadata.PackageNotFoundError:  # run from a checkout
        ours = []
    return shlex.quote(next((str(one) for one in ours if one.name == library), library))


@contextmanager
def no_collection() -> Iterator[None]:
    """No reference cycles are looked for while the block runs."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@functools.cache
def freeze_once() -> None:
    """Takes all that is there now out of later collections: what was imported stays, and is most of what there is."""
    gc.freeze()
