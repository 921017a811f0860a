"""Logits of two models on the same tokens -> how far apart they are, and how far apart is too far."""

import math

import torch
from torch import Tensor

from qtune.data.masks import IGNORED
from qtune.export.verification import Closeness, Limits

# Largest mean KL divergence (nats per token) and smallest top-1 agreement that pass, by the dtype that the weights are
# written in. Activations are float32 on both sides.
#
# float32  only sums in another order remain; measured 1e-9 to 1e-7.
# float16  one rounding of each weight, 2**-11 of its size; measured 1e-7 to 1e-5 on real models.
# bfloat16 2**-8: 64 times the variance of float16.
#
# Tokens that the reference holds for as likely as its likeliest one, up to this difference of log-probabilities: which
# of them another model puts first says nothing.
TIE = 0.05

# An adapter lost, scaled wrongly or merged into other weights costs 1e-2 and more.
KL_LIMITS = {torch.float32: 1e-5, torch.float16: 1e-4, torch.bfloat16: 1e-2}
TOP1_LIMITS = {torch.float32: 0.999, torch.float16: 0.99, torch.bfloat16: 0.95}

# A weak adapter may have so small an effect that losing it stays below the limit above. The export must therefore also
# be ten times closer to the trained model than the bare base is, down to what rounding alone can do.
EFFECT_SHARE = 0.1
KL_FLOORS = {torch.float32: 1e-8, torch.float16: 2e-5, torch.bfloat16: 2e-3}


class ClosenessMeter:
    """Adds up closeness over rows, so that the logits of one row at a time are in memory."""

    def __init__(self) -> None:
        self._tokens = 0
        self._kl = 0.0
        self._kl_largest = 0.0
        self._agreed = 0
        self._gap = 0.0
        self._new_tokens = 0.0

    def add(self, reference: Tensor, other: Tensor) -> None:
        """Compares logits [length, vocab] of the same positions.

        Where `other` has a larger vocabulary, distributions are compared over the tokens of the reference, and what
        `other` gives to its new ones is counted apart; a new token that is the likeliest is a disagreement.
        """
        shared = min(reference.shape[-1], other.shape[-1])
        likeliest = other.argmax(-1)
        self._new_tokens += other.float().softmax(-1)[:, shared:].sum().item()
        reference, other = reference[:, :shared].float(), other[:, :shared].float()
        log_p, log_q = reference.log_softmax(-1), other.log_softmax(-1)
        # A new token that is the likeliest has no place in the reference: it is a disagreement.
        choice = likeliest.clamp(max=shared - 1)
        lost = log_p.amax(-1) - log_p.gather(-1, choice.unsqueeze(-1)).squeeze(-1)
        agreed = (likeliest < shared) & (lost <= TIE)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        self._tokens += len(kl)
        self._kl += kl.double().sum().item()
        self._kl_largest = max(self._kl_largest, kl.max().item())
        self._agreed += int(agreed.sum())
        self._gap = max(self._gap, (reference - other).abs().max().item())

    def result(self) -> Closeness:
        """The closeness over everything added."""
        count = max(1, self._tokens)
        return Closeness(
            tokens=self._tokens,
            kl=self._kl / count,
            kl_largest=self._kl_largest,
            top1=self._agreed / count,
            gap=self._gap,
            new_tokens=self._new_tokens / count,
        )


class PerplexityMeter:
    """exp of the mean negative log-likelihood of the scored tokens."""

    def __init__(self) -> None:
        self._scored = 0
        self._loss = 0.0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Logits [length, vocab] predict labels [length] of the next position; -100 is not scored."""
        scored = labels[1:] != IGNORED
        log_p = logits[:-1][scored].float().log_softmax(-1)
        self._loss -= log_p.gather(1, labels[1:][scored].unsqueeze(1)).double().sum().item()
        self._scored += int(scored.sum())

    def result(self) -> float:
        """The perplexity; infinite where it is beyond a float."""
        mean = self._loss / max(1, self._scored)
        return math.exp(mean) if mean < 700 else math.inf


def limits(stored: torch.dtype, effect: float) -> Limits:
    """The limits for weights written in a dtype, and an adapter whose loss would cost a KL of `effect`."""
    name = str(stored).removeprefix("torch.")
    absolute, relative = KL_LIMITS[stored], max(KL_FLOORS[stored], EFFECT_SHARE * effect)
    if relative < absolute:
        reason = f"{EFFECT_SHARE:.0%} of what the adapter changes ({effect:.2g}), at least what {name} rounds away"
        return Limits(relative, TOP1_LIMITS[stored], reason)
    return Limits(absolute, TOP1_LIMITS[stored], f"{name} rounding, with a tenfold margin")


def shortfalls(closeness: Closeness, allowed: Limits) -> list[str]:
    """What is wrong, in words; empty when the limits are kept."""
    problems = []
    if not closeness.kl <= allowed.kl:
        problems.append(f"KL divergence {closeness.kl:.3g} nats per token, at most {allowed.kl:.3g} ({allowed.reason})")
    # One token more than the share: with few tokens a single tie must not decide.
    if closeness.tokens * (1 - closeness.top1) > closeness.tokens * (1 - allowed.top1) + 1:
        problems.append(f"the likeliest token agrees at {closeness.top1:.2%} of positions, at least {allowed.top1:.1%}")
    return problems
