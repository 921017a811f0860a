"""A base folder before anything is loaded from it: what it is instead of a model, and whether its weights are there."""

import json
from pathlib import Path

from qtune.errors import ModelError, Problem, first_line
from qtune.lfs import ADVICE, lfs_pointers
from qtune.model.checkpoint import INDEX, SINGLE, weight_map


def refuse_other_folders(base: str) -> None:
    """A folder with an adapter or a run in it is no base model.

    Raises:
        ModelError: with the model that is meant, as far as the folder says.
    """
    folder = Path(base)
    if not folder.is_dir() or (folder / "config.json").is_file():
        return
    if (folder / "resolved.toml").is_file():
        message = "is a run of qtune, not a model; adapter.start_from goes on from it, its export is a model"
        raise ModelError(Problem(base, message))
    file = folder / "adapter_config.json"
    if file.is_file():
        try:
            said = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(Problem(str(file), f"cannot be read: {first_line(error)}")) from error
        said = said if isinstance(said, dict) else {}
        of = said.get("base_model_name_or_path") or "a model that it does not name"
        kind = str(said.get("peft_type") or "peft").lower().replace("_", "-")
        message = f"is a {kind} adapter of {of}, not a model; set model.base to that, or merge the adapter first"
        raise ModelError(Problem(base, message))


def require_weights(base: str) -> None:
    """The weights of a local folder are there, and are weights. A hub id is not asked.

    Raises:
        ModelError: files are Git LFS pointers or missing, or the weights are not safetensors.
    """
    folder = Path(base)
    if not folder.is_dir():
        return
    refuse_pointers(folder)
    index = folder / INDEX
    if index.is_file():
        files = sorted(set(weight_map(index).values()))
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            message = f"{len(missing)} of {len(files)} files of weights are missing, the first of them {missing[0]}"
            raise ModelError(Problem(base, message))
    elif not (folder / SINGLE).is_file():
        if others := sorted(folder.glob("*.safetensors")):
            message = f"has {others[0].name} and no {INDEX} that names it; its weights are not whole"
            raise ModelError(Problem(base, message))
        pickled = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        has = f"its weights are pickled ({pickled[0].name}), which can run code" if pickled else "it has no weights"
        raise ModelError(Problem(base, f"{has}; only safetensors are read"))


def refuse_pointers(folder: Path) -> None:
    """Raises a ModelError that names the files of a folder that are Git LFS pointers, if there are any."""
    if pointers := lfs_pointers(folder):
        raise ModelError([Problem(str(file), ADVICE) for file in pointers])
