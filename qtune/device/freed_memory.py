"""What becomes of memory that a training step on a processor frees: it stays with the process for the next step.

glibc gives the top of its heap back to the system once 64 MiB of it are free, and large blocks at once (mallopt(3),
M_TRIM_THRESHOLD and M_MMAP_THRESHOLD). A step frees its activations when it ends, so that the next one would get them
again page by page, each page filled with zeros by the kernel. NOTES.md has what that costs.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""mallopt's numbers (malloc.h)."""
LARGEST_ON_HEAP = 32 * 2**20
"""Bytes: the most that every glibc takes. Larger blocks are mapped singly, so that they leave no gaps when they go."""
NEVER = -1
SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")
TUNABLES = "GLIBC_TUNABLES"
"""By these a user sets the allocator (mallopt(3), "Environment variables"; the GNU C library's manual, "Tunables")."""


@contextlib.contextmanager
def freed_memory_stays(device: torch.device) -> Iterator[None]:
    """While it lasts, the heap does not shrink; then all that is free goes back. Nothing happens for a card, without
    glibc, or where the environment sets the allocator."""
    library = _glibc() if device.type == "cpu" and not _is_set_by_user() else None
    if library is None:
        yield
        return
    library.mallopt(MMAP_THRESHOLD, LARGEST_ON_HEAP)
    library.mallopt(TRIM_THRESHOLD, NEVER)
    try:
        yield
    finally:
        # What glibc itself arrives at where blocks of that size are freed.
        library.mallopt(TRIM_THRESHOLD, 2 * LARGEST_ON_HEAP)
        library.malloc_trim(0)


def _is_set_by_user() -> bool:
    return any(os.environ.get(name) for name in SETTINGS) or "glibc.malloc" in os.environ.get(TUNABLES, "")


def _glibc() -> ctypes.CDLL | None:
    try:
        os.confstr("CS_GNU_LIBC_VERSION")
    except (AttributeError, ValueError, OSError):  # Windows; another C library
        return None
    return ctypes.CDLL(None)
