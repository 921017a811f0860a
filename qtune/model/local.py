"""The base model's files on this disk: fetched from the hub where they are not there yet."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from qtune.disk import NO_FILE, no_file_in
from qtune.errors import ModelError, Problem, first_line
from qtune.model.as_made import require_as_made
from qtune.model.builtin import PREFIX, builtin_folder
from qtune.model.folder import weight_files
from qtune.model.from_gguf import gguf_folder
from qtune.model.hub import hub_refusal, is_local_only, require_reachable
from qtune.model.trust import trusted_revision
from qtune.recipe.schema import Model

# What a merge or a loader may need from the hub; weights in other formats stay there.
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*"]


def base_folder(model: Model) -> str:
    """What transformers loads from: a folder (built-in models and GGUF files have one made), or a hub id.

    Raises:
        ModelError: a built-in model or a GGUF file cannot be had, an exported folder is not what was exported, or one
            holds a pipe or a device.
    """
    if model.base.startswith(PREFIX):
        return str(builtin_folder(model.base.removeprefix(PREFIX)))
    path = Path(model.base).expanduser()
    if path.suffix == ".gguf":
        return str(gguf_folder(path))
    if path.is_file() and path.name == "config.json":
        path = path.parent
    if not path.is_dir():
        return model.base
    if (found := no_file_in(path, below=False)) is not None:
        raise ModelError(Problem(str(found), NO_FILE))
    require_as_made(path)
    return str(path)


def base_on_disk(model: Model) -> Path | None:
    """The base model's folder where its weights are on this disk already; nothing is fetched.

    Raises ModelError when a built-in model or a GGUF file cannot be had.
    """
    folder = Path(base_folder(model))
    if folder.is_dir():
        return folder
    try:
        cached = Path(snapshot_download(model.base, revision=model.revision, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError):
        return None
    try:
        weight_files(cached)
    except ModelError:  # not all of them are here yet, and fetching brings the rest
        return None
    return cached


def local_base(model: Model) -> Path:
    """The base model's folder on this disk; a hub id is downloaded unless it is in the hub's cache.

    Raises ModelError when it cannot be had.
    """
    base = Path(base_folder(model))
    if base.is_dir():
        return base
    # Code that somebody agreed to is of one commit.
    revision = trusted_revision(model.base, model.revision) if model.trust_remote_code else model.revision
    require_reachable(model, "config.json")
    try:
        return Path(
            snapshot_download(
                model.base,
                revision=revision,
                allow_patterns=HUB_FILES,
                local_files_only=is_local_only(model.base),
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        if (refusal := hub_refusal(model, error)) is not None:
            raise refusal from error
        raise ModelError(Problem(model.base, f"its weights cannot be fetched: {first_line(error)}")) from error
