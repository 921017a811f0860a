# Triton's functions are compiled from their source; types would be read as arguments' kinds, and it brings none itself.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""The operations of `qtune.kernels.ops` for CUDA cards, in Triton, which comes with PyTorch there.

All of them are bound by memory: each reads its inputs and writes its outputs once, and computes in fp32 between.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 2048
"""Elements of a program of an elementwise kernel."""
VOCABULARY_BLOCK = 8192
"""Logits of a row that are in registers at once."""
QUANTIZED_BLOCKS = 32
"""Blocks of 4-bit codes of a program."""


# --- root mean square normalization ---------------------------------------------------------------------------------


@triton.jit
def _rms_norm(x, weight, y, rstd, width, eps, padded: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, padded)
    inside = places < width
    values = tl.load(x + row * width + places, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(values * values) / width + eps)
    rounded = (values * scale).to(y.dtype.element_ty).to(tl.float32)
    weights = tl.load(weight + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * width + places, (rounded * weights).to(y.dtype.element_ty), mask=inside)
    tl.store(rstd + row, scale)


@triton.jit
def _rms_norm_backward(grad, x, weight, rstd, dx, width, padded: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, padded)
    inside = places < width
    scale = tl.load(rstd + row)
    normal = tl.load(x + row * width + places, mask=inside, other=0.0).to(tl.float32) * scale
    weights = tl.load(weight + places, mask=inside, other=0.0).to(tl.float32)
    slope = tl.load(grad + row * width + places, mask=inside, other=0.0).to(tl.float32) * weights
    slope = slope.to(dx.dtype.element_ty).to(tl.float32)
    mean = tl.sum(slope * normal) / width
    tl.store(dx + row * width + places, ((slope - normal * mean) * scale).to(dx.dtype.element_ty), mask=inside)


def _warps(width: int) -> int:
    return 4 if width <= 2048 else 8 if width <= 8192 else 16


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """weight · (x / rms(x)) and 1 / rms."""
    x = x.contiguous()
    width = x.shape[-1]
    y, rstd = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    _rms_norm[(x.numel() // width,)](
        x, weight, y, rstd, width, eps, padded=triton.next_power_of_2(width), num_warps=_warps(width)
    )
    return y, rstd


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """d loss / d x."""
    grad, x = grad.contiguous(), x.contiguous()
    width = x.shape[-1]
    dx = torch.empty_like(x)
    _rms_norm_backward[(x.numel() // width,)](
        grad, x, weight, rstd, dx, width, padded=triton.next_power_of_2(width), num_warps=_warps(width)
    )
    return dx


# --- rotary position embedding --------------------------------------------------------------------------------------


@triton.jit
def _turn(
    x, out, heads, x_batch, x_head, x_place, out_batch, out_head, out_place, batch, place, half, first_cos, second_cos,
    first_sin, second_sin, back: tl.constexpr, padded_heads: tl.constexpr, padded_half: tl.constexpr,
):  # fmt: skip
    head = tl.arange(0, padded_heads)[:, None]
    column = tl.arange(0, padded_half)[None, :]
    inside = (head < heads) & (column < half)
    source = x + batch * x_batch + place * x_place + head * x_head + column
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    if back:
        new_first = first * first_cos + second * second_sin
        new_second = second * second_cos - first * first_sin
    else:
        new_first = first * first_cos - second * first_sin
        new_second = second * second_cos + first * second_sin
    target = out + batch * out_batch + place * out_place + head * out_head + column
    tl.store(target, new_first.to(out.dtype.element_ty), mask=inside)
    tl.store(target + half, new_second.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(
    q, k, cos, sin, new_q, new_k, q_heads, k_heads, length, half, q_batch, q_head, q_place, k_batch, k_head, k_place,
    new_q_batch, new_q_head, new_q_place, new_k_batch, new_k_head, new_k_place, angle_batch,
    back: tl.constexpr, padded_q_heads: tl.constexpr, padded_k_heads: tl.constexpr, padded_half: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    batch, place = program // length, program % length
    column = tl.arange(0, padded_half)[None, :]
    angle = batch * angle_batch + place * 2 * half + column
    first_cos = tl.load(cos + angle, mask=column < half, other=0.0).to(tl.float32)
    second_cos = tl.load(cos + angle + half, mask=column < half, other=0.0).to(tl.float32)
    first_sin = tl.load(sin + angle, mask=column < half, other=0.0).to(tl.float32)
    second_sin = tl.load(sin + angle + half, mask=column < half, other=0.0).to(tl.float32)
    _turn(
        q, new_q, q_heads, q_batch, q_head, q_place, new_q_batch, new_q_head, new_q_place, batch, place, half,
        first_cos, second_cos, first_sin, second_sin, back, padded_q_heads, padded_half,
    )  # fmt: skip
    _turn(
        k, new_k, k_heads, k_batch, k_head, k_place, new_k_batch, new_k_head, new_k_place, batch, place, half,
        first_cos, second_cos, first_sin, second_sin, back, padded_k_heads, padded_half,
    )  # fmt: skip


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    """q and k [batch, heads, length, head_dim] turned, or turned back, by one kernel."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    cos, sin, new_q, new_k = cos.contiguous(), sin.contiguous(), torch.empty_like(q), torch.empty_like(k)
    batch, _, length, width = q.shape
    _rotate[(batch * length,)](
        q, k, cos, sin, new_q, new_k, q.shape[1], k.shape[1], length, width // 2,
        *(x.stride(axis) for x in (q, k, new_q, new_k) for axis in range(3)),
        0 if cos.shape[0] == 1 else cos.stride(0), back=back,
        padded_q_heads=triton.next_power_of_2(q.shape[1]), padded_k_heads=triton.next_power_of_2(k.shape[1]),
        padded_half=triton.next_power_of_2(width // 2),
    )  # fmt: skip
    return new_q, new_k


# --- gated activations ----------------------------------------------------------------------------------------------


@triton.jit
def _act(x, silu: tl.constexpr):
    """The activation and its derivative."""
    if silu:
        share = tl.sigmoid(x)
        return x * share, share * (1.0 + x * (1.0 - share))
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)  # sqrt(2 / pi)
    tanh = 2.0 * tl.sigmoid(2.0 * inner) - 1.0
    slope = 0.7978845608028654 * (1.0 + 0.134145 * x * x)
    return 0.5 * x * (1.0 + tanh), 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * slope


@triton.jit
def _gated(gate, up, out, count, silu: tl.constexpr, piece: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * piece + tl.arange(0, piece)
    inside = places < count
    value, _ = _act(tl.load(gate + places, mask=inside, other=0.0).to(tl.float32), silu)
    other = tl.load(up + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + places, (value * other).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gated_backward(grad, gate, up, d_gate, d_up, count, silu: tl.constexpr, piece: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * piece + tl.arange(0, piece)
    inside = places < count
    value, slope = _act(tl.load(gate + places, mask=inside, other=0.0).to(tl.float32), silu)
    other = tl.load(up + places, mask=inside, other=0.0).to(tl.float32)
    given = tl.load(grad + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(d_gate + places, (given * other * slope).to(d_gate.dtype.element_ty), mask=inside)
    tl.store(d_up + places, (given * value).to(d_up.dtype.element_ty), mask=inside)
    tl.store(grad + places, (value * other).to(grad.dtype.element_ty), mask=inside)


def gated(gate: Tensor, up: Tensor, activation: str, out: Tensor) -> None:
    """out = act(gate) · up."""
    count = gate.numel()
    _gated[(triton.cdiv(count, ELEMENTS),)](gate, up, out, count, silu=activation == "silu", piece=ELEMENTS)


def gated_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str, d_gate: Tensor, d_up: Tensor) -> None:
    """The gradients of gate and up, and act(gate) · up over the gradient."""
    count = gate.numel()
    _gated_backward[(triton.cdiv(count, ELEMENTS),)](
        grad, gate, up, d_gate, d_up, count, silu=activation == "silu", piece=ELEMENTS
    )


# --- cross-entropy of a tile of logits -----------------------------------------------------------------------------


@triton.jit
def _capped(x, scale, cap, is_capped: tl.constexpr):
    """A family's rule, and its derivative with respect to x."""
    value, slope = x * scale, scale
    if is_capped:  # one return: Triton compares the types of all of them, of those not taken as well
        tanh = 2.0 * tl.sigmoid(2.0 * value / cap) - 1.0
        value, slope = tanh * cap, (1.0 - tanh * tanh) * scale
    return value, slope


@triton.jit
def _cross_entropy(
    logits, labels, nll, correct, scale, cap,
    vocab: tl.constexpr, slopes: tl.constexpr, is_capped: tl.constexpr, piece: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * vocab
    label = tl.load(labels + row)
    highest, total, likeliest = -float("inf"), 0.0, 0
    for start in range(0, vocab, piece):  # the running maximum and the sum relative to it (arXiv:1805.02867)
        places = start + tl.arange(0, piece)
        values, _ = _capped(
            tl.load(line + places, mask=places < vocab, other=0.0).to(tl.float32), scale, cap, is_capped
        )
        values = tl.where(places < vocab, values, -float("inf"))
        best = tl.max(values, 0)
        likeliest = tl.where(best > highest, start + tl.argmax(values, 0), likeliest)
        higher = tl.maximum(highest, best)
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(values - higher), 0)
        highest = higher
    normalizer = highest + tl.log(total)
    target, _ = _capped(tl.load(line + label).to(tl.float32), scale, cap, is_capped)
    tl.store(nll + row, normalizer - target)
    tl.store(correct + row, likeliest == label)
    if slopes:
        tl.debug_barrier()  # every thread has read the label's logit before it is written over
        for start in range(0, vocab, piece):
            places = start + tl.arange(0, piece)
            inside = places < vocab
            given = tl.load(line + places, mask=inside, other=0.0).to(tl.float32)
            values, slope = _capped(given, scale, cap, is_capped)
            slope = (tl.exp(values - normalizer) - tl.where(places == label, 1.0, 0.0)) * slope
            tl.store(line + places, slope.to(logits.dtype.element_ty), mask=inside)


def cross_entropy(
    logits: Tensor, labels: Tensor, scale: float, cap: float, slope: bool, nll: Tensor, correct: Tensor
) -> None:
    """Likelihoods, whether each label is the likeliest, and the gradient over the logits."""
    rows, vocab = logits.shape
    _cross_entropy[(rows,)](
        logits, labels, nll, correct, scale, cap, vocab=vocab, slopes=slope, is_capped=cap != 0.0,
        piece=min(VOCABULARY_BLOCK, triton.next_power_of_2(vocab)), num_warps=16,
    )  # fmt: skip


@triton.jit
def _cross_entropy_block(
    logits, labels, maximum, total, target, likeliest, first, width, scale, cap,
    is_capped: tl.constexpr, piece: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * width
    label = tl.load(labels + row) - first
    highest, sums, best_place = tl.load(maximum + row), tl.load(total + row), tl.load(likeliest + row)
    start = 0
    while start < width:
        places = start + tl.arange(0, piece)
        values, _ = _capped(
            tl.load(line + places, mask=places < width, other=0.0).to(tl.float32), scale, cap, is_capped
        )
        values = tl.where(places < width, values, -float("inf"))
        best = tl.max(values, 0)
        best_place = tl.where(best > highest, first + start + tl.argmax(values, 0), best_place)
        higher = tl.maximum(highest, best)
        sums = sums * tl.exp(highest - higher) + tl.sum(tl.exp(values - higher), 0)
        highest = higher
        start += piece
    tl.store(maximum + row, highest)
    tl.store(total + row, sums)
    tl.store(likeliest + row, best_place)
    inside = (label >= 0) & (label < width)
    given, _ = _capped(tl.load(line + label, mask=inside, other=0.0).to(tl.float32), scale, cap, is_capped)
    tl.store(target + row, given, mask=inside)


@triton.jit
def _cross_entropy_block_gradient(
    logits, labels, normalizer, first, width, scale, cap, is_capped: tl.constexpr, piece: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1).to(tl.int64) * piece + tl.arange(0, piece)
    inside = places < width
    line = logits + row * width
    given = tl.load(line + places, mask=inside, other=0.0).to(tl.float32)
    values, slope = _capped(given, scale, cap, is_capped)
    label = tl.load(labels + row) - first
    slope = (tl.exp(values - tl.load(normalizer + row)) - tl.where(places == label, 1.0, 0.0)) * slope
    tl.store(line + places, slope.to(logits.dtype.element_ty), mask=inside)


def _block_piece(width: int) -> int:
    return min(VOCABULARY_BLOCK // 2, triton.next_power_of_2(width))


def cross_entropy_block(
    logits: Tensor, labels: Tensor, start: int, scale: float, cap: float,
    maximum: Tensor, total: Tensor, target: Tensor, likeliest: Tensor,
) -> None:  # fmt: skip
    """The running normalizer, the label's logit and the likeliest token, with one more block of the vocabulary."""
    rows, width = logits.shape
    _cross_entropy_block[(rows,)](
        logits, labels, maximum, total, target, likeliest, start, width, scale, cap,
        is_capped=cap != 0.0, piece=_block_piece(width), num_warps=8,
    )  # fmt: skip


def cross_entropy_block_gradient(
    logits: Tensor, labels: Tensor, start: int, scale: float, cap: float, normalizer: Tensor
) -> None:
    """The gradient over the logits of a block."""
    rows, width = logits.shape
    piece = _block_piece(width)
    _cross_entropy_block_gradient[(rows, triton.cdiv(width, piece))](
        logits, labels, normalizer, start, width, scale, cap, is_capped=cap != 0.0, piece=piece, num_warps=8
    )


# --- 4-bit weights with double quantization -------------------------------------------------------------------------


@triton.jit
def _dequantize(
    codes, absmax, absmax_code, absmax_scale, offset, code, out, count, blocks,
    bytes_each: tl.constexpr, some_blocks: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * some_blocks + tl.arange(0, some_blocks)
    inside = block < blocks
    largest = tl.load(absmax_code + tl.load(absmax + block, mask=inside, other=0).to(tl.int32))
    largest = largest * tl.load(absmax_scale + block // 256, mask=inside, other=0.0) + tl.load(offset)
    byte = block[:, None] * bytes_each + tl.arange(0, bytes_each)[None, :]
    packed = tl.load(codes + byte, mask=byte * 2 < count, other=0).to(tl.int32)
    high = tl.load(code + (packed >> 4)) * largest[:, None]
    low = tl.load(code + (packed & 15)) * largest[:, None]
    places = block[:, None] * (2 * bytes_each) + tl.arange(0, 2 * bytes_each)[None, :]
    tl.store(out + places, tl.interleave(high, low).to(out.dtype.element_ty), mask=places < count)


def dequantize_nested(
    codes: Tensor, absmax: Tensor, absmax_code: Tensor, absmax_scale: Tensor, offset: Tensor, code: Tensor,
    shape: list[int], block: int, kind: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The weight [out, in], in one launch where bitsandbytes takes three."""
    weight = codes.new_empty(shape, dtype=dtype)
    blocks = absmax.numel()
    _dequantize[(triton.cdiv(blocks, QUANTIZED_BLOCKS),)](
        codes.view(torch.uint8), absmax, absmax_code, absmax_scale, offset, code, weight, weight.numel(), blocks,
        bytes_each=block // 2, some_blocks=QUANTIZED_BLOCKS,
    )  # fmt: skip
    return weight
