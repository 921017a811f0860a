"""What CUDA does otherwise than the CPU kernels that a trace runs on, as far as it changes memory.

(`device_state.py` answers what the libraries ask before they call a kernel.)

Each difference is in the source of the library that is named beside it. Nothing here is fitted to a measurement.
"""

from __future__ import annotations

import functools
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from qtune.memory.tracing.fake_tensors import CPU, WHERE
from qtune.sizes import KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Workspace = list[tuple[int, str]]
"""Temporary buffers of a kernel: bytes and a name."""

# CUDA autocast runs these in fp32; CPU autocast leaves them alone (torch docs, "CUDA Ops that can autocast to float32";
# aten/src/ATen/autocast_mode.h, AT_FORALL_FP32). Only those that causal LMs call.
_FP32_UNDER_AUTOCAST: frozenset[Any] = frozenset(
    {
        functional.layer_norm, torch.layer_norm, functional.group_norm, functional.softmax, torch.softmax,
        torch.Tensor.softmax, functional.log_softmax, torch.log_softmax, functional.cross_entropy,
        functional.nll_loss, functional.softplus, torch.pow, torch.Tensor.pow, torch.Tensor.__pow__, torch.rsqrt,
        torch.Tensor.rsqrt, torch.exp, torch.Tensor.exp, torch.log, torch.Tensor.log, torch.sum, torch.Tensor.sum,
        torch.cumsum, torch.Tensor.cumsum, torch.prod, torch.Tensor.prod, torch.norm, torch.Tensor.norm,
    }
)  # fmt: skip

_FLASH_ROUNDING = 128
"""Rows of the fp32 gradient accumulator are padded to blocks of 128 (flash_api.cpp, mha_bwd)."""


Capability = tuple[int, int]
"""CUDA compute capability of a card."""

TODAYS_CARD = (8, 9)
"""What is taken of a card of which nothing is known: bfloat16, flash attention."""


class CudaKernels(TorchFunctionMode):
    """While tracing: dropout with a bool mask, the card's choice of attention, fp32 operations under autocast."""

    def __init__(self, capability: Capability) -> None:
        super().__init__()
        self.capability = capability

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is WHERE:
            return CPU
        kwargs = kwargs or {}
        if func is torch.autograd.backward:
            return self._backward(args[0], kwargs.get("grad_tensors"))
        if func is functional.dropout:
            return self._dropout(*args, **kwargs)
        if func is functional.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func in _FP32_UNDER_AUTOCAST and torch.is_autocast_enabled("cpu"):
            args = tuple(_widened(arg) for arg in args)
        return func(*args, **kwargs)

    def _backward(self, loss: torch.Tensor | tuple[torch.Tensor, ...], gradients: Any = None) -> None:
        """A mode is suspended inside its own handler, and torch 2.13 hands the backward to it (autograd/__init__.py):
        what checkpointing recomputes there would not be CUDA's. So the engine is started with the mode back on."""
        outputs = (loss,) if isinstance(loss, torch.Tensor) else tuple(loss)
        given = (None,) * len(outputs) if gradients is None else gradients
        seeds = tuple(
            torch.ones_like(output) if seed is None and output.requires_grad else seed
            for output, seed in zip(outputs, given, strict=True)
        )
        with self:
            torch.autograd.graph._engine_run_backward(
                outputs, seeds, False, False, (), allow_unreachable=True, accumulate_grad=True
            )

    def _attention(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
        """PyTorch's choice among its kernels (torch 2.13, transformers/cuda/sdp_utils.cpp).

        Flash attention, and cuDNN's, share keys between heads (`enable_gqa`) but want 16 bits and Ampere; the memory-
        efficient kernel wants as many keys as queries; what neither takes is computed plainly, with the weights
        [batch, heads, length, length] in fp32. The fused ones keep the same: the output and a number for each row.
        """
        # Fused kernels keep a seed of the dropout, not a mask; with one the CPU would compute plainly.
        options |= {"dropout_p": 0.0}
        has_shared_keys = options.get("enable_gqa", False) and key.shape[-3] != query.shape[-3]
        # Attention is one of the operations that autocast gives 16 bits, but not what it falls back to.
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
        is_flash = self.capability >= (8, 0) and dtype in (torch.bfloat16, torch.float16)
        if has_shared_keys and not is_flash:
            low = (tensor.to(dtype) for tensor in (query, key, value))
            found: torch.Tensor = torch.ops.aten._scaled_dot_product_attention_math(*low, **options)[0]
            return found
        return functional.scaled_dot_product_attention(query, key, value, **options)

    @staticmethod
    def _dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        if p == 0 or not training:
            return x
        # aten/src/ATen/native/Dropout.cpp: the fused kernel keeps a mask of one byte for each element.
        return torch.native_dropout(x, p, True)[0]


def _widened(arg: Any) -> Any:
    if isinstance(arg, torch.Tensor) and arg.dtype in (torch.bfloat16, torch.float16):
        return arg.float()
    return arg


def workspace(func: Any, args: Sequence[Any], cuda: bool) -> Workspace:
    """The buffers that a kernel takes for itself, alive beside its inputs and outputs."""
    buffers = _buffers_of(func.__name__, cuda)
    return [] if buffers is None else buffers(args)


@functools.cache
def _buffers_of(name: str, cuda: bool) -> Callable[[Sequence[Any]], Workspace] | None:
    """Those of the kernels with this name; None where they take no more than their results."""
    if name.startswith("gemm_4bit"):
        return functools.partial(_four_bit_product, cuda=cuda)
    if name.startswith("logsumexp"):
        return _logsumexp
    if not cuda:
        return None
    if name.startswith("_scaled_dot_product_") and "attention" in name and "backward" in name:
        return _attention_backward
    if name.startswith("int8_mixed_scaled_mm"):
        return _int8_product
    return _int8_rows if name.startswith("int8_vectorwise_quant") else None


def _logsumexp(args: Sequence[Any]) -> Workspace:
    """Its own operations are not seen from outside (ReduceOps.cpp, logsumexp_out_impl)."""
    return [(args[0].numel() * args[0].element_size(), "shifted exponentials (inside logsumexp)")]


def _int8_product(args: Sequence[Any]) -> Workspace:
    """The int32 product and its fp16 form, of bitsandbytes 0.50's `int8_scaled_mm` and CUDA `int8_mm_dequant`.

    x: [..., in]; codes of the weight: [out, in]. fp16 is what comes out; any other type is a copy of it.
    """
    x, codes = args[0], args[2]
    outputs = x.numel() // x.shape[-1] * codes.shape[0]
    product = (outputs * 4, "int32 product (inside int8_mixed_scaled_mm)")
    if x.dtype is torch.float16:
        return [product]
    return [product, (outputs * 2, "fp16 product (inside int8_mixed_scaled_mm)")]


def _int8_rows(args: Sequence[Any]) -> Workspace:
    """The magnitudes of x and whether each is an outlier (bitsandbytes 0.50, CUDA `int8_vectorwise_quant`)."""
    x = args[0]
    return [
        (x.numel() * x.element_size(), "magnitudes (inside int8_vectorwise_quant)"),
        (x.numel(), "outliers (inside int8_vectorwise_quant)"),
    ]


def _four_bit_product(args: Sequence[Any], cuda: bool) -> Workspace:
    """The dequantized weight and absmax of bitsandbytes 0.50's `_dequant_linear_fallback` (CUDA holds absmax twice).

    CUDA takes this way above 1536 rows; below, whether a fused kernel runs depends on the card, and this is the most.
    """
    x, _, shape = args[:3]
    buffers = [(prod(shape) * x.element_size(), "dequantize_4bit (inside gemm_4bit)")]
    if len(args) > 7 and args[7] is not None:
        buffers += [(args[7].numel() * 4, "dequantize absmax (inside gemm_4bit)")] * (2 if cuda else 1)
    return buffers


def _attention_backward(args: Sequence[Any]) -> Workspace:
    """PyTorch's flash attention backward (flash_api.cpp, mha_bwd): fp32 dq, row sums, and dk and dv for every head.

    query: [batch, heads, length, head_dim]. The memory-efficient kernel, taken when there is a mask, holds an fp32
    accumulator of the same size (mem_eff_attention/kernel_backward.h, workspace_size).
    """
    query, key = args[1], args[2]
    batch, heads, length, head_dim = query.shape
    rows = -(-length // _FLASH_ROUNDING) * _FLASH_ROUNDING
    wide = -(-head_dim // 32) * 32
    gradients = [
        (batch * heads * rows * wide * 4, "dq accumulator (inside attention backward)"),
        (batch * heads * rows * 4, "row sums (inside attention backward)"),
    ]
    if key.shape[1] != heads:
        each = batch * key.shape[2] * heads * head_dim * key.element_size()
        gradients.append((2 * each, "expanded dk and dv (inside attention backward)"))
    return gradients


WORKSPACE_BYTES = 32 * MIB

OLDER_WORKSPACE_BYTES = 8320 * KIB
"""cuBLAS' workspace inside the allocator, on Hopper and later and before it: 4096 KiB x 8, 4096 KiB x 2 + 16 KiB x 8
(PyTorch docs, "CUDA semantics", cuBLAS workspaces). Each thread that multiplies has one: the forward's, the backward's.
The peak of the allocator was two of 32 MiB above the tensors in every run."""


def workspace_bytes(card: Capability) -> int:
    """One cuBLAS workspace on a card of this capability."""
    return WORKSPACE_BYTES if card >= (9, 0) else OLDER_WORKSPACE_BYTES
