"""What a base answers, kept in memory while several runs on it are measured: it is asked the same once."""

import hashlib
import json
from collections.abc import Callable
from typing import TypeVar

from qtune import console
from qtune.tuned.load import LoadedRun

Found = TypeVar("Found")


class BaseOnce:
    """Measurements of bases by everything that decides them."""

    def __init__(self) -> None:
        self._found: dict[str, object] = {}

    def measured(self, untuned: LoadedRun, asked: object, measure: Callable[[], Found]) -> Found:
        """What `measure` finds, or has found of the same base, held and computed the same way, for the same question.

        asked: everything else that decides it, as JSON can write it.
        """
        name = _name(untuned, asked)
        if name not in self._found:
            self._found[name] = measure()
        else:
            console.say(f"base model: {untuned.recipe.model.base} was asked the same before")
        return self._found[name]  # type: ignore[return-value]  # of the same question


def _name(untuned: LoadedRun, asked: object) -> str:
    recipe, plan = untuned.recipe, untuned.plan
    held = [recipe.model.model_dump(mode="json"), recipe.quantization.model_dump(mode="json")]
    computed = [
        plan.device.torch_name,
        plan.compute_dtype,
        plan.attention,
        plan.embeddings,
        plan.layers,
        plan.loss_tile_bytes,
    ]
    return hashlib.blake2b(json.dumps([held, computed, asked]).encode(), digest_size=16).hexdigest()
