"""A weight as training saw it: quantized by bitsandbytes as loading does, and dequantized again."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from bitsandbytes.functional import (
    QuantState,
    dequantize_blockwise,
    get_4bit_type,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
    quantize_blockwise,
)

from qtune.model.packed import ROW_SCALES

# bitsandbytes' defaults, which transformers does not override: weights that share an absmax, absmax that share another.
BLOCK = 64
OUTER_BLOCK = 256

# bitsandbytes divides by no smaller absmax than this.
SMALLEST = 1e-38

# Elements quantized at a time: their fp32 copies stay in a processor's cache.
PIECE = 2**18


@dataclass(frozen=True)
class Basis:
    """How training held the frozen weights of the base model.

    `load_dtype` is what a checkpoint's tensors were cast to before they were quantized (and what those that are not
    quantized are kept in); `compute_dtype` is what quantized weights are dequantized to for each product.
    Where the quantization `is_stored`, the codes are the checkpoint's own.
    """

    kind: Literal["nf4", "fp4", "int8", "none"]
    double_quantization: bool
    load_dtype: torch.dtype
    compute_dtype: torch.dtype
    is_stored: bool = False


def as_trained(weight: torch.Tensor, basis: Basis) -> torch.Tensor:
    """The values that a quantized linear layer multiplied with, bit for bit.

    `weight` is [out, in] as the checkpoint stores it. 4-bit values come in the compute dtype; int8 ones in fp32, for
    an int8 product applies the scales to its result; without quantization they come in the load dtype.
    """
    match basis.kind:
        case "none":
            return weight.to(basis.load_dtype)
        case "int8":
            codes, scales, _ = int8_vectorwise_quant(weight.to(basis.load_dtype).to(torch.float16))
            dequantized: torch.Tensor = int8_vectorwise_dequant(codes, scales)
            return dequantized
        case "nf4" | "fp4":
            return _four_bit_round_trip(weight, basis)


def as_stored(codes: torch.Tensor, statistics: dict[str, torch.Tensor], compute_dtype: torch.dtype) -> torch.Tensor:
    """The values of a weight that the checkpoint already holds in one of bitsandbytes' formats, typed as `as_trained`.

    `statistics` are the tensors stored beside `codes` (`model.packed.statistics_of`).
    """
    if ROW_SCALES in statistics:
        values: torch.Tensor = int8_vectorwise_dequant(codes, statistics[ROW_SCALES])
        return values
    state = QuantState.from_dict(dict(statistics), device=torch.device("cpu"))
    absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    flat: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        codes, absmax.float(), state.blocksize, state.quant_type, state.shape, compute_dtype
    )
    return flat


def _four_bit_round_trip(weight: torch.Tensor, basis: Basis) -> torch.Tensor:
    """Quantizes and dequantizes [out, in] in pieces of whole blocks.

    The arithmetic of each block is bitsandbytes' own, operation by operation, so a piece has the codes of the whole
    tensor. Only double quantization looks across pieces: its offset is the mean of every absmax.
    """
    grid = _grid(basis.kind)
    flat = weight.reshape(-1)
    whole = flat.numel() // BLOCK * BLOCK
    codes = torch.empty(flat.numel(), dtype=torch.uint8)
    absmax = torch.empty(-(-flat.numel() // BLOCK), dtype=torch.float32)
    for begin in range(0, whole, PIECE):
        end = min(begin + PIECE, whole)
        blocks = flat[begin:end].to(basis.load_dtype).float().view(-1, BLOCK)
        largest = blocks.abs().amax(1)
        absmax[begin // BLOCK : end // BLOCK] = largest
        _encode(blocks * (1 / largest.clamp(min=SMALLEST)).unsqueeze(1), grid, codes[begin:end])
    if whole < flat.numel():
        # bitsandbytes divides where a block is not full.
        rest = flat[whole:].to(basis.load_dtype).float()
        absmax[-1] = rest.abs().max().clamp(min=SMALLEST)
        _encode(rest / absmax[-1], grid, codes[whole:])
    if basis.double_quantization:
        offset = absmax.mean()
        outer_codes, outer = quantize_blockwise(absmax - offset, blocksize=OUTER_BLOCK)
        absmax = dequantize_blockwise(outer_codes, outer) + offset
    result = torch.empty(flat.numel(), dtype=basis.compute_dtype)
    for begin in range(0, len(result), PIECE):
        piece = codes[begin : begin + PIECE]
        scales = absmax[begin // BLOCK :][: -(-len(piece) // BLOCK)]
        result[begin : begin + PIECE] = _look_up(grid.values, piece, scales, BLOCK, basis.compute_dtype)
    return result.view(weight.shape)


@dataclass(frozen=True)
class _Grid:
    """Which of a 4-bit type's values is next to a number in [-1, 1], as tables of 256.

    The numbers fall into 127 equal bins, so narrow that none holds more than one of the bounds between two values.
    `bounds` has the one of each bin (infinity for none); `values` at 2 · bin and 2 · bin + 1 is the value for numbers
    up to the bound and above it. That takes a tenth of the time of a binary search for every weight.
    """

    bounds: torch.Tensor
    values: torch.Tensor


def _grid(kind: str) -> _Grid:
    # FP4 has a zero of either sign; what is between them is zero as well.
    values = get_4bit_type(kind, device="cpu").unique()
    between = (values[:-1] + values[1:]) / 2
    bins = _bins(between).long()
    bounds = torch.full((256,), math.inf)
    bounds[bins] = between
    below = (bins < torch.arange(128).unsqueeze(1)).sum(1)
    above = (bins <= torch.arange(128).unsqueeze(1)).sum(1)
    return _Grid(bounds, values[torch.stack([below, above], 1)].reshape(-1).contiguous())


def _bins(numbers: torch.Tensor) -> torch.Tensor:
    """The bin of each number in [-1, 1], uint8; 0 begins a bin."""
    return numbers.mul(63).add_(64).to(torch.uint8)


def _encode(scaled: torch.Tensor, grid: _Grid, codes: torch.Tensor) -> None:
    """Fills `codes` with the place in `grid.values` of each number."""
    scaled = scaled.clamp_(-1, 1).view(-1)
    bins = _bins(scaled)
    bounds = _look_up(grid.bounds, bins, torch.ones(1), len(bins), torch.float32)
    torch.add(bins.mul_(2), (scaled > bounds).view(torch.uint8), out=codes)


def _look_up(
    table: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, block: int, dtype: torch.dtype
) -> torch.Tensor:
    """table[code] · absmax of its block, by bitsandbytes' kernel: ten times faster than indexing with a tensor."""
    found: torch.Tensor = torch.ops.bitsandbytes.dequantize_blockwise(codes, absmax, table, block, dtype)
    return found
