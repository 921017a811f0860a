"""The large libraries, imported in three quarters of the time that import statements take."""

from __future__ import annotations

import functools
import gc
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


def import_libraries() -> None:
    """Imports torch, bitsandbytes, transformers, peft and datasets; later import statements find them there.

    They make some 750,000 objects, which all stay: looking through them for reference cycles, a thousand times, is a
    sixth of the time.
    """
    with no_collection():
        import torch  # noqa: F401

        with _nothing_is_compiled():
            import bitsandbytes  # noqa: F401
        import datasets  # noqa: F401
        import peft  # noqa: F401
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
    """What is there now is not looked at by any later collection: what was imported stays."""
    gc.freeze()


@contextmanager
def _nothing_is_compiled() -> Iterator[None]:
    """bitsandbytes 0.50 wraps four functions in `torch.compile` when it is imported, which imports the whole compiler.
    They are for devices without kernels of their own; CPU and CUDA have them (backends/default/ops.py)."""
    import torch

    def uncompiled(function: Any = None, **_: Any) -> Any:
        return uncompiled if function is None else function

    original = torch.compile
    torch.compile = uncompiled  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = original
