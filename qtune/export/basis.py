"""A weight as training saw it: quantized by bitsandbytes as loading does, and dequantized again."""

from dataclasses import dataclass
from typing import Literal

import torch
from bitsandbytes.functional import (
    QuantState,
    dequantize_4bit,
    dequantize_blockwise,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
    quantize_4bit,
    quantize_blockwise,
)

# bitsandbytes' defaults, which transformers does not override: weights that share an absmax, absmax that share another.
BLOCK = 64
OUTER_BLOCK = 256

# Elements quantized at a time. bitsandbytes' CPU path makes several fp32 and int32 copies of its input; in pieces they
# stay small, and 4096 x 4096 takes 0.26 s instead of 0.50 s on two cores.
CHUNK = 2**21


@dataclass(frozen=True)
class Basis:
    """How training held the frozen weights of the base model.

    `load_dtype` is what a checkpoint's tensors were cast to before they were quantized (and what those that are not
    quantized are kept in); `compute_dtype` is what quantized weights are dequantized to for each product.
    """

    kind: Literal["nf4", "fp4", "int8", "none"]
    double_quantization: bool
    load_dtype: torch.dtype
    compute_dtype: torch.dtype


def as_trained(weight: torch.Tensor, basis: Basis) -> torch.Tensor:
    """The values that a quantized linear layer multiplied with, bit for bit.

    `weight` is [out, in] as the checkpoint stores it. 4-bit values come in the compute dtype; int8 ones in fp32, for
    an int8 product applies the scales to its result; without quantization they come in the load dtype.
    """
    loaded = weight.to(basis.load_dtype)
    match basis.kind:
        case "none":
            return loaded
        case "int8":
            codes, scales, _ = int8_vectorwise_quant(loaded.to(torch.float16))
            dequantized: torch.Tensor = int8_vectorwise_dequant(codes, scales)
            return dequantized
        case "nf4" | "fp4":
            return _four_bit_round_trip(loaded.contiguous(), basis)


def as_stored(codes: torch.Tensor, statistics: dict[str, torch.Tensor], compute_dtype: torch.dtype) -> torch.Tensor:
    """The values of a weight that the checkpoint already holds in bitsandbytes' 4-bit format, in the compute dtype.

    `statistics` are the tensors stored beside `codes`, by the part of their names after the weight's ("absmax",
    "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4").
    """
    state = QuantState.from_dict(dict(statistics), device=torch.device("cpu"))
    absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    flat: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        codes, absmax.float(), state.blocksize, state.quant_type, state.shape, compute_dtype
    )
    return flat


def _four_bit_round_trip(loaded: torch.Tensor, basis: Basis) -> torch.Tensor:
    """Quantizes and dequantizes [out, in] in pieces of whole rows.

    A piece holds whole blocks, so its codes are those of the whole tensor. Only double quantization looks across
    pieces: its offset is the mean of every absmax.
    """
    rows = max(BLOCK, CHUNK // loaded.shape[-1] // BLOCK * BLOCK)
    pieces = loaded.split(rows)
    quantized = [
        quantize_4bit(piece, blocksize=BLOCK, quant_type=basis.kind, compress_statistics=False) for piece in pieces
    ]
    absmax = torch.cat([state.absmax for _, state in quantized])
    if basis.double_quantization:
        offset = absmax.mean()
        codes, outer = quantize_blockwise(absmax - offset, blocksize=OUTER_BLOCK)
        absmax = dequantize_blockwise(codes, outer) + offset
    result = torch.empty(loaded.shape, dtype=basis.compute_dtype)
    begin = 0
    for target, (packed, state) in zip(result.split(rows), quantized, strict=True):
        end = begin + state.absmax.numel()
        state.absmax, state.dtype = absmax[begin:end], basis.compute_dtype
        target.copy_(dequantize_4bit(packed, state))
        begin = end
    return result
