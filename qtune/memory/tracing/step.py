"""One training step as a value, and its execution: forward, loss, backward, clipping, optimizer, evaluation.

The same function drives fake tensors (a prediction) and real ones (a check of it on the CPU).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers.trainer_pt_utils import get_parameter_names

from qtune.memory.tracing import adoption, categories
from qtune.model.checkpointed import checkpoint_first, free_inputs
from qtune.model.host import activations_on_host
from qtune.model.layer_major import layer_by_layer

if TYPE_CHECKING:
    from qtune.memory.tracing.ledger import Ledger

Loss = Callable[[torch.nn.Module, dict[str, torch.Tensor]], torch.Tensor]
"""(model, batch of input_ids, labels, attention_mask) -> scalar."""


ParameterGroups = list[dict[str, Any]]
"""Parameter groups as torch.optim takes them."""

_NOT_DECAYED = (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")
"""Names of parameters without weight decay (transformers 5.23, trainer.py, `get_decay_parameter_names`)."""


@dataclass(frozen=True)
class Batch:
    """The largest batch of a run."""

    rows: int
    length: int
    """Tokens of the longest row, virtual tokens not included."""
    masked: bool = False
    """Whether there is an attention mask: rows of unequal length, or packed ones."""
    scored: int | None = None
    """Labelled positions in the batch; None: all of them, the most there can be."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """input_ids, labels and, if masked, attention_mask: [rows, length]."""
        ids = torch.zeros(self.rows, self.length, dtype=torch.long)
        batch = {"input_ids": ids, "labels": ids.clone()}
        if self.masked:
            batch["attention_mask"] = torch.ones(self.rows, self.length, dtype=torch.long)
        return batch


@dataclass(frozen=True)
class Step:
    """How a model is trained, as far as memory depends on it."""

    batch: Batch
    loss: Loss
    optimizer: Callable[[ParameterGroups], torch.optim.Optimizer] | None
    """None: no optimizer, the step ends with the backward."""
    checkpointing: Literal["none", "reentrant", "non-reentrant"]
    autocast: torch.dtype | None = None
    max_gradient_norm: float | None = 1.0
    paged: bool = False
    """Whether the optimizer's larger states live in managed memory, which the allocator does not count."""
    activations: Literal["device", "host"] = "device"
    """Where what the backward needs waits for it."""
    accumulates: bool = False
    """Whether gradients of earlier micro-batches wait in memory."""
    frees_inputs: bool = False
    """Whether the embeddings' output is let go of, where layers are checkpointed (`model.checkpointed.free_inputs`)."""
    micro_batches: int = 1
    """So many pass each layer one behind the other, and go back together."""
    host_apart: bool = False
    """Whether host memory is other memory than the device's: on a card, not on a CPU."""
    ends_after: Literal["forward", "step"] = "step"
    eval_batch: Batch | None = None
    checkpointed: bool | int = True
    """Of the layers, where there is checkpointing: all, or so many of the first."""

    def one_by_one(self) -> Step:
        """The same step where micro-batches cannot pass a layer together: each goes back before the next comes."""
        return replace(self, micro_batches=1, accumulates=self.accumulates or self.micro_batches > 1)

    @property
    def checkpoints_all(self) -> bool:
        """Whether what a forward keeps are the checkpoints of its layers."""
        return self.checkpointing != "none" and self.checkpointed is True


def prepare(model: Any, step: Step) -> None:
    """Train mode and gradient checkpointing, as transformers.Trainer sets them (`_inner_training_loop`)."""
    model.train()
    if step.checkpointing != "none":
        model.activation_checkpointing_enable({"use_reentrant": step.checkpointing == "reentrant"})
        checkpoint_first(model, step.checkpointed)
        if any(not p.requires_grad for p in model.parameters()):
            model.enable_input_require_grads()
        if step.frees_inputs:
            free_inputs(model)


def trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """What the step changes."""
    return [p for p in model.parameters() if p.requires_grad]


def parameter_groups(model: torch.nn.Module) -> ParameterGroups:
    """What the optimizer is given: with and without weight decay, as `Trainer.create_optimizer` parts them.

    An optimizer goes through its groups one after the other, so they decide which of its temporaries meet.
    """
    decayed = set(get_parameter_names(model, [torch.nn.LayerNorm], _NOT_DECAYED))
    groups: tuple[list[torch.nn.Parameter], ...] = ([], [])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[name not in decayed].append(parameter)
    return [{"params": group} for group in groups if group]


def forward_backward(model: torch.nn.Module, step: Step, ledger: Ledger, *, backward: bool = True) -> Any:
    """Forward and backward over one batch; returns what the caller must keep alive (the loss after a forward)."""
    batch = step.batch.tensors()
    ledger.enter("forward")
    with _autocast(step), _activations(model, step, ledger):
        if step.micro_batches == 1:
            loss = step.loss(model, batch)
        else:
            losses = layer_by_layer(model, [lambda: step.loss(model, batch)] * step.micro_batches)
            loss = torch.stack(losses).sum()
    if not backward:
        return loss
    ledger.enter("backward")
    # Not loss.backward(): as a method of Tensor that suspends function modes, and CUDA's behaviour with them.
    torch.autograd.backward(loss)
    return None


@torch.no_grad()
def goes_together(model: torch.nn.Module, step: Step) -> bool:
    """Whether the layers of a model can be computed one by one, as far as tensors without storage can tell.

    They tell of code that takes a layer's answer apart, and of layers that a forward does not go through; only
    numbers (`layers_stand_alone`, which a run asks) tell of a layer that reads what another one has left.
    """
    batch = step.batch.tensors()
    try:
        with _autocast(step):
            layer_by_layer(model, [lambda: step.loss(model, batch)])
    except Exception:  # as in a run: whatever a family's code does to a stand-in
        return False
    return True


def update(
    model: torch.nn.Module,
    step: Step,
    optimizer: torch.optim.Optimizer,
    ledger: Ledger,
    *,
    foreach: bool | None = None,
) -> None:
    """Clipping and the optimizer's step; the gradients are freed.

    foreach: whether clipping walks through lists of tensors; left out, torch decides by their device: on CUDA it does.
    """
    parameters = trained(model)
    adoption.adopt_gradients(ledger, parameters)
    ledger.enter("optimizer")
    if step.max_gradient_norm is not None:
        torch.nn.utils.clip_grad_norm_(parameters, step.max_gradient_norm, foreach=foreach)
    optimizer.step()
    adoption.adopt_optimizer(ledger, optimizer, paged=step.paged)
    optimizer.zero_grad(set_to_none=True)


def evaluate(model: torch.nn.Module, step: Step, ledger: Ledger) -> None:
    """One evaluation batch without gradients."""
    assert step.eval_batch is not None
    model.eval()
    ledger.enter("eval")
    with torch.no_grad(), _autocast(step):
        step.loss(model, step.eval_batch.tensors())
    model.train()


def _autocast(step: Step) -> Any:
    return contextlib.nullcontext() if step.autocast is None else torch.autocast("cpu", step.autocast)


def _activations(model: torch.nn.Module, step: Step, ledger: Ledger) -> Any:
    if step.activations == "device":
        return contextlib.nullcontext()
    kept = categories.CHECKPOINTED if step.checkpoints_all else categories.ACTIVATIONS
    return activations_on_host(
        model,
        left=lambda tensor: ledger.adopt(tensor, categories.HOST if step.host_apart else kept),
        returned=lambda tensor: ledger.adopt(tensor, kept),
    )


def give_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Give every parameter a gradient without computing one."""
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
