"""What becomes of memory that a training step on a processor frees: it stays with the process for the next step.

glibc gives the top of a heap back to the system once more is free there than twice the largest block that it has freed
(64 MiB at most; mallopt(3), M_TRIM_THRESHOLD and M_MMAP_THRESHOLD). A step frees its activations when it ends, and the
next one would get them again page by page, each page filled with zeros by the kernel. NOTES.md has what that costs.
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
"""Bytes: the most that glibc's own adjustment comes to on 64 bits, and that every release takes there. Larger blocks
are mapped singly and go back at once, so that they leave no gaps."""
NEVER = -1
SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")
TUNABLES = "GLIBC_TUNABLES"
"""By these a user sets the allocator (mallopt(3), "Environment variables"; the GNU C library's manual, "Tunables")."""

_users = 0
"""How many parts of the process are within `freed_memory_stays`."""


@contextlib.contextmanager
def freed_memory_stays(device: torch.device) -> Iterator[None]:
    """While it lasts, heaps do not shrink; after the outermost one what is free goes back, but for what threads other
    than the first have freed, which goes with the next that each of them frees. From then on the thresholds are those
    that glibc's own adjustment ends at. Nothing happens for a card, without glibc, or where the environment sets the
    allocator.
    """
    global _users
    library = _glibc() if device.type == "cpu" and not _is_set_by_user() else None
    if library is None:
        yield
        return
    if not _users:
        library.mallopt(MMAP_THRESHOLD, LARGEST_ON_HEAP)
        library.mallopt(TRIM_THRESHOLD, NEVER)
    _users += 1
    try:
        yield
    finally:
        _users -= 1
        if not _users:
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
