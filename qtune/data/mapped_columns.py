"""Names in `columns` that mean nothing for a source, whose rows or shape have no such column; and the way out."""

import contextlib
from collections.abc import Callable, Collection, Sequence
from itertools import islice
from pathlib import Path

from qtune.data.formats import unknown_name
from qtune.data.rows import Row
from qtune.data.sources import Source, find_sources
from qtune.data.store import Stored
from qtune.errors import DataError, Problem
from qtune.recipe.schema import Data
from qtune.recipe.text import show_value
from qtune.spelling import did_you_mean

Named = tuple[str, Source]
"""A source, and the key of [data] that names it."""

LOOKED_AT = 100
"""Rows of a source by which its columns are known."""


def first_rows(source: Source) -> list[Row]:
    """The first rows of a source that can be read."""
    return [row for row in islice(source.rows(), LOOKED_AT) if isinstance(row, Row)]


def require_mapped(source: Source, stored: Stored, split: str, others: Callable[[], Sequence[Named]]) -> None:
    """Raises a DataError for names in `columns` that mean nothing: no shape has the one, or no row the other.

    split, others: as in `missing_columns`; the others are asked for only where this source lacks a column.
    """
    unknown = {ours: problem for ours in source.columns if (problem := unknown_name(ours))}
    problems = [Problem(f"data.columns.{ours}", problem) for ours, problem in unknown.items()]
    if stored.rows > stored.bad_count:
        unread = [ours for ours in source.columns if ours not in unknown and not stored.mapped.get(ours)]
        if unread:
            problems += missing_columns(source, unread, columns_of(first_rows(source)), split, others())
    if problems:
        raise DataError(problems)


def columns_of(rows: Sequence[Row]) -> set[str]:
    """All that some rows have."""
    return {key for row in rows for key in row.value}


def missing_columns(
    source: Source, missing: Sequence[str], present: Collection[str], split: str, others: Sequence[Named]
) -> list[Problem]:
    """What is wrong with names of `columns`, ours, whose column no row of a source has; where rows of another source
    have it, also how only those are renamed.

    present: the columns that its rows have. split: the key of [data] that names it. others: all of the recipe's.
    """
    shared = {source.columns[ours] for ours in missing if ours not in source.entry.columns}
    having = [
        (key, one) for key, one in others if shared and one.name != source.name and shared & columns_of(first_rows(one))
    ]
    found = f"found {', '.join(sorted(present))}"
    problems = []
    for ours in missing:
        theirs, as_those = source.columns[ours], ""
        advice = did_you_mean(theirs, sorted(present), found)
        if having and theirs in shared:
            as_those, advice = f", as those of {having[0][1].name} have", found
        message = f"no row of {source.name} has a column {theirs!r}{as_those}; {advice}"
        problems.append(Problem(f"data.columns.{ours}", message))
    if having:
        problems.append(_way_out(source, missing, present, split, having[0], others))
    return problems


def _way_out(
    source: Source, missing: Sequence[str], present: Collection[str], split: str, other: Named, others: Sequence[Named]
) -> Problem:
    """Names of its own for the source that has our columns under other ones; where it has no such column at all, they
    are named with the source that has them."""
    if all(ours in present for ours in missing):
        key, own = split, source.entry.columns | {ours: ours for ours in missing}
        entry, why = source.entry, "names of one source alone are given with it"
    else:
        key, own = other[0], dict(other[1].columns)
        entry, why = other[1].entry, "what only some sources have is named with them, and not in data.columns"
    more = ", …" if sum(one == key for one, _ in others) > 1 else ""
    written = show_value(entry.model_copy(update={"columns": own}))
    return Problem(f"data.{key}", f"{why}: {key} = [{written}{more}]")


def sources_of(data: Data, folder: Path, split: str = "train") -> list[Named]:
    """The sources of each key of [data] that can be found. split: as in `prepare`."""
    named = {"train": (data.train, split), "validation": (data.validation, "validation"), "test": (data.test, "test")}
    found: list[Named] = []
    for key, (given, meant) in named.items():
        if given is not None and not isinstance(given, float):
            with contextlib.suppress(DataError):  # said where that source is read
                found += [(key, source) for source in find_sources(given, data, folder, meant)]
    return found
