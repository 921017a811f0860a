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

from qtune.device.present import is_out_of_memory
from qtune.errors import first_line
from qtune.kernels import comparison, plain

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

_SCHEMAS = (
    "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd) -> Tensor",
    "rotate(Tensor q, Tensor k, Tensor cos, Tensor sin, bool back) -> (Tensor, Tensor)",
    "gated(Tensor gate, Tensor up, str activation, Tensor(a!) out) -> ()",
    "gated_backward(Tensor(a!) grad, Tensor gate, Tensor up, str activation, Tensor(b!) d_gate, Tensor(c!) d_up) -> ()",
    "cross_entropy(Tensor(a!) logits, Tensor labels, float scale, float cap, bool slope, Tensor(b!) nll, "
    "Tensor(c!) correct) -> ()",
    "cross_entropy_block(Tensor(a!) logits, Tensor labels, int start, float scale, float cap, Tensor(b!) maximum, "
    "Tensor(c!) total, Tensor(d!) target, Tensor(e!) likeliest) -> ()",
    "cross_entropy_block_gradient(Tensor(a!) logits, Tensor labels, int start, float scale, float cap, "
    "Tensor normalizer) -> ()",
    "product_in(Tensor left, Tensor right, ScalarType dtype) -> Tensor",
    "load_layer(Tensor(a!) block, Tensor home) -> ()",
    "dequantize_nested(Tensor codes, Tensor absmax, Tensor absmax_code, Tensor absmax_scale, Tensor offset, "
    "Tensor code, int[] shape, int block, str kind, ScalarType dtype) -> Tensor",
)
_library = torch.library.Library("qtune", "DEF")
for _schema in _SCHEMAS:
    _library.define(_schema)


@functools.cache
def card_kernel(name: str) -> Callable[..., Any] | str:
    """The Triton kernel of an operation; why not, where it does not give on this card what PyTorch's operations give.

    Asked once in a process, before its first use: in each type that the card computes in. What can fail is whatever a
    compiler may say (Triton needs a C compiler at run time), and there is a second way to compute the same.
    """
    try:
        from qtune.kernels import on_cuda

        kernel: Callable[..., Any] = getattr(on_cuda, name)
        for dtype, tolerance in comparison.TOLERANCES.items():
            if dtype is torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
                continue
            found = comparison.difference(name, kernel, dtype)
            if not found <= tolerance:
                return f"differs by {found:.1e} in {str(dtype).removeprefix('torch.')}"
    except Exception as error:
        log.debug("Triton kernel %s", name, exc_info=True)
        return _reason(error)
    return kernel


def _reason(error: BaseException) -> str:
    """What went wrong at the bottom: Triton's compiler raises again for each function that calls the failing one, with
    its source as the message and what it has to say in an attribute."""
    while error.__cause__ is not None:
        error = error.__cause__
    said = getattr(error, "error_message", None)
    return said.strip() if isinstance(said, str) and said.strip() else first_line(error)


def without_kernels() -> dict[str, str]:
    """Operations for which PyTorch's own are used on this card, each with the reason."""
    found = {name: card_kernel(name) for name in comparison.COMPARED}
    return {name: reason for name, reason in found.items() if isinstance(reason, str)}


def dequantized(codes: Tensor, state: bnb.QuantState) -> Tensor:
    """The weight [out, in] of a `Linear4bit`, in the type that it was quantized from."""
    if not state.nested or state.state2.blocksize != plain.NESTED_BLOCK or state.state2.dtype is not torch.float32:
        return bnb.dequantize_4bit(codes, state)
    weight: Tensor = torch.ops.qtune.dequantize_nested.default(*plain.nested_arguments(codes, state))
    return weight


def _product_in_on_cuda(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """cuBLAS keeps the sum that it has in fp32."""
    if dtype is left.dtype or not _keeps_sums(left.dtype, dtype):
        return plain.product_in(left, right, dtype)
    return torch.mm(left, right, out_dtype=dtype)


@functools.cache
def _keeps_sums(low: torch.dtype, high: torch.dtype) -> bool:
    """Whether this card's library multiplies in one type and writes in the other (`out_dtype`, torch 2.8 and newer),
    with operands as a step has them: in order, transposed, and some columns of a wider one.

    Raises:
        RuntimeError: memory ran out, which says nothing about the library.
    """
    try:
        wide = torch.ones(16, 32, device="cuda", dtype=low)
        layouts = wide[:, :16].contiguous(), wide[:, :16].contiguous().t(), wide[:, :16]
        products = [torch.mm(left, right, out_dtype=high) for left in layouts for right in layouts]
        return all(bool((product == 16).all()) for product in products)
    except (RuntimeError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        return False


def _on_card(name: str) -> Callable[..., Any]:
    """An operation on a card: by its kernel, or as everywhere else."""

    def run(*arguments: Any) -> Any:
        kernel = card_kernel(name)
        return (getattr(plain, name) if isinstance(kernel, str) else kernel)(*arguments)

    return run


for _name in comparison.COMPARED:
    _library.impl(_name, getattr(plain, _name), "CPU")
    _library.impl(_name, _on_card(_name), "CUDA")
_library.impl("product_in", plain.product_in, "CPU")
_library.impl("product_in", _product_in_on_cuda, "CUDA")
_library.impl("load_layer", plain.load_layer, "CPU")
_library.impl("load_layer", plain.load_layer, "CUDA")


# --- what they return, for tensors without storage ------------------------------------------------------------------


def _shaped_by(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Says what an operation returns, for tensors without storage."""
    return torch.library.register_fake(f"qtune::{name}", lib=_library)


@_shaped_by("rms_norm")
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(
        (*x.shape[:-1], 1), dtype=torch.float32
    )


@_shaped_by("rms_norm_backward")
def _(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_shaped_by("rotate")
def _(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k)


@_shaped_by("gated")
def _(gate: Tensor, up: Tensor, activation: str, out: Tensor) -> None:
    return None


@_shaped_by("gated_backward")
def _(grad: Tensor, gate: Tensor, up: Tensor, activation: str, d_gate: Tensor, d_up: Tensor) -> None:
    return None


@_shaped_by("cross_entropy")
def _(logits: Tensor, labels: Tensor, scale: float, cap: float, slope: bool, nll: Tensor, correct: Tensor) -> None:
    return None


@_shaped_by("cross_entropy_block")
def _(logits: Tensor, labels: Tensor, start: int, scale: float, cap: float, maximum: Tensor, total: Tensor,
      target: Tensor, likeliest: Tensor) -> None:  # fmt: skip
    return None


@_shaped_by("cross_entropy_block_gradient")
def _(logits: Tensor, labels: Tensor, start: int, scale: float, cap: float, normalizer: Tensor) -> None:
    return None


@_shaped_by("load_layer")
def _(block: Tensor, home: Tensor) -> None:
    return None


@_shaped_by("product_in")
def _(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    return left.new_empty((left.shape[0], right.shape[1]), dtype=dtype)


@_shaped_by("dequantize_nested")
def _(codes: Tensor, absmax: Tensor, absmax_code: Tensor, absmax_scale: Tensor, offset: Tensor, code: Tensor,
      shape: list[int], block: int, kind: str, dtype: torch.dtype) -> Tensor:  # fmt: skip
    return codes.new_empty(shape, dtype=dtype)
