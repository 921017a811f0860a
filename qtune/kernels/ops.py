"""The operations `torch.ops.qtune.*`, by PyTorch's own operations; on CUDA cards by Triton, where that works.

Each is one operation to whoever watches a step, so that a trace sees the same on every device: its inputs, its outputs
and nothing between. None of them has a gradient: they are called inside of autograd functions.
"""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

_SCHEMAS = (
    "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd) -> Tensor",
    "rotate(Tensor x, Tensor cos, Tensor sin, bool back) -> Tensor",
    "gated(Tensor gate, Tensor up, str activation, Tensor(a!) out) -> ()",
    "gated_backward(Tensor(a!) grad, Tensor gate, Tensor up, str activation, Tensor(b!) d_gate, Tensor(c!) d_up) -> ()",
    "cross_entropy(Tensor(a!) logits, Tensor labels, float scale, float cap, bool slope, Tensor(b!) nll, "
    "Tensor(c!) correct) -> ()",
    "product_in(Tensor left, Tensor right, ScalarType dtype) -> Tensor",
    "dequantize_nested(Tensor codes, Tensor absmax, Tensor absmax_code, Tensor absmax_scale, Tensor offset, "
    "Tensor code, int[] shape, int block, str kind, ScalarType dtype) -> Tensor",
)
_library = torch.library.Library("qtune", "DEF")
for _schema in _SCHEMAS:
    _library.define(_schema)

PIECE = 2**16
"""Elements that a CPU takes at once: what is needed beside inputs and outputs stays in its cache."""


@functools.cache
def card_kernel(name: str) -> Callable[..., Any] | str:
    """The Triton kernel of an operation; why not, where it does not give on this card what PyTorch's operations give.

    Asked once in a process, before its first use: in each type that the card computes in. What can fail is whatever a
    compiler may say (Triton needs a C compiler at run time), and there is a second way to compute the same.
    """
    try:
        from qtune.kernels import comparison, on_cuda

        kernel: Callable[..., Any] = getattr(on_cuda, name)
        for dtype, tolerance in comparison.TOLERANCES.items():
            if dtype is torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
                continue
            found = comparison.difference(name, kernel, dtype)
            if not found <= tolerance:
                return f"differs by {found:.1e} in {str(dtype).removeprefix('torch.')}"
    except Exception as error:
        log.debug("Triton kernel %s", name, exc_info=True)
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return kernel


def without_kernels() -> dict[str, str]:
    """Operations for which PyTorch's own are used on this card, each with the reason."""
    from qtune.kernels import comparison

    found = {name: card_kernel(name) for name in comparison.COMPARED}
    return {name: reason for name, reason in found.items() if isinstance(reason, str)}


def _implemented(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers an implementation for every device, and the kernel of `on_cuda` before it on cards."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        def on_card(*args: Any) -> Any:
            kernel = card_kernel(name)
            return (function if isinstance(kernel, str) else kernel)(*args)

        _library.impl(name, function, "CPU")
        _library.impl(name, on_card, "CUDA")
        return function

    return register


def _shaped_by(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Says what an operation returns, for tensors without storage."""
    return torch.library.register_fake(f"qtune::{name}", lib=_library)


# --- root mean square normalization (arXiv:1910.07467) --------------------------------------------------------------


@_implemented("rms_norm")
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """weight · (x / rms(x)) [..., width], rounded before the weight as in transformers; 1 / rms [..., 1] in fp32."""
    x = x.contiguous()
    exact = x.float()
    rstd = torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    return (exact * rstd).to(x.dtype).mul_(weight), rstd


@_shaped_by("rms_norm")
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(
        (*x.shape[:-1], 1), dtype=torch.float32
    )


@_implemented("rms_norm_backward")
def _rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """d loss / d x, [..., width]."""
    normal = x.contiguous().float() * rstd  # not in place: in fp32 it is x
    slope = (grad * weight).float()
    slope -= normal.mul_((slope * normal).mean(-1, keepdim=True))
    return slope.mul_(rstd).to(x.dtype)


@_shaped_by("rms_norm_backward")
def _(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# --- rotary position embedding (arXiv:2104.09864) -------------------------------------------------------------------


@_implemented("rotate")
def _rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """x [batch, heads, length, head_dim] turned by its positions' angles [1 or batch, length, head_dim]; or back."""
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


@_shaped_by("rotate")
def _(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    return torch.empty_like(x)


# --- gated activations (arXiv:2002.05202) ---------------------------------------------------------------------------


def _activated(x: Tensor, activation: str) -> Tensor:
    return torch.nn.functional.silu(x) if activation == "silu" else torch.nn.functional.gelu(x, approximate="tanh")


def _through_activation(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, x)
    return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")


@_implemented("gated")
def _gated(gate: Tensor, up: Tensor, activation: str, out: Tensor) -> None:
    """out = act(gate) · up; `out` may be one of them."""
    for g, u, o in _in_pieces(gate, up, out):
        torch.mul(_activated(g, activation), u, out=o)


@_implemented("gated_backward")
def _gated_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str, d_gate: Tensor, d_up: Tensor) -> None:
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
    return zip(*(tensor.view(-1).split(PIECE) for tensor in tensors), strict=True)


@_shaped_by("gated")
def _(gate: Tensor, up: Tensor, activation: str, out: Tensor) -> None:
    return None


@_shaped_by("gated_backward")
def _(grad: Tensor, gate: Tensor, up: Tensor, activation: str, d_gate: Tensor, d_up: Tensor) -> None:
    return None


# --- cross-entropy of a tile of logits -----------------------------------------------------------------------------


@_implemented("cross_entropy")
def _cross_entropy(
    logits: Tensor, labels: Tensor, scale: float, cap: float, slope: bool, nll: Tensor, correct: Tensor
) -> None:
    """Negative log-likelihood [rows] of `labels` [rows] under logits [rows, vocab], and whether each is the likeliest.

    A family's rule comes before: cap · tanh(scale · x / cap); cap = 0: only the scale. With `slope` the gradient of
    the likelihood with respect to the logits as given is written over them; without it what they hold then is nobody's.
    """
    rows = max(1, PIECE // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    for start in range(0, len(logits), rows):
        part = slice(start, start + rows)
        low, target = logits[part], labels[part].unsqueeze(1)
        exact = low.to(torch.promote_types(low.dtype, torch.float32))
        if scale != 1.0:
            exact = exact.mul_(scale)
        if cap:
            exact = exact.div_(cap).tanh_()
        capped = 1 - exact.square() if cap and slope else None
        if cap:
            exact = exact.mul_(cap)
        correct[part] = exact.argmax(dim=1) == labels[part]
        normalizer = exact.logsumexp(dim=1, keepdim=True)
        nll[part] = (normalizer - exact.gather(1, target)).squeeze(1)
        if not slope:
            continue
        exact = exact.sub_(normalizer).exp_()  # d nll / d logits = softmax - onehot
        exact.scatter_add_(1, target, torch.full_like(target, -1, dtype=exact.dtype))
        if capped is not None:
            exact *= capped
        if scale != 1.0:
            exact *= scale
        if exact is not low:
            low.copy_(exact)


@_shaped_by("cross_entropy")
def _(logits: Tensor, labels: Tensor, scale: float, cap: float, slope: bool, nll: Tensor, correct: Tensor) -> None:
    return None


# --- a product of 16-bit tensors in fp32 ----------------------------------------------------------------------------


def _product_in(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right as another type than theirs."""
    return (left @ right).to(dtype)


def _product_in_on_cuda(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """cuBLAS keeps the sum that it has in fp32."""
    if dtype is left.dtype or not _keeps_sums(left.dtype, dtype):
        return _product_in(left, right, dtype)
    return torch.mm(left, right, out_dtype=dtype)


@functools.cache
def _keeps_sums(low: torch.dtype, high: torch.dtype) -> bool:
    """Whether this card's library multiplies in one type and writes in the other (`out_dtype`, torch 2.8 and newer)."""
    one = torch.ones(16, 16, device="cuda", dtype=low)
    try:
        torch.mm(one, one, out_dtype=high)
    except (RuntimeError, TypeError):
        return False
    return True


_library.impl("product_in", _product_in, "CPU")
_library.impl("product_in", _product_in_on_cuda, "CUDA")


@_shaped_by("product_in")
def _(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    return left.new_empty((left.shape[0], right.shape[1]), dtype=dtype)


# --- 4-bit weights with double quantization (arXiv:2305.14314) ------------------------------------------------------


@_implemented("dequantize_nested")
def _dequantize_nested(
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


@_shaped_by("dequantize_nested")
def _(codes: Tensor, absmax: Tensor, absmax_code: Tensor, absmax_scale: Tensor, offset: Tensor, code: Tensor,
      shape: list[int], block: int, kind: str, dtype: torch.dtype) -> Tensor:  # fmt: skip
    return codes.new_empty(shape, dtype=dtype)


NESTED_BLOCK = 256
"""Codes of absmax with one scale between them; bitsandbytes knows no other number for it."""


def dequantized(codes: Tensor, state: bnb.QuantState) -> Tensor:
    """The weight [out, in] of a `Linear4bit`, in the type that it was quantized from."""
    if not state.nested or state.state2.blocksize != NESTED_BLOCK or state.state2.dtype is not torch.float32:
        return bnb.dequantize_4bit(codes, state)
    weight: Tensor = torch.ops.qtune.dequantize_nested.default(*nested_arguments(codes, state))
    return weight


def nested_arguments(codes: Tensor, state: bnb.QuantState) -> tuple[Any, ...]:
    """What `dequantize_nested` takes, of a weight with double quantization."""
    nested = state.state2
    return (
        codes, state.absmax, nested.code, nested.absmax, state.offset, state.code,
        list(state.shape), state.blocksize, state.quant_type, state.dtype,
    )  # fmt: skip
