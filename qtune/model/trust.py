"""Consent to Python code that comes with a model: given on this computer, for this code, and never read from a folder.

`model.trust_remote_code = true` in a recipe says that its author trusted the code. Recipes and runs travel; trust does
not. Before such code runs, whoever is at this computer is asked once, or says so with --trust-remote-code. What is
remembered is a hash of the code (and, from the hub, the commit), so that other code under the same name is asked again.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from qtune import console
from qtune.errors import ModelError, Problem, first_line
from qtune.whole import write_text

FILE = "trusted_code.json"
DESCRIBING = ("config.json", "tokenizer_config.json", "generation_config.json")
"""Files whose `auto_map` names the classes that are imported."""


def config_folder() -> Path:
    """XDG_CONFIG_HOME/qtune, else ~/.config/qtune: what a person has decided, unlike a cache."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config").expanduser() / "qtune"


def trusted_revision(base: str, revision: str | None) -> str | None:
    """The revision whose code may run: that of a hub id is its commit from here on, so that what was agreed to is what
    is fetched.

    Raises:
        ModelError: nobody at this computer has agreed to this code, or a folder names code that is not in it.
    """
    folder = Path(base)
    if folder.is_dir():
        _refuse_code_of_others(folder)
        require_consent(base, code_hash(folder))
        return revision
    commit = _commit(base, revision)
    _refuse_code_of_others_on_the_hub(base, commit)
    if not _is_without_code(base, commit):
        require_consent(base, f"commit {commit}")
    return commit


def require_consent(base: str, code: str | None) -> None:
    """Asks whoever sits at the terminal, where nobody has agreed to this code yet; `code` is None where there is none.

    Raises:
        ModelError: nobody has agreed, and nobody can be asked, or the answer was no.
    """
    if code is None or code in _known():
        return
    if sys.stdin.isatty() and sys.stderr.isatty():
        console.say(f"{base} brings Python code of its own, which would run with your rights ({code})")
        console.say("It runs if you type yes; that is remembered for this code: ")
        if input().strip().lower() == "yes":
            grant(base, code)
            return
    message = (
        f"brings Python code of its own ({code}), and a recipe cannot agree to it for you; read it, and if you trust "
        "it say --trust-remote-code once"
    )
    raise ModelError(Problem(base, message))


def grant_for(base: str, revision: str | None) -> None:
    """Remembers consent to the code that a folder or a hub id has now.

    Raises:
        ModelError: it cannot be found, or a folder names code that is not in it.
    """
    folder = Path(base)
    if folder.is_dir():
        _refuse_code_of_others(folder)
        code = code_hash(folder)
    else:
        commit = _commit(base, revision)
        _refuse_code_of_others_on_the_hub(base, commit)
        code = f"commit {commit}"
    if code is not None:
        grant(base, code)


def is_granted(base: str, revision: str | None) -> bool:
    """Whether somebody at this computer has agreed to the code that a folder or a hub id has now; nobody is asked.

    Raises:
        ModelError: a hub id that was agreed to before cannot be found.
    """
    known, folder = _known(), Path(base)
    if folder.is_dir():
        return code_hash(folder) in known
    return base in known.values() and f"commit {_commit(base, revision)}" in known


def grant(base: str, code: str) -> None:
    """Remembers consent to code, on this computer and for this user."""
    known = _known()
    known[code] = base
    try:
        write_text(config_folder() / FILE, json.dumps(known, indent=2, sort_keys=True) + "\n")
    except OSError as error:
        message = f"consent cannot be kept: {error.strerror}; XDG_CONFIG_HOME can name another folder"
        raise ModelError(Problem(str(config_folder()), message)) from error


def code_hash(folder: Path) -> str | None:
    """A hash of a folder's Python files and of what its configurations import; None where it has no code."""
    files = sorted(folder.glob("**/*.py"))
    named = {name: auto_map for name in DESCRIBING if (auto_map := _auto_map(folder / name))}
    if not files and not named:
        return None
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(folder)}\0".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    digest.update(json.dumps(named, sort_keys=True).encode())
    return f"sha256 {digest.hexdigest()}"


def _refuse_code_of_others(folder: Path) -> None:
    """A class "OWNER/REPOSITORY--MODULE.CLASS" is imported from the hub as it is there on that day: consent to a folder
    cannot hold it. Files that are not there name nothing.

    Raises:
        ModelError: the folder names such a class.
    """
    for name in DESCRIBING:
        for reference in _references(_auto_map(folder / name)):
            if "--" in reference:
                raise ModelError(
                    Problem(str(folder / name), _code_of_another(reference, "copy that code into the folder"))
                )


def _refuse_code_of_others_on_the_hub(base: str, commit: str) -> None:
    """`_refuse_code_of_others` of a hub id. A class of the model's own repository is one of the commit that was agreed
    to, also under its full name (transformers 5.23, `get_class_from_dynamic_module`); one of another is not.

    Raises:
        ModelError: the model names such a class.
    """
    for name in DESCRIBING:
        try:
            file = Path(hf_hub_download(base, name, revision=commit))
        except (HfHubHTTPError, OSError, ValueError):  # not there, or it cannot be fetched: neither can the model
            continue
        for reference in _references(_auto_map(file)):
            owner, is_named, _ = reference.partition("--")
            if is_named and owner != base:
                way_out = "download the model into a folder, copy that code beside it"
                raise ModelError(Problem(f"{base}, {name}", _code_of_another(reference, way_out)))


def _code_of_another(reference: str, way_out: str) -> str:
    return (
        f"its auto_map imports {reference!r}, code of another repository, which may change at any time; {way_out} and "
        "name it without what stands before --"
    )


def _references(auto_map: Any) -> Iterator[str]:
    """The classes that an `auto_map` names, by whatever nesting: a tokenizer has a slow one and a fast one."""
    if isinstance(auto_map, str):
        yield auto_map
    elif isinstance(auto_map, dict | list):
        for value in auto_map.values() if isinstance(auto_map, dict) else auto_map:
            yield from _references(value)


def code_files(folder: Path) -> set[str]:
    """Hashes of a folder's Python files, whatever they are called."""
    return {hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("**/*.py")}


def _is_without_code(base: str, commit: str) -> bool:
    """Whether a hub model that is on this disk has no code; one that is not there may have some."""
    try:
        folder = Path(snapshot_download(base, revision=commit, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError):
        return False
    return code_hash(folder) is None


def _auto_map(file: Path) -> Any:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return values.get("auto_map") if isinstance(values, dict) else None


def _commit(base: str, revision: str | None) -> str:
    """The hub's commit of what would be loaded: from this disk, else from the hub. Runs nothing."""
    try:
        return Path(snapshot_download(base, revision=revision, local_files_only=True)).name
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError):
        pass
    from transformers import PretrainedConfig  # a base that is here need not wait for it

    try:
        options = {} if revision is None else {"revision": revision}
        values, _ = PretrainedConfig.get_config_dict(base, **options)
    except (OSError, ValueError) as error:
        raise ModelError(Problem(base, f"cannot be loaded: {first_line(error)}")) from error
    return str(values.get("_commit_hash") or revision)


def _known() -> dict[str, str]:
    try:
        values = json.loads((config_folder() / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        console.say(f"{config_folder() / FILE} cannot be read ({first_line(error)}): nothing counts as agreed to")
        return {}
    return {str(code): str(base) for code, base in values.items()} if isinstance(values, dict) else {}
