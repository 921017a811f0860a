"""Whether training rows are prepared as a whole or streamed: as the recipe says, or as the disk allows."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qtune.data.files import DataFile, refuse_unstreamable
from qtune.data.sources import Source
from qtune.disk import free_bytes
from qtune.recipe.row_kinds import STREAMED_KINDS
from qtune.recipe.schema import Data
from qtune.sizes import size_text

LARGEST_SHARE = 0.5
"""Of the free disk, that prepared rows may take without being asked for."""
GROWTH, GROWTH_OF_PACKED = 3, 12
"""Bytes that are kept of a row for each byte of its file."""


@dataclass(frozen=True)
class Choice:
    """Whether rows are streamed, and why."""

    streams: bool
    reason: str
    is_tight: bool = False
    """Whether the disk is short of what will be kept."""


WHOLE = Choice(False, "prepared as a whole")


def choose_streaming(data: Data, sources: Sequence[Source], cache: Path) -> Choice:
    """Decides for the training rows; `cache` is where prepared ones would be kept.

    Raises:
        DataError: streaming is asked for, and a file is of a kind that cannot be.
    """
    files = [file for source in sources for file in source.files]
    if data.streaming is True:
        refuse_unstreamable(files)
        return Choice(True, "as the recipe says")
    if data.streaming is False:
        return Choice(False, "as the recipe says")
    kept = sum(map(_kept_bytes, files))
    free = free_bytes(cache)
    about = f"prepared rows would take about {size_text(kept)} of the {size_text(free)} that are free in {cache}"
    if kept <= LARGEST_SHARE * free:
        return Choice(False, about)
    needs_all = (
        any(file.kind not in STREAMED_KINDS for file in files)
        or data.packing
        or any(source.hub is not None or source.weight != 1 for source in sources)
    )
    if needs_all:
        return Choice(
            False, f"{about}, and kinds of files, packing or weights do not let them be streamed", is_tight=True
        )
    return Choice(True, about)


def _kept_bytes(file: DataFile) -> int:
    packed = file.compression or file.kind == "parquet"
    return file.path.stat().st_size * (GROWTH_OF_PACKED if packed else GROWTH)
