"""The training loss: cross-entropy over the labelled positions alone, without ever holding the logits.

The head is applied in tiles of rows, and each tile's gradient is computed at once while its logits exist, so that
nothing of size [labelled, vocab] is kept and nothing is computed twice. The idea of fusing head and loss is that of
Cut Your Losses (arXiv:2411.09009, section 4) and Liger Kernel (arXiv:2410.10989, section 3.2).

A head in host memory, or a compressed one, is applied in blocks of vocabulary rows instead, so that each row crosses
the bus, or is read back, twice for a micro-batch and not once for each tile of rows.
"""

import functools
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

import qtune.kernels.ops  # noqa: F401  (defines torch.ops.qtune)
from qtune.data.masks import IGNORED
from qtune.kernels import on_cpu
from qtune.model.stored_rows import StoredRows, stored_rows
from qtune.sizes import MIB

if TYPE_CHECKING:
    from collections.abc import Callable

_ops: Any = torch.ops.qtune

TILE_BYTES = 64 * MIB
"""Size of one tile of logits in the head's dtype, where nothing else is asked for: [memory] loss_tile."""


@dataclass
class ScoredOutput(ModelOutput):
    """What a causal LM with `install_loss` returns when it is given labels.

    loss: scalar fp32, the SUM of the negative log-likelihoods, so that the caller chooses the mean's denominator.
    correct: scalar, labelled positions whose most likely token is the label.
    scored: number of labelled positions.
    row_losses, row_scored: [batch], the first and the last of these for each row; None while gradients are wanted.
    """

    loss: Tensor | None = None
    correct: Tensor | None = None
    scored: int | None = None
    row_losses: Tensor | None = None
    row_scored: Tensor | None = None


@dataclass(frozen=True)
class LogitRule:
    """What a model family does to the head's output: logits = cap * tanh(scale * x / cap)."""

    scale: float = 1.0
    cap: float | None = None


def logit_rule(config: PretrainedConfig) -> LogitRule:
    """The rule of a model family, from its configuration (Gemma caps; Cohere, Falcon-H1 and Granite scale)."""
    text = config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale *= getattr(text, name, None) or 1.0
    divisor = getattr(text, "logits_scaling", None)
    if divisor:
        scale = scale * divisor if text.model_type == "hyperclovax" else scale / divisor
    return LogitRule(scale, getattr(text, "final_logit_softcapping", None))


def scored_positions(labels: Tensor) -> Tensor:
    """Indices, into the flattened [batch, length], of the positions whose NEXT token is scored.

    labels: [batch, length], aligned with the input ids. A row's last position predicts nothing.
    """
    following = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    return (following.flatten() != IGNORED).nonzero().flatten()


class _TiledCrossEntropy(torch.autograd.Function):
    """(hidden [n, hidden], head [vocab, hidden], bias [vocab] or None, labels [n]) -> (summed NLL, correct, NLLs).

    NLLs: of each position [n] where `is_measuring`; else empty, for a step of training has no use for them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        rule: LogitRule,
        tile_bytes: int,
        is_measuring: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = max(1, tile_bytes // (hidden.element_size() * weight.shape[0]))
        exact = torch.promote_types(hidden.dtype, torch.float32)
        nll = hidden.new_empty(len(hidden), dtype=exact)
        right = hidden.new_empty(len(hidden), dtype=torch.bool)
        # Under no_grad a trained weight still says that it needs a gradient.
        want_hidden, want_weight, want_bias = (one and not is_measuring for one in ctx.needs_input_grad[:3])
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if want_weight else None
        grad_bias = torch.zeros_like(bias, dtype=exact) if want_bias and bias is not None else None
        for start in range(0, len(hidden), rows):
            tile = slice(start, start + rows)
            logits = on_cpu.linear(hidden[tile], weight, bias)
            wanted = want_hidden or want_weight or want_bias
            _ops.cross_entropy.default(
                logits, labels[tile], rule.scale, rule.cap or 0.0, wanted, nll[tile], right[tile]
            )
            if grad_hidden is not None:
                on_cpu.mm(logits, weight, out=grad_hidden[tile])
            if grad_weight is not None:
                grad_weight += on_cpu.mm(logits.t(), hidden[tile])
            if grad_bias is not None:
                grad_bias += logits.sum(dim=0, dtype=exact)
            del logits  # or the next tile would come beside it
        loss, correct = nll.sum(), right.sum()
        losses = nll if is_measuring else nll.new_empty(0)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.mark_non_differentiable(correct, losses)
        ctx.dtypes = weight.dtype, bias.dtype if bias is not None else None
        return loss, correct, losses

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        scaled_hidden = None if grad_hidden is None else grad_hidden * grad_loss.to(grad_hidden.dtype)
        scaled_weight = None if grad_weight is None else (grad_weight * grad_loss).to(ctx.dtypes[0])
        scaled_bias = None if grad_bias is None else (grad_bias * grad_loss).to(ctx.dtypes[1])
        return scaled_hidden, scaled_weight, scaled_bias, None, None, None, None


class _StreamedCrossEntropy(torch.autograd.Function):
    """As `_TiledCrossEntropy`, for a frozen head that is stored otherwise; tiles are [n, rows of the vocabulary].

    A first pass over the vocabulary finds each position's normalizer, its label's logit and its likeliest token, a
    second one the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: StoredRows,
        bias: Tensor | None,
        labels: Tensor,
        rule: LogitRule,
        tile_bytes: int,
        is_measuring: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        vocabulary = head.shape[0]
        # Neither the block of weights nor its logits, in their own type, are larger than a tile.
        rows = max(1, tile_bytes // max(hidden.element_size() * hidden.shape[0], head.row_bytes()))
        exact = torch.promote_types(hidden.dtype, torch.float32)
        starts = range(0, vocabulary, rows)
        cap = rule.cap or 0.0

        def block_and_logits(start: int) -> tuple[Tensor, Tensor]:
            stop = min(start + rows, vocabulary)
            block = head.block(start, stop, hidden.device)
            return block, on_cpu.linear(hidden, block, None if bias is None else bias[start:stop])

        maximum, total, target = (hidden.new_full((len(hidden),), first, dtype=exact) for first in (-torch.inf, 0, 0))
        likeliest = torch.zeros_like(labels)
        for start in starts:
            block, logits = block_and_logits(start)
            del block  # or the next one would come beside it
            _ops.cross_entropy_block.default(logits, labels, start, rule.scale, cap, maximum, total, target, likeliest)
            del logits
        normalizer = maximum + total.log()
        losses = normalizer - target
        loss = losses.sum()
        correct = (likeliest == labels).sum()
        grad_hidden = None
        if ctx.needs_input_grad[0] and not is_measuring:
            grad = torch.zeros_like(hidden, dtype=exact)
            for start in starts:
                block, logits = block_and_logits(start)
                _ops.cross_entropy_block_gradient.default(logits, labels, start, rule.scale, cap, normalizer)
                grad += on_cpu.mm(logits, block)
                del block, logits
            grad_hidden = grad.to(hidden.dtype)
        if not is_measuring:
            losses = losses.new_empty(0)
        ctx.save_for_backward(grad_hidden)
        ctx.mark_non_differentiable(correct, losses)
        return loss, correct, losses

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (grad_hidden,) = ctx.saved_tensors
        scaled = None if grad_hidden is None else grad_hidden * grad_loss.to(grad_hidden.dtype)
        return scaled, None, None, None, None, None, None


def tiled_cross_entropy(
    hidden: Tensor,
    head: Tensor | StoredRows,
    bias: Tensor | None,
    labels: Tensor,
    rule: LogitRule = LogitRule(),
    tile_bytes: int = TILE_BYTES,
    *,
    is_measuring: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed negative log-likelihood (scalar, fp32 or wider), number of correct predictions (int64 scalar), and NLLs.

    hidden: [n, hidden]; bias: [vocab] or None; labels: [n] token ids, all of them scored. head: [vocab, hidden]; a
    frozen one may be stored otherwise, and comes to `hidden`'s device block by block. is_measuring: takes no gradient,
    and gives the NLL of each position [n], of which there are none otherwise.
    Memory above the inputs: one tile of logits in the head's dtype, and a gradient like `hidden`; of a head that is
    stored otherwise also a block of it, that gradient in fp32, and what a block adds to it.
    """
    function = _StreamedCrossEntropy if isinstance(head, StoredRows) else _TiledCrossEntropy
    loss, correct, losses = function.apply(hidden, head, bias, labels, rule, tile_bytes, is_measuring)
    return loss, correct, losses


def install_loss(model: PreTrainedModel, *, tiled: bool = True, tile_bytes: int = TILE_BYTES) -> None:
    """Makes `model(..., labels=…)` return a ScoredOutput; calls without labels are as they were.

    model: the bare causal LM, not its peft wrapper (soft prompts put their own -100 labels in front and come through).
    tiled=False materialises the model's own logits: the fallback for a family whose head does more than `logit_rule`
    knows, and the reference that `loss_agrees` compares with. tile_bytes: of the logits that exist at once.
    """
    original: Callable[..., Any] = getattr(model, "_qtune_original_forward", model.forward)
    model._qtune_original_forward = original  # type: ignore[assignment]
    rule = logit_rule(model.config)

    # The signature stays the model's own: generate() checks its arguments against it.
    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if labels is None:
            return original(*args, **kwargs)
        positions = scored_positions(labels)
        targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()[positions]
        if not tiled:
            logits = original(*args, **kwargs).logits.flatten(0, 1)[positions].float()
            losses = functional.cross_entropy(logits, targets, reduction="none")
            correct = (logits.argmax(dim=1) == targets).sum()
            return ScoredOutput(losses.sum(), correct, len(targets), *_by_row(losses, positions, labels))
        hidden = self.base_model(*args, **kwargs).last_hidden_state.flatten(0, 1)[positions]
        head = self.get_output_embeddings()
        # Under autocast the head would be cast to 16 bits; without it a 16-bit head decides the products' dtype.
        hidden = hidden.to(head.weight.dtype)
        rows, is_measuring = stored_rows(head), not torch.is_grad_enabled()
        loss, correct, losses = tiled_cross_entropy(
            *(hidden, head.weight if rows is None else rows, head.bias, targets, rule, tile_bytes),
            is_measuring=is_measuring,
        )
        return ScoredOutput(loss, correct, len(targets), *_by_row(losses, positions, labels))

    model.forward = types.MethodType(forward, model)


def _by_row(losses: Tensor, positions: Tensor, labels: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """(summed NLL, scored positions) of each row of `labels` [batch, length]; None where gradients are wanted.

    losses: of each position [n]; positions: [n], into the flattened labels.
    """
    if torch.is_grad_enabled():
        return None, None
    rows, nothing = positions // labels.shape[1], losses.new_zeros(len(labels))
    scored = nothing.long().index_add_(0, rows, torch.ones_like(rows))
    return nothing.index_add(0, rows, losses), scored


@torch.no_grad()
def loss_agrees(model: PreTrainedModel, ids: Tensor, tolerance: float = 0.01) -> bool:
    """Whether the tiled loss equals the loss from the model's own logits on `ids` [1, length], up to rounding.

    The difference is taken relative to the loss; 0.01 is above 16-bit rounding and far below any forgotten scale.
    """
    head = model.get_output_embeddings()
    # A quantized head's weight is packed: only the head itself can multiply with it.
    if not isinstance(head, nn.Linear) or head.weight.shape != (head.out_features, head.in_features):
        return False
    model.eval()
    losses = []
    for tiled in (False, True):
        install_loss(model, tiled=tiled)
        try:
            losses.append(float(model(input_ids=ids, labels=ids, use_cache=False).loss))
        except AttributeError:  # no backbone that can be run apart from the head
            return False
    own, ours = losses
    return abs(ours - own) <= tolerance * max(abs(own), 1e-6)
