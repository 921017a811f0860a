"""resolved.toml: a recipe with every value that a run used, each with its origin beside it; a recipe itself."""

import re
import shlex
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomlkit
from tomlkit.items import Table

from qtune.errors import Problem, RunError, first_line
from qtune.plan import Plan
from qtune.recipe.comments import of_other_kinds
from qtune.recipe.faults import Faulty
from qtune.recipe.file import Origin, Resolved, leaves, load_recipe
from qtune.recipe.parse import parse_recipe
from qtune.recipe.schema import FileSource, KeyPath, Recipe, is_run_name
from qtune.recipe.text import rewritten, show_value
from qtune.run.folder import RunDir

if TYPE_CHECKING:
    from collections.abc import Mapping


NAME = ("output", "name")
COMMAND = re.compile(r"`qtune (\w+) ([^`]+)`")
"""In a comment."""


def settled_values(resolved: Resolved, plan: Plan) -> list[tuple[KeyPath, Any, Origin]]:
    """Every key of the recipe with the value that the run uses and where that came from.

    Keys that are left out (None) stay out. "auto" is replaced by what the plan decided, with its reason.
    """
    decided: Mapping[KeyPath, Any] = {
        ("quantization", "compute_dtype"): plan.compute_dtype,
        ("adapter", "dtype"): plan.adapter_dtype,
        ("model", "attention"): plan.attention,
        ("training", "micro_batch_size"): plan.micro_batch_size,
        ("training", "gradient_checkpointing"): plan.gradient_checkpointing,
        ("training", "lean_step"): plan.lean_step,
        ("training", "optimizer"): plan.optimizer,
        ("training", "learning_rate"): plan.learning_rate,
        ("data", "streaming"): plan.streaming if resolved.recipe.data.streaming == "auto" else None,
        ("memory", "embeddings"): plan.embeddings,
        ("memory", "keep_dequantized"): plan.keep_dequantized,
    }
    rows: list[tuple[KeyPath, Any, Origin]] = []
    for path, value in leaves(resolved.recipe):
        if path == NAME and value is None and is_run_name(resolved.run_name):
            rows.append((path, resolved.run_name, Origin("rule", "the recipe's file name")))
        if value is None or value == {} or (path == ("training", "epochs") and resolved.recipe.training.steps):
            continue
        origin = resolved.origins[path]
        if path in plan.reasons:
            origin = Origin("rule", plan.reasons[path])
        settled = decided.get(path)
        rows.append((path, value if settled is None else settled, origin))
    return rows


def resolved_text(resolved: Resolved, plan: Plan) -> str:
    """The text of resolved.toml. Relative data paths are made absolute, so that it can be read from anywhere."""
    lines = ["# Every value of this run and where it came from. A recipe: qtune run, eval and export read it."]
    table = ""
    for path, value, origin in settled_values(resolved, plan):
        if path[0] != table:
            table = str(path[0])
            lines += ["", f"[{table}]"]
        key = ".".join(map(str, path[1:]))
        lines.append(f"{key} = {_written(path, value, resolved)}  # {origin.in_words}")
    return "\n".join(lines) + "\n"


def _written(path: KeyPath, value: Any, resolved: Resolved) -> str:
    if path in (("data", "train"), ("data", "validation"), ("data", "test"), ("data", "chat_template")):
        value = absolute_paths(value, resolved.folder)
    if path == ("adapter", "start_from"):
        value = str(Path(value).expanduser().resolve())
    if path == ("model", "base") and Path(value).expanduser().exists():
        value = str(Path(value).expanduser().resolve())
    return show_value(value)


def absolute_paths(value: Any, folder: Path) -> Any:
    """Paths of a recipe's data, from `folder`; what is no path there (hub ids, built-in templates, shares) stays."""
    if isinstance(value, (list, tuple)):
        return [absolute_paths(one, folder) for one in value]
    if hasattr(value, "model_dump"):
        fields = {name: one for name, one in value.model_dump().items() if one not in (None, {}, ())}
        return {name: absolute_paths(one, folder) if name == "path" else one for name, one in fields.items()}
    if isinstance(value, str) and not value.startswith("hub:"):
        path = folder / Path(value).expanduser()
        is_pattern = any(character in value for character in "*?[")
        return str(path.absolute()) if is_pattern or path.exists() else value
    return value


def text_for(resolved: Resolved, target: Path) -> str:
    """The recipe's text as the file `target`, with what --set changed; relative data paths are right from there, and
    commands in its comments that name the recipe name `target`, and of another kind or base no comment speaks."""
    asked = _set_changes(resolved)
    if target.parent.resolve() != resolved.folder.resolve():
        data = resolved.recipe.data
        for key in ("train", "validation", "test", "chat_template"):
            value = getattr(data, key)
            if (moved := absolute_paths(value, resolved.folder.resolve())) != value:
                asked["data", key] = moved
    text = rewritten(_renaming(resolved.text, resolved.file, target), asked, "")
    return of_other_kinds(text, resolved.text, resolved.recipe)


def _renaming(text: str, file: Path, target: Path) -> str:
    """Commands that `qtune init` has written above a recipe, for another file."""

    def renamed(command: re.Match[str]) -> str:
        try:
            words = shlex.split(command[2])
        except ValueError:  # a quotation mark alone, in a comment of somebody's own
            return command[0]
        if len(words) != 1 or Path(words[0]).name != file.name:
            return command[0]
        near = target.relative_to(Path.cwd()) if target.is_relative_to(Path.cwd()) else target
        return f"`qtune {command[1]} {shlex.quote(str(near))}`"

    lines = text.splitlines(keepends=True)
    return "".join(COMMAND.sub(renamed, line) if line.startswith("#") else line for line in lines)


def _set_changes(resolved: Resolved) -> dict[KeyPath, Any]:
    """What --set has put into the recipe, and as None what it has put out of it."""
    changes: dict[KeyPath, Any] = {}
    sources = {(str(path[0]), str(path[1])): origin.source for path, origin in resolved.origins.items()}
    tables = resolved.recipe.model_dump(mode="json", exclude_none=True)
    for table, key in sources:
        if sources[table, key] == "--set":
            changes[table, key] = tables[table][key]
    given = tomllib.loads(resolved.text)
    for table in {str(path[0]) for path in changes}:
        for key in given.get(table, {}):
            if sources.get((table, key)) not in ("recipe", "--set"):
                changes[table, key] = None
    return changes


@dataclass(frozen=True)
class WrittenValue:
    """One key of resolved.toml: its value as TOML writes it, and where it came from."""

    path: KeyPath
    text: str
    origin: Origin

    @property
    def plain_text(self) -> str:
        """Without the quotes of TOML."""
        return self.text.strip('"')


def read_values(run_dir: RunDir) -> tuple[WrittenValue, ...]:
    """The keys of a run's resolved.toml in their order, with what their comments say.

    Raises:
        RunError: the file cannot be read.
    """
    written = []
    for name, table in _parsed(run_dir, tomlkit.parse).items():
        if not isinstance(table, Table):
            raise RunError(Problem(str(run_dir.resolved_file), f"cannot be read: {name} is not a table"))
        # The body, not items(), which hands out plain booleans without their comments.
        for key, item in table.value.body:
            if key is not None:
                source, _, reason = item.trivia.comment.lstrip("# ").partition(": ")
                written.append(WrittenValue((name, key.key), item.as_string(), Origin(source, reason)))
    return tuple(written)


def read_resolved(run_dir: RunDir, changes: Sequence[str] = (), *, need_rows: bool = True) -> Resolved:
    """A run's recipe as it was resolved, every origin as it was written then; `changes` are `--set` texts.

    Whether the run that it has started from is still needed, `resumption.require_start` says.

    Raises:
        RecipeError: a change is wrong, or the data or the model are not where they were. RunError: no such file.
    """
    resolved = load_recipe(run_dir.resolved_file, changes, need_rows=need_rows, need_start=False)
    written = {value.path: value.origin for value in read_values(run_dir)}
    # A value that is written nowhere was left out then; what is set now says so itself.
    origins = {
        path: origin if origin.source == "--set" else written.get(path, Origin("default"))
        for path, origin in resolved.origins.items()
    }
    recipe, folder = as_written(run_dir, resolved.recipe)
    return replace(resolved, recipe=recipe, origins=origins, written_in=folder)


def as_written(run_dir: RunDir, recipe: Recipe) -> tuple[Recipe, Path]:
    """A run's recipe with the paths of its rows as they were written, and the folder that they start from.

    They are absolute in resolved.toml. Rows are called by them, and are found under that name where they are kept
    prepared. The run's own folder, and the recipe as it is, where its recipe.toml does not tell.
    """
    try:
        given = tomllib.loads(run_dir.recipe_file.read_text(encoding="utf-8-sig")).get("data", {})
    except (OSError, ValueError):
        return recipe, run_dir.path
    given = given if isinstance(given, dict) else {}
    values = {key: getattr(recipe.data, key) for key in SPLITS if key in given and not _is_set_by_option(run_dir, key)}
    pairs = [pair for key, value in values.items() for pair in _paths_beside(value, given[key])]
    folder = next((start for found, path in pairs if (start := _start_of(found, path)) is not None), None)
    if folder is None:
        return recipe, run_dir.path
    renamed = {key: _renamed(value, given[key], folder) for key, value in values.items()}
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=renamed)}), folder


SPLITS = ("train", "validation", "test")


def _is_set_by_option(run_dir: RunDir, split: str) -> bool:
    """Whether a key of [data], or a part of it, is not what the recipe's file says."""
    own = [value for value in read_values(run_dir) if value.path[0] == "data"]
    return any(str(value.path[1]).partition(".")[0] == split and value.origin.source == "--set" for value in own)


def _each(value: Any) -> list[Any]:
    """The sources of a split, of which there may be one alone."""
    return list(value) if isinstance(value, list | tuple) else [value]


def _path_in(source: Any) -> Any:
    """The path, or what stands in its place, of a source as a recipe's file or its table has it."""
    return source.get("path") if isinstance(source, dict) else getattr(source, "path", source)


def _paths_beside(value: Any, given: Any) -> list[tuple[str, str]]:
    """The paths of a split in resolved.toml, each with the one that was written for it."""
    pairs = zip(map(_path_in, _each(value)), map(_path_in, _each(given)), strict=False)
    return [(found, path) for found, path in pairs if isinstance(found, str) and isinstance(path, str)]


def _start_of(found: str, written: str) -> Path | None:
    """The folder from which a path that was written leads to the one that was found; None where it needs none."""
    parts, end = Path(found).parts, Path(written).parts
    is_relative = not Path(written).is_absolute() and not written.startswith(("hub:", "~"))
    if not is_relative or not Path(found).is_absolute() or parts[-len(end) :] != end:
        return None
    return Path(*parts[: -len(end)])


def _renamed(value: Any, given: Any, folder: Path) -> Any:
    """A split of resolved.toml whose paths from `folder` are as they were written."""
    if isinstance(value, tuple):
        given = [*_each(given), *[None] * len(value)]
        return tuple(_renamed(one, written, folder) for one, written in zip(value, given, strict=False))
    found, path = _path_in(value), _path_in(given)
    if not isinstance(found, str) or not isinstance(path, str) or _start_of(found, path) != folder:
        return value
    return value.model_copy(update={"path": path}) if isinstance(value, FileSource) else path


def written_text(run_dir: RunDir) -> str:
    """The text of a run's resolved.toml, which is a recipe.

    Raises:
        RunError: it is none, or cannot be read.
    """
    resolved_recipe(run_dir)
    return run_dir.resolved_file.read_text(encoding="utf-8")


def recipe_of_text(text: str) -> Recipe:
    """The recipe in the text of a resolved.toml that this version has written or read."""
    return parse_recipe(tomllib.loads(text))


def resolved_recipe(run_dir: RunDir) -> Recipe:
    """The run's recipe with every value; unlike `read_resolved` it asks for no file that the recipe names.

    Raises:
        RunError: the file cannot be read, or is not a recipe of this version.
    """
    try:
        return parse_recipe(_parsed(run_dir, tomllib.loads))
    except Faulty as error:
        file = str(run_dir.resolved_file)
        keys = [(".".join(map(str, fault.path)), fault.message) for fault in error.faults]
        raise RunError([Problem(file, f"{key}: {message}") for key, message in keys]) from error


def _parsed(run_dir: RunDir, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(run_dir.resolved_file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:  # tomllib's and tomlkit's errors are ValueErrors
        raise RunError(Problem(str(run_dir.resolved_file), f"cannot be read: {first_line(error)}")) from error
