"""lock.json: what a run depended on, so that it can be repeated and a result can be believed."""

import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qtune import __version__
from qtune.plan import Plan
from qtune.recipe.schema import Recipe

if TYPE_CHECKING:
    from qtune.data.prepare import Prepared

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "bitsandbytes",
    "datasets",
    "accelerate",
    "safetensors",
    "tokenizers",
)


def lock_of(
    recipe: Recipe, plan: Plan, base: str, commit: str | None, sources: list[Any], rows: str, template: str
) -> dict[str, Any]:
    """The lock of a run: versions, base model, data and template hashes, seed, device.

    base: what transformers loaded from; commit: the hub's, None for a folder. sources: `data.sources.Source` values;
    rows: `rows_hash` of what is trained on.
    """
    return {
        "qtune": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "base": {"name": recipe.model.base, "commit": commit, "files_sha256": _folder_hash(Path(base))},
        "data": [{"source": source.name, "blake2b": source.fingerprint} for source in sources],
        "training_rows_blake2b": rows,
        "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest(),
        "seed": recipe.training.seed,
        "device": {
            "name": plan.device.name,
            "kind": plan.device.kind,
            "total_bytes": plan.device.total_bytes,
            "bf16": plan.device.bf16,
            "capability": plan.device.capability,
        },
    }


def rows_hash(prepared: "Prepared") -> str:
    """A hash of the training rows, their order, weights and lengths in tokens, wherever their files are."""
    contents = prepared.examples["train"].with_format("numpy")["row_hash"][:]
    digest = hashlib.blake2b(np.asarray(contents, dtype=np.int64).tobytes(), digest_size=16)
    digest.update(np.asarray(prepared.lengths, dtype=np.int64).tobytes())
    return digest.hexdigest()


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
