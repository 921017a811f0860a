"""Tables of TOML -> a Recipe, or everything that is wrong with them at once."""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from qtune.recipe.faults import Fault, faults_of
from qtune.recipe.rules import conflicts
from qtune.recipe.schema import DEFAULT_KINDS, KeyPath, Recipe


def parse_recipe(tables: Mapping[str, Any]) -> Recipe | list[Fault]:
    """The recipe that TOML `tables` describe, or everything that is wrong with them."""
    filled = dict(tables)
    for name, kind in DEFAULT_KINDS.items():
        if isinstance(filled.get(name), dict):
            filled[name] = {"kind": kind, **filled[name]}
    try:
        # Through JSON: strict validation of Python values would refuse TOML arrays for tuples.
        recipe = Recipe.model_validate_json(json.dumps(filled, default=str))
    except ValidationError as error:
        return faults_of(error, filled)
    return list(conflicts(recipe)) or recipe


def changed(recipe: Recipe, changes: dict[KeyPath, Any]) -> Recipe:
    """A recipe with other values, checked like any other."""
    tables = recipe.model_dump(mode="json", exclude_none=True, exclude_unset=True)
    for name in ("quantization", "adapter"):
        tables[name] = getattr(recipe, name).model_dump(mode="json", exclude_none=True)
    for (table, key), value in changes.items():
        tables.setdefault(str(table), {})[str(key)] = value
    result = parse_recipe(tables)
    if isinstance(result, list):
        raise ValueError("; ".join(f"{fault.path}: {fault.message}" for fault in result))
    return result
