"""Sizes in bytes, binary as memory is, and speeds: their units, read from text and written in words."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from qtune.errors import InputError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterable

KIB = 2**10
MIB = 2**20
GIB = 2**30
LARGEST = 2**50
"""1 PiB: more than any machine has."""


def size_in_bytes(text: str, place: str) -> int:
    """Bytes of a size as recipes and --vram write it: "8GiB", "8 GB", "512MiB", "8".

    place: the key or option that it was given for, which an error names.

    Raises:
        InputError: it is no size.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(gib|gb|g|mib|mb|m)?\s*", text.lower())
    if not match or len(match[1]) > 40:
        raise InputError(Problem(place, f"{text[:80]!r} is not a size; write it as 8GiB or 512MiB"))
    unit = MIB if (match[2] or "g").startswith("m") else GIB
    size = float(match[1]) * unit
    if not 1 <= size <= LARGEST:
        raise InputError(Problem(place, f"{text[:80]!r} is no size of a memory; write it as 8GiB or 512MiB"))
    return int(size)


def size_text(size_bytes: float, digits: int = 2) -> str:
    """ "6.98 GiB", MiB below a tenth of one, KiB below a tenth of that, and bytes below one of them.

    digits: of GiB; MiB and KiB have one fewer.
    """
    if size_bytes >= GIB / 10:
        return f"{size_bytes / GIB:.{digits}f} GiB"
    if size_bytes >= MIB / 10:
        return f"{size_bytes / MIB:.{digits - 1}f} MiB"
    return f"{size_bytes / KIB:.{digits - 1}f} KiB" if size_bytes >= KIB else f"{size_bytes:.0f} B"


def gib_text(size_bytes: float) -> str:
    """In GiB for sizes that stand beside each other, "6.98 GiB"; smaller where that would be 0.00 of something."""
    return size_text(size_bytes) if 0 < size_bytes < GIB / 200 else f"{size_bytes / GIB:.2f} GiB"


def digits_apart(sizes: Iterable[float], other_bytes: float) -> int:
    """How many digits `size_text` needs for no size to look like the other one that it is compared with, unless it is
    that one."""
    different = [size for size in sizes if size != other_bytes]
    for digits in range(2, 9):
        if all(size_text(size, digits) != size_text(other_bytes, digits) for size in different):
            return digits
    return 9  # of a GiB: bytes


def texts_apart(size_bytes: float, other_bytes: float) -> tuple[str, str]:
    """Two sizes that are compared, with as many digits as it takes to see which one is larger."""
    digits = digits_apart([size_bytes], other_bytes)
    return size_text(size_bytes, digits), size_text(other_bytes, digits)


def share_saved(ours: int, theirs: int) -> str:
    """What ours takes less than theirs, in per cent; "takes less" where theirs is the smaller one."""
    return f"{1 - ours / theirs:.0%}" if ours <= theirs else "takes less"


def saving_text(without: int, ours: int) -> str:
    """What a technique does to the peak: "0.43 GiB", or "costs 2.1 MiB" where the step is smaller without it."""
    return size_text(without - ours) if without >= ours else f"costs {size_text(ours - without)}"


def flops_text(per_second: float, *, is_card: bool) -> str:
    """Operations per second, in the unit that is used of such a device everywhere."""
    unit, size = ("TFLOP/s", 1e12) if is_card else ("GFLOP/s", 1e9)
    found = per_second / size
    return f"{found:,.0f} {unit}" if found >= 100 else f"{found:.3g} {unit}"
