"""Which rates are known of a device: measured on it, by its data sheet, or none."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from qtune.cache import cache_folder, not_writable
from qtune.device.cards import card_named
from qtune.device.rates import Rates, data_sheet_rates
from qtune.errors import InputError
from qtune.whole import write_text

if TYPE_CHECKING:
    from pathlib import Path

    from qtune.device.cards import Card
    from qtune.device.present import Device


def known_rates(device: Device) -> Rates | None:
    """What `qtune doctor --measure` kept of the device on this computer, else its card's data sheet; None for a card of
    which only the memory is known, and for a processor that was not measured."""
    try:
        return Rates.from_json(json.loads(_file(device).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        pass  # not measured, or by another version
    card = card_of(device)
    return None if card is None else data_sheet_rates(card)


def keep_rates(device: Device, rates: Rates) -> Path:
    """Keeps measured rates for every later prediction on this computer; returns the file.

    Raises:
        InputError: the cache cannot be written.
    """
    file = _file(device)
    try:
        write_text(file, json.dumps(rates.to_json(), indent=1))
    except OSError as error:
        raise not_writable(file.parent, error) from error
    return file


def _file(device: Device) -> Path:
    """One for each device: a card goes by the name of the table, so that --gpu finds what was measured on it."""
    card = card_of(device)
    name = device.name if card is None else card.name
    return cache_folder() / "rates" / f"{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


def card_of(device: Device) -> Card | None:
    """The card of the table that a device is; None for a processor, and for a card that is not in it."""
    if device.kind != "cuda":
        return None
    try:
        return card_named(device.name)
    except InputError:
        return None
