"""The recipes that come with qtune."""

import shlex
from pathlib import Path

from qtune.errors import Problem, RecipeError
from qtune.recipe.row_kinds import ROW_KINDS, TEXT_KINDS, kind_of
from qtune.spelling import did_you_mean, meant_file

# The recipes that come with qtune: beside the package in a checkout, inside it in an installed wheel.
_SHIPPED = (Path(__file__).parents[1] / "recipes", Path(__file__).parents[2] / "recipes")


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with qtune, by name."""
    folder = next((folder for folder in _SHIPPED if folder.is_dir()), None)
    return {path.stem: path for path in sorted(folder.glob("*.toml"))} if folder else {}


def shipped_rows(name: str) -> Path:
    """A file of rows that recipes come with."""
    return next(iter(shipped_recipes().values())).parent / "data" / f"{name}.jsonl"


def find_recipe(name: str, verb: str = "run") -> Path:
    """The recipe file that `name` means: a path, or the name of a recipe that comes with qtune.

    verb: that asks, for the commands that an error names.

    Raises:
        RecipeError: there is neither.
    """
    path = Path(name)
    if path.is_file():
        _refuse_rows(path)
        return path
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    if (path / "resolved.toml").is_file():
        raise RecipeError(Problem(name, f"is a run's folder, not a recipe: {_ways_with_run(path, verb)}"))
    if path.is_dir():
        inside = ", ".join(sorted(str(file) for file in path.glob("*.toml"))[:5])
        raise RecipeError(Problem(name, f"is a folder, not a recipe{f'; it holds {inside}' if inside else ''}"))
    known = f"({', '.join(shipped)})"
    near = did_you_mean(path.stem, shipped)
    meant = meant_file(name) or (f"; {near}" if near else f" {known}")
    raise RecipeError(Problem(name, f"no such file, nor a recipe that comes with qtune{meant}"))


def _ways_with_run(run: Path, verb: str) -> str:
    """The commands for who has named a run where a recipe is wanted."""
    recipe = str(run / "resolved.toml")
    if verb != "run":
        return f"its recipe is meant by: {shlex.join(['qtune', verb, recipe])}"
    anew = f"{shlex.join(['qtune', 'run', recipe])} begins anew"
    if not (run / "adapter" / "adapter_config.json").is_file():
        return f"{shlex.join(['qtune', 'run', '--resume', str(run)])} goes on with it, {anew}"
    if not (run / "adapter" / "trained_state.safetensors").is_file():
        return f"it has ended; {anew}"
    goes_on = shlex.join(["qtune", "run", recipe, "--set", f"adapter.start_from={run}"])
    return f"it has ended; {goes_on} goes on from its adapter in a new run, {anew}"


def _refuse_rows(path: Path) -> None:
    """Who has rows and no recipe yet is told how to come by one."""
    kind, _ = kind_of(path)
    if kind in ROW_KINDS and kind not in TEXT_KINDS:
        command = f"qtune init --base MODEL --data {shlex.quote(str(path))}"
        raise RecipeError(Problem(str(path), f"these are rows, not a recipe; {command} writes a recipe for them"))


def written_beside(file: Path, suffix: str) -> Path:
    """Where a changed copy of a recipe goes: beside it; of one that comes with qtune, into the current folder."""
    beside = file.with_suffix(suffix)
    return Path(beside.name) if file in shipped_recipes().values() else beside
