"""TRL's own training step as a way to compare with: what a competent user's script takes today.

The model, the cast of its adapter and the fused head are TRL's code (1.16, trainer/sft_trainer.py, trainer/utils.py,
kernels/chunked_logprob.py), traced like any other. Only its Triton kernels have stand-ins: operations that touch the
same bytes of tensors that are there.
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import torch
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils

from qtune.adapter.attach import attach_adapter
from qtune.memory.tracing.bare_model import bare_model
from qtune.memory.tracing.device_state import DeviceQuestion, answered_as_on_a_card
from qtune.memory.tracing.step import Step
from qtune.memory.tracing.trace import trace
from qtune.model.quantization import quantization_config
from qtune.recipe.schema import Unquantized

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PretrainedConfig

    from qtune.memory.tracing.cuda import Capability
    from qtune.memory.tracing.step import ParameterGroups
    from qtune.memory.tracing.trace import Traced
    from qtune.plan import Plan
    from qtune.recipe.schema import Recipe


class _Kernel:
    """In a Triton kernel's place: launched on a grid, it does what `stand_in` does."""

    def __init__(self, stand_in: Callable[..., None]) -> None:
        self.stand_in = stand_in

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.stand_in


def _fold(tile: torch.Tensor, stride: int, targets: torch.Tensor, maximum: torch.Tensor, *_: Any, **__: Any) -> None:
    """`_forward_kernel`: one pass over a tile of logits [rows, columns], some numbers for each row."""
    torch.sum(tile, dim=1, out=maximum.new_empty(maximum.shape, dtype=tile.dtype))


def _differentiate(tile: torch.Tensor, *_: Any, **__: Any) -> None:
    """`_backward_kernel`: the gradient written over a tile of logits."""
    tile.mul_(1.0)


_library = torch.library.Library("qtune_trace", "DEF")
_library.define("addmm_fp32(Tensor(a!) total, Tensor a, Tensor b) -> Tensor(a!)")
_library.impl("addmm_fp32", lambda total, a, b: total, "Meta")


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """`torch.addmm(..., out_dtype=float32)` of 16-bit matrices into an fp32 sum."""
    torch.ops.qtune_trace.addmm_fp32(total, a, b)


def _always(capability: Capability) -> Any:
    return lambda device: True


QUESTIONS = (
    DeviceQuestion(chunked_logprob, "_use_triton", _always, "Triton's kernels fold a tile of logits in place"),
    DeviceQuestion(trl_utils, "_use_triton", _always, "where Triton is, only labelled positions are scored"),
    DeviceQuestion(chunked_logprob, "_forward_kernel", lambda capability: _Kernel(_fold), "it is none without Triton"),
    DeviceQuestion(
        chunked_logprob, "_backward_kernel", lambda capability: _Kernel(_differentiate), "it is none without Triton"
    ),
    DeviceQuestion(
        chunked_logprob,
        "triton",
        lambda capability: types.SimpleNamespace(cdiv=lambda a, b: -(-a // b)),
        "its grid is counted with it",
    ),
    DeviceQuestion(
        chunked_logprob,
        "_addmm_fp32",
        lambda capability: _add_product,
        "on a card a product of 16-bit matrices is added to fp32 in one kernel, without a copy",
    ),
)
"""What TRL's step asks about the device beyond `device_state.QUESTIONS`."""


def trace_trl(
    config: PretrainedConfig,
    recipe: Recipe,
    plan: Plan,
    step: Step,
    card: Capability | None,
    *,
    plays_allocator: bool = True,
) -> Traced:
    """TRL's step on the recipe's model, adapter and batch.

    step: the recipe's own; its batch and accumulation are taken over. TRL 1.16 checkpoints every layer unless it is
    told otherwise. plays_allocator: as in `trace`.
    """
    theirs = Step(
        step.batch,
        _loss,
        _adamw,
        "non-reentrant" if recipe.adapter.peft_checkpoints else "none",
        step.autocast,
        max_gradient_norm=1.0,
        accumulates=step.accumulates,
    )

    def made(shape: PretrainedConfig) -> Any:
        return _model(shape, recipe, plan)

    if card is None:
        return trace(config, made, theirs, card=None)
    with answered_as_on_a_card(card, QUESTIONS):
        return trace(config, made, theirs, card=card, plays_allocator=plays_allocator)


def _model(config: PretrainedConfig, recipe: Recipe, plan: Plan) -> Any:
    """The base as the recipe loads it, adapted, with what SFTTrainer's constructor does to it."""
    dtype = getattr(torch, plan.compute_dtype)
    network = bare_model(config, dtype, quantization_config(recipe.quantization, dtype), plan.attention)
    with torch.device("meta"):
        model = attach_adapter(network, recipe.adapter, plan)
    if not isinstance(recipe.quantization, Unquantized):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_magnitude_vector" not in name:
                parameter.data = parameter.data.to(torch.bfloat16)
    trl_utils.add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))
    return model


def _loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """`SFTTrainer.compute_loss`: zero on positions without a label."""
    outputs = model(**batch, use_cache=False, fused_lm_head=True)
    loss: torch.Tensor = -outputs.log_probs.sum() / outputs.label_mask.numel()
    return loss


def _adamw(parameters: ParameterGroups) -> torch.optim.Optimizer:
    """transformers' default, `adamw_torch_fused`."""
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True)
