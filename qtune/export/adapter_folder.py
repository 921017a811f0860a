"""A run's adapter alone, in peft's format, with nothing of ours and no path of this computer in it."""

import json
from pathlib import Path

from qtune.errors import VerificationError, first_line
from qtune.export.adapter_weights import CONFIG, WEIGHTS
from qtune.export.model_card import adapter_card
from qtune.export.model_files import write_json
from qtune.export.opened_run import OpenedRun
from qtune.export.staged import staged_folder
from qtune.export.verification import damage_of, seal_export
from qtune.manifest import IF_CHANGED
from qtune.records import plain

# Keys that peft's config has for its own book-keeping, and that may hold paths of this computer.
PRIVATE = ("parent_library", "auto_mapping")


def write_adapter(source: OpenedRun, output: Path, *, force: bool) -> Path:
    """Copies the adapter's two files, names the base as others know it, adds tokenizer and card.

    Raises:
        InputError: the folder is there and `force` is not given.
    """
    weights = source.adapter / WEIGHTS
    with staged_folder(output, weights.stat().st_size, force=force) as work:
        (work / WEIGHTS).write_bytes(weights.read_bytes())
        write_json(work / CONFIG, public_config(source))
        source.tokenizer.save_pretrained(work)
        (work / "README.md").write_text(adapter_card(source, work), encoding="utf-8")
        seal_export(work, source.run.path)
    return output


def is_adapter_alone(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def require_same_adapter(source: OpenedRun, folder: Path) -> None:
    """An adapter that was exported alone is still what was exported, and the run's, byte for byte.

    Raises:
        VerificationError: it is not.
    """
    if (said := damage_of(folder)) is not None:
        raise VerificationError(f"{folder}: {said}; {IF_CHANGED}")
    differ = []
    try:
        if (folder / WEIGHTS).read_bytes() != (source.adapter / WEIGHTS).read_bytes():
            differ.append(WEIGHTS)
        if json.loads((folder / CONFIG).read_text(encoding="utf-8")) != plain(public_config(source)):
            differ.append(CONFIG)
    except (OSError, ValueError, RecursionError) as error:
        raise VerificationError(f"{folder} cannot be read: {first_line(error)}") from error
    if differ:
        raise VerificationError(f"{folder} is not the adapter of {source.run.path}: {' and '.join(differ)} differ")


def public_config(source: OpenedRun) -> dict[str, object]:
    """The adapter's config with the base's public name, ready for inference."""
    config: dict[str, object] = json.loads((source.adapter / CONFIG).read_text(encoding="utf-8"))
    for key in PRIVATE:
        config.pop(key, None)
    config["base_model_name_or_path"] = source.base_name
    config["revision"] = source.recipe.model.revision
    config["inference_mode"] = True
    return config
