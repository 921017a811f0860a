"""What `qtune init` says of a recipe's kinds, above it and above each, and how that stays true where another is set."""

from __future__ import annotations

import re
import textwrap
import tomllib
from typing import TYPE_CHECKING, Any

from qtune.recipe.lines import toml_lines
from qtune.recipe.schema import DEFAULT_KINDS, KINDS
from qtune.recipe.text import show_value

if TYPE_CHECKING:
    from qtune.recipe.schema import Recipe

LINE_LENGTH = 118

TITLE = re.compile(r"# (?P<adapter>[\w-]+) on (?P<base>.+), (?P<export>an export, )?whose weights stay (?P<how>.+)\.")


def title(adapter: str, base: str, quantization: str, *, is_export: bool = False) -> str:
    """The first line of a recipe."""
    how = {"none": "as they are", "int8": "in int8"}.get(quantization, f"in {quantization.upper()}")
    return f"# {adapter} on {base}, {'an export, ' if is_export else ''}whose weights stay {how}."


def about_kind(table: str, kind: str) -> list[str]:
    """The lines above `kind`: what the table does says more than what the word means; the other kinds are other
    tables."""
    return comment_lines(f"{KINDS[table][kind].__doc__} Kinds: {', '.join(KINDS[table])}.")


def comment_lines(text: str) -> list[str]:
    """A text as comments of a recipe."""
    return [f"# {line}" for line in textwrap.wrap(" ".join(text.split()), LINE_LENGTH, break_on_hyphens=False)]


def of_other_kinds(text: str, old: str, recipe: Recipe) -> str:
    """The recipe `text`, which means `recipe`, without what its comments said of the kinds and the base of the text
    `old` that it was made from: those of `init` are made anew, and others on and above the line of a kind go."""
    before, after = tomllib.loads(old), recipe.model_dump(mode="json")
    was, now = _values(before), _values(after)
    if was == now:
        return text
    lines = text.split("\n")
    found = TITLE.fullmatch(lines[0])
    if found is not None and (found["adapter"], found["base"]) == (was["adapter"], was["base"]):
        stays_export = found["export"] is not None and was["base"] == now["base"]
        lines[0] = title(now["adapter"], now["base"], now["quantization"], is_export=stays_export)
    for table in KINDS:
        place = toml_lines("\n".join(lines)).get((table, "kind"))
        if place is not None and was[table] != now[table] and re.match(r"kind\s*=", lines[place - 1]):
            first = place - 1
            while first and lines[first - 1].startswith("#"):
                first -= 1
            is_of_init = lines[first : place - 1] == about_kind(table, was[table])
            lines[first:place] = [
                *(about_kind(table, now[table]) if is_of_init else []),
                f"kind = {show_value(now[table])}",
            ]
    return "\n".join(lines)


def _values(recipe: dict[str, Any]) -> dict[str, str]:
    kinds = {table: recipe.get(table, {}).get("kind", usual) for table, usual in DEFAULT_KINDS.items()}
    return {**kinds, "base": recipe["model"]["base"]}
