"""Graphics cards by name: what their memory holds and whether they compute in bfloat16."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qtune.errors import InputError, Problem

if TYPE_CHECKING:
    from qtune.device import Device

GIB = 2**30

SIZES = (6, 8, 10, 11, 12, 16, 20, 24, 32, 48, 80)
"""GB classes of cards that the savings table asks about."""


@dataclass(frozen=True)
class Card:
    """A card as its maker sells it. NVIDIA's GB of card memory are GiB."""

    name: str
    gib: int
    capability: tuple[int, int]
    """CUDA compute capability (developer.nvidia.com/cuda-gpus); bfloat16 products came with 8.0."""

    def device(self) -> Device:
        """The card as an empty device: all its memory free but what the driver takes."""
        from qtune.device import Device

        total = self.gib * GIB
        return Device("cuda", self.name, total, total, self.capability >= (8, 0), self.capability)


CARDS = (
    Card("GTX 1080 Ti", 11, (6, 1)),
    Card("RTX 2060", 6, (7, 5)),
    Card("RTX 2080 Ti", 11, (7, 5)),
    Card("T4", 16, (7, 5)),
    Card("V100", 32, (7, 0)),
    Card("RTX 3050", 8, (8, 6)),
    Card("RTX 3060", 12, (8, 6)),
    Card("RTX 3060 8GB", 8, (8, 6)),
    Card("RTX 3070", 8, (8, 6)),
    Card("RTX 3080", 10, (8, 6)),
    Card("RTX 3090", 24, (8, 6)),
    Card("RTX 4060", 8, (8, 9)),
    Card("RTX 4060 Ti 16GB", 16, (8, 9)),
    Card("RTX 4070", 12, (8, 9)),
    Card("RTX 4080", 16, (8, 9)),
    Card("RTX 4090", 24, (8, 9)),
    Card("RTX 5060 Ti 16GB", 16, (12, 0)),
    Card("RTX 5070", 12, (12, 0)),
    Card("RTX 5080", 16, (12, 0)),
    Card("RTX 5090", 32, (12, 0)),
    Card("RTX 4000 Ada", 20, (8, 9)),
    Card("A10", 24, (8, 6)),
    Card("L4", 24, (8, 9)),
    Card("A6000", 48, (8, 6)),
    Card("L40S", 48, (8, 9)),
    Card("A100 40GB", 40, (8, 0)),
    Card("A100 80GB", 80, (8, 0)),
    Card("H100", 80, (9, 0)),
    Card("H200", 141, (9, 0)),
)


def card_named(name: str) -> Card:
    """The card that `name` means: case, "NVIDIA GeForce" and a memory size that agrees do not matter.

    Raises:
        InputError: no such card; names the nearest.
    """
    wanted, gib = _parts(name)
    found = [card for card in CARDS if _parts(card.name)[0] == wanted and gib in (None, card.gib)]
    if found:
        exact = [card for card in found if _parts(card.name)[1] == gib]
        return (exact or found)[0]
    near = difflib.get_close_matches(name, [card.name for card in CARDS], n=3, cutoff=0.4)
    hint = f"; did you mean {' or '.join(near)}?" if near else f"; known are {', '.join(card.name for card in CARDS)}"
    raise InputError(Problem("--gpu", f"{name!r} is not in the table of cards{hint} Or give --vram 12GiB"))


def described(gib: float) -> Device:
    """A card of which only the memory is known: taken to be one of today's, with bfloat16."""
    from qtune.device import Device

    return Device("cuda", f"a card with {gib:g} GiB", int(gib * GIB), int(gib * GIB), True, (8, 9))


def size_in_bytes(text: str) -> int:
    """Bytes of a size as recipes and --vram write it: "8GiB", "8 GB", "512MiB", "8". Sizes are binary.

    Raises:
        InputError: it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(gib|gb|g|mib|mb|m)?\s*", text.lower())
    if not match or float(match[1]) <= 0:
        raise InputError(Problem("--vram", f"{text!r} is not a size; write it as 8GiB or 512MiB"))
    unit = 2**20 if (match[2] or "g").startswith("m") else GIB
    return int(float(match[1]) * unit)


def _parts(name: str) -> tuple[str, int | None]:
    lowered = re.sub(r"nvidia|geforce|tesla|graphics|-", " ", name.lower())
    size = re.search(r"\b(\d+)\s*gi?b\b", lowered)
    bare = re.sub(r"\b\d+\s*gi?b\b", " ", lowered)
    return " ".join(bare.split()), int(size[1]) if size else None
