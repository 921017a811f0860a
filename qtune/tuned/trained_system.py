"""The system message that most of a run's training rows begin with: whoever talks to the run may want it."""

from collections import Counter
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

from qtune.data.conversation import RowError
from qtune.data.formats import detect_format, renamed, to_conversation
from qtune.data.rows import Row
from qtune.data.sources import HUB, find_sources
from qtune.errors import InputError
from qtune.recipe.schema import Data, HubSource

LOOKED_AT = 100
"""Rows of each source: enough to see what is usual."""


def usual_system(data: Data, folder: Path) -> str | None:
    """What more than half of the first rows have for a system message; empty where they share none, None where that is
    not known: they are gone by now, or on the hub.

    Rows of the hub are not asked: talking to a run fetches no data set.
    """
    if any(_is_of_the_hub(entry) for entry in (data.train if isinstance(data.train, tuple) else (data.train,))):
        return None
    found: Counter[str | None] = Counter()
    try:
        for source in find_sources(data.train, data, folder):
            for row in islice(source.rows(), LOOKED_AT):
                if isinstance(row, Row):
                    found[_system_of(row, source.row_format, source.columns, data)] += 1
    except (InputError, OSError):
        return None
    if not found:
        return None
    ((text, count),) = found.most_common(1)
    return text or "" if 2 * count > found.total() else ""


def _is_of_the_hub(entry: object) -> bool:
    return isinstance(entry, HubSource) or (isinstance(entry, str) and entry.startswith(HUB))


def _system_of(row: Row, given: str, columns: Mapping[str, str], data: Data) -> str | None:
    value = renamed(row.value, columns)
    row_format = detect_format(value) if given == "auto" else given
    try:
        if row_format is None:
            return None
        talk = to_conversation(value, row_format, row.place, data.system, data.system_prompt, data.on_turn_order)
    except RowError:
        return None
    first = talk.messages[0]
    return str(first["content"]) if first["role"] == "system" else None
