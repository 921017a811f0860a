"""Predictions remembered on disk: the same model, recipe, device and libraries give the same bytes."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qtune import console
from qtune.cache import cache_folder
from qtune.memory.predict import Longest, Prediction, model_key, predict, summarize
from qtune.memory.tracing.work import from_rows, rows_of
from qtune.model.quantization import is_stored_quantized
from qtune.records import CHECKSUM, NotARecord, require_sealed, sealed
from qtune.startup.allocator import has_expandable_segments
from qtune.whole import write_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PretrainedConfig

    from qtune.memory.tracing.work import Work
    from qtune.plan import Plan
    from qtune.recipe.schema import Recipe

Traced = TypeVar("Traced")


def predicted(config: PretrainedConfig, recipe: Recipe, plan: Plan, longest: Longest | None = None) -> Prediction:
    """`predict`, summarized; from the cache where it has been traced before.

    Raises:
        ModelError: as `predict`.
    """

    def traced() -> Prediction:
        return summarize(predict(config, recipe, plan, longest), loaded_whole=_loaded_whole(config, plan))

    return cached(config, recipe, plan, longest, traced)


def _loaded_whole(config: PretrainedConfig, plan: Plan) -> bool:
    """Whether all of a checkpoint comes to the card before some of it goes to the host."""
    return is_stored_quantized(config) and plan.layers == "device"


def cached(
    config: PretrainedConfig,
    recipe: Recipe,
    plan: Plan,
    longest: Longest | None,
    traced: Callable[[], Prediction],
    way: str = "",
) -> Prediction:
    """What `traced` says; from the cache where it was asked before for the same recipe.

    way: names what is traced where it is not the recipe's own step but another one that follows from it.
    """
    file = cache_folder() / "memory" / f"{_key(config, recipe, plan, longest, way)}.json"
    prediction = _kept(file, Prediction.from_json)
    if prediction is None:
        prediction = traced()
        _keep(file, asdict(prediction))
    return prediction


def traced_work(config: PretrainedConfig, recipe: Recipe, plan: Plan, longest: Longest) -> Work:
    """What the recipe's step gives the device to do, where its memory is not the question; from the cache if it can be.

    Raises:
        ModelError: as `predict`.
    """
    file = cache_folder() / "work" / f"{_key(config, recipe, plan, longest, '')}.json"
    work = _kept(file, lambda values: from_rows(values["rows"]))
    if work is None:
        work = predict(config, recipe, plan, longest, plays_allocator=False).work
        _keep(file, {"rows": rows_of(work)})
    return work


NAME = "traced_as"
"""The key with the name of a file in the cache, which says what was traced: another one's is no answer."""


def _kept(file: Path, made_of: Callable[[dict[str, Any]], Traced]) -> Traced | None:
    """What was traced before; None where nothing was, and where the file is not what was written, which is said."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        require_sealed(values)
        if values.pop(NAME, file.stem) != file.stem:
            raise NotARecord("it was traced for another step")
        return made_of({name: value for name, value in values.items() if name != CHECKSUM})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        console.say(f"{file} is not what was kept there; it is traced again")
        return None


def _keep(file: Path, values: dict[str, Any]) -> None:
    """Where it cannot be kept, in a cache that is full or another user's, it is traced again the next time."""
    with suppress(OSError):
        write_text(file, json.dumps(sealed({**values, NAME: file.stem})))


def _key(config: PretrainedConfig, recipe: Recipe, plan: Plan, longest: Longest | None, way: str) -> str:
    """Everything that the bytes depend on, and this package's own code."""
    parts = {
        "model": model_key(config, recipe, plan),
        "packing": recipe.data.packing,
        "batch": [plan.micro_batch_size, plan.max_length, plan.accumulation_steps > 1, plan.together],
        "longest": None if longest is None else asdict(longest),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "code": _own_code(),
        "way": way,
        "expandable": has_expandable_segments(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


@functools.cache
def _own_code() -> str:
    """Hash of the sources that a prediction runs through."""
    rooms = (Path(__file__).parents[1] / name for name in ("memory", "adapter", "model", "kernels"))
    files = [file for room in rooms for file in room.rglob("*.py")]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()
