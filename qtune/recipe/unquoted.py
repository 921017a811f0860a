"""Values without their quotes: a shell eats them, and in a recipe somebody has forgotten them."""

import json
import re
import tomllib
from collections.abc import Callable
from typing import Any

from qtune.recipe.meant_keys import takes_list
from qtune.recipe.schema import KeyPath

LONGEST_LINE = 500
"""Characters of one that is worth a guess."""
OTHERS_WORDS = {"True": "true", "False": "false"}
"""Python's, which TOML does not know."""
_BARE_LIST = re.compile(r"\[([^\[\]{}\"']+)\]")
_BARE_KEY = re.compile(r"[\w-]+(?:\.[\w-]+)*")


def value_given(keys: KeyPath, text: str, value_of: Callable[[str], Any]) -> Any:
    """What a text of a command line is meant to be: what `value_of` says of it, or of each part of a list whose quotes
    a shell has eaten."""
    value = value_of(text)
    if isinstance(value, str) and takes_list(".".join(map(str, keys))) and (parts := _bare_parts(text)):
        return [value_of(part) for part in parts]
    return value


def quoted_line(line: str) -> str | None:
    """The line of a recipe that is meant by one that is no TOML for want of quotes; None where that is not what is
    wrong with it."""
    if len(line) > LONGEST_LINE:
        return None
    key, equals, rest = line.partition("=")
    key, value = key.strip(), rest.partition("#")[0].strip()
    if not equals or not value or not _BARE_KEY.fullmatch(key) or _is_toml(f"{key} = {value}"):
        return None
    parts = _bare_parts(value)
    if not parts and value[0] in "\"'[{":
        return None
    meant = f"{key} = [{', '.join(map(_quoted, parts))}]" if parts else f"{key} = {_quoted(value)}"
    return meant if _is_toml(meant) else None


def _bare_parts(text: str) -> list[str]:
    """Of a list without a quote in it."""
    bare = _BARE_LIST.fullmatch(text)
    return [] if bare is None else [part.strip() for part in bare[1].split(",") if part.strip()]


def _quoted(text: str) -> str:
    """A value as TOML takes it."""
    if _is_toml(f"value = {text}"):
        return text
    return OTHERS_WORDS.get(text) or json.dumps(text, ensure_ascii=False)


def _is_toml(text: str) -> bool:
    try:
        tomllib.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
