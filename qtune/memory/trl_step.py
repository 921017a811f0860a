"""TRL's own step as it comes: the model, loss and optimizer of its SFTTrainer (1.16), to be traced beside ours.

What TRL computes is TRL's own code: its fused head (`add_fused_lm_head`) and `SFTTrainer.compute_loss`. Only its Triton
kernels, which exist on a card alone, have stand-ins that touch the same bytes.
"""

from __future__ import annotations

import contextlib
import types
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils
from trl.trainer.sft_trainer import SFTTrainer

from qtune.adapter.attach import attach_adapter, cast_adapter
from qtune.memory.predict import training_step
from qtune.memory.tracing.bare_model import bare_model
from qtune.memory.tracing.step import Step
from qtune.model.load import quantization_config
from qtune.recipe.schema import FourBit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PretrainedConfig

    from qtune.memory.predict import Longest
    from qtune.memory.tracing.step import Loss, ParameterGroups
    from qtune.plan import Plan
    from qtune.recipe.schema import Recipe

OUTPUTS = ("log_probs", "entropy", "is_top1")
"""What SFTTrainer asks of its head: the last two for its metrics (trl 1.16, sft_trainer.py)."""


def trl_model(recipe: Recipe, plan: Plan) -> Callable[[PretrainedConfig], torch.nn.Module]:
    """configuration -> the model of a plain script on the meta device: NF4 with double quantization, the recipe's
    adapter, whose weights SFTTrainer makes bfloat16."""
    low = torch.bfloat16 if plan.compute_dtype != "float16" else torch.float16
    four_bit = quantization_config(FourBit(kind="nf4", double_quantization=True), low)

    def made(config: PretrainedConfig) -> torch.nn.Module:
        network = bare_model(config, low, four_bit, plan.attention)
        with torch.device("meta"):
            model = attach_adapter(network, recipe.adapter, plan)
            cast_adapter(model, torch.bfloat16)
        trl_utils.add_fused_lm_head(model.get_base_model(), outputs=OUTPUTS)
        return model

    return made


def trl_step(recipe: Recipe, plan: Plan, longest: Longest) -> Step:
    """The step of SFTTrainer's defaults on the batch that ours has: checkpointing, fused AdamW, clipping at 1."""
    ours = training_step(recipe, plan, longest)
    return Step(
        batch=ours.batch,
        loss=_loss(is_masked=ours.batch.masked),
        optimizer=_adamw,
        checkpointing="non-reentrant" if plan.gradient_checkpointing else "none",
        autocast=torch.bfloat16 if plan.compute_dtype != "float16" else torch.float16,
        accumulates=ours.accumulates,
        host_apart=ours.host_apart,
    )


def _adamw(parameters: ParameterGroups) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4, foreach=True)


def _loss(*, is_masked: bool) -> Loss:
    """`SFTTrainer.compute_loss`, given what it asks of its trainer.

    Its collator always makes a mask; where all rows are equally long, transformers looks into it and drops it.
    """
    trainer = types.SimpleNamespace(
        aux_loss_enabled=False,
        compute_loss_func=None,
        label_smoother=None,
        args=types.SimpleNamespace(loss_type="nll", average_tokens_across_devices=True, max_length=None),
        accelerator=types.SimpleNamespace(
            parallelism_config=None, num_processes=1, gather_for_metrics=lambda tensor: tensor
        ),
        get_tp_size=lambda: 1,
        _tp_size=1,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
    )

    def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        def called(**inputs: Any) -> Any:
            return model(**{name: value for name, value in inputs.items() if is_masked or name != "attention_mask"})

        trainer.model = model
        inputs = {"attention_mask": torch.ones_like(batch["input_ids"]), **batch}
        # On devices with Triton only the labelled positions are scored.
        with _replaced(trl_utils, {"_use_triton": lambda device: True, "_ChunkedLogProbFunction": _ChunkedLogProb}):
            found: torch.Tensor = SFTTrainer.compute_loss(
                trainer, called, inputs, num_items_in_batch=batch["labels"].ne(-100).sum()
            )
        return found

    return loss


class _ChunkedLogProb(chunked_logprob.ChunkedLogProbFunction):
    """TRL's function as it runs on devices with Triton, forward and backward."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        with _triton_kernels():
            return chunked_logprob.ChunkedLogProbFunction.forward(ctx, *args)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        with _triton_kernels():
            return chunked_logprob.ChunkedLogProbFunction.backward(ctx, *gradients)


@contextlib.contextmanager
def _triton_kernels() -> Iterator[None]:
    """While it is open each of TRL's kernels is one operation that touches what the kernel does."""
    with _replaced(chunked_logprob, _STAND_INS):
        yield


@contextlib.contextmanager
def _replaced(module: Any, stand_ins: dict[str, Any]) -> Iterator[None]:
    kept = {name: getattr(module, name) for name in stand_ins}
    try:
        for name, stand_in in stand_ins.items():
            setattr(module, name, stand_in)
        yield
    finally:
        for name, original in kept.items():
            setattr(module, name, original)


def _fold(tile: torch.Tensor, stride: int, targets: torch.Tensor, maximum: torch.Tensor, *_: Any, **__: Any) -> None:
    """`_forward_kernel`: one pass over a tile of logits [rows, columns], some numbers for each row."""
    torch.sum(tile, dim=1, out=maximum.new_empty(maximum.shape, dtype=tile.dtype))


def _differentiate(tile: torch.Tensor, *_: Any, **__: Any) -> None:
    """`_backward_kernel`: the gradient written over a tile of logits."""
    tile.mul_(1.0)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """`torch.addmm(..., out_dtype=float32)` of 16-bit matrices into an fp32 sum."""
    torch.ops.qtune_trace.addmm_fp32(total, a, b)


_STAND_INS = {
    "_use_triton": lambda device: False,  # its callers would ask the kernels for a grid
    "_forward_tile": _fold,
    "_backward_tile": _differentiate,
    "_addmm_fp32": _add_product,
}

_library = torch.library.Library("qtune_trace", "DEF")
_library.define("addmm_fp32(Tensor(a!) total, Tensor a, Tensor b) -> Tensor(a!)")
_library.impl("addmm_fp32", lambda total, a, b: total, "Meta")
