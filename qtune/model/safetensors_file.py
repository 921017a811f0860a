"""A safetensors file: its header, checked before anybody believes it. Its tensors: `model/checkpoint.py`.

Layout: https://github.com/huggingface/safetensors#format: eight bytes of length, a JSON header, the tensors.
"""

import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from qtune.errors import ModelError, Problem

LONGEST_HEADER = 100_000_000
"""Bytes, as in the library."""
BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
        "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
        "C64": 64}  # fmt: skip


def require_whole(file: Path) -> None:
    """The file has what its header says; only the header is read.

    Raises:
        ModelError: it does not.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(LONGEST_HEADER, size - 8):
                message = f"is cut off or no safetensors file: {size:,} bytes, with a header of {length:,}"
                raise ModelError(Problem(str(file), message))
            header = json.loads(stream.read(length))
    except OSError as error:
        raise ModelError(Problem(str(file), f"cannot be read: {error.strerror}")) from error
    except (ValueError, RecursionError) as error:
        raise ModelError(Problem(str(file), "is no safetensors file: its header is not JSON")) from error
    if (fault := _fault(header, size - 8 - length)) is not None:
        raise ModelError(Problem(str(file), f"is damaged: {fault}"))


def _fault(header: Any, data_bytes: int) -> str | None:
    if not isinstance(header, dict):
        return "its header is no object"
    end, before = 0, ""
    tensors = {name: about for name, about in header.items() if name != "__metadata__"}
    for name, about in sorted(tensors.items(), key=_start):
        place = _place(about)
        if place is None:
            return f"{name[:200]} is described as {str(about)[:200]}"
        start, stop = place
        if start < end:
            return f"{name[:200]} overlaps {before[:200]}"
        if start > end:
            return f"{start - end:,} bytes before {name[:200]} belong to no tensor"
        if stop > data_bytes:
            return f"{name[:200]} ends at byte {stop:,} of {data_bytes:,}; it was not copied to its end"
        end, before = stop, name
    return None if end == data_bytes else f"{data_bytes - end:,} bytes at its end belong to no tensor"


def _start(entry: tuple[str, Any]) -> tuple[int, int]:
    return _place(entry[1]) or (-1, -1)


def _place(about: Any) -> tuple[int, int] | None:
    """Where a tensor begins and ends, if its type, shape and place go together."""
    if not isinstance(about, Mapping):
        return None
    shape, offsets, bits = about.get("shape"), about.get("data_offsets"), BITS.get(str(about.get("dtype")))
    if bits is None or not isinstance(shape, list) or not isinstance(offsets, list):
        return None
    if not all(isinstance(number, int) and 0 <= number < 2**63 for number in (*shape, *offsets)):
        return None
    if len(offsets) != 2 or len(shape) > 64 or prod(shape) * bits != 8 * (offsets[1] - offsets[0]):
        return None
    return offsets[0], offsets[1]
