"""lock.json: what a run depended on, so that it can be repeated and a result can be believed."""

import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qtune import __version__
from qtune.plan import Plan
from qtune.recipe import Recipe

PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate", "safetensors", "tokenizers")


def lock_of(recipe: Recipe, plan: Plan, base: str, commit: str | None, sources: list[Any], template: str) -> dict[str, Any]:
    """The lock of a run: versions, base model, data and template hashes, seed, device.

    base: what transformers loaded from; commit: the hub's, None for a folder. sources: `data.sources.Source` values.
    """
    return {
        "qtune": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "base": {"name": recipe.model.base, "commit": commit, "files_sha256": _folder_hash(Path(base))},
        "data": [{"source": source.name, "blake2b": source.fingerprint} for source in sources],
        "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest(),
        "seed": recipe.training.seed,
        "device": {"name": plan.device.name, "total_bytes": plan.device.total_bytes},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _folder_hash(folder: Path) -> str | None:
    """Names, sizes and configuration of a local model; hashing gigabytes of weights would delay every run."""
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix == ".safetensors":
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        elif file.name == "config.json":
            digest.update(file.read_bytes())
    return digest.hexdigest()
