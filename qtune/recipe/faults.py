"""What is wrong with a recipe: pydantic's errors with our paths and words."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from qtune.recipe.meant_keys import advice
from qtune.recipe.schema import ADAPTERS, QUANTIZATIONS, FileSource, HubSource, KeyPath, Recipe
from qtune.recipe.text import show_value
from qtune.recipe.unquoted import number_meant
from qtune.spelling import did_you_mean

ELSEWHERE_CALLED = {
    "host": ("cpu", "ram", "offload", "offloaded", "stream", "streamed", "streaming", "pinned"),
    "disk": ("nvme", "ssd"),
    "device": ("gpu", "cuda", "card", "vram"),
    "sharded": ("shard", "fsdp", "fsdp2", "zero3"),
}
"""What other tools call the places where a part of the model can be."""
MOST_SHOWN = 100
"""Mistakes that are told apart. Where there are more, the file is something else than a recipe."""


class Fault(NamedTuple):
    """Something wrong with one key: where it is in the recipe and what would be right."""

    path: KeyPath
    message: str
    wanted: str = ""
    """The list that `message` gives as right, where it gives one: TOML."""


class Faulty(ValueError):  # noqa: N818  said of tables, as errors.OutOfMemory is of memory
    """Tables that are no recipe. `faults`: everything that is wrong with them."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__("; ".join(f"{'.'.join(map(str, fault.path))}: {fault.message}" for fault in self.faults))


def faults_of(error: ValidationError, tables: Mapping[str, Any]) -> list[Fault]:
    """pydantic's errors with our paths and words; the branches of a union become one fault."""
    messages_of: dict[KeyPath, list[str]] = {}
    wanted_of: dict[KeyPath, str] = {}
    details = error.errors(include_url=False)
    for detail in details[:MOST_SHOWN]:
        if detail["type"] == "union_tag_invalid":
            detail["loc"] = (*detail["loc"], "kind")
        path = _real_path(detail["loc"], tables, keep_last=detail["type"] in ("missing", "extra_forbidden"))
        messages_of.setdefault(path, []).append(_in_our_words(path, detail))
        if detail["type"] in LIST_TYPES and isinstance(detail["input"], str):
            wanted_of[path] = _as_list(detail["input"])
    # Where an element of a list is wrong, the union's other branches, which want no list at all, say nothing.
    branches = {path[:length] for path in messages_of for length in range(len(path))}
    found = [
        Fault(path, _joined(messages), wanted_of.get(path, ""))
        for path, messages in messages_of.items()
        if path not in branches
    ]
    more = [Fault((), f"has {len(details) - MOST_SHOWN} mistakes more")] if len(details) > MOST_SHOWN else []
    return found + more


def _in_our_words(path: KeyPath, detail: Mapping[str, Any]) -> str:
    context = detail.get("ctx", {})
    match detail["type"]:
        case "extra_forbidden":
            where = f"[{'.'.join(map(str, path[:-1]))}]" if path[:-1] else "a recipe"
            meant = advice(path, detail["input"])
            near = f"; {meant}" if meant else _nearest(str(path[-1]), _known_keys(detail["loc"]))
            return f"no such key in {where}{near}"
        case "missing":
            return "is required and missing"
        case "literal_error" | "union_tag_invalid":
            choices = re.findall(r"'([^']*)'", str(context.get("expected", context.get("expected_tags"))))
            *others, last = (f'"{choice}"' for choice in choices)
            expected = f"{', '.join(others)} or {last}" if others else last
            word = detail["input"].get("kind") if isinstance(detail["input"], dict) else detail["input"]
            # Of one word alone the sentence has said it; where a number is meant, another word is no slip of it.
            meant = next((choice for choice in choices if str(word).lower() in ELSEWHERE_CALLED.get(choice, ())), None)
            near = _nearest(meant or str(word), choices, list_known=False) if len(choices) > 1 else ""
            return f"must be {expected}{near}"
        case "tuple_type" | "list_type" if isinstance(detail["input"], str):
            return f"must be a list, as {_as_list(detail['input'])}"
        case "tuple_type" | "list_type":
            return "must be a list"
        case "float_type" | "int_type" if isinstance(detail["input"], str) and (meant := number_meant(detail["input"])):
            return f"must be a number without quotes: {meant}"
        case "float_type":
            return "must be a number"
        case "int_type" | "int_from_float":
            return "must be a whole number"
        case "bool_type" | "bool_parsing":
            return "must be true or false"
        case "model_type" | "model_attributes_type" | "dict_type":
            return "must be a table"
        case "string_type":
            return f"must be a text in quotes{_as_size(path, detail['input'])}"
        case "string_too_short" | "too_short":
            return "must not be empty"
        case "string_pattern_mismatch":
            return f"must look like {_pattern_in_words(path)}"
        case "string_too_long":
            return f"must be at most {context['max_length']:,} characters long"
        case "too_long":
            return f"must have at most {context['max_length']:,} entries"
        case "less_than_equal" if isinstance(context["le"], int):
            return f"must be at most {context['le']:,}"
        case "less_than_equal":
            return f"must be at most {context['le']:g}"
        case _:
            return str(detail["msg"]).replace("Input should be", "must be").replace("Input", "it")


LIST_TYPES = ("tuple_type", "list_type")


def _as_list(text: str) -> str:
    """What somebody has written as one text, as TOML."""
    return show_value([part.strip(" []\"'") for part in text.split(",")])


def _as_size(path: KeyPath, value: object) -> str:
    """How a bare number is written where a size is meant."""
    is_size = path in SIZES and isinstance(value, (int, float)) and not isinstance(value, bool)
    return f': "{value}{SIZES[path]}"' if is_size else ""


SIZES: dict[KeyPath, str] = {("memory", "budget"): "GiB", ("memory", "loss_tile"): "MiB"}
"""The unit that a bare number of each is most likely meant in."""


def _pattern_in_words(path: KeyPath) -> str:
    if path in SIZES:
        return '"8GiB" or "512MiB"'
    return "owner/name" if path[-1] == "hub" else "a folder name: letters, digits, . _ + -"


def _nearest(word: str, known: Sequence[str], *, list_known: bool = True) -> str:
    meant = did_you_mean(word, known, f"known: {', '.join(known)}" if known and list_known else "")
    return f"; {meant}" if meant else ""


def _known_keys(location: Sequence[str | int]) -> list[str]:
    """The keys of the table that a location (pydantic's, with its union tags) is in."""
    tagged: dict[str | int, type[BaseModel]] = {"file source": FileSource, "hub source": HubSource}
    tagged.update((*QUANTIZATIONS.items(), *ADAPTERS.items()))
    *tables, _ = location
    if not tables:
        return list(Recipe.model_fields)
    for tag in reversed(tables):
        if tag in tagged:
            return list(tagged[tag].model_fields)
    table = Recipe.model_fields[str(tables[0])].annotation
    return list(table.model_fields) if isinstance(table, type) and issubclass(table, BaseModel) else []


def _joined(messages: Sequence[str]) -> str:
    """One sentence for the branches of a union: "must be a or b"."""
    first, *others = dict.fromkeys(messages)
    return " or ".join([first, *(other.removeprefix("must be ") for other in others)])


def _real_path(location: Sequence[str | int], tables: Mapping[str, Any], *, keep_last: bool) -> KeyPath:
    """Drops what pydantic adds to a location: union tags and the names of union branches."""
    path: list[str | int] = []
    value: Any = tables
    for position, part in enumerate(location):
        is_last = position == len(location) - 1
        if isinstance(value, Mapping) and (part in value or (is_last and keep_last)):
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        else:
            continue
        path.append(part)
    return tuple(path)
