"""A recipe's text with other values: comments, order and formatting stay as they were."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import tomlkit
from pydantic import BaseModel
from tomlkit.items import Comment, Item, Null, Table

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from qtune.recipe.schema import KeyPath


def rewritten(text: str, changes: Mapping[KeyPath, Any], reason: str, replaced: Collection[KeyPath] = ()) -> str:
    """`text` with `changes` of (table, key) -> value; keys that were not there come at the end of their table.

    None takes a key out, with the comment above it, which spoke of it. reason: a comment for new keys, if it is not
    empty. replaced: keys that get that comment as well, for what stood behind the old value does not hold of the new.
    """
    document = tomlkit.parse(text)
    for (table, key), value in changes.items():
        if value is None:
            if key in document.get(str(table), {}):
                _remove(document[str(table)], str(key))
            continue
        if table not in document:
            document.add(tomlkit.nl())
            document.add(str(table), tomlkit.table())
        target = document[str(table)]
        assert isinstance(target, Table)
        if key in target:
            old, new = target.value.item(str(key)), _item_of(value)
            assert isinstance(old, Item)
            # tomlkit puts one space before a comment of its own; this one keeps its column.
            new.trivia.comment_ws, new.trivia.comment = old.trivia.comment_ws, old.trivia.comment
            if (table, key) in replaced:
                new.comment(reason)
            target[str(key)] = new
        else:
            item = _item_of(value)
            if reason:
                item.comment(reason)
            _append(target, str(key), item)
    return tomlkit.dumps(document).rstrip("\n") + "\n"


def _item_of(value: Any) -> Item:
    """A value as tomlkit writes it; one with tables in it on its own line, where tomlkit would make tables below."""
    has_tables = isinstance(value, dict) or (
        isinstance(value, (list, tuple)) and any(isinstance(x, dict) for x in value)
    )
    return tomlkit.value(show_value(value)) if has_tables else tomlkit.item(value)


def _remove(table: Table, key: str) -> None:
    """Takes a key out, and the comment lines directly above it."""
    body = table.value.body
    above = next(place for place, (name, _) in enumerate(body) if name is not None and name.key == key) - 1
    while above >= 0 and isinstance(body[above][1], Comment):
        body[above] = (None, Null())
        above -= 1
    table.remove(key)


def _append(table: Table, key: str, item: Any) -> None:
    """After the table's last key, before the blank lines that part it from the next table."""
    keys = list(table.keys())
    if keys:
        table.value._insert_after(keys[-1], key, item)
    else:
        table.add(key, item)


def show_changes(changes: Mapping[KeyPath, Any]) -> str:
    """Values by their keys, in one line, as a recipe would set them."""
    return ", ".join(f"{'.'.join(map(str, key))} = {show_value(value)}" for key, value in changes.items())


def plain_changes(changes: Mapping[KeyPath, Any]) -> dict[str, Any]:
    """Values by the names of their keys, as "training.steps", for other programs."""
    return {".".join(map(str, key)): value for key, value in changes.items()}


def show_value(value: Any) -> str:
    """A value as TOML would write it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(show_value, value))}]"
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_defaults=True)
    if isinstance(value, dict):
        return (
            f"{{ {', '.join(f'{_key(key)} = {show_value(inner)}' for key, inner in value.items())} }}"
            if value
            else "{}"
        )
    # A JSON string is a TOML string but for DEL, which TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f") if isinstance(value, str) else str(value)


def _key(name: str) -> str:
    """A bare key where TOML allows it, a quoted one elsewhere."""
    return name if re.fullmatch(r"[\w-]+", name, re.ASCII) else show_value(name)
