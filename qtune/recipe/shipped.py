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


def find_recipe(name: str) -> Path:
    """The recipe file that `name` means: a path, or the name of a recipe that comes with qtune.

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
        goes_on, anew = shlex.join(["qtune", "run", "--resume", name]), shlex.quote(str(path / "resolved.toml"))
        ways = f"{goes_on} goes on with it, qtune run {anew} begins anew"
        raise RecipeError(Problem(name, f"is a run's folder, not a recipe: {ways}"))
    if path.is_dir():
        inside = ", ".join(sorted(str(file) for file in path.glob("*.toml"))[:5])
        raise RecipeError(Problem(name, f"is a folder, not a recipe{f'; it holds {inside}' if inside else ''}"))
    known = f"({', '.join(shipped)})"
    near = did_you_mean(path.stem, shipped)
    meant = meant_file(name) or (f"; {near}" if near else f" {known}")
    raise RecipeError(Problem(name, f"no such file, nor a recipe that comes with qtune{meant}"))


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
