"""The large libraries, imported at once: without looking for reference cycles among what stays."""

from __future__ import annotations

import functools
import gc
import sys
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

LIBRARIES = ("bitsandbytes", "datasets", "peft", "torch", "transformers")


def import_libraries(waiting: Callable[[str], AbstractContextManager[None]] | None = None) -> None:
    """Imports torch, bitsandbytes, transformers, peft and datasets; later import statements find them there.

    They make some 750,000 objects, which all stay: looking through them for reference cycles, a thousand times, is a
    sixth of the time.

    waiting: how it is said what is waited for (`console.waiting`); where all of them are there already, nothing is.
    """
    is_said = waiting is not None and any(name not in sys.modules for name in LIBRARIES)
    with waiting("loading the libraries") if is_said and waiting is not None else nullcontext(), no_collection():
        import bitsandbytes  # noqa: F401
        import datasets  # noqa: F401
        import peft  # noqa: F401
        import torch  # noqa: F401
        import transformers  # noqa: F401
    freeze_once()


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
