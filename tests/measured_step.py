"""The step of the runs in measured/h100.json, as far as it was another one than today's.

They were made with peft's layers and transformers' blocks, which `lean_step = false` still is; with AdamW over lists of
tensors, a loss whose tiles are copied to fp32, and embeddings whose output waited for the backward. These pieces hold
the trace of `lean_step = false` against a card; today's step has measured/h200.json.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from qtune.memory import predict as prediction
from qtune.memory.tracing import step
from qtune.memory.tracing import trace as tracing
from qtune.model import loss


@pytest.fixture(autouse=True)
def with_the_step_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For every test of a module that imports it."""
    as_measured(monkeypatch)
    tracing._built.clear()  # what was built under the same key is another step
    yield
    tracing._built.clear()


def as_measured(patch: pytest.MonkeyPatch) -> None:
    """Puts the old pieces in the place of the new ones; the recipe has to say `lean_step = false`."""
    own = prediction.optimizer_of

    def optimizer_of(plan: Any) -> Any:
        if plan.optimizer == "adamw":
            return lambda parameters: torch.optim.AdamW(parameters, lr=plan.learning_rate, foreach=True)
        return own(plan)

    patch.setattr(prediction, "optimizer_of", optimizer_of)
    patch.setattr(step, "free_inputs", lambda model: None)
    patch.setattr(loss._TiledCrossEntropy, "forward", staticmethod(_forward))


def _forward(
    ctx: Any,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    rule: Any,
    tile_bytes: int,
    is_measuring: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """For a frozen head whose logits are scored as they are."""
    assert rule == loss.LogitRule()
    rows = max(1, tile_bytes // (4 * weight.shape[0]))
    exact = torch.float32
    total = torch.zeros((), dtype=exact, device=hidden.device)
    correct = torch.zeros((), dtype=torch.long, device=hidden.device)
    losses = torch.empty(hidden.shape[0] if is_measuring else 0, dtype=exact, device=hidden.device)
    grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] and not is_measuring else None
    for start in range(0, hidden.shape[0], rows):
        part = hidden[start : start + rows]
        target = labels[start : start + rows].unsqueeze(1)
        logits = functional.linear(part, weight, bias).to(exact)
        correct += (logits.argmax(dim=1, keepdim=True) == target).sum()
        normalizer = logits.logsumexp(dim=1, keepdim=True)
        of_tile = normalizer - logits.gather(1, target)
        total += of_tile.sum()
        if is_measuring:
            losses[start : start + rows] = of_tile.squeeze(1)
        if grad_hidden is None:
            continue
        slope = logits.sub_(normalizer).exp_()
        slope.scatter_add_(1, target, torch.full_like(target, -1, dtype=slope.dtype))
        slope_low = slope.to(weight.dtype)
        torch.mm(slope_low, weight, out=grad_hidden[start : start + rows])
    ctx.save_for_backward(grad_hidden, None, None)
    ctx.mark_non_differentiable(correct, losses)
    ctx.dtypes = weight.dtype, None
    return total, correct, losses
