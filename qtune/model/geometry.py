"""The sizes of well-known models, which come with qtune: memory and time are known for them without a network."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from qtune import console
from qtune.model.hub import is_hub_id, is_kept
from qtune.model.load import load_config
from qtune.recipe.schema import Model

FOLDER = Path(__file__).parent / "geometries"


@dataclass(frozen=True)
class Geometry:
    """One published configuration, of all models that share it."""

    models: tuple[str, ...]
    source: str
    parameters: int
    """As the weights' own header counts them."""
    values: dict[str, Any]
    """Keys of config.json: what memory and time depend on."""

    def config(self) -> PretrainedConfig:
        """The configuration that transformers builds of it."""
        return AutoConfig.for_model(**self.values)


def geometries() -> Iterator[Geometry]:
    """All that are shipped."""
    for file in sorted(FOLDER.glob("*.json")):
        said = json.loads(file.read_text(encoding="utf-8"))
        yield Geometry(tuple(said["models"]), said["source"], said["parameters"], said["config"])


def shipped_geometry(model: Model) -> Geometry | None:
    """The geometry of a hub id whose own config.json is not on this computer; None where it is, or none is shipped."""
    if model.revision is not None or not is_hub_id(model.base) or is_kept(model, "config.json"):
        return None
    return next((one for one in geometries() if model.base.lower() in (name.lower() for name in one.models)), None)


def load_geometry(model: Model) -> PretrainedConfig:
    """What memory and time depend on: the model's own configuration, or the shipped one, which is said.

    A run takes `load_config`: it depends on more than sizes.

    Raises:
        ModelError: it is neither here nor shipped, and cannot be had.
    """
    shipped = shipped_geometry(model)
    if shipped is None:
        return load_config(model)
    _say(model.base)
    return shipped.config()


@cache
def _say(base: str) -> None:
    """Once in a process: a verb asks several times."""
    console.say(f"{base}: its sizes are those that come with qtune; its own config.json is not on this computer")
