"""How fast a device multiplies matrices in each dtype, measured in the shapes of a training step.

A capability flag does not tell: processors without bfloat16 instructions emulate them at a tenth of the speed forward
and a fortieth backward, and some with them gain nothing.
"""

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from qtune.sizes import flops_text

Shape = tuple[int, int, int]
"""Of a product: tokens, width, intermediate width."""

CPU_SHAPE: Shape = (128, 576, 1536)
"""The built-in model's widest layer on half a row of the quickstart."""
CARD_SHAPES: tuple[Shape, ...] = ((4096, 4096, 14336), (2048, 2048, 7168), (1024, 1024, 3584))
"""A 7B model's, and smaller ones for a card with little free, which measure more of how fast kernels are launched."""

LEAST_REPEATS, MOST_REPEATS, ENOUGH_SECONDS = 3, 40, 0.25
"""Counted products of each dtype: as many as the time allows; the shortest is taken, so that other work on the computer
does not decide."""

WORTHWHILE = 1.25
"""bfloat16 rounds to 8 bits, so it must gain something: the least ratio of the times for which it is taken."""


@dataclass(frozen=True)
class ProductTimes:
    """Seconds of one product [tokens, width] x [width, intermediate], and of the gradient of its input."""

    forward: float
    backward: float
    shape: Shape = CPU_SHAPE

    @property
    def total(self) -> float:
        """Both, as in a training step of a frozen layer."""
        return self.forward + self.backward

    @property
    def gflops(self) -> tuple[float, float]:
        """10^9 operations per second, forward and backward; each takes 2 per multiplication and addition."""
        operations = 2 * math.prod(self.shape)
        return operations / self.forward / 1e9, operations / self.backward / 1e9

    def text(self, *, is_card: bool) -> str:
        """Both in words."""
        forward, backward = (flops_text(1e9 * one, is_card=is_card) for one in self.gflops)
        return f"{forward} forward, {backward} backward"


def product_times(device: torch.device, dtypes: Sequence[str]) -> dict[str, ProductTimes]:
    """By dtype, the shortest of many products each way.

    On a processor the dtypes take turns, for other work to meet them alike. On a card each is made and freed before the
    next one: there memory is short, and other work seldom.
    """
    if device.type == "cpu":
        return _in_turns(device, dtypes, CPU_SHAPE)
    shape = _shape_that_fits(torch.cuda.mem_get_info(device)[0])
    found: dict[str, ProductTimes] = {}
    for name in dtypes:
        found |= _in_turns(device, [name], shape)
        torch.cuda.empty_cache()
    return found


def product_bytes(shape: Shape) -> int:
    """What the products of a shape hold at once at most, in float32: inputs, weight, and a result of each kind."""
    tokens, width, intermediate = shape
    return 4 * (2 * tokens * width + width * intermediate + 2 * tokens * intermediate)


def _shape_that_fits(free_bytes: int) -> Shape:
    """The largest shape that takes at most half of what is free; the smallest where none does."""
    return next((shape for shape in CARD_SHAPES if 2 * product_bytes(shape) <= free_bytes), CARD_SHAPES[-1])


def _in_turns(device: torch.device, dtypes: Sequence[str], shape: Shape) -> dict[str, ProductTimes]:
    works = {name: _works(device, getattr(torch, name), shape) for name in dtypes}
    taken: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in dtypes}
    for repeat in range(MOST_REPEATS):
        for name, (forward, backward) in works.items():
            if repeat < LEAST_REPEATS or sum(map(sum, taken[name])) < ENOUGH_SECONDS:
                taken[name][0].append(_seconds(device, forward))
                taken[name][1].append(_seconds(device, backward))
    return {name: ProductTimes(min(forward), min(backward), shape) for name, (forward, backward) in taken.items()}


def _works(device: torch.device, dtype: torch.dtype, shape: Shape) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """A product, and that of its gradient; each was done once, for the first ones may compile or allocate."""
    tokens, width, intermediate = shape
    inputs = torch.randn(tokens, width, device=device, dtype=dtype)
    weight = torch.randn(intermediate, width, device=device, dtype=dtype)
    slope = linear(inputs, weight)
    torch.mm(slope, weight)
    return lambda: linear(inputs, weight), lambda: torch.mm(slope, weight)


def cpu_product_times() -> dict[str, ProductTimes]:
    """Of float32 and bfloat16 on this processor, with the threads that torch uses; measured once in a process."""
    return _cpu_product_times(torch.get_num_threads())


@functools.cache
def _cpu_product_times(threads: int) -> dict[str, ProductTimes]:
    return product_times(torch.device("cpu"), ("float32", "bfloat16"))


def bf16_pays_on_cpu() -> bool:
    """Whether bfloat16 products are so much faster than float32's here that a run should compute in it."""
    times = cpu_product_times()
    return times["float32"].total > WORTHWHILE * times["bfloat16"].total


def _seconds(device: torch.device, work: Callable[[], Tensor]) -> float:
    _wait_for(device)
    start = time.perf_counter()
    work()
    _wait_for(device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
