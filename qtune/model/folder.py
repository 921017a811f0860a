"""A base folder before anything is loaded from it: what it is instead of a model, and whether its weights are there."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from qtune.errors import ModelError, Problem, first_line
from qtune.lfs import ADVICE, lfs_pointers
from qtune.model.safetensors_file import require_whole

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"
OBJECTS = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"),
    *("special_tokens_map.json", "added_tokens.json"),
)
"""Files that loaders believe to hold an object."""
ASKED = ("config.json", "tokenizer.json")
"""Those of them whose readers are asked at once, and say it themselves; the second takes a moment to read."""


def refuse_other_folders(base: str) -> None:
    """A folder with an adapter or a run in it is no base model; nor is one with an adapter beside the model, which
    transformers would put on it without a word.

    Raises:
        ModelError: with the model that is meant, as far as the folder says.
    """
    folder = Path(base)
    if not folder.is_dir():
        return
    if (folder / "config.json").is_file():
        if (folder / ADAPTER).exists():
            message = f"has an adapter beside the model, which would be put on it; move {ADAPTER} elsewhere"
            raise ModelError(Problem(base, message))
        return
    if (folder / "resolved.toml").is_file():
        message = "is a run of qtune, not a model; adapter.start_from goes on from it, its export is a model"
        raise ModelError(Problem(base, message))
    file = folder / ADAPTER
    if file.is_file():
        try:
            said = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            said = {}
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
    if (index := weight_map(folder)) is not None:
        files = sorted(set(index.values()))
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            message = f"{len(missing)} of {len(files)} files of weights are missing, the first of them {missing[0]}"
            raise ModelError(Problem(base, message))
        _require_whole([folder / name for name in files])
    elif found := sorted(folder.glob("*.safetensors")):
        if not (folder / SINGLE).is_file():
            message = f"has {found[0].name} and no {INDEX} that names it; its weights are not whole"
            raise ModelError(Problem(base, message))
        _require_whole(found)
    else:
        pickled = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        has = f"its weights are pickled ({pickled[0].name}), which can run code" if pickled else "it has no weights"
        raise ModelError(Problem(base, f"{has}; only safetensors are read"))


def _require_whole(files: Sequence[Path]) -> None:
    """Every file has what its header says; those that do not are named together."""
    problems: list[Problem] = []
    for file in files:
        try:
            require_whole(file)
        except ModelError as error:
            problems.extend(error.problems)
    if problems:
        raise ModelError(problems)


def weight_files(folder: Path) -> list[Path]:
    """The shards of a model folder in the order of their names.

    Raises ModelError when there are none or when the index names a file that is not there.
    """
    if (named := weight_map(folder)) is not None:
        names = sorted(set(named.values()))
        files = [folder / name for name in names]
        if missing := [file.name for file in files if not file.exists()]:
            raise ModelError(Problem(str(folder), f"shards named in {INDEX} are missing: {', '.join(missing)}"))
        return files
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if any(folder.glob("*.bin")):
        raise ModelError(
            Problem(
                str(folder), "the weights are pickle files (.bin); convert them to safetensors, qtune reads no pickle"
            )
        )
    raise ModelError(Problem(str(folder), f"no {SINGLE} and no {INDEX}: not a model folder"))


def weight_map(folder: Path) -> dict[str, str] | None:
    """The file of each tensor's name, as the index of a folder in several files says; None where there is no index.

    Raises:
        ModelError: it is damaged, or names what is no file of the folder.
    """
    index = folder / INDEX
    if not index.exists():
        return None
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = list(found.values())
    except OSError as error:
        raise ModelError(Problem(str(index), f"cannot be read: {error.strerror}")) from error
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(Problem(str(index), "is damaged: it has no weight_map from tensors to files")) from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(Problem(str(index), f"names {str(name)[:200]!r}, which is no safetensors file beside it"))
    return dict(found)


def refuse_pointers(folder: Path) -> None:
    """Raises a ModelError that names the files of a folder that are Git LFS pointers, if there are any."""
    if pointers := lfs_pointers(folder):
        raise ModelError([Problem(str(file), ADVICE) for file in pointers])


def require_side_files(folder: Path) -> None:
    """What stands beside the weights can be read, by whichever verb comes to need it first.

    Raises:
        ModelError: something that has the name of such a file is none, or is damaged.
    """
    names = [name for name in OBJECTS if name not in ASKED]
    for name in (*names, "chat_template.jinja"):
        file = folder / name
        if os.path.lexists(file) and not file.is_file():
            what = "is a folder" if file.is_dir() else "is a link to what is not there"
            raise ModelError(Problem(str(file), f"{what}; a file of the model has this name: put that back"))
    refuse_damaged_json(folder, names)


def refuse_damaged_json(folder: Path, names: Sequence[str] = OBJECTS) -> None:
    """Names the file for which a loader has failed, or would fail, in words of its own, if there is one.

    Raises:
        ModelError: a configuration or a tokenizer's file holds no JSON object, or cannot be read.
    """
    for name in names:
        try:
            values = json.loads((folder / name).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:  # loaders pass it on, without a sentence
            raise ModelError(Problem(str(folder / name), f"cannot be read: {error.strerror}")) from error
        except (ValueError, RecursionError) as error:
            raise ModelError(Problem(str(folder / name), f"is not JSON: {first_line(error)}")) from error
        if not isinstance(values, dict):
            raise ModelError(Problem(str(folder / name), f"must be an object with keys, not {str(values)[:40]!r}"))
