"""lock.json: what a run depended on, so that it can be repeated and a result can be believed."""

import hashlib
import platform
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from qtune import __version__
from qtune.model.contents import Contents
from qtune.plan import Plan
from qtune.recipe.file import leaves
from qtune.recipe.parse import parse_recipe
from qtune.recipe.schema import Recipe
from qtune.records import plain, read_record, write_record
from qtune.run.folder import RunDir

if TYPE_CHECKING:
    from collections.abc import Iterable

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
    processes: int = 1
    """How many had one and shared the rows of each step."""


@dataclass(frozen=True)
class Continued:
    """What a run went on with when it was resumed."""

    from_step: int
    qtune: str
    python: str
    packages: dict[str, str | None]
    device: LockedDevice
    contents: Contents | None = None
    training_rows_blake2b: str | None = None
    chat_template_sha256: str | None = None
    data: tuple[LockedSource, ...] = ()
    compute_dtype: str | None = None
    recipe: dict[str, Any] | None = None
    accepted: tuple[str, ...] = ()
    """The drifts that this part was told to go on with."""


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
    contents: Contents | None = None
    """What was in the base's files; locks of older versions do not know."""
    compute_dtype: str | None = None
    recipe: dict[str, Any] | None = None
    """The values of resolved.toml by their keys."""
    resumed: tuple[Continued, ...] = ()
    run_id: str | None = None
    """Who the run is (`run.identity`); None in locks of older versions."""
    ancestors: tuple[str, ...] = ()
    """The runs whose records and checkpoints it goes on from."""

    @property
    def latest(self) -> "Lock":
        """What the run went on with last, as a lock: what its weights belong to now."""
        lock = self
        for part in self.resumed:
            lock = replace(
                lock,
                packages=part.packages,
                device=part.device,
                contents=part.contents or lock.contents,
                training_rows_blake2b=part.training_rows_blake2b or lock.training_rows_blake2b,
                chat_template_sha256=part.chat_template_sha256 or lock.chat_template_sha256,
                data=part.data or lock.data,
                compute_dtype=part.compute_dtype or lock.compute_dtype,
                recipe=part.recipe or lock.recipe,
            )
        return lock

    @property
    def is_identity_alone(self) -> bool:
        """Whether it says who the run is and nothing else: it goes on from one whose lock was lost."""
        return self == Lock(run_id=self.run_id, ancestors=self.ancestors)

    @property
    def knows_whole_weights(self) -> bool:
        """Whether every byte of the base's weights was hashed."""
        contents = self.latest.contents
        return contents is not None and contents.is_whole

    @property
    def last_device(self) -> LockedDevice:
        """The one of the last part of the run, which its memory was measured on."""
        return self.resumed[-1].device if self.resumed else self.device

    def branched(self, run_id: str) -> "Lock":
        """The lock of another run, which goes on from this one's records and checkpoints."""
        if self.run_id is None:  # what an older version has written says nothing either
            return self
        return replace(self, run_id=run_id, ancestors=(*self.ancestors, self.run_id))

    def resumed_as(self, now: "Lock", step: int, accepted: tuple[str, ...] = ()) -> "Lock":
        """This lock with what another process goes on with after `step`; what is as it was is not written again."""
        last = self.latest
        part = Continued(
            step,
            now.qtune,
            now.python,
            now.packages,
            now.device,
            contents=None if (contents := _all_known(now.contents, last.contents)) == last.contents else contents,
            training_rows_blake2b=_new(now.training_rows_blake2b, last.training_rows_blake2b),
            chat_template_sha256=_new(now.chat_template_sha256, last.chat_template_sha256),
            data=() if now.data == last.data else now.data,
            compute_dtype=_new(now.compute_dtype, last.compute_dtype),
            recipe=None if now.recipe == last.recipe else now.recipe,
            accepted=accepted,
        )
        return replace(self, resumed=(*self.resumed, part))


def _all_known(now: Contents | None, last: Contents | None) -> Contents | None:
    """What is known of the base now, with what was found of the same files before: not everything is read each time."""
    if now is None or last is None:
        return now
    weights = {}
    for name, file in now.weights.items():
        before = last.weights.get(name)
        if before is not None and before.may_be(file):
            file = replace(file, whole=file.whole or before.whole, checksum=file.checksum or before.checksum)
        weights[name] = file
    return replace(now, weights=weights)


def _new(now: str | None, before: str | None) -> str | None:
    return None if now == before else now


def lock_of(
    recipe: Recipe,
    plan: Plan,
    base: str,
    commit: str | None,
    prepared: "Prepared",
    data: "Iterable[LockedSource]" = (),
    contents: Contents | None = None,
    values: dict[str, Any] | None = None,
) -> Lock:
    """The lock of a run that begins now, here.

    base: what transformers loaded from; commit: the hub's, None for a folder. prepared: what is trained on. data: its
    sources, under names that do not depend on where one stands. values: `recipe_values` of its resolved recipe.
    """
    device = plan.device
    return Lock(
        qtune=__version__,
        python=platform.python_version(),
        packages=versions(),
        base=LockedBase(recipe.model.base, commit, sizes_hash(Path(base))),
        data=tuple(data),
        training_rows_blake2b=rows_hash(prepared),
        chat_template_sha256=template_hash(prepared.template.text),
        seed=recipe.training.seed,
        device=LockedDevice(
            device.name, device.kind, device.total_bytes, device.bf16, device.capability, device.processes
        ),
        contents=contents,
        compute_dtype=plan.compute_dtype,
        recipe=values,
    )


PLACES = (
    ("model", "base"), ("adapter", "start_from"), ("data", "train"), ("data", "validation"), ("data", "test"),
    ("data", "chat_template"), ("output", "directory"), ("output", "name"),
)  # fmt: skip
"""Keys that say where something is. It may be moved; what is in it is asked by its contents."""


def recipe_values(text: str) -> dict[str, Any]:
    """The values that stand in a run's resolved.toml by their keys, as JSON has them; those that name a place stay out.

    Keys that are not written have the default of a version that did not know them, and say nothing.

    Raises:
        Faulty, ValueError: it is no recipe.
    """
    tables = tomllib.loads(text)
    written = {(name, key) for name, table in tables.items() if isinstance(table, Mapping) for key in table}
    recipe = parse_recipe(tables)
    values = {
        ".".join(map(str, path)): plain(_jsonable(value))
        for path, value in leaves(recipe)
        if path[:2] in written and value is not None and (path not in PLACES or isinstance(value, (int, float)))
    }
    return dict(sorted(values.items()))


def _jsonable(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(key): _jsonable(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(inner) for inner in value]
    return value


def template_hash(template: str) -> str:
    """Of a chat template's text."""
    return hashlib.sha256(template.encode()).hexdigest()


def versions() -> dict[str, str | None]:
    """Of the libraries that compute."""
    return {name: _version(name) for name in PACKAGES}


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
    if prepared.stream is not None:
        digest = hashlib.blake2b(digest_size=16)
        for name in ("row_hash", "length"):
            for _, part in prepared.stream.all_figures(name):
                digest.update(part[name].astype(np.int64).tobytes())
        return digest.hexdigest()
    contents = prepared.examples["train"].with_format("numpy")["row_hash"][:]
    digest = hashlib.blake2b(np.asarray(contents, dtype=np.int64).tobytes(), digest_size=16)
    digest.update(np.asarray(prepared.lengths, dtype=np.int64).tobytes())
    return digest.hexdigest()


@cache
def _version(package: str) -> str | None:
    """Read once: what a process has imported stays, and a look at all of them is asked for three times a run."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def sizes_hash(folder: Path) -> str | None:
    """Names, sizes and configuration of a local model: all that locks of older versions know of it."""
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix == ".safetensors":
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        elif file.name == "config.json":
            digest.update(file.read_bytes())
    return digest.hexdigest()
