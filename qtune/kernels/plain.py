"""The operations `torch.ops.qtune.*` in PyTorch's own: what a CPU runs, and what kernels are compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qtune.kernels import on_cpu

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bitsandbytes.functional import QuantState

PIECE = 2**16
"""Elements that a CPU takes at once: what is needed beside inputs and outputs stays in its cache."""

CARD_PIECE = 2**20
"""Elements that a card takes at once, where these operations stand in for a kernel: with all that is needed beside
inputs and outputs no more than SCRATCH_BYTES, so that a card that leaves a kernel out needs no more than was said."""

SCRATCH_BYTES = 32 * 2**20
"""What any of these operations takes beside its inputs and outputs, whatever their size, at most."""


def _piece(tensor: Tensor) -> int:
    return PIECE if tensor.device.type == "cpu" else CARD_PIECE


# --- root mean square normalization (arXiv:1910.07467) --------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """weight · (x / rms(x)) [..., width], rounded before the weight as in transformers; 1 / rms [..., 1] in fp32."""
    x = x.contiguous()
    y, rstd = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    for part, normal, scale in _in_rows(x, y, rstd):
        exact = part.float()
        torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps, out=scale)
        normal.copy_(exact * scale).mul_(weight)
    return y, rstd


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """d loss / d x, [..., width]."""
    grad, x = grad.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    for given, part, scale, out in _in_rows(grad, x, rstd, dx):
        normal = part.float() * scale  # not in place: in fp32 it is x
        slope = (given * weight).float()
        slope -= normal.mul_((slope * normal).mean(-1, keepdim=True))
        out.copy_(slope.mul_(scale))
    return dx


def _in_rows(*tensors: Tensor) -> Any:
    """Contiguous tensors [..., width] with the same rows, so many rows of the first one at once."""
    rows = max(1, _piece(tensors[0]) // tensors[0].shape[-1])
    return zip(*(tensor.view(-1, tensor.shape[-1]).split(rows) for tensor in tensors), strict=True)


# --- rotary position embedding (arXiv:2104.09864) -------------------------------------------------------------------


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    """q and k [batch, heads, length, head_dim], each with heads of its own number, turned by their positions' angles
    [1 or batch, length, head_dim]; or back."""
    return _turned(q, cos, sin, back), _turned(k, cos, sin, back)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    half = x.shape[-1] // 2
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    out = torch.empty_like(x)
    torch.mul(x, cos, out=out)
    first, second = x[..., :half], x[..., half:]
    if back:
        out[..., :half].addcmul_(second, sin[..., half:])
        out[..., half:].addcmul_(first, sin[..., :half], value=-1)
    else:
        out[..., :half].addcmul_(second, sin[..., :half], value=-1)
        out[..., half:].addcmul_(first, sin[..., half:])
    return out


# --- gated activations (arXiv:2002.05202) ---------------------------------------------------------------------------


def _activated(x: Tensor, activation: str) -> Tensor:
    return torch.nn.functional.silu(x) if activation == "silu" else torch.nn.functional.gelu(x, approximate="tanh")


def _through_activation(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, x)
    return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")


def gated(gate: Tensor, up: Tensor, activation: str, out: Tensor) -> None:
    """out = act(gate) · up; `out` may be one of them."""
    for g, u, o in _in_pieces(gate, up, out):
        torch.mul(_activated(g, activation), u, out=o)


def gated_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str, d_gate: Tensor, d_up: Tensor) -> None:
    """From d loss / d (act(gate) · up) in `grad`: the gradients of gate and up, which may be written over those; and
    act(gate) · up itself, over the gradient."""
    for d, g, u, dg, du in _in_pieces(grad, gate, up, d_gate, d_up):
        value = _activated(g, activation)
        inside, through_gate = value * u, d * u
        torch.mul(d, value, out=du)
        dg.copy_(_through_activation(through_gate, g, activation))
        d.copy_(inside)


def _in_pieces(*tensors: Tensor) -> Any:
    """Contiguous tensors of one shape, flat, so many elements at once."""
    return zip(*(tensor.view(-1).split(_piece(tensor)) for tensor in tensors), strict=True)


# --- cross-entropy of a tile of logits -----------------------------------------------------------------------------


def cross_entropy(
    logits: Tensor, labels: Tensor, scale: float, cap: float, slope: bool, nll: Tensor, correct: Tensor
) -> None:
    """Negative log-likelihood [rows] of `labels` [rows] under logits [rows, vocab], and whether each is the likeliest.

    A family's rule comes before: cap · tanh(scale · x / cap); cap = 0: only the scale. With `slope` the gradient of
    the likelihood with respect to the logits as given is written over them; without it what they hold then is nobody's.
    """
    for part in _row_parts(logits):
        low, target = logits[part], labels[part].unsqueeze(1)
        exact, capped = _ruled(low, scale, cap, wants_slope=slope)
        correct[part] = exact.argmax(dim=1) == labels[part]
        normalizer = exact.logsumexp(dim=1, keepdim=True)
        nll[part] = (normalizer - exact.gather(1, target)).squeeze(1)
        if not slope:
            continue
        exact = exact.sub_(normalizer).exp_()  # d nll / d logits = softmax - onehot
        exact.scatter_add_(1, target, torch.full_like(target, -1, dtype=exact.dtype))
        _write_slope(exact, capped, scale, low)


def cross_entropy_block(
    logits: Tensor, labels: Tensor, start: int, scale: float, cap: float,
    maximum: Tensor, total: Tensor, target: Tensor, likeliest: Tensor,
) -> None:  # fmt: skip
    """Takes the logits [rows, block] of the tokens from `start` on into what is known of each position [rows]:

    the largest logit, the sum of exp(logit - largest), the label's logit, and the likeliest token (the running maximum
    and the sum relative to it: arXiv:1805.02867). A family's rule comes before, as in `cross_entropy`.
    What the logits hold afterwards is nobody's.
    """
    for part in _row_parts(logits):
        exact, _ = _ruled(logits[part], scale, cap, wants_slope=False)
        best, place = exact.max(dim=1)
        before = maximum[part]
        likeliest[part] = torch.where(best > before, place + start, likeliest[part])
        inside, local = _in_block(labels[part], start, logits.shape[1])
        target[part] = torch.where(inside, exact.gather(1, local.unsqueeze(1)).squeeze(1), target[part])
        highest = torch.maximum(before, best)
        sums = exact.sub_(highest.unsqueeze(1)).exp_().sum(dim=1)
        total[part] = total[part] * (before - highest).exp() + sums
        maximum[part] = highest


def cross_entropy_block_gradient(
    logits: Tensor, labels: Tensor, start: int, scale: float, cap: float, normalizer: Tensor
) -> None:
    """Writes d NLL / d logits over the logits [rows, block] of the tokens from `start` on; normalizer: [rows]."""
    for part in _row_parts(logits):
        low = logits[part]
        exact, capped = _ruled(low, scale, cap, wants_slope=True)
        exact = exact.sub_(normalizer[part].unsqueeze(1)).exp_()
        inside, local = _in_block(labels[part], start, logits.shape[1])
        exact.scatter_add_(1, local.unsqueeze(1), -inside.to(exact.dtype).unsqueeze(1))
        _write_slope(exact, capped, scale, low)


def _row_parts(logits: Tensor) -> Iterator[slice]:
    rows = max(1, _piece(logits) // logits.shape[1])
    return (slice(start, start + rows) for start in range(0, len(logits), rows))


def _ruled(low: Tensor, scale: float, cap: float, *, wants_slope: bool) -> tuple[Tensor, Tensor | None]:
    """Logits under a family's rule, in fp32 or wider (in place where they are), and d capped / d scaled."""
    exact = low.to(torch.promote_types(low.dtype, torch.float32))
    if scale != 1.0:
        exact = exact.mul_(scale)
    if not cap:
        return exact, None
    exact = exact.div_(cap).tanh_()
    capped = 1 - exact.square() if wants_slope else None
    return exact.mul_(cap), capped


def _write_slope(slope: Tensor, capped: Tensor | None, scale: float, out: Tensor) -> None:
    """The gradient through the rule, where the logits were."""
    if capped is not None:
        slope *= capped
    if scale != 1.0:
        slope *= scale
    if slope is not out:
        out.copy_(slope)


def _in_block(labels: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Which labels lie in a block of the vocabulary, and their places in it (0 for the others)."""
    inside = (labels >= start) & (labels < start + width)
    return inside, torch.where(inside, labels - start, 0)


# --- a product of 16-bit tensors in fp32 ----------------------------------------------------------------------------


def product_in(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right as another type than theirs."""
    return on_cpu.mm(left, right).to(dtype)


# --- a layer's packed weights, from where they wait -----------------------------------------------------------------


def load_layer(block: Tensor, home: Tensor) -> None:
    """Copies `home` [bytes] into `block` [bytes] on the device; from pinned memory without being waited for."""
    block.copy_(home, non_blocking=True)


# --- 4-bit weights with double quantization (arXiv:2305.14314) ------------------------------------------------------


def dequantize_nested(
    codes: Tensor, absmax: Tensor, absmax_code: Tensor, absmax_scale: Tensor, offset: Tensor, code: Tensor,
    shape: list[int], block: int, kind: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The weight of packed 4-bit codes whose absmax is 8-bit codes itself, as bitsandbytes computes it."""
    ops = torch.ops.bitsandbytes
    exact = ops.dequantize_blockwise.default(absmax, absmax_scale, absmax_code, NESTED_BLOCK, torch.float32).add_(
        offset
    )
    weight: Tensor = ops.dequantize_4bit.default(codes, exact, block, kind, shape, dtype)
    return weight


NESTED_BLOCK = 256
"""Codes of absmax with one scale between them; bitsandbytes knows no other number for it."""


def nested_arguments(codes: Tensor, state: QuantState) -> tuple[Any, ...]:
    """What `dequantize_nested` takes, of a weight with double quantization."""
    nested = state.state2
    return (
        codes, state.absmax, nested.code, nested.absmax, state.offset, state.code,
        list(state.shape), state.blocksize, state.quant_type, state.dtype,
    )  # fmt: skip
