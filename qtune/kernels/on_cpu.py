"""Products of float32 matrices on a processor with AVX-512 that is no Intel: by oneDNN, whatever PyTorch would use.

PyTorch's own float32 products are MKL's on x86, which leaves AVX-512 unused on other makers' processors: 100 GFLOP/s on
one thread of an AMD EPYC (Zen 5) where oneDNN, which comes with PyTorch and multiplies its bfloat16, does 220. On a
processor with AVX2 alone MKL's are the faster ones: an AMD EPYC (Zen 3) takes 0.89 of oneDNN's time for the products of
the built-in model's step, on one thread, and 0.84 at a width of 2,048 (`tools/bench_products.py`). Products of both are
fp32 to rounding. Which one is taken is a property of the processor and of the shapes, never of a measurement: a run
goes on bit for bit.

Tensors without storage, and every other type and device, are PyTorch's.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qtune.device.processor import has_avx512, vendor

if TYPE_CHECKING:
    from collections.abc import Iterator

LEAST = 64
"""Of each of the three sizes: thin products are bound by memory, and of some oneDNN has no kernel but its reference."""

LEAST_WORK = 2**24
"""Multiplications: a smaller product is not worth the question."""

PIECE = 2**18
"""Elements of a result that are computed at once where they are then added or copied: what that takes beside the
tensors that a trace knows stays small."""


def mm(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """left [n, k] @ right [k, m]; into `out` where it is given."""
    if not takes(left, right):
        return torch.mm(left, right, out=out)
    if out is None:
        return by_onednn(left, right)
    for rows in _pieces(left, out):
        out[rows] = by_onednn(left[rows], right)
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [n, k] @ weight [m, k]ᵀ + bias [m]."""
    if not takes(x, weight.t()):
        return torch.nn.functional.linear(x, weight, bias)
    return by_onednn(x, weight.t(), bias)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total [n, m] + left [n, k] @ right [k, m], in the place of `total`."""
    if not takes(left, right):
        return total.addmm_(left, right)
    for rows in _pieces(left, total):
        total[rows] += by_onednn(left[rows], right)
    return total


def scaled_product(left: Tensor, right: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """scale · left @ right, in one launch on a card."""
    if takes(left, right):
        return mm(left, right, out).mul_(scale)
    unread = left.new_empty(right.shape[1]) if out is None else out  # beta = 0
    return torch.addmm(unread, left, right, beta=0, alpha=scale, out=out)


def takes(left: Tensor, right: Tensor) -> bool:
    """Whether a product is oneDNN's: two float32 matrices that lie dense in memory, on such a processor."""
    return (
        left.dtype is right.dtype is torch.float32
        and type(left) in _PLAIN
        and type(right) in _PLAIN
        and left.device.type == right.device.type == "cpu"
        and left.dim() == right.dim() == 2
        and min(*left.shape, *right.shape) >= LEAST
        and left.numel() * (right.numel() // right.shape[0]) >= LEAST_WORK
        and _is_dense(left)
        and _is_dense(right)
        and not torch.is_autocast_enabled("cpu")  # which would have PyTorch's in another type
        and is_faster()
    )


_PLAIN = (Tensor, nn.Parameter)


def _is_dense(matrix: Tensor) -> bool:
    """By rows or by columns, without gaps: of others oneDNN has no kernel but its reference, 400 times slower."""
    return matrix.is_contiguous() or matrix.t().is_contiguous()


@functools.cache
def is_faster() -> bool:
    """Whether this is an x86 processor with AVX-512 of another maker than MKL's, and PyTorch has oneDNN."""
    return torch.backends.mkldnn.is_available() and vendor() not in ("", "GenuineIntel") and has_avx512()


def by_onednn(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """left [n, k] @ right [k, m] + bias [m] by oneDNN, whatever `takes` says of them."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise.default(left, right.t(), bias, "none", [], "")
    return found


def _pieces(left: Tensor, result: Tensor) -> Iterator[slice]:
    """Rows of both; all of them where some would not lie dense."""
    rows = max(LEAST, PIECE // result.shape[1]) if left.is_contiguous() else len(result)
    return (slice(start, start + rows) for start in range(0, len(result), rows))
