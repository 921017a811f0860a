"""resolved.toml: a recipe with every value that a run used, each with its origin beside it; a recipe itself."""

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomlkit
from tomlkit.items import Table

from qtune.errors import Problem, RunError, first_line
from qtune.plan import Plan
from qtune.recipe.faults import Faulty
from qtune.recipe.file import Origin, Resolved, leaves
from qtune.recipe.parse import parse_recipe
from qtune.recipe.schema import KeyPath, Recipe
from qtune.recipe.text import show_value
from qtune.run.folder import RunDir

if TYPE_CHECKING:
    from collections.abc import Mapping


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
        ("training", "optimizer"): plan.optimizer,
        ("training", "learning_rate"): plan.learning_rate,
        ("memory", "embeddings"): plan.embeddings,
    }
    rows: list[tuple[KeyPath, Any, Origin]] = []
    for path, value in leaves(resolved.recipe):
        if value is None or value == {} or (path == ("training", "epochs") and resolved.recipe.training.steps):
            continue
        origin = resolved.origins[path]
        if path in plan.reasons:
            origin = Origin("rule", plan.reasons[path])
        rows.append((path, decided.get(path, value), origin))
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
        why = f"{origin.source}: {origin.reason}" if origin.reason else origin.source
        lines.append(f"{key} = {_written(path, value, resolved)}  # {why}")
    return "\n".join(lines) + "\n"


def written_origins(text: str) -> dict[KeyPath, Origin]:
    """Where the values in the text of a resolved.toml came from, as their comments say."""
    found: dict[KeyPath, Origin] = {}
    for name, table in tomlkit.parse(text).items():
        assert isinstance(table, Table), name
        # The body, not items(), which hands out plain booleans without their comments.
        for key, item in table.value.body:
            if key is not None:
                source, _, reason = item.trivia.comment.lstrip("# ").partition(": ")
                found[name, key.key] = Origin(source, reason)
    return found


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


def resolved_recipe(run_dir: RunDir) -> Recipe:
    """The run's recipe with every value; unlike `load_recipe` it does not ask for the training rows, which may be gone.

    Raises:
        RunError: the file cannot be read, or is not a recipe of this version.
    """
    file = run_dir.resolved_file
    try:
        return parse_recipe(tomllib.loads(file.read_text(encoding="utf-8")))
    except Faulty as error:
        keys = [(".".join(map(str, fault.path)), fault.message) for fault in error.faults]
        raise RunError([Problem(str(file), f"{key}: {message}") for key, message in keys]) from error
    except (OSError, ValueError) as error:
        raise RunError(Problem(str(file), f"cannot be read: {first_line(error)}")) from error
