"""Records in the files of a run: frozen dataclasses -> plain JSON values, and back to equal ones.

JSON has no word for a float that is no number. "NaN", "Infinity" and "-Infinity" stand for it, as texts: what Python's
own writer would put there is not JSON, and readers in other languages stop at it. Older files have null instead.

A digit that a disk or a hand has changed still makes a record. So each carries a checksum of its own values, in the key
`crc32`; without it, as in older files, nothing is compared.
"""

import dataclasses
import functools
import json
import math
import types
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from qtune.errors import Problem, RunError, first_line
from qtune.whole import write_text

Record = TypeVar("Record")

_NAMES = {math.inf: "Infinity", -math.inf: "-Infinity"}
_VALUES = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class NotARecord(ValueError):  # noqa: N818  said of values, as `Faulty` is of tables
    """JSON values that are no record of this kind; the message names the key."""


CHECKSUM = "crc32"


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values with their checksum, which comes last."""
    own = {name: value for name, value in values.items() if name != CHECKSUM}
    # As they will be read: numbers as keys become texts, which stand in another order.
    return {**own, CHECKSUM: _checksum(json.loads(json.dumps(own)))}


def require_intact(values: Any) -> None:
    """Compares values with the checksum that was written with them.

    Raises:
        NotARecord: they are others.
    """
    if isinstance(values, Mapping) and CHECKSUM in values:
        own = {name: value for name, value in values.items() if name != CHECKSUM}
        if values[CHECKSUM] != _checksum(own):
            raise NotARecord(
                f"it is not what was written, for its checksum is another; if it is right as it is, remove {CHECKSUM}"
            )


def require_sealed(values: Any) -> None:
    """`require_intact` of values that have had a checksum ever since they are written.

    Raises:
        NotARecord: they are others, or have none.
    """
    if not isinstance(values, Mapping) or CHECKSUM not in values:
        raise NotARecord(f"it has no {CHECKSUM}")
    require_intact(values)


def _checksum(values: Mapping[str, Any]) -> str:
    """Of the values, whatever their order, spaces or encoding in the file."""
    return f"{zlib.crc32(json.dumps(values, sort_keys=True).encode()):08x}"


RUN_ID = "run_id"
"""The key of a record with the identity of the run that it is of (`run.identity`)."""


@dataclasses.dataclass(frozen=True)
class _OfRun:
    """Any record of a run, as far as whose it is."""

    run_id: str | None = None


def write_record(file: Path, record: Any, run_id: str | None = None) -> None:
    """Writes a record as a JSON file, whole or not at all; what is None by default and in fact is left out."""
    absent = {field.name for field in dataclasses.fields(record) if field.default is None}
    values = {name: value for name, value in plain(record).items() if value is not None or name not in absent}
    if run_id is not None:
        values[RUN_ID] = run_id
    write_text(file, json.dumps(sealed(values), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_record(file: Path, kind: type[Record]) -> Record | None:
    """The record in a JSON file; None where there is no such file.

    Raises:
        RunError: the file cannot be read, or holds no such record.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8-sig"))
        require_intact(values)
        return record_of(kind, values)
    except FileNotFoundError:
        return None
    except NotARecord as error:
        raise RunError(Problem(str(file), f"cannot be read: {error}")) from error
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(Problem(str(file), f"cannot be read: {first_line(error)}")) from error


def run_id_in(file: Path) -> str | None:
    """Of which run a record says that it is; None where it does not say.

    Raises:
        RunError: the file cannot be read, or holds no record.
    """
    found = read_record(file, _OfRun)
    return None if found is None else found.run_id


def plain(value: Any) -> Any:
    """A record, or what stands in one, as values that every JSON reader understands."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return _NAMES.get(value, "NaN")
    return value


@functools.cache
def _types_of(kind: type) -> dict[str, Any]:
    """The type of each field; a table of metrics asks for them at every line."""
    return get_type_hints(kind)


def record_of(kind: type[Record], values: Any, place: str = "") -> Record:
    """The record that `plain` made `values` of. Keys that it has not are left out, those of newer versions for example.

    Raises:
        NotARecord: a key without a default is missing, or a value has another type.
    """
    if not isinstance(values, Mapping):
        raise NotARecord(f"{place or kind.__name__}: is {_shown(values)}, not an object")
    hints = _types_of(kind)  # type: ignore[arg-type]
    values_of = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        name = f"{place}.{field.name}" if place else field.name
        if field.name in values:
            values_of[field.name] = _value_of(hints[field.name], values[field.name], name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise NotARecord(f"{name}: is missing")
    return kind(**values_of)


def _value_of(hint: Any, value: Any, place: str) -> Any:
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _first_that_fits(inner, value, place)
    if dataclasses.is_dataclass(hint):
        return record_of(hint, value, place)  # type: ignore[arg-type]
    if origin is tuple and isinstance(value, list):
        return tuple(_value_of(inner[0], one, f"{place}[{number}]") for number, one in enumerate(value))
    if origin is dict and isinstance(value, Mapping):
        return {str(key): _value_of(inner[1], one, f"{place}.{key}") for key, one in value.items()}
    if origin is Literal and value in inner:
        return value
    if hint is float:
        return _float_of(value, place)
    if hint is type(None) and value is None:
        return None
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise NotARecord(f"{place}: is {_shown(value)}")


def _first_that_fits(hints: tuple[Any, ...], value: Any, place: str) -> Any:
    if value is None and type(None) in hints:
        return None
    for hint in hints:
        try:
            return _value_of(hint, value, place)
        except NotARecord:
            continue
    raise NotARecord(f"{place}: is {_shown(value)}")


def _float_of(value: Any, place: str) -> float:
    if value is None:  # of an older version, which wrote null for what is no number
        return math.nan
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str) and value in _VALUES:
        return _VALUES[value]
    raise NotARecord(f"{place}: is {_shown(value)}, not a number")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
