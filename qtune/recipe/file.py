"""A recipe file and `--set` changes -> a checked recipe whose every value knows where it came from.

Everything that is wrong is reported at once, each problem with its file and line, key, value and what would be right.
"""

import os
import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from qtune.errors import Problem, RecipeError
from qtune.recipe.faults import Fault, Faulty
from qtune.recipe.lines import line_of, toml_fault, toml_lines
from qtune.recipe.meant_keys import keys_meant
from qtune.recipe.parse import parse_recipe
from qtune.recipe.schema import DEFAULT_KINDS, OWN_STARTS, KeyPath, Recipe, Waivable
from qtune.recipe.text import show_value
from qtune.recipe.unquoted import DEEPEST, LONGEST_NUMBER, is_deeper, line_meant, value_given
from qtune.sizes import MIB, size_text
from qtune.spelling import meant_file

LONGEST_RECIPE = MIB // 4
"""Bytes. The longest that comes with qtune has 2 KiB."""
RECIPE = ".toml"
"""Ending of a file that is no model and has no rows."""
ENDS = (("steps", "epochs"), ("epochs", "steps"))
"""Of [training]: two ways to say the same thing, of which the one that is set replaces the one in the file."""
KIND, START_FROM = ("adapter", "kind"), ("adapter", "start_from")
# A dotted key of that many parts, which tomllib would take time for by the square of their number.
_DEEP_KEY = re.compile(r"""(?<![\w-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){64}""")
TOO_DEEP = f"tables and lists stand in each other more than {DEEPEST} times, as in no recipe"


@dataclass(frozen=True)
class Origin:
    """Where a value came from: "recipe", "--set", "default" or a rule, with the place or the reason."""

    source: str
    reason: str = ""

    @property
    def in_words(self) -> str:
        """As resolved.toml says it: "rule: no bfloat16 on this card"."""
        return f"{self.source}: {self.reason}" if self.reason else self.source


@dataclass(frozen=True)
class Resolved:
    """A checked recipe, its origins by key path, and the file it was read from."""

    recipe: Recipe
    origins: Mapping[KeyPath, Origin]
    file: Path
    text: str
    written_in: Path | None = None
    """Of a run's recipe, which lies in the run's folder: that of the recipe it began with."""
    set_aside: tuple[str, ...] = ()
    """A sentence each on what the file says and a change has put something else in the place of."""

    @property
    def folder(self) -> Path:
        """The folder that relative data paths of the recipe start from."""
        return self.file.parent if self.written_in is None else self.written_in

    @property
    def run_name(self) -> str:
        """What its runs are called: output.name, else the recipe's file name."""
        return self.recipe.output.name or self.file.stem

    def allowing(self, findings: Sequence[str]) -> "Resolved":
        """The same recipe that waives more findings of the gate.

        Raises:
            RecipeError: a name is no finding that can be waived.
        """
        wrong = [name for name in findings if name not in get_args(Waivable)]
        if wrong:
            known = ", ".join(get_args(Waivable))
            raise RecipeError([Problem(f"--allow {name}", f"no finding that can be waived: {known}") for name in wrong])
        allowed = tuple(dict.fromkeys([*self.recipe.data.allow, *findings]))
        if allowed == self.recipe.data.allow:
            return self
        data = self.recipe.data.model_copy(update={"allow": allowed})
        origins = {**self.origins, ("data", "allow"): Origin("--allow")}
        return replace(self, recipe=self.recipe.model_copy(update={"data": data}), origins=origins)


def load_recipe(
    path: Path, overrides: Sequence[str] = (), *, need_rows: bool = True, need_start: bool = True
) -> Resolved:
    """Reads and checks a recipe, changed by `--set` texts such as "training.learning_rate=1e-4".

    need_rows: whether data files that are not there are an error; memory can be predicted without them.
    need_start: likewise the run that the adapter starts from, which a run that has saved a step can do without.

    Raises:
        RecipeError: with every problem of the file and of the changes.
    """
    return check_recipe(_recipe_text(path), path, overrides, need_rows=need_rows, need_start=need_start)


def _recipe_text(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            content = stream.read(LONGEST_RECIPE + 1)
    except OSError as error:
        raise RecipeError(Problem(str(path), f"cannot be read: {error.strerror}")) from error
    if len(content) > LONGEST_RECIPE:
        message = f"is larger than {size_text(LONGEST_RECIPE)}, which no recipe is; rows belong into files of their own"
        raise RecipeError(Problem(str(path), message))
    try:
        # Some editors begin a file with a byte order mark, and end lines with a carriage return.
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise RecipeError(Problem(str(path), f"is not UTF-8 text (byte {error.start})")) from error


def check_recipe(
    text: str, path: Path, overrides: Sequence[str] = (), *, need_rows: bool = True, need_start: bool = True
) -> Resolved:
    """`load_recipe` on a text; `path` is what errors name and what relative data paths start from."""
    tables = _parse_toml(text, path)
    changes, problems = _parse_overrides(overrides)
    lines = toml_lines(text)
    set_aside = [
        f"--set {'.'.join(map(str, keys))}: {_named(others, lines, path)} set aside"
        for keys in changes
        if (others := _replaced(tables, keys, changes))
    ]
    # A kind first: it clears its table, and must not clear what another change has put there.
    for keys in sorted(changes, key=lambda keys: keys[-1] != "kind"):
        problems.extend(_apply(tables, keys, changes[keys]))
    if START_FROM in changes:
        for _, key in _own_start(tables, changes):
            tables["adapter"].pop(key)
    for one, other in ENDS:
        if ("training", one) in changes and ("training", other) not in changes and _has(tables, ("training", one)):
            tables["training"].pop(other, None)
    faults: list[Fault] = []
    recipe: Recipe | None = None
    try:
        recipe = parse_recipe(tables)
    except Faulty as error:
        faults += error.faults
    # Also where keys are wrong: whoever mends those would only then hear of a file that is not there.
    known = {fault.path for fault in faults}
    missing = _missing_files(tables, path.parent, need_rows=need_rows, need_start=need_start)
    faults += [fault for fault in missing if fault.path not in known]
    faults.sort(key=lambda fault: line_of(lines, fault.path))
    problems.extend(_problem(fault, tables, changes, lines, path) for fault in faults)
    if problems or recipe is None:
        raise RecipeError(problems)
    return Resolved(recipe, _origins(recipe, tables, changes, lines, path), path, text, set_aside=tuple(set_aside))


def _parse_toml(text: str, path: Path) -> dict[str, Any]:
    if _DEEP_KEY.search(text):
        raise RecipeError(Problem(str(path), TOO_DEEP))
    try:
        tables = tomllib.loads(text)
    except RecursionError as error:
        raise RecipeError(Problem(str(path), TOO_DEEP)) from error
    except ValueError as error:  # tomllib's own is one; so is Python's of a number with thousands of digits
        if not isinstance(error, tomllib.TOMLDecodeError):
            raise RecipeError(Problem(str(path), "not valid TOML: a number has too many digits")) from error
        line, reason = toml_fault(error, text)
        meant = line_meant(text, line)
        advice = f"; did you mean {meant}?" if meant else ""
        raise RecipeError(Problem(f"{path}:{line}", f"not valid TOML: {reason}{advice}")) from error
    if is_deeper(tables, DEEPEST):
        raise RecipeError(Problem(str(path), TOO_DEEP))
    _refuse_huge_numbers(tables, path)
    return tables


def _refuse_huge_numbers(tables: dict[str, Any], path: Path) -> None:
    """tomllib takes hexadecimal numbers of any length, and Python writes none of more than 4,300 digits."""
    inside: list[Any] = [tables]
    while inside:
        value = inside.pop()
        if isinstance(value, (dict, list)):
            inside.extend(value.values() if isinstance(value, dict) else value)
        elif isinstance(value, int) and value.bit_length() > LONGEST_NUMBER:
            raise RecipeError(Problem(str(path), "not valid TOML: a number has too many digits"))


def _parse_overrides(overrides: Sequence[str]) -> tuple[dict[KeyPath, Any], list[Problem]]:
    changes: dict[KeyPath, Any] = {}
    problems: list[Problem] = []
    for override in overrides:
        key, equals, value = override.partition("=")
        keys = tuple(part.strip() for part in key.split("."))
        if any("\ud800" <= character <= "\udfff" for character in override):  # how Python takes other bytes
            problems.append(Problem(f"--set {override!a}", "is not UTF-8 text"))
        elif not equals or len(keys) < 2 or not all(keys) or len(keys) > DEEPEST:
            near = keys_meant(keys[0]) if equals and len(keys) == 1 else []
            meant = " or ".join(shlex.quote(f"{key}={_shortened(value.strip())}") for key in near)
            advice = f"; did you mean {meant}?" if meant else ""
            problems.append(Problem(f"--set {_shortened(override)}", f"must look like table.key=value{advice}"))
        else:
            changes[keys] = value_given(keys, value.strip())
    return changes, problems


def _replaced(tables: Mapping[str, Any], keys: KeyPath, changes: Mapping[KeyPath, Any]) -> dict[KeyPath, Any]:
    """What the file says and the change of `keys` leaves nothing of, besides the value of its own key."""
    table = tables.get(str(keys[0]))
    if not isinstance(table, dict):
        return {}
    if _is_other_kind(table, keys, changes[keys]):
        return {(keys[0], key): value for key, value in table.items() if key != "kind"}
    if keys == START_FROM:
        return _own_start(tables, changes)
    others = [other for one, other in ENDS if keys == ("training", one) and ("training", other) not in changes]
    return {("training", other): table[other] for other in others if other in table}


def _own_start(tables: Mapping[str, Any], changes: Mapping[KeyPath, Any]) -> dict[KeyPath, Any]:
    """The keys of how the adapter in the file begins by itself, which one that starts from a run does not."""
    table = tables.get("adapter")
    if not isinstance(table, dict) or (KIND in changes and _is_other_kind(table, KIND, changes[KIND])):
        return {}
    keys = [key for key in ("initialization", "text") if key in table and ("adapter", key) not in changes]
    return {("adapter", key): table[key] for key in keys if key == "text" or table[key] in OWN_STARTS}


def _named(values: Mapping[KeyPath, Any], lines: Mapping[KeyPath, int], path: Path) -> str:
    """ "training.epochs = 3 (recipe.toml:9) is", or several, which are."""
    named = [
        f"{'.'.join(map(str, keys))} = {_shortened(show_value(value))} ({path.name}:{line_of(lines, keys)})"
        for keys, value in values.items()
    ]
    return f"{', '.join(named)} {'is' if len(named) == 1 else 'are'}"


def _is_other_kind(table: Mapping[str, Any], keys: KeyPath, value: Any) -> bool:
    """Whether a change makes another kind of adapter or quantization, which is another table: the keys of the old kind
    would only be errors."""
    return (
        len(keys) == 2
        and keys[1] == "kind"
        and keys[0] in DEFAULT_KINDS
        and table.get("kind", DEFAULT_KINDS[str(keys[0])]) != value
    )


def _apply(tables: dict[str, Any], keys: KeyPath, value: Any) -> Iterator[Problem]:
    table = tables
    for key in keys[:-1]:
        inner = table.setdefault(str(key), {})
        if not isinstance(inner, dict):
            yield Problem(f"--set {'.'.join(map(str, keys))}", f"{key} is not a table")
            return
        table = inner
    if _is_other_kind(table, keys, value):
        table.clear()
    table[str(keys[-1])] = value


def _missing_files(tables: Mapping[str, Any], folder: Path, *, need_rows: bool, need_start: bool) -> Iterator[Fault]:
    """Files that the tables name and that are not there; the tables need not be a recipe."""
    base = _text_at(tables, "model", "base")
    if base.endswith(".gguf") or base.startswith((".", "/", "~")):
        if not is_there(base):
            yield Fault(("model", "base"), f"no such file or folder{meant_file(base, but=RECIPE)}")
    elif base.count("/") > 1 and not is_there(base):
        yield Fault(("model", "base"), "neither a folder that exists nor a hub id (owner/name)")
    earlier = _text_at(tables, "adapter", "start_from")
    if need_start and earlier and not is_finished_run(earlier):
        yield Fault(("adapter", "start_from"), "is not a finished run")
    template = _text_at(tables, "data", "chat_template")
    if _is_path(template) and not is_there(template, folder):
        yield Fault(("data", "chat_template"), f"no such file{meant_file(template, folder)}")
    data = tables.get("data")
    if need_rows and isinstance(data, dict):
        for key in ("train", "validation", "test"):
            yield from missing_rows(data.get(key), folder, ("data", key))


def _is_path(template: str) -> bool:
    """Whether a chat template's name can only be a file's; tokenizers have others by names of their own."""
    return "/" in template or template.startswith("~") or Path(template).suffix in (".jinja", ".jinja2", ".j2", ".txt")


def is_there(name: str, folder: Path = Path()) -> bool:
    """Whether a path that somebody has written, from `folder`, leads to something."""
    try:
        path = folder / Path(name).expanduser()
        # Of a folder that is still to be made the system knows no way up.
        return path.exists() or (not folder.exists() and Path(os.path.normpath(path)).exists())
    # Too long a name, one with a zero byte in it, a home that nobody has.
    except (OSError, ValueError, RuntimeError):
        return False


def is_finished_run(name: str) -> bool:
    """Whether a path that somebody has written leads to a run that has ended."""
    return is_there(f"{name}/adapter/adapter_config.json")


def _text_at(tables: Mapping[str, Any], table: str, key: str) -> str:
    found = tables.get(table)
    value = found.get(key) if isinstance(found, dict) else None
    return value if isinstance(value, str) else ""


def missing_rows(given: Any, folder: Path, path: KeyPath = ("data", "train")) -> Iterator[Fault]:
    """Files and folders that are not there; patterns and hub datasets are looked up when they are read."""
    if isinstance(given, list):
        for index, source in enumerate(given):
            yield from missing_rows(source, folder, (*path, index))
        return
    is_table = isinstance(given, dict)
    name = given.get("path") if isinstance(given, dict) else given
    if not isinstance(name, str) or not name or name.startswith("hub:") or any(mark in name for mark in "*?["):
        return
    if not is_there(name, folder):
        yield Fault(
            (*path, "path") if is_table else path,
            f"no such file or folder in {folder}{meant_file(name, folder, but=RECIPE)}",
        )


def _problem(
    fault: Fault, tables: Mapping[str, Any], changes: Mapping[KeyPath, Any], lines: Mapping[KeyPath, int], path: Path
) -> Problem:
    if not fault.path:
        return Problem(str(path), fault.message)
    key = ".".join(str(part) for part in fault.path)
    value: Any = tables
    for part in fault.path:
        if isinstance(value, dict):
            value = value.get(part, _ABSENT)
        elif isinstance(value, list) and isinstance(part, int):
            value = value[part]
    shown = "" if value is _ABSENT or isinstance(value, dict) else f" = {_shortened(show_value(value))}"
    changed = next(
        (keys for keys in changes if keys[: len(fault.path)] == fault.path or fault.path[: len(keys)] == keys), None
    )
    if changed:
        message = fault.message
        if fault.wanted:  # a shell eats the quotes that nothing guards
            message = message.replace(fault.wanted, shlex.join(["--set", f"{key}={fault.wanted}"]), 1)
        return Problem("--set", f"{key}{shown}: {message}")
    return Problem(f"{path}:{line_of(lines, fault.path)}", f"{key}{shown}: {fault.message}")


_ABSENT = object()


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:197]}..."


def leaves(table: BaseModel, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every key of a recipe with its value, in the schema's order."""
    for name in type(table).model_fields:
        value = getattr(table, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, (*path, name))
        else:
            yield (*path, name), value


def _origins(
    recipe: Recipe,
    tables: Mapping[str, Any],
    changes: Mapping[KeyPath, Any],
    lines: Mapping[KeyPath, int],
    path: Path,
) -> dict[KeyPath, Origin]:
    origins: dict[KeyPath, Origin] = {}
    for keys, _ in leaves(recipe):
        if any(changed[: len(keys)] == keys for changed in changes):
            origins[keys] = Origin("--set")
        elif keys in lines and _has(tables, keys):
            origins[keys] = Origin("recipe", f"{path.name}:{lines[keys]}")
        else:
            origins[keys] = Origin("default")
    return origins


def _has(tables: Any, keys: KeyPath) -> bool:
    for key in keys:
        if not isinstance(tables, dict) or key not in tables:
            return False
        tables = tables[key]
    return True
