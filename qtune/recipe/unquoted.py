"""Values without their quotes: a shell eats them, and in a recipe somebody has forgotten them."""

import math
import re
import tomllib
from typing import Any

from qtune.recipe.lines import toml_fault
from qtune.recipe.meant_keys import takes_list
from qtune.recipe.schema import KeyPath
from qtune.recipe.text import show_value

DEEPEST = 16
"""Tables and lists in each other; a recipe has four."""
LONGEST_NUMBER = 1000
"""Bits. Whatever is longer than its key allows is told with the key; this can still be written."""
LONGEST_LINE = 500
"""Characters of one that is worth a guess."""
SWITCHES = {"true": "true", "yes": "true", "on": "true", "false": "false", "no": "false", "off": "false"}
"""How other languages write them, in small letters."""
_BARE_LIST = re.compile(r"\[([^\[\]{}\"']+)\]")
_ASSIGNED = re.compile(r"\s*([\w-]+(?:\.[\w-]+)*)\s*=\s*(?!=)(.*?)[,;]?\s*(?:(?<=\s)#.*)?", re.ASCII)
_TABLE = re.compile(r"^\s*\[([\w.-]+)\]", re.MULTILINE)
_PLAIN = re.compile(r"[^\s\"'`“”„‘’\[\]{}(),;=#][^\"'`“”„‘’\[\]{}()]*")
_NUMERIC = re.compile(r"[+-]?[\d.][\d_.,eE+-]*")


def value_given(keys: KeyPath, text: str) -> Any:
    """The value that a text of a command line stands for: TOML, or else the text itself, and so each part of a list
    whose quotes a shell has eaten."""
    value, bare = _toml_value(text), _BARE_LIST.fullmatch(text)
    if isinstance(value, str) and bare is not None and takes_list(".".join(map(str, keys))):
        return [_toml_value(part.strip()) for part in bare[1].split(",") if part.strip()]
    return value


def _toml_value(text: str) -> Any:
    """A TOML value, or the text itself where it is none."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):  # a text; or a number or a nest that is refused as the text it is
        return text
    if parsed.keys() != {"value"} or is_deeper(parsed, DEEPEST):
        return text
    value = parsed["value"]
    return text if isinstance(value, int) and value.bit_length() > LONGEST_NUMBER else value


def is_deeper(value: Any, most: int) -> bool:
    """Whether lists and tables stand in each other more often than `most` times."""
    inside = [value]
    for _ in range(most):
        inside = [
            inner
            for one in inside
            if isinstance(one, (dict, list))
            for inner in (one.values() if isinstance(one, dict) else one)
            if isinstance(inner, (dict, list))
        ]
    return bool(inside)


def number_meant(text: str) -> str | None:
    """A number that somebody has written in another way than TOML's, in TOML's; None where it is none, or where a comma
    may mean one thing or another."""
    try:
        number = float(text)
    except ValueError:
        return None
    if not math.isfinite(number):
        return None
    if isinstance(_toml_value(text), (int, float)):
        return text
    sign, digits = ("-", text[1:]) if text.startswith("-") else ("", text.removeprefix("+"))
    whole, point, rest = digits.partition(".")
    fraction = re.sub(r"^(?!\d)", "0", rest) if point else ""
    meant = f"{sign}{whole.lstrip('0') or '0'}{point}{fraction}"
    return meant if isinstance(_toml_value(meant), (int, float)) else None


def line_meant(text: str, line: int) -> str | None:
    """The line that is meant by line `line` of a recipe, counted from 1, where quotes or TOML's way of writing a value
    are all that it lacks; None where something else is wrong, or where it cannot be told what is meant."""
    lines = text.split("\n")
    before, own, after = lines[: line - 1], lines[line - 1], lines[line:]
    found = _ASSIGNED.fullmatch(own) if len(own) <= LONGEST_LINE else None
    if found is None or _first_fault(own) is None:
        return None
    if _first_fault("\n".join(before)) is not None:  # within a list or a text of several lines
        return None
    tables = _TABLE.findall("\n".join(before))
    value = _value_meant(f"{tables[-1]}.{found[1]}" if tables else found[1], found[2])
    if value is None:
        return None
    meant = f"{found[1]} = {value}"
    fault = _first_fault("\n".join([*before, meant, *after]))
    return meant if fault is None or fault > line else None


def _value_meant(key: str, value: str) -> str | None:
    """As TOML."""
    bare = _BARE_LIST.fullmatch(value)
    inside = value if bare is None else bare[1]
    if bare is not None or ("," in inside and takes_list(key)):
        words = [part.strip() for part in inside.removesuffix(",").split(",")]
        # A comma within a number, which comes apart here, is not told from one between two.
        parts = [None if _is_odd_number(word) else _one_meant(word) for word in words]
        return None if None in parts else f"[{', '.join(filter(None, parts))}]"
    return _one_meant(value)


def _one_meant(word: str) -> str | None:
    if not isinstance(_toml_value(word), str):
        return word
    if word.lower() in SWITCHES:
        return SWITCHES[word.lower()]
    if _is_odd_number(word):
        return number_meant(word)
    is_nothing = word.lower() in ("none", "null", "nil")  # the key is to be left out
    return show_value(word) if _PLAIN.fullmatch(word) and word.isprintable() and not is_nothing else None


def _is_odd_number(word: str) -> bool:
    """Whether a word can only be a number, though TOML writes none so."""
    return _NUMERIC.fullmatch(word) is not None and isinstance(_toml_value(word), str)


def _first_fault(text: str) -> int | None:
    """The line of the first thing in a text that is no TOML, counted from 1; None: all is."""
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        return toml_fault(error, text)[0]
    except (ValueError, RecursionError):
        return 1
    return None
