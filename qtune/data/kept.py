"""A folder of the cache with rows in it: an Arrow file, and about.json, which says what must be in that."""

import json
import shutil
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from qtune import console
from qtune.cache import mark_used
from qtune.records import NotARecord, require_sealed, sealed
from qtune.sizes import MIB

ABOUT = "about.json"


def write_about(folder: Path, rows: Path, about: Mapping[str, Any]) -> None:
    """Notes what is in a folder, and a checksum of its file of rows, which is complete."""
    # A folder's name says what is in it: another one's, in its place, is whole as well.
    values = {**about, "name": folder.name, "nbytes": rows.stat().st_size, "rows_crc32": _crc32(rows)}
    (folder / ABOUT).write_text(json.dumps(sealed(values)), encoding="utf-8")


def read_about(folder: Path, rows: Path) -> dict[str, Any] | None:
    """What was noted of a folder; None where there is none. One that is not what was written is said, and removed."""
    try:
        values = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        require_sealed(values)
        if rows.stat().st_size != values["nbytes"] or _crc32(rows) != values["rows_crc32"]:
            raise NotARecord(f"{rows.name} has other bytes")
        if values.get("name", folder.name) != folder.name:
            raise NotARecord("it was written under another name")
    except FileNotFoundError:
        if folder.exists():
            discard(folder)
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        discard(folder)
        return None
    mark_used(folder / ABOUT)
    return dict(values)


def discard(folder: Path) -> None:
    """Removes what cannot be used, and says so."""
    console.say(f"{folder} is not what was kept there; its rows are made again")
    with suppress(OSError):  # another user's: then the rows cannot be kept, which is said
        shutil.rmtree(folder)


def _crc32(file: Path) -> int:
    """Of all of a file: about 3 GB/s where it is in memory."""
    checksum = 0
    with file.open("rb") as stream:
        while block := stream.read(4 * MIB):
            checksum = zlib.crc32(block, checksum)
    return checksum
