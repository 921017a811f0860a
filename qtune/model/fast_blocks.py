"""Norms and rotary embeddings of a transformers model, each as one operation forward and one backward.

transformers writes an RMSNorm in eight operations and a rotation in five for q and five for k, each of which reads and
writes everything. What is replaced is known by its code: a family that computes anything else keeps its own.
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

import qtune.kernels.ops  # noqa: F401  (defines torch.ops.qtune)
from qtune.model.same_code import computes_the_same
from qtune.model.short_attention import install_short_attention

if TYPE_CHECKING:
    from collections.abc import Callable

ROTATION = "apply_rotary_pos_emb"
"""What every modeling file of transformers calls the function."""


class _RmsNorm(torch.autograd.Function):
    """(x [..., width], frozen weight [width], epsilon) -> [..., width]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd = torch.ops.qtune.rms_norm.default(x, weight, eps)
        ctx.save_for_backward(x, rstd)
        ctx.weight = weight  # frozen
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, rstd = ctx.saved_tensors
        return torch.ops.qtune.rms_norm_backward.default(grad, x, ctx.weight, rstd), None, None


class _Rotation(torch.autograd.Function):
    """(q, k [batch, heads, length, head_dim], cos, sin [1 or batch, length, head_dim]) -> as q, as k.

    Both at once: where the processor is the limit, an operation and its function cost it as much as a large one.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.angles = cos, sin  # of the whole model, and without a gradient
        turned: tuple[Tensor, Tensor] = torch.ops.qtune.rotate.default(q, k, cos, sin, False)
        return turned

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_q: Tensor, d_k: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return *torch.ops.qtune.rotate.default(d_q, d_k, *ctx.angles, True), None, None


def install_fast_blocks(model: nn.Module) -> None:
    """Replaces what can be replaced in a model whose norms are frozen, for calls that want a gradient."""
    install_short_attention()
    for module in model.modules():
        if "forward" in vars(module):  # somebody else's already
            continue
        if computes_the_same(type(module).forward, LlamaRMSNorm.forward):
            _take_over_norm(module)
        elif _turns(type(module).forward):
            _take_over_rotation(module)


def _take_over_norm(module: Any) -> None:
    original: Callable[..., Tensor] = module.forward

    def forward(self: Any, x: Tensor) -> Tensor:
        weight = self.weight
        if not torch.is_grad_enabled() or weight.requires_grad or weight.dtype != x.dtype:
            return original(x)
        y: Tensor = _RmsNorm.apply(x, weight, self.variance_epsilon)
        return y

    module.forward = types.MethodType(forward, module)


def _turns(forward: Any) -> bool:
    """Whether a module's forward calls its file's rotation, and that is Llama's."""
    code, known = getattr(forward, "__code__", None), getattr(forward, "__globals__", {})
    if code is None or hasattr(forward, "__wrapped__") or ROTATION not in code.co_names:
        return False
    return ROTATION in known and computes_the_same(known[ROTATION], apply_rotary_pos_emb)


def _take_over_rotation(module: Any) -> None:
    """The same forward, which finds our rotation under the name of its own; nothing changes for other modules."""
    theirs = type(module).forward
    ours = types.FunctionType(
        theirs.__code__,
        {**theirs.__globals__, ROTATION: rotated},
        theirs.__name__,
        theirs.__defaults__,
        theirs.__closure__,
    )
    ours.__kwdefaults__ = theirs.__kwdefaults__
    module.forward = types.MethodType(ours, module)


def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """`apply_rotary_pos_emb` of transformers 5.23: q and k [batch, heads, length, head_dim], turned."""
    fits = q.dim() == 4 and cos.dim() == 3 and cos.shape[-1] == q.shape[-1] == k.shape[-1]
    same = q.dtype == k.dtype == cos.dtype and q.shape[0] == k.shape[0] and q.shape[2] == k.shape[2]
    if not (torch.is_grad_enabled() and fits and same and unsqueeze_dim == 1):
        turned: tuple[Tensor, Tensor] = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        return turned
    both: tuple[Tensor, Tensor] = _Rotation.apply(q, k, cos, sin)
    return both
