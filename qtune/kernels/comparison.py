"""Each Triton kernel beside PyTorch's operations, on small random inputs, on the card that is about to use it.

A kernel is compiled for the card and by the Triton that are there, and no test elsewhere can speak for those.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import bitsandbytes
import torch
from torch import Tensor

from qtune.kernels import plain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Largest ||difference|| / ||value|| that is rounding, by type."""

Pair = tuple[Tensor, Tensor]
"""The kernel's result, PyTorch's."""


def difference(name: str, kernel: Callable[..., Any], dtype: torch.dtype, device: str = "cuda") -> float:
    """The largest relative difference of any result of a kernel in one type; infinite where one is no number."""
    with torch.random.fork_rng(devices=[device] if device == "cuda" else []):
        torch.manual_seed(0)
        pairs = list(COMPARED[name](kernel, dtype, device))
    return max(relative(ours, theirs) for ours, theirs in pairs)


def relative(ours: Tensor, theirs: Tensor) -> float:
    """||ours - theirs|| / ||theirs||; infinite where ours is not finite."""
    found = float((ours.float() - theirs.float()).norm() / theirs.float().norm().clamp(min=1e-30))
    return found if found == found else float("inf")


def _norms(kernel: Any, dtype: torch.dtype, device: str) -> Iterator[Pair]:
    for width in (128, 4096, 4100):  # a head's, a model's, one that is no power of two
        x, weight = (torch.randn(*shape, width, dtype=dtype, device=device) for shape in ((3, 33), ()))
        yield from zip(kernel(x, weight, 1e-5), plain.rms_norm(x, weight, 1e-5), strict=True)


def _norm_gradients(kernel: Any, dtype: torch.dtype, device: str) -> Iterator[Pair]:
    for width in (128, 4096, 4100):
        grad, x, weight = (torch.randn(*shape, width, dtype=dtype, device=device) for shape in ((99,), (99,), ()))
        rstd = plain.rms_norm(x, weight, 1e-5)[1]
        yield kernel(grad, x, weight, rstd), plain.rms_norm_backward(grad, x, weight, rstd)


def _rotations(kernel: Any, dtype: torch.dtype, device: str) -> Iterator[Pair]:
    for heads, width in (((32, 8), 128), ((3, 3), 96), ((9, 1), 64)):
        q, k = (torch.randn(2, 75, some, width, dtype=dtype, device=device).transpose(1, 2) for some in heads)
        for rows in (1, 2):
            angles = torch.randn(rows, 75, width, device=device)
            cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
            for back in (False, True):
                yield from zip(kernel(q, k, cos, sin, back), plain.rotate(q, k, cos, sin, back), strict=True)


def _gates(kernel: Any, dtype: torch.dtype, device: str) -> Iterator[Pair]:
    for activation in ("silu", "gelu_tanh"):
        gate, up = (torch.randn(77, 1000, dtype=dtype, device=device) for _ in range(2))
        ours, theirs = torch.empty_like(gate), torch.empty_like(gate)
        kernel(gate, up, activation, ours)
        plain.gated(gate, up, activation, theirs)
        yield ours, theirs


def _gate_gradients(kernel: Any, dtype: torch.dtype, device: str) -> Iterator[Pair]:
    for activation in ("silu", "gelu_tanh"):
        given = [torch.randn(77, 1000, dtype=dtype, device=device) for _ in range(3)]
        ours, theirs = ([tensor.clone() for tensor in given] for _ in range(2))
        for function, (grad, gate, up) in ((kernel, ours), (plain.gated_backward, theirs)):
            function(grad, gate, up, activation, gate, up)  # over gate and up, as under checkpointing
        yield from zip(ours, theirs, strict=True)


def _likelihoods(kernel: Any, dtype: torch.dtype, device: str) -> Iterator[Pair]:
    for scale, cap in ((1.0, 0.0), (1.3, 7.0)):
        logits = 3 * torch.randn(40, 20000, dtype=dtype, device=device)
        labels = torch.randint(0, 20000, (40,), device=device)
        labels[::2] = logits[::2].argmax(dim=1)
        results = []
        for function in (kernel, plain.cross_entropy):
            slope, nll = logits.clone(), torch.empty(40, device=device)
            correct = torch.empty(40, dtype=torch.bool, device=device)
            function(slope, labels, scale, cap, True, nll, correct)
            results.append((slope, nll, correct))
        yield from zip(*results, strict=True)


def _blocks(kernel: Any, dtype: torch.dtype, device: str) -> Iterator[Pair]:
    for scale, cap in ((1.0, 0.0), (1.3, 7.0)):
        blocks = [3 * torch.randn(40, width, dtype=dtype, device=device) for width in (5000, 2048, 300)]
        labels = torch.randint(0, 7348, (40,), device=device)
        results = []
        for function in (kernel, plain.cross_entropy_block):
            largest, total, target = (torch.full((40,), start, device=device) for start in (-torch.inf, 0.0, 0.0))
            likeliest, start = torch.zeros(40, dtype=torch.long, device=device), 0
            for block in blocks:
                function(block.clone(), labels, start, scale, cap, largest, total, target, likeliest)
                start += block.shape[1]
            results.append((largest, total, target, likeliest))
        yield from zip(*results, strict=True)


def _block_gradients(kernel: Any, dtype: torch.dtype, device: str) -> Iterator[Pair]:
    for scale, cap in ((1.0, 0.0), (1.3, 7.0)):
        logits = 3 * torch.randn(40, 5000, dtype=dtype, device=device)
        labels = torch.randint(90, 6000, (40,), device=device)
        labels[0] = 100
        normalizer = torch.full((40,), 12.0, device=device)
        ours, theirs = logits.clone(), logits.clone()
        kernel(ours, labels, 100, scale, cap, normalizer)
        plain.cross_entropy_block_gradient(theirs, labels, 100, scale, cap, normalizer)
        yield ours, theirs


def _weights(kernel: Any, dtype: torch.dtype, device: str) -> Iterator[Pair]:
    for kind in ("nf4", "fp4"):
        weight = torch.randn(96, 4160, dtype=dtype)
        packed: Any = bitsandbytes.nn.Params4bit(weight, False, quant_type=kind, compress_statistics=True).to(device)
        arguments = plain.nested_arguments(packed, packed.quant_state)
        yield kernel(*arguments), plain.dequantize_nested(*arguments)


COMPARED: dict[str, Callable[[Any, torch.dtype, str], Iterator[Pair]]] = {
    "rms_norm": _norms,
    "rms_norm_backward": _norm_gradients,
    "rotate": _rotations,
    "gated": _gates,
    "gated_backward": _gate_gradients,
    "cross_entropy": _likelihoods,
    "cross_entropy_block": _blocks,
    "cross_entropy_block_gradient": _block_gradients,
    "dequantize_nested": _weights,
}
"""By the name of the operation."""
