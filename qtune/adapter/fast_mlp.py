"""A gated MLP with LoRA on its layers, down(act(gate(x)) · up(x)), as one autograd function.

Of its five tensors as wide as the intermediate size only two are saved, or none: under gradient checkpointing the
function saves its input alone and computes gate and up anew in its own backward, in tiles of rows. The layer's
recomputation then ends where the MLP begins, for nothing of it is waited for: the down product, a third of the MLP, is
computed once and not twice, and nothing of the size [rows, intermediate] is alive in the backward.

Tiling along the sequence: ALST (arXiv:2506.13996, section 3.1).
"""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import GELUTanh, SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP

import qtune.kernels.ops  # noqa: F401  (defines torch.ops.qtune)
from qtune.adapter.fast_lora import is_ours, require_unchanged
from qtune.adapter.products import Layer, Stack
from qtune.model.same_code import computes_the_same
from qtune.sizes import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_ops: Any = torch.ops.qtune

TILE_BYTES = 32 * MIB
"""Of a tile [rows, intermediate] at least, where there are so many rows: below, launches would cost more than they
save. A small model's step of 8,192 tokens is one tile."""


def activation_of(module: nn.Module) -> str | None:
    """The activation that a module is, where it is one of the two that gated MLPs use."""
    if type(module) in (SiLUActivation, nn.SiLU):
        return "silu"
    if type(module) is GELUTanh and isinstance(module.act, functools.partial):
        return "gelu_tanh"
    return None


@dataclass(frozen=True)
class Mlp:
    """The layers of a gated MLP."""

    into: Stack
    """gate, up"""
    down: Stack
    activation: str
    """Of `torch.ops.qtune.gated`."""
    layer: Any
    """Of the model, whose switch says whether it is checkpointed; None where it has none."""
    tile_bytes: int
    """Of a tile at least."""

    @property
    def recompute(self) -> bool:
        """Whether the backward computes gate and up again: under checkpointing nothing but the input is kept."""
        return bool(getattr(self.layer, "gradient_checkpointing", False))

    def parameters(self) -> list[nn.Parameter]:
        """A and B of gate, up and down, in turn."""
        return [*self.into.parameters(), *self.down.parameters()]

    @property
    def least_rows(self) -> int:
        """Of a tile, where there are more."""
        hidden, wide = self.into.layers[0].a.shape[1], self.into.layers[0].b.shape[0]
        return max(hidden, self.tile_bytes // (2 * wide))

    def tiles(self, rows: int, times: int = 1) -> Iterator[slice]:
        """Rows that are computed at once: [tile, intermediate] is as large as the weight that it is multiplied with,
        so that dequantizing the weights once for each tile stays a small part of multiplying with them; or larger."""
        most = times * self.least_rows
        count = max(1, -(-rows // most))
        size = -(-rows // count)
        for start in range(0, rows, size):
            yield slice(start, min(start + size, rows))


class _Keep(torch.autograd.Function):
    """Saves x before the MLP is computed, so that a checkpoint's recomputation stops before it.

    (torch/utils/checkpoint.py: recomputing ends when the last tensor that the forward saved is there again.)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, _: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatedMlp(torch.autograd.Function):
    """(x [..., hidden], the node that keeps x or None, MLP, its parameters) -> [..., hidden]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Any, mlp: Mlp, *parameters: Tensor) -> Tensor:
        ctx.versions = mlp.into.up_to_date(x.dtype), mlp.down.up_to_date(x.dtype)
        rows = x.reshape(-1, x.shape[-1])
        output = rows.new_empty(len(rows), mlp.down.layers[0].b.shape[0])
        # A tile is half of what the backward holds.
        for tile in [slice(0, len(rows))] if kept is None else mlp.tiles(len(rows), times=2):
            gate, up, u = _gate_and_up(mlp, rows[tile])
            if kept is None:
                ctx.save_for_backward(x, gate, up, u)
            inside = torch.empty_like(gate) if kept is None else gate
            _ops.gated.default(gate, up, mlp.activation, inside)
            del gate, up, u
            mlp.down.output(0, inside, mlp.down.inner(inside), out=output[tile])
            del inside
        ctx.mlp, ctx.kept = mlp, kept
        return output.view(*x.shape[:-1], output.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        mlp: Mlp = ctx.mlp
        for stack, versions in zip((mlp.into, mlp.down), ctx.versions, strict=True):
            require_unchanged(stack, versions)
        if ctx.kept is None:
            x, *saved = ctx.saved_tensors
        else:
            (x,), saved = ctx.kept.saved_tensors, []
            ctx.kept = None
        rows, grads = x.reshape(-1, x.shape[-1]), grad_output.reshape(-1, grad_output.shape[-1])
        dx = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        total: list[Tensor] | None = None
        for tile in [slice(0, len(rows))] if saved else mlp.tiles(len(rows)):
            given = list(saved or _gate_and_up(mlp, rows[tile]))
            found = _backward(mlp, rows[tile], grads[tile], given, None if dx is None else dx[tile], is_own=not saved)
            total = found if total is None else [sum_ + part for sum_, part in zip(total, found, strict=True)]
        assert total is not None
        into, down = total[:3], total[3:]
        weights = [*mlp.into.by_parameter(into), *mlp.down.by_parameter(down)]
        return None if dx is None else dx.view(x.shape), None, None, *weights


def _gate_and_up(mlp: Mlp, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """gate and up [rows, intermediate], and their inner products."""
    u = mlp.into.inner(x)
    return mlp.into.output(0, x, u), mlp.into.output(1, x, u), u


def _backward(
    mlp: Mlp, x: Tensor, grad: Tensor, given: list[Tensor], dx: Tensor | None, *, is_own: bool
) -> list[Tensor]:
    """Gradients of the weights, those of gate and up and those of down; that of x is written into `dx`.

    given: gate, up and their inner products. is_own: they were computed for this; their gradients are written over
    them, and three tensors [rows, intermediate] are all there is. Otherwise they are autograd's.
    """
    gate, up, u = given
    given.clear()
    du_down = mlp.down.inner_gradient([grad], len(grad))
    inside = mlp.down.input_gradient([grad], du_down)
    d_gate, d_up = (gate, up) if is_own else (torch.empty_like(gate), torch.empty_like(up))
    _ops.gated_backward.default(inside, gate, up, mlp.activation, d_gate, d_up)
    del gate, up
    down = mlp.down.weight_gradients(inside, mlp.down.inner(inside), [grad], du_down)
    del inside
    du = mlp.into.inner_gradient([d_gate, d_up], len(grad))
    into = mlp.into.weight_gradients(x, u, [d_gate, d_up], du)
    if dx is not None:
        mlp.into.input_gradient([d_gate, d_up], du, out=dx)
    return [*into, *down]


def gated_mlp(module: Any, layers: dict[str, Layer], layer: Any, tile_bytes: int) -> Mlp | None:
    """The MLP of a module whose code is LlamaMLP's, whatever its family calls it, with LoRA on all three layers.

    layer: of the model, that it is in.
    """
    if not computes_the_same(type(module).forward, LlamaMLP.forward):
        return None
    names = ("gate_proj", "up_proj", "down_proj")
    activation = activation_of(module.act_fn)
    if activation is None or any(name not in layers or layers[name].has_dropout for name in names):
        return None
    gate, up, down = (layers[name] for name in names)
    return Mlp(Stack([gate, up]), Stack([down]), activation, layer, tile_bytes)


def take_over_mlp(module: Any, mlp: Mlp) -> None:
    """Gives a module our forward for training; every other call stays what it was, but that without gradients many rows
    go through it tile by tile: an evaluation should need no more than a step."""
    original: Callable[..., Tensor] = module.forward
    layers: Sequence[Layer] = [*mlp.into.layers, *mlp.down.layers]

    def forward(self: Any, x: Tensor) -> Tensor:
        dtype = is_ours(x, layers)
        if dtype is None or dtype != x.dtype:
            return original(x) if torch.is_grad_enabled() else _in_tiles(original, x, 2 * mlp.least_rows)
        parameters = mlp.parameters()
        if not mlp.recompute:
            plain: Tensor = _GatedMlp.apply(x, None, mlp, *parameters)
            return plain
        kept = _Keep.apply(x, parameters[0])
        recomputed: Tensor = _GatedMlp.apply(kept, kept.grad_fn, mlp, *parameters)
        return recomputed

    module.forward = types.MethodType(forward, module)


def _in_tiles(original: Callable[..., Tensor], x: Tensor, most: int) -> Tensor:
    """What a module that treats every row [hidden] alone makes of x [..., hidden], `most` rows at once."""
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) <= most:
        return original(x)
    out: Tensor | None = None
    for start in range(0, len(rows), most):
        part = original(rows[start : start + most])
        if out is None:
            out = part.new_empty(len(rows), part.shape[-1])
        out[start : start + most] = part
        del part  # or the next one would come beside it
    assert out is not None
    return out.view(*x.shape[:-1], out.shape[-1])
