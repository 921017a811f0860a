"""Float32 products of this processor: PyTorch's own beside oneDNN's, of the shapes that a training step has.

    python tools/bench_products.py [--threads 1] [--tokens 512] [--width 576] [--intermediate 1536]

A line for each shape [tokens, in] x [in, out]: GFLOP/s of both, with the weight as the forward pass reads it (by rows
of its output) and as the backward pass does; the best of several turns each, in alternation. The last line says how
many times as long PyTorch's took over all of them, and which of the two qtune takes here (qtune/kernels/on_cpu.py).
"""

import argparse
import time
from collections.abc import Callable

import torch

from qtune.device.processor import processor_name
from qtune.kernels import on_cpu

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

TURNS = 7
FLOP_IN_A_TURN = 2e9
"""At least: a short product is timed over many."""


def main(arguments: list[str] | None = None) -> None:
    """Times and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--intermediate", type=int, default=1536)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    if not torch.backends.mkldnn.is_available():
        raise SystemExit("this PyTorch has no oneDNN")
    print(f"{processor_name()}, {given.threads} threads, float32")
    whole = {"PyTorch": 0.0, "oneDNN": 0.0}
    for shape in shapes(given.tokens, given.width, given.intermediate):
        for pass_name, seconds in both_passes(*shape):
            for name, took in seconds.items():
                whole[name] += took
            flop = 2 * shape[0] * shape[1] * shape[2]
            rates = ", ".join(f"{name} {flop / took / 1e9:.0f} GFLOP/s" for name, took in seconds.items())
            print(f"{' x '.join(map(str, shape))}, {pass_name}: {rates}")
    taken = "oneDNN's" if on_cpu.is_faster() else "PyTorch's"
    print(f"PyTorch / oneDNN: {whole['PyTorch'] / whole['oneDNN']:.2f} of the time; qtune takes {taken}")


def shapes(tokens: int, width: int, intermediate: int) -> list[tuple[int, int, int]]:
    """(tokens, in, out) of a layer's linear layers and of a block of the head's rows."""
    return [
        (tokens, width, width),
        (tokens, width, intermediate),
        (tokens, intermediate, width),
        (tokens, width, 8192),
    ]


def both_passes(tokens: int, inner: int, outer: int) -> list[tuple[str, dict[str, float]]]:
    """Seconds of a product by its name, of the forward pass and of the gradient of its input."""
    x, weight, grad = torch.randn(tokens, inner), torch.randn(outer, inner), torch.randn(tokens, outer)
    return [("forward", in_turns(x, weight.t())), ("backward", in_turns(grad, weight))]


def in_turns(left: torch.Tensor, right: torch.Tensor) -> dict[str, float]:
    """Seconds of left @ right by each way, the best of its turns."""
    ways: dict[str, Product] = {"PyTorch": torch.mm, "oneDNN": on_cpu.by_onednn}
    repeats = max(1, round(FLOP_IN_A_TURN / (2 * left.numel() * right.shape[1])))
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(TURNS):
        for name, product in ways.items():
            product(left, right)
            start = time.perf_counter()
            for _ in range(repeats):
                product(left, right)
            best[name] = min(best[name], (time.perf_counter() - start) / repeats)
    return best


if __name__ == "__main__":
    main()
