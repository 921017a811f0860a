"""What `qtune chat TARGET` means: a run's folder, or a model; told before anything heavy is imported."""

from pathlib import Path

from qtune.errors import ModelError, Problem
from qtune.model.builtin import unknown_builtin
from qtune.model.hub import require_reachable
from qtune.recipe.schema import Model
from qtune.recipe.shipped import shipped_recipes
from qtune.run.folder import RunDir, refuse_missing_run, runs_beside

MODEL_FILES = ("config.json", "adapter_config.json")
"""One of them is in every folder that says what it is; an adapter's is refused where its base can be named."""


def run_meant(target: str) -> RunDir | None:
    """The run whose folder `target` is; None where it names a model.

    Raises:
        RunError: it looks like the path of a run, and is none.
    """
    refuse_missing_run(target)
    path = Path(target)
    looks_like_a_path = target.startswith(("/", ".", "~")) or (len(path.parts) > 1 and path.parent.is_dir())
    is_run = (path / "resolved.toml").is_file()
    return None if not is_run and (path.exists() or not looks_like_a_path) else RunDir.open(path)


def require_model(target: str) -> None:
    """A model of this name can be had, as far as can be told without loading anything.

    Raises:
        ModelError: it is a folder of something else, no built-in model, or a hub's that is out of reach.
        RunError: it is a recipe, or another file.
    """
    path = Path(target)
    is_file = path.is_file() and path.suffix != ".gguf" and path.name != "config.json"
    if is_file or (not path.exists() and target in shipped_recipes()):
        RunDir.open(path)  # says what it is instead
    if path.is_dir() and not any((path / name).is_file() for name in MODEL_FILES):
        message = "is neither a run (it has no resolved.toml) nor a model (no config.json)"
        raise ModelError(Problem(target, f"{message}{runs_beside(path / 'any')}"))
    if (wrong := unknown_builtin(target)) is not None:
        raise ModelError(Problem(target, wrong))
    require_reachable(Model(base=target), "config.json")
