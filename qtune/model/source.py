"""Where a base comes from: a recipe's model.base -> what is loaded, without loading it."""

from pathlib import Path

from qtune.model.builtin import PREFIX, builtin_folder
from qtune.model.from_gguf import gguf_folder
from qtune.recipe.schema import Model


def base_folder(model: Model) -> str:
    """What transformers loads from: a folder (built-in models and GGUF files have one made), or a hub id.

    Raises:
        ModelError: a built-in model or a GGUF file cannot be had.
    """
    if model.base.startswith(PREFIX):
        return str(builtin_folder(model.base.removeprefix(PREFIX)))
    path = Path(model.base).expanduser()
    if path.suffix == ".gguf":
        return str(gguf_folder(path))
    if path.is_file() and path.name == "config.json":
        return str(path.parent)
    return str(path) if path.is_dir() else model.base
