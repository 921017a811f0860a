"""Tables of TOML -> a Recipe, or everything that is wrong with them at once."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from qtune.recipe.faults import Fault, Faulty, faults_of
from qtune.recipe.rules import conflicts, conflicts_of_run
from qtune.recipe.schema import DEFAULT_KINDS, KINDS, KeyPath, Recipe
from qtune.spelling import nearest


def parse_recipe(tables: Mapping[str, Any]) -> Recipe:
    """The recipe that TOML `tables` describe.

    Raises:
        Faulty: with everything that is wrong with them.
    """
    filled = dict(tables)
    for name, kind in DEFAULT_KINDS.items():
        if isinstance(filled.get(name), dict):
            filled[name] = {"kind": kind, **filled[name]}
    try:
        # Through JSON: strict validation of Python values would refuse TOML arrays for tuples.
        recipe = Recipe.model_validate_json(json.dumps(filled, default=str))
    except ValidationError as error:
        faults = faults_of(error, filled)
        faults += _faults_beside_a_kind(filled, faults)
        raise Faulty([*faults, *_conflicts_of_the_rest(filled, faults)]) from error
    if found := list(conflicts(recipe)):
        raise Faulty(found)
    return recipe


def _faults_beside_a_kind(tables: Mapping[str, Any], faults: Sequence[Fault]) -> list[Fault]:
    """What else is wrong with tables whose kind is mistyped, by the kind that is meant: without one no key is known."""
    meant = {
        name: {**table, "kind": kind}
        for name, kinds in KINDS.items()
        if isinstance(table := tables.get(name), dict)
        and any(fault.path == (name, "kind") for fault in faults)
        and (kind := nearest(str(table["kind"]), kinds)) is not None
    }
    if not meant:
        return []
    try:
        Recipe.model_validate_json(json.dumps({**tables, **meant}, default=str))
    except ValidationError as error:
        return [fault for fault in faults_of(error, {**tables, **meant}) if fault.path[:1] and fault.path[0] in meant]
    return []


def _conflicts_of_the_rest(tables: Mapping[str, Any], faults: Sequence[Fault]) -> list[Fault]:
    """Conflicts in the tables without a fault, where those can be told without the others."""
    faulty = {str(fault.path[0]) for fault in faults if fault.path}
    without = {
        name: {key: value for key, value in table.items() if not any(fault.path[:2] == (name, key) for fault in faults)}
        if isinstance(table, dict)
        else table
        for name, table in tables.items()
        if not any(fault.path == (name,) for fault in faults)
    }
    rules = conflicts
    if faulty & DECIDING.keys():  # what they are decides what goes with them
        without |= {name: table for name, table in DECIDING.items() if name in faulty}
        rules = conflicts_of_run
    try:
        recipe = Recipe.model_validate_json(json.dumps(without, default=str))
    except ValidationError:  # a key that is required
        return []
    return [fault for fault in rules(recipe) if fault.path[0] not in faulty]


DECIDING = {"model": {"base": "any"}, "quantization": {"kind": "nf4"}, "adapter": {"kind": "lora"}}
"""Tables that stand for faulty ones while others are looked at, none of which depends on them."""


def changed(recipe: Recipe, changes: dict[KeyPath, Any]) -> Recipe:
    """A recipe with other values, checked like any other.

    Raises:
        Faulty: they do not go together.
    """
    tables = recipe.model_dump(mode="json", exclude_none=True, exclude_unset=True)
    for name in ("quantization", "adapter"):
        tables[name] = getattr(recipe, name).model_dump(mode="json", exclude_none=True)
    for (table, key), value in changes.items():
        tables.setdefault(str(table), {})[str(key)] = value
    return parse_recipe(tables)
