"""Graphics cards by name: what their memory holds and whether they compute in bfloat16."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qtune.errors import InputError, Problem
from qtune.sizes import GIB, size_in_bytes
from qtune.spelling import did_you_mean

if TYPE_CHECKING:
    from qtune.device.present import Device

SIZES = (6, 8, 10, 11, 12, 16, 20, 24, 32, 48, 80)
"""GB classes of cards that the savings table asks about."""


@dataclass(frozen=True)
class Card:
    """A card as its maker sells it. NVIDIA's GB of card memory are GiB."""

    name: str
    gib: int
    capability: tuple[int, int]
    """CUDA compute capability (developer.nvidia.com/cuda-gpus); bfloat16 products came with 8.0."""
    gigabytes_per_second: int
    """Bandwidth of the card's memory, in 10^9 bytes."""
    tensor_teraflops: float
    """Products of 16-bit matrices summed in fp32, without sparsity; where there are no tensor cores, the best that the
    card does with 16-bit operands."""
    fp32_teraflops: float
    """Plain fp32 arithmetic."""

    def device(self) -> Device:
        """The card as an empty device: all its memory free but what the driver takes."""
        from qtune.device.present import Device

        total = self.gib * GIB
        return Device("cuda", self.name, total, total, self.capability >= (8, 0), self.capability)


CARDS = (
    Card("GTX 1060", 6, (6, 1), 192, 4.4, 4.4),
    Card("GTX 1070", 8, (6, 1), 256, 6.5, 6.5),
    Card("GTX 1080", 8, (6, 1), 320, 8.9, 8.9),
    Card("GTX 1080 Ti", 11, (6, 1), 484, 11.3, 11.3),
    Card("GTX 1660", 6, (7, 5), 192, 10.0, 5.0),
    Card("GTX 1660 Super", 6, (7, 5), 336, 10.0, 5.0),
    Card("GTX 1660 Ti", 6, (7, 5), 288, 10.9, 5.4),
    Card("RTX 2060", 6, (7, 5), 336, 25.8, 6.5),
    Card("RTX 2060 12GB", 12, (7, 5), 336, 28.7, 7.2),
    Card("RTX 2060 Super", 8, (7, 5), 448, 28.7, 7.2),
    Card("RTX 2070", 8, (7, 5), 448, 29.9, 7.5),
    Card("RTX 2070 Super", 8, (7, 5), 448, 36.3, 9.1),
    Card("RTX 2080", 8, (7, 5), 448, 40.3, 10.1),
    Card("RTX 2080 Super", 8, (7, 5), 496, 44.6, 11.2),
    Card("RTX 2080 Ti", 11, (7, 5), 616, 53.8, 13.4),
    Card("TITAN RTX", 24, (7, 5), 672, 130.5, 16.3),
    Card("RTX 3050", 8, (8, 6), 224, 18.2, 9.1),
    Card("RTX 3050 6GB", 6, (8, 6), 168, 13.5, 6.8),
    Card("RTX 3060", 12, (8, 6), 360, 25.5, 12.7),
    Card("RTX 3060 8GB", 8, (8, 6), 240, 25.5, 12.7),
    Card("RTX 3060 Ti", 8, (8, 6), 448, 32.4, 16.2),
    Card("RTX 3070", 8, (8, 6), 448, 40.6, 20.3),
    Card("RTX 3070 Ti", 8, (8, 6), 608, 43.5, 21.7),
    Card("RTX 3080", 10, (8, 6), 760, 59.5, 29.8),
    Card("RTX 3080 12GB", 12, (8, 6), 912, 61.3, 30.6),
    Card("RTX 3080 Ti", 12, (8, 6), 912, 68.2, 34.1),
    Card("RTX 3090", 24, (8, 6), 936, 71.2, 35.6),
    Card("RTX 3090 Ti", 24, (8, 6), 1008, 80.0, 40.0),
    Card("RTX 4060", 8, (8, 9), 272, 30.2, 15.1),
    Card("RTX 4060 Ti", 8, (8, 9), 288, 44.1, 22.1),
    Card("RTX 4060 Ti 16GB", 16, (8, 9), 288, 44.1, 22.1),
    Card("RTX 4070", 12, (8, 9), 504, 58.3, 29.1),
    Card("RTX 4070 Super", 12, (8, 9), 504, 71.0, 35.5),
    Card("RTX 4070 Ti", 12, (8, 9), 504, 80.2, 40.1),
    Card("RTX 4070 Ti Super", 16, (8, 9), 672, 88.2, 44.1),
    Card("RTX 4080", 16, (8, 9), 717, 97.5, 48.7),
    Card("RTX 4080 Super", 16, (8, 9), 736, 104.4, 52.2),
    Card("RTX 4090", 24, (8, 9), 1008, 165.2, 82.6),
    Card("RTX 5050", 8, (12, 0), 320, 26.3, 13.2),
    Card("RTX 5060", 8, (12, 0), 448, 38.4, 19.2),
    Card("RTX 5060 Ti", 8, (12, 0), 448, 47.4, 23.7),
    Card("RTX 5060 Ti 16GB", 16, (12, 0), 448, 47.4, 23.7),
    Card("RTX 5070", 12, (12, 0), 672, 61.7, 30.9),
    Card("RTX 5070 Ti", 16, (12, 0), 896, 87.9, 43.9),
    Card("RTX 5080", 16, (12, 0), 960, 112.6, 56.3),
    Card("RTX 5090", 32, (12, 0), 1792, 209.5, 104.8),
    Card("RTX 3050 Laptop", 4, (8, 6), 192, 14.3, 7.1),
    Card("RTX 3060 Laptop", 6, (8, 6), 336, 26.2, 13.1),
    Card("RTX 3070 Laptop", 8, (8, 6), 448, 33.2, 16.6),
    Card("RTX 3080 Laptop", 8, (8, 6), 448, 42.0, 21.0),
    Card("RTX 3080 Laptop 16GB", 16, (8, 6), 448, 42.0, 21.0),
    Card("RTX 4050 Laptop", 6, (8, 9), 192, 24.3, 12.1),
    Card("RTX 4060 Laptop", 8, (8, 9), 256, 29.1, 14.6),
    Card("RTX 4070 Laptop", 8, (8, 9), 256, 40.1, 20.0),
    Card("RTX 4080 Laptop", 12, (8, 9), 432, 67.7, 33.9),
    Card("RTX 4090 Laptop", 16, (8, 9), 576, 79.4, 39.7),
    Card("RTX 5060 Laptop", 8, (12, 0), 384, 33.2, 16.6),
    Card("RTX 5070 Laptop", 8, (12, 0), 384, 43.3, 21.6),
    Card("RTX 5070 Ti Laptop", 12, (12, 0), 672, 52.3, 26.1),
    Card("RTX 5080 Laptop", 16, (12, 0), 896, 70.3, 35.1),
    Card("RTX 5090 Laptop", 24, (12, 0), 896, 90.7, 45.3),
    Card("RTX A2000", 6, (8, 6), 288, 31.9, 8.0),
    Card("RTX A2000 12GB", 12, (8, 6), 288, 31.9, 8.0),
    Card("RTX A4000", 16, (8, 6), 448, 76.7, 19.2),
    Card("RTX A4500", 20, (8, 6), 640, 94.6, 23.7),
    Card("RTX A5000", 24, (8, 6), 768, 111.1, 27.8),
    Card("RTX A6000", 48, (8, 6), 768, 154.8, 38.7),
    Card("RTX 2000 Ada", 16, (8, 9), 224, 48.0, 12.0),
    Card("RTX 4000 Ada", 20, (8, 9), 360, 106.9, 26.7),
    Card("RTX 5000 Ada", 32, (8, 9), 576, 261.1, 65.3),
    Card("RTX 6000 Ada", 48, (8, 9), 960, 364.2, 91.1),
    Card("RTX PRO 6000", 96, (12, 0), 1792, 500.0, 125.0),
    Card("P100", 16, (6, 0), 732, 18.7, 9.3),
    Card("V100", 16, (7, 0), 900, 112.0, 14.0),
    Card("V100 32GB", 32, (7, 0), 900, 112.0, 14.0),
    Card("T4", 16, (7, 5), 320, 65.0, 8.1),
    Card("A10", 24, (8, 6), 600, 125.0, 31.2),
    Card("A30", 24, (8, 0), 933, 165.0, 10.3),
    Card("A40", 48, (8, 6), 696, 149.7, 37.4),
    Card("L4", 24, (8, 9), 300, 121.0, 30.3),
    Card("L40", 48, (8, 9), 864, 181.0, 90.5),
    Card("L40S", 48, (8, 9), 864, 362.0, 91.6),
    Card("A100", 40, (8, 0), 1555, 312.0, 19.5),
    Card("A100 80GB", 80, (8, 0), 2039, 312.0, 19.5),
    Card("H100", 80, (9, 0), 3350, 989.0, 67.0),
    Card("H100 NVL", 94, (9, 0), 3938, 835.0, 60.0),
    Card("H200", 141, (9, 0), 4800, 989.0, 67.0),
    Card("B200", 180, (10, 0), 8000, 2250.0, 75.0),
)
"""Where a maker sells one name with several sizes, the name alone is the smaller one that is common; with several
forms, the faster one (SXM) from the A100 80GB on.

Rates: NVIDIA's data sheets of the data center and workstation cards, and its architecture whitepapers, "GeForce RTX"
appendices, for the others. What a sheet gives with sparsity is halved (again for FP8, twice again for FP4). On GeForce
cards summing in fp32 runs at half the rate of summing in fp16. Laptops: cores times the highest boost clock, which
their power limit may forbid.
"""


def card_named(name: str) -> Card:
    """The card that `name` means: case, "NVIDIA GeForce" and a memory size that agrees do not matter.

    Raises:
        InputError: no such card; names the nearest.
    """
    wanted, gib = _parts(name)
    named = [card for card in CARDS if _parts(card.name)[0] == wanted]
    fitting = [card for card in named if gib in (None, card.gib)]
    if fitting:
        exact = [card for card in fitting if _parts(card.name)[1] == gib]
        return (exact or fitting)[0]
    if named:
        sizes = " or ".join(str(card.gib) for card in named)
        raise InputError(
            Problem("--gpu", f"{name!r}: a {named[0].name} has {sizes} GB. Or give its memory: --vram 12GiB")
        )
    known = [card.name for card in CARDS]
    hint = did_you_mean(name, known, f"known are {', '.join(known)}.", most=3)
    raise InputError(
        Problem("--gpu", f"{name!r} is not in the table of cards; {hint} Or give its memory: --vram 12GiB")
    )


def described(gib: float) -> Device:
    """A card of which only the memory is known: taken to be one of today's, with bfloat16."""
    from qtune.device.present import Device

    size = f"{gib:.6g} GiB" if gib >= 1 else f"{1024 * gib:.6g} MiB"
    return Device("cuda", f"a card with {size}", int(gib * GIB), int(gib * GIB), True, (8, 9))


# What torch and shops put around a card's name.
_AROUND = re.compile(r"nvidia|geforce|tesla|graphics|\b(?:gpu|pcie|sxm\d?|hbm\d?e?|generation)\b|-")


def _parts(name: str) -> tuple[str, int | None]:
    """A name as it is compared, without its memory, and that in GB: "RTX3060 12 GB" is ("rtx 3060", 12)."""
    lowered = " ".join(_AROUND.sub(" ", name.lower()).split())
    lowered = re.sub(r"^([rg]tx)(?=\d)", r"\1 ", lowered)
    lowered = re.sub(r"^(?=[2-5]0\d0\b)", "rtx ", lowered)
    lowered = re.sub(r"^(?=1[06]\d0\b)", "gtx ", lowered)
    lowered = re.sub(r"^(?=a\d000\b)", "rtx ", lowered)
    size = re.search(r"\b(\d+)\s*gi?b\b", lowered)
    bare = re.sub(r"\b\d+\s*gi?b\b", " ", lowered)
    return " ".join(bare.split()), int(size[1]) if size else None


def device_for(gpu: str | None, vram: str | None) -> Device:
    """The card that is asked about: by name, by size, or the one that is here."""
    from qtune.device.present import present_device

    if gpu is not None:
        return card_named(gpu).device()
    if vram is not None:
        return described(size_in_bytes(vram, "--vram") / GIB)
    return present_device()


def require_known(gpu: str | None, vram: str | None) -> None:
    """--gpu and --vram name a card, told before anything heavy is imported.

    Raises:
        InputError: no such card, or no size.
    """
    if gpu is not None:
        card_named(gpu)
    if vram is not None:
        size_in_bytes(vram, "--vram")


def fitting_cards(needed_bytes: int, sizes: tuple[int, ...]) -> str:
    """The cards of these GB classes that hold what is needed, margin included: "8 GB and more"."""
    fitting = [gb for gb in sizes if needed_bytes <= gb * GIB]
    return f"{fitting[0]} GB and more" if fitting else f"none up to {sizes[-1]} GB"
