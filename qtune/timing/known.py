"""Which rates are known of a device: measured on it, by its data sheet, or none."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import re
from typing import TYPE_CHECKING

from qtune import __version__, console
from qtune.cache import cache_folder, not_writable
from qtune.device.cards import card_named
from qtune.device.processor import processor_name
from qtune.device.rates import Rates, data_sheet_rates
from qtune.errors import InputError
from qtune.records import CHECKSUM, require_intact, sealed
from qtune.whole import write_text

if TYPE_CHECKING:
    from pathlib import Path

    from qtune.device.cards import Card
    from qtune.device.present import Device


def known_rates(device: Device) -> Rates | None:
    """What `qtune doctor --measure` kept of the device on this computer, else its card's data sheet; None for a card of
    which only the memory is known, and for a processor that was not measured."""
    file = _file(device)
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:  # not measured here
        text = None
    if text is not None and (measured := _measured(file, text)) is not None:
        return measured
    card = card_of(device)
    return None if card is None else data_sheet_rates(card)


@functools.cache
def _measured(file: Path, text: str) -> Rates | None:
    """Rates as `keep_rates` wrote them; None where they are not, which is said once."""
    try:
        values = json.loads(text)
        require_intact(values)
        return Rates.from_json({name: value for name, value in values.items() if name != CHECKSUM})
    except (ValueError, TypeError, AttributeError, RecursionError):
        console.say(f"{file} is not what was measured, and is not used; qtune doctor --measure measures again")
        return None


def keep_rates(device: Device, rates: Rates) -> Path:
    """Keeps measured rates for every later prediction on this computer; returns the file.

    Raises:
        InputError: the cache cannot be written.
    """
    file = _file(device)
    try:
        write_text(file, json.dumps(sealed(rates.to_json()), indent=1))
    except OSError as error:
        raise not_writable(file.parent, error) from error
    return file


DECIDING = ("torch", "bitsandbytes")
"""Whose versions decide how long an operation takes, and how long it takes to launch one."""


def beside_here() -> dict[str, str]:
    """What rates depend on beside their device: versions, and the processor that launches."""
    versions = {name: importlib.metadata.version(name) for name in DECIDING}
    return {"qtune": __version__, **versions, "processor": processor_name()}


def measured_otherwise(device: Device) -> list[str]:
    """Of a processor: the sources of what was measured on this computer with other numbers of threads."""
    if device.kind != "cpu":
        return []
    files = sorted(set(_folder().glob("cpu-*.json")) - {_file(device)})
    found = (_measured(file, file.read_text(encoding="utf-8", errors="replace")) for file in files)
    return [rates.source for rates in found if rates is not None]


def _file(device: Device) -> Path:
    """One for each device: a card goes by the name of the table, so that --gpu finds what was measured on it."""
    card = card_of(device)
    name = device.name if card is None else card.name
    return _folder() / f"{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


def _folder() -> Path:
    return cache_folder() / "rates"


def card_of(device: Device) -> Card | None:
    """The card of the table that a device is; None for a processor, and for a card that is not in it."""
    if device.kind != "cuda":
        return None
    try:
        return card_named(device.name)
    except InputError:
        return None
