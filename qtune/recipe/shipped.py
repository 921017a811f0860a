"""The recipes that come with qtune."""

from pathlib import Path

from qtune.errors import Problem, RecipeError

# The recipes that come with qtune: beside the package in a checkout, inside it in an installed wheel.
_SHIPPED = (Path(__file__).parents[1] / "recipes", Path(__file__).parents[2] / "recipes")


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with qtune, by name."""
    folder = next((folder for folder in _SHIPPED if folder.is_dir()), None)
    return {path.stem: path for path in sorted(folder.glob("*.toml"))} if folder else {}


def find_recipe(name: str) -> Path:
    """The recipe file that `name` means: a path, or the name of a recipe that comes with qtune.

    Raises:
        RecipeError: there is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    raise RecipeError(Problem(name, f"no such file, nor a recipe that comes with qtune ({', '.join(shipped)})"))


def written_beside(file: Path, suffix: str) -> Path:
    """Where a changed copy of a recipe goes: beside it; of one that comes with qtune, into the current folder."""
    beside = file.with_suffix(suffix)
    return Path(beside.name) if file in shipped_recipes().values() else beside
