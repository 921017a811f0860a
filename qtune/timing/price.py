"""Work against rates: the time of a step, and what of it each kind of operation takes. Pure arithmetic.

A card computes while the processor launches what comes next, so a step takes the longer of the two; on a CPU both are
one processor's, one after the other. Each kernel takes the longest of what it moves, computes and looks up.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qtune.kernels.comparison import COMPARED

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable

    from qtune.device.rates import Rates
    from qtune.memory.tracing.work import Kernel, Place, Work


@dataclass(frozen=True)
class Cost:
    """What some of a step's work amounts to."""

    launches: int = 0
    bytes: int = 0
    flops: int = 0
    seconds: float = 0.0
    """Of the device."""
    beside: float = 0.0
    """Seconds of the bus while the device computes, once for all micro-batches of a step: layers that are sent for."""
    own_launches: int = 0
    """Of the launches, those of qtune's own kernels."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.launches + other.launches,
            self.bytes + other.bytes,
            self.flops + other.flops,
            self.seconds + other.seconds,
            self.beside + other.beside,
            self.own_launches + other.own_launches,
        )

    def processor_seconds(self, rates: Rates) -> float:
        """What launching it takes."""
        others = self.launches - self.own_launches
        return others * rates.launch_seconds + self.own_launches * rates.own_launch_seconds


@dataclass(frozen=True)
class Duration:
    """How long something takes, and what it waits for."""

    device_seconds: float
    processor_seconds: float
    launches: int
    is_own_processor: bool

    @property
    def seconds(self) -> float:
        """The longer of both; their sum where one processor does both."""
        if self.is_own_processor:
            return self.device_seconds + self.processor_seconds
        return max(self.device_seconds, self.processor_seconds)

    @property
    def waits_for_processor(self) -> bool:
        """Whether the card waits for launches: a faster card would not help."""
        return not self.is_own_processor and self.processor_seconds > self.device_seconds


def kernel_seconds(kernel: Kernel, rates: Rates) -> float:
    """Seconds of a device for one kernel, or for the few that one operation launches."""
    dtype = str(kernel.dtype).removeprefix("torch.")
    arithmetic = rates.attention if kernel.kind == "attention" else rates.products.get(dtype, rates.products["float32"])
    moving = {
        "thin products": rates.thin,
        "dequantization": rates.dequantized,
        "host transfers": rates.host_link,
        "layer transfers": min(rates.host_link, rates.moved),
        "copies": rates.copied,
    }.get(kernel.kind, rates.moved)
    longest = max(kernel.bytes / moving, kernel.flops / arithmetic, kernel.scattered / rates.scattered)
    return longest + kernel.launches * rates.kernel_seconds


def training_part(work: Work) -> Work:
    """Without the batch of an evaluation, which a trace holds as well."""
    return Counter({key: count for key, count in work.items() if key[0].phase != "eval"})


def cost_by(work: Work, rates: Rates, group: Callable[[Place, Kernel], Hashable]) -> dict[Hashable, Cost]:
    """The costs of work, added up by what `group` says of each part."""
    costs: dict[Hashable, Cost] = defaultdict(Cost)
    for (place, kernel), count in work.items():
        taken = count * kernel_seconds(kernel, rates)
        is_beside = kernel.kind == "layer transfers" and not rates.is_own_processor
        costs[group(place, kernel)] += Cost(
            count * kernel.launches,
            count * kernel.bytes,
            count * kernel.flops,
            *((0.0, taken) if is_beside else (taken, 0.0)),
            count * kernel.launches if kernel.op in COMPARED else 0,
        )
    return dict(costs)


def duration(costs: Iterable[Cost], rates: Rates) -> Duration:
    """How long work of these costs takes, all in all; costs: of each micro-batch, and of the rest of a step."""
    costs = list(costs)
    total, beside = sum(costs, Cost()), max((cost.beside for cost in costs), default=0.0)
    return Duration(max(total.seconds, beside), total.processor_seconds(rates), total.launches, rates.is_own_processor)
