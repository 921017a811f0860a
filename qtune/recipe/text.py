"""A recipe's text with other values: comments, order and formatting stay as they were."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tomlkit
from tomlkit.items import Item, Table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qtune.recipe.schema import KeyPath


def rewritten(text: str, changes: Mapping[KeyPath, Any], reason: str) -> str:
    """`text` with `changes` of (table, key) -> value; keys that were not there come at the end of their table.

    None takes a key out. reason: a comment for new keys, if it is not empty.
    """
    document = tomlkit.parse(text)
    for (table, key), value in changes.items():
        if value is None:
            if key in document.get(str(table), {}):
                document[str(table)].remove(str(key))
            continue
        if table not in document:
            document.add(tomlkit.nl())
            document.add(str(table), tomlkit.table())
        target = document[str(table)]
        assert isinstance(target, Table)
        if key in target:
            old, new = target.value.item(str(key)), tomlkit.item(value)
            assert isinstance(old, Item)
            # tomlkit puts one space before a comment of its own; this one keeps its column.
            new.trivia.comment_ws, new.trivia.comment = old.trivia.comment_ws, old.trivia.comment
            target[str(key)] = new
        else:
            item = tomlkit.item(value)
            if reason:
                item.comment(reason)
            _append(target, str(key), item)
    return tomlkit.dumps(document).rstrip("\n") + "\n"


def _append(table: Table, key: str, item: Any) -> None:
    """After the table's last key, before the blank lines that part it from the next table."""
    keys = list(table.keys())
    if keys:
        table.value._insert_after(keys[-1], key, item)
    else:
        table.add(key, item)
