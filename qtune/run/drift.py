"""Whether a run is still on what it was trained on: its lock beside what is here now, and what to do where they differ.

A tuned model is its adapter and its base together. On another base it answers something, and everything that is made of
it looks well: so whoever goes on with a run asks here first.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, get_args

from qtune import console
from qtune.cache import cache_folder
from qtune.errors import InputError, Problem, RunError
from qtune.model.contents import Contents, TokenizerContents, WeightFile, contents_of
from qtune.model.local import base_folder, base_on_disk, local_base
from qtune.recipe.schema import Model, Recipe
from qtune.records import plain
from qtune.run.folder import RunDir
from qtune.run.lock import (
    Lock,
    LockedDevice,
    LockedSource,
    read_lock,
    recipe_values,
    sizes_hash,
    template_hash,
    versions,
)
from qtune.run.resolved import resolved_recipe, written_text
from qtune.run.resumption import CHANGEABLE, RATE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qtune.device.present import Device

Kind = Literal[
    "weights", "config", "generation", "tokenizer", "code", "template", "rows", "recipe", "versions", "processor"
]
KINDS: tuple[Kind, ...] = get_args(Kind)

BASE: tuple[Kind, ...] = ("weights", "config", "generation", "tokenizer", "code")
"""What a base model's folder holds."""

USING: tuple[Kind, ...] = (*BASE, "template", "recipe", "versions", "processor")
"""What an answer of the tuned model depends on."""

LEARNING = ("trl", "datasets", "accelerate")
"""Libraries without a part in how a finished run computes."""

SHOWN = 6
"""Differences of one kind that are written out."""


@dataclass(frozen=True)
class Drift:
    """One thing that is no longer what it was."""

    kind: Kind
    message: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


def known_kinds(names: Sequence[str]) -> tuple[str, ...]:
    """Names as `--accept-drift` takes them.

    Raises:
        RunError: one is no kind of drift.
    """
    if unknown := [name for name in names if name not in KINDS]:
        raise RunError(Problem("--accept-drift", f"{unknown[0]!r} is none of {', '.join(KINDS)}"))
    return tuple(names)


_said: ContextVar[set[tuple[Path, Drift]] | None] = ContextVar("_said", default=None)


@contextmanager
def accepting_once() -> Iterator[None]:
    """Says each accepted drift of a run once, however many stages in it compare that run with its lock; inside of
    another one it is that one's."""
    outer = _said.get()
    token = _said.set(set() if outer is None else outer)
    try:
        yield
    finally:
        _said.reset(token)


def require_no_drift(run_dir: RunDir, drifts: Sequence[Drift], accepted: Sequence[str]) -> None:
    """Says the drifts that were accepted, and stops at the others.

    Raises:
        RunError: something that was not accepted is no longer what it was.
    """
    accepted, said = known_kinds(accepted), _said.get()
    for drift in drifts:
        if drift.kind in accepted and (said is None or (run_dir.path, drift) not in said):
            console.say(f"accepted: {drift}")
            if said is not None:
                said.add((run_dir.path, drift))
    left = [drift for drift in drifts if drift.kind not in accepted]
    if not left:
        return
    place = str(run_dir.path)
    options = " ".join(f"--accept-drift {kind}" for kind in dict.fromkeys(drift.kind for drift in left))
    advice = f"put it back as it was, or go on with what is here now: {options}"
    raise RunError([*(Problem(place, f"is no longer what it was: {drift}") for drift in left), Problem(place, advice)])


def require_same_base(
    run_dir: RunDir,
    recipe: Recipe,
    tokenizer: "PreTrainedTokenizerBase",
    template: str | None,
    accepted: Sequence[str],
    *,
    kinds: Sequence[Kind] = USING,
    device: "Device | None" = None,
    parts: Sequence[str] = (),
    checksums: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Whether a finished run is still what was trained, before it is used.

    template: the chat template's text as it is here; None leaves it out. parts: those of [data] whose rows are about to
    be used, as "test". checksums: of the base's weights, where they are about to be loaded
    (`model.load.checksums_loaded`).

    Raises:
        RunError: it is not, and that was not accepted. ModelError, DataError: base or rows are not there.
    """
    lock = _lock_or_said(run_dir, accepted)
    if lock is None:
        return
    now = contents_here(recipe.model, tokenizer, checksums=checksums)
    drifts = list(base_drifts(lock, now, kinds, sizes_hash(Path(base_folder(recipe.model)))))
    if template is not None:
        drifts += template_drifts(lock, template)
    if "recipe" in kinds:
        drifts += recipe_drifts(lock, values_of(run_dir))
    if "versions" in kinds:
        drifts += version_drifts(lock, without=LEARNING)
    if "processor" in kinds and device is not None:
        drifts += processor_drifts(lock, device, lock.latest.compute_dtype)
    if parts:
        drifts += source_drifts(lock, locked_sources(recipe, run_dir.path, parts))
    require_no_drift(run_dir, drifts, accepted)


def resume_drifts(begun: Lock, now: Lock, values: dict[str, Any], parts: Sequence[LockedSource]) -> Iterator[Drift]:
    """Everything in which a run that goes on would differ from the one that began.

    values: of resolved.toml as it stands, before anything is changed. parts: the sources that are not trained on.
    """
    last = begun.latest
    if now.contents is not None:
        yield from base_drifts(begun, now.contents, BASE, now.base.files_sha256)
    if last.chat_template_sha256 is not None and last.chat_template_sha256 != now.chat_template_sha256:
        yield _template(last.chat_template_sha256, now.chat_template_sha256)
    if last.training_rows_blake2b not in (None, now.training_rows_blake2b):
        yield Drift(
            "rows",
            f"the training rows are not those that the run began with (blake2b {_short(last.training_rows_blake2b)} -> "
            f"{_short(now.training_rows_blake2b)})",
        )
    yield from source_drifts(begun, parts)
    yield from recipe_drifts(begun, values)
    yield from version_drifts(begun)
    yield from _devices(last.device, now.device)
    if last.compute_dtype not in (None, now.compute_dtype):
        yield Drift("processor", f"computes in {now.compute_dtype}, not in {last.compute_dtype}")


def said_of_an_old_lock(lock: Lock) -> str | None:
    """What a lock of an older version, or of a run that goes on from one without, cannot tell; None where it can."""
    if lock.latest.contents is not None:
        return None
    if lock.is_identity_alone:
        return "goes on from a run without lock.json: what that began with cannot be compared"
    return "lock.json is of an older version: it knows the sizes of the base's files, and not what was in them"


def contents_here(
    model: Model,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    whole: bool = False,
    checksums: Mapping[str, str] = MappingProxyType({}),
) -> Contents:
    """Of the base as it is on this disk now; fetched from the hub where it is not. The rest as in `contents_of`.

    Raises:
        ModelError: it cannot be had.
    """
    return contents_of(base_on_disk(model) or local_base(model), tokenizer, whole=whole, checksums=checksums)


def values_of(run_dir: RunDir) -> dict[str, Any]:
    """What stands in a run's resolved.toml now (`recipe_values`).

    Raises:
        RunError: it cannot be read.
    """
    return recipe_values(written_text(run_dir))


def said_of(run_dir: RunDir) -> list[str]:
    """A sentence for each thing that is no longer what it was, for pages and screens, which go on.

    Only what needs no tokenizer is compared. What cannot be compared is a sentence too.
    """
    try:
        lock, recipe = read_lock(run_dir), resolved_recipe(run_dir)
        if lock is None:
            is_begun = run_dir.metrics_file.is_file() or run_dir.checkpoints.is_dir() or run_dir.is_finished
            return ["has no lock.json: what it was trained on cannot be compared"] if is_begun else []
        drifts = list(recipe_drifts(lock, values_of(run_dir)))
        known = lock.latest.contents is not None
        if known and (folder := base_on_disk(recipe.model)) is not None:
            now = contents_of(folder, None)
            drifts += base_drifts(lock, now, ("weights", "config", "generation", "code"))
    except InputError as error:
        return [f"cannot be compared with its lock: {error}"]
    return [f"is no longer what it was: {drift}" for drift in drifts]


def base_drifts(lock: Lock, now: Contents, kinds: Sequence[Kind], sizes: str | None = None) -> Iterator[Drift]:
    """The base's files beside what they were; an older lock knows their `sizes_hash` alone."""
    then = lock.latest.contents
    if then is None:
        known = lock.base.files_sha256
        if None not in (known, sizes) and known != sizes:
            yield Drift("weights", "the sizes of the base's files or its config.json have changed")
        return
    found: dict[Kind, list[str]] = {
        "weights": list(_weights(then.weights, now.weights)),
        "config": list(_values(then.config, now.config)),
        "generation": list(_values(then.generation, now.generation)),
        "tokenizer": list(_tokenizers(then.tokenizer, now.tokenizer)),
        "code": list(_values(then.code, now.code)),
    }
    for kind, said in found.items():
        if said and kind in kinds:
            yield Drift(kind, _listed(said))


def template_drifts(lock: Lock, template: str) -> Iterator[Drift]:
    """The chat template beside the one that rows were rendered with."""
    then, now = lock.latest.chat_template_sha256, template_hash(template)
    if then not in (None, now):
        yield _template(then, now)


def recipe_drifts(lock: Lock, values: dict[str, Any]) -> Iterator[Drift]:
    """The values of resolved.toml beside those that were trained with.

    One that may change on resuming may have any of the values that it ever had: the lock is written first.
    """
    then = lock.latest.recipe
    if then is None:
        return
    history = [one for one in (lock.recipe, *(part.recipe for part in lock.resumed)) if one is not None]
    changeable = {".".join(map(str, path)) for path in (*CHANGEABLE, RATE)}
    said = [
        text
        for key in sorted(then.keys() | values.keys())
        for text in _values({key: then[key]} if key in then else {}, {key: values[key]} if key in values else {})
        if not (key in changeable and any(values.get(key) == earlier.get(key) for earlier in history))
    ]
    if said:
        yield Drift("recipe", f"resolved.toml says otherwise: {_listed(said)}")


def version_drifts(lock: Lock, without: Sequence[str] = ()) -> Iterator[Drift]:
    """The libraries beside those that computed."""
    then = {name: one for name, one in lock.latest.packages.items() if name not in without}
    now = versions()
    said = [f"{name} {then[name]} -> {now.get(name)}" for name in then if then[name] != now.get(name)]
    if said:
        yield Drift("versions", ", ".join(said))


def processor_drifts(lock: Lock, device: "Device", compute_dtype: str | None) -> Iterator[Drift]:
    """The device beside the one that computed; `compute_dtype` is what is going to be computed in."""
    last = lock.latest
    here = LockedDevice(device.name, device.kind, device.total_bytes, device.bf16, device.capability)
    yield from _devices(last.device, here)
    if last.compute_dtype not in (None, compute_dtype):
        yield Drift("processor", f"computes in {compute_dtype}, not in {last.compute_dtype}")


def locked_sources(recipe: Recipe, folder: Path, parts: Sequence[str]) -> tuple[LockedSource, ...]:
    """Sources of rows by the hash of their contents; parts: keys of [data], of which shares have none.

    Raises:
        DataError: one is not there.
    """
    # They wait for a library, and a report asks for no source.
    from qtune.data.sources import content_digest, find_sources
    from qtune.data.stream_seen import Seen

    data = recipe.data
    given = {part: getattr(data, part) for part in parts}
    # Rows that are streamed are too many to be read for this alone.
    digest_of = Seen(cache_folder() / "examples").digest if data.streaming is True else content_digest
    return tuple(
        LockedSource(source.name, source.fingerprint_by(digest_of))
        for part, value in given.items()
        if value is not None and not isinstance(value, float)
        for source in find_sources(value, data, folder, part)
    )


def source_drifts(lock: Lock, now: Sequence[LockedSource]) -> Iterator[Drift]:
    """Files of rows beside what was in them; one that the lock does not know has no past."""
    then = {source.source: source.blake2b for source in lock.latest.data}
    said = [
        f"{source.source} has other rows (blake2b {_short(then[source.source])} -> {_short(source.blake2b)})"
        for source in now
        if source.source in then and then[source.source] != source.blake2b
    ]
    if said:
        yield Drift("rows", _listed(said))


def _lock_or_said(run_dir: RunDir, accepted: Sequence[str]) -> Lock | None:
    known_kinds(accepted)
    lock = read_lock(run_dir)
    if lock is None:
        console.say(f"{run_dir.path} has no lock.json: whether its base is the one it was trained on cannot be told")
    elif (said := said_of_an_old_lock(lock)) is not None:
        console.say(f"{run_dir.path}: {said}")
    return lock


def _weights(then: dict[str, WeightFile], now: dict[str, WeightFile]) -> Iterator[str]:
    for name in sorted(then.keys() | now.keys()):
        before, after = then.get(name), now.get(name)
        if before is None or after is None:
            yield f"{name} is {'new' if before is None else 'gone'}"
        elif before.nbytes != after.nbytes:
            yield f"{name} has {before.nbytes:,} -> {after.nbytes:,} bytes"
        elif before.sampled != after.sampled:
            yield f"{name} holds other numbers (blake2b {_short(before.sampled)} -> {_short(after.sampled)})"
        elif None not in (before.checksum, after.checksum) and before.checksum != after.checksum:
            yield f"{name} holds other numbers (crc32 {before.checksum} -> {after.checksum})"
        elif None not in (before.whole, after.whole) and before.whole != after.whole:
            yield f"{name} holds other numbers (sha256 {_short(before.whole)} -> {_short(after.whole)})"


def _tokenizers(then: TokenizerContents | None, now: TokenizerContents | None) -> Iterator[str]:
    if then is None or now is None:
        return
    if then.tokens != now.tokens:
        yield f"{then.tokens:,} -> {now.tokens:,} tokens"
    elif then.vocabulary != now.vocabulary:
        yield (
            f"the {now.tokens:,} tokens are others, or in another order (blake2b {_short(then.vocabulary)} -> "
            f"{_short(now.vocabulary)})"
        )
    if then.rules != now.rules:
        yield f"text is split by other rules (blake2b {_short(then.rules)} -> {_short(now.rules)})"
    yield from _values(then.special, now.special)


def _values(then: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    for key in sorted(then.keys() | now.keys()):
        if key not in now:
            yield f"{key} = {_shown(then[key])} is gone"
        elif key not in then:
            yield f"{key} = {_shown(now[key])} is new"
        elif plain(then[key]) != plain(now[key]):  # JSON knows neither infinity nor tuples
            yield f"{key} {_shown(then[key])} -> {_shown(now[key])}"


def _devices(then: LockedDevice, now: LockedDevice) -> Iterator[Drift]:
    if then.kind is not None and then.kind != now.kind:
        yield Drift("processor", f"{then.name} -> {now.name}")
    elif then.bf16 is not None and then.bf16 != now.bf16:
        has = {True: "has bfloat16 products", False: "has none in bfloat16"}
        yield Drift("processor", f"{then.name}, which {has[then.bf16]} -> {now.name}, which {has[bool(now.bf16)]}")


def _template(then: str | None, now: str | None) -> Drift:
    return Drift("template", f"the chat template is another (sha256 {_short(then)} -> {_short(now)})")


def _listed(said: Sequence[str]) -> str:
    rest = f" and {len(said) - SHOWN} more" if len(said) > SHOWN else ""
    return "; ".join(said[:SHOWN]) + rest


def _short(digest: str | None) -> str:
    return "none" if digest is None else digest[:8]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
