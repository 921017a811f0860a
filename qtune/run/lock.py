"""lock.json: what a run depended on, so that it can be repeated and a result can be believed."""

import hashlib
import platform
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from qtune import __version__
from qtune.plan import Plan
from qtune.recipe.schema import Recipe
from qtune.run.folder import RunDir
from qtune.run.records import read_record, write_record

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


@dataclass(frozen=True)
class LockedBase:
    """The base model: the name in the recipe, the hub's commit of it, and a hash of its folder where it is one."""

    name: str = ""
    commit: str | None = None
    files_sha256: str | None = None


@dataclass(frozen=True)
class LockedSource:
    """A source of rows and the hash of its contents."""

    source: str
    blake2b: str


@dataclass(frozen=True)
class LockedDevice:
    """What a trace must know of the device that a run was on; older locks know its name alone."""

    name: str = ""
    kind: Literal["cuda", "cpu"] | None = None
    total_bytes: int | None = None
    bf16: bool | None = None
    capability: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Continued:
    """What a run went on with when it was resumed."""

    from_step: int
    qtune: str
    python: str
    packages: dict[str, str | None]
    device: LockedDevice


@dataclass(frozen=True)
class Lock:
    """What a run began with, and what it went on with each time."""

    qtune: str = ""
    python: str = ""
    packages: dict[str, str | None] = field(default_factory=dict)
    base: LockedBase = field(default_factory=LockedBase)
    data: tuple[LockedSource, ...] = ()
    training_rows_blake2b: str | None = None
    chat_template_sha256: str | None = None
    seed: int | None = None
    device: LockedDevice = field(default_factory=LockedDevice)
    resumed: tuple[Continued, ...] = ()

    @property
    def last_device(self) -> LockedDevice:
        """The one of the last part of the run, which its memory was measured on."""
        return self.resumed[-1].device if self.resumed else self.device

    def resumed_as(self, now: "Lock", step: int) -> "Lock":
        """This lock with what another process goes on with after `step`."""
        part = Continued(step, now.qtune, now.python, now.packages, now.device)
        return replace(self, resumed=(*self.resumed, part))


def lock_of(recipe: Recipe, plan: Plan, base: str, commit: str | None, prepared: "Prepared") -> Lock:
    """The lock of a run that begins now, here.

    base: what transformers loaded from; commit: the hub's, None for a folder. prepared: what is trained on.
    """
    device = plan.device
    return Lock(
        qtune=__version__,
        python=platform.python_version(),
        packages={name: _version(name) for name in PACKAGES},
        base=LockedBase(recipe.model.base, commit, _folder_hash(Path(base))),
        data=tuple(LockedSource(source.name, source.fingerprint) for source in prepared.sources),
        training_rows_blake2b=rows_hash(prepared),
        chat_template_sha256=hashlib.sha256(prepared.template.text.encode()).hexdigest(),
        seed=recipe.training.seed,
        device=LockedDevice(device.name, device.kind, device.total_bytes, device.bf16, device.capability),
    )


def write_lock(run_dir: RunDir, lock: Lock) -> None:
    """Writes RUN/lock.json."""
    write_record(run_dir.lock_file, lock)


def read_lock(run_dir: RunDir) -> Lock | None:
    """RUN/lock.json; None where the run was stopped before it was written.

    Raises:
        RunError: it is damaged.
    """
    return read_record(run_dir.lock_file, Lock)


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
