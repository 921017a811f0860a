"""What a device does in a second of training, as a value: from its maker's data sheet, or measured on it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qtune.device.cards import Card


@dataclass(frozen=True)
class Rates:
    """What a device does in a second at work that training gives it, and what the processor beside it does."""

    kind: Literal["data sheet", "measured"]
    source: str
    """In words: of which device, from where, when."""
    products: Mapping[str, float]
    """FLOPs per second of large products, by torch's name of the operands' dtype; summed in fp32."""
    attention: float
    """FLOPs per second of the attention kernels, forward and backward together."""
    moved: float
    """Bytes per second of operations that walk through large tensors in order."""
    copied: float
    """Bytes per second of copies: casts between types of different size, layouts, concatenations."""
    thin: float
    """Bytes per second of products with one very small side, an adapter's."""
    dequantized: float
    """Bytes per second of reading quantized weights back."""
    scattered: float
    """Operands per second of operations that work out each operand's place: transposed and broadcast tensors."""
    kernel_seconds: float
    """What a kernel takes however little it does."""
    host_link: float
    """Bytes per second between the host's memory and the device's; infinite where they are one."""
    launch_seconds: float
    """The processor's time for each kernel that it launches, Python, autograd and libraries included."""
    own_launch_seconds: float
    """The same for each kernel of qtune's own, which Triton launches from Python."""
    is_own_processor: bool = False
    """Whether launching and computing share one processor: their times add up then, on a card they overlap."""
    beside: Mapping[str, str] = field(default_factory=dict)
    """Of measured ones: versions and the processor then, by name; nothing in what older versions have kept."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Rates:
        """Rates from what `to_json` gave.

        Raises:
            TypeError: they are of another version.
        """
        return cls(**stored)


MEASURES = "qtune doctor --measure measures again"


def changed_since(rates: Rates, here: Mapping[str, str]) -> str | None:
    """In words, what is another one now than when rates were measured, of `here`: versions and the processor by name.
    None where nothing is, and for a data sheet, which nobody here has measured."""
    if rates.kind == "data sheet":
        return None
    if not rates.beside:
        return "what has changed is not known: an older qtune measured, and kept no versions"
    found = {name: (then, here.get(name, "not here")) for name, then in rates.beside.items()}
    return "; ".join(f"{name} was {then}, is {now}" for name, (then, now) in found.items() if now != then) or None


def source_in_words(rates: Rates, here: Mapping[str, str]) -> str:
    """Where rates are from, and what has changed since then, if anything has."""
    changed = changed_since(rates, here)
    return rates.source if changed is None else f"{rates.source} (since then {changed}; {MEASURES})"


# Shares of a data sheet's figures that training reaches. From two profiled steps of Llama 3.1 8B, 4 x 2048 tokens, on
# an H100 80GB HBM3 (torch 2.11, 2026-11-27): the time of the kernels of each kind over what they do.
PRODUCTS_REACHED = 0.75
MOVED_REACHED = 0.91
THIN_REACHED = 0.66
DEQUANTIZED_REACHED = 0.64
SCATTERED_OPERANDS_PER_FLOP = 1 / 70
"""Working out where one operand lies takes about as long as 70 fp32 operations."""
LINK_REACHED = 0.8

KERNEL_SECONDS = 2.5e-6
"""The shortest kernel and the gap after it."""
LAUNCH_SECONDS = 38e-6
"""The processor beside that H100 needed this for each launch, where the card waited for it (1 x 2048 tokens)."""
OWN_LAUNCHES_ARE_DEARER = 4.1
"""Times as much for qtune's own kernels. Beside an H200, `qtune doctor --measure` took 127 ms for the 2,899 launches of
a tiny step with peft's layers, 44 microseconds each, and 77 ms for the lean one's 628 of the same kind and 275 of its
own, 181 each (2026-11-27)."""


def attention_reached(capability: tuple[int, int]) -> float:
    """Share of the tensor cores' figure that attention kernels reach.

    Hopper and later data center cards: cuDNN's kernels with a mask in the profile above. Ampere, Ada and GeForce
    Blackwell: FlashAttention-2's own measurements on an A100, forward 0.73 and backward 0.63 at the best, less with a
    mask (arXiv:2307.08691, section 4.1). Before Ampere: the memory-efficient kernel, taken to reach half of that.
    """
    if capability in ((9, 0), (10, 0)):
        return 0.32
    return 0.5 if capability >= (8, 0) else 0.25


def link_bytes_per_second(capability: tuple[int, int]) -> float:
    """A PCI Express slot of 16 lanes of the card's generation: 3 before Ampere, 4 with it and Ada, 5 later."""
    gigabytes = 16 if capability < (8, 0) else 32 if capability < (9, 0) else 64
    return gigabytes * 1e9


def data_sheet_rates(card: Card) -> Rates:
    """What a card does by its data sheet, as far as training reaches it."""
    tensor, plain = card.tensor_teraflops * 1e12, card.fp32_teraflops * 1e12
    moved = card.gigabytes_per_second * 1e9
    return Rates(
        kind="data sheet",
        source=f"{card.name}: NVIDIA's figures, and the share of them that training reached on an H100",
        products={
            "bfloat16": PRODUCTS_REACHED * tensor,
            "float16": PRODUCTS_REACHED * tensor,
            "float32": PRODUCTS_REACHED * plain,
            "int8": 2 * PRODUCTS_REACHED * tensor,
        },
        attention=attention_reached(card.capability) * tensor,
        moved=MOVED_REACHED * moved,
        copied=MOVED_REACHED * moved,
        thin=THIN_REACHED * moved,
        dequantized=DEQUANTIZED_REACHED * moved,
        scattered=SCATTERED_OPERANDS_PER_FLOP * plain,
        kernel_seconds=KERNEL_SECONDS,
        host_link=LINK_REACHED * link_bytes_per_second(card.capability),
        launch_seconds=LAUNCH_SECONDS,
        own_launch_seconds=OWN_LAUNCHES_ARE_DEARER * LAUNCH_SECONDS,
    )


BEYOND = 1.5
"""Times a data sheet's own figure from which a measurement is not believed. A cache or a raised clock explains less."""


def not_believed(rates: Rates, card: Card) -> list[str]:
    """In words, each measured rate that is far beyond the card's data sheet: a clock was read before work was done."""
    products = max(rates.products.get("bfloat16", 0.0), rates.products.get("float16", 0.0))
    tensor = max(card.tensor_teraflops, card.fp32_teraflops) * 1e12
    moved = card.gigabytes_per_second * 1e9
    compared = {
        "products": (products, tensor),
        "attention": (rates.attention, tensor),
        "moved": (rates.moved, moved),
        "copied": (rates.copied, moved),
        "thin": (rates.thin, moved),
        "dequantized": (rates.dequantized, moved),
    }
    return [
        f"{name} {found:.3g} a second, data sheet {limit:.3g}"
        for name, (found, limit) in compared.items()
        if found > BEYOND * limit
    ]
