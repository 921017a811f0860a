"""The large libraries, imported at once: without looking for reference cycles among what stays."""

from __future__ import annotations

import functools
import gc
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


def import_libraries() -> None:
    """Imports torch, bitsandbytes, transformers, peft and datasets; later import statements find them there.

    They make some 750,000 objects, which all stay: looking through them for reference cycles, a thousand times, is a
    sixth of the time.
    """
    with no_collection():
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
