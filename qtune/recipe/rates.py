"""Learning rates that cannot work, by the kind of adapter: said before hours are spent on them. Pure arithmetic.

AdamW moves a number by about the rate in each step, whatever its gradient is, so that a rate says how far a run can
come at all, and how violently its first steps change the model.
"""

from dataclasses import dataclass
from decimal import Decimal

from qtune.recipe.schema import IA3, Adapter, Lora, PrefixTuning, PromptTuning, PTuning

SLOWEST_PROMPT = 1e-3
"""Prompt tuning, of bare vectors. PEFT's comparison of methods (MetaMathQA, Llama 3.2 3B) has 34.3 % of GSM8K at 1e-3,
and 5.7 % at 1e-4 with weight decay."""
FASTEST_LORA = 1.0
"""What rate x scale x rank of a LoRA may be. In its first step every number of B becomes about the rate, so that the
output of a layer changes by about half of this times its input, in all layers at once. On the built-in model 0.1 (rank
256, alpha 512, 2e-4) and 0.32 (rank 16, alpha 32, 1e-2) still learned: losses of 2.51 were 0.086 and 0.114 on held-out
rows after 16 steps of the quickstart, one seed, bfloat16 on a CPU. After 60 steps of 4 rows in float32
(`tools/soft_prompt_runs.jsonl`) 1.02 (rank 256, alpha 512, 2e-3) had 0.335, and 3.2 and 9.6 (rank 16, 0.1 and 0.3) had
4.73 and 5.31: they diverged."""
SLOWEST_LORA = 3.2e-5
"""And rate x scale x rank at which it does not move: 2.37 after the same 60 steps (rank 16, alpha 32, 1e-6)."""
ROUNDING = 1e-9
"""Of a product of floats: the largest rate that is advised is not itself too large."""


@dataclass(frozen=True)
class Range:
    """Rates between which a kind of adapter has been seen to learn, and what it did at both ends.

    Measured on the built-in model: 60 steps of 4 rows of the quickstart, one seed, float32 on an AMD EPYC (Zen 3); a
    tenth of the rows held out, of residual prompts 260 (`tools/soft_prompt_runs.jsonl`).
    """

    slowest: float
    fastest: float
    losses: tuple[float, float, float, float]
    """Held-out, of the start, at `slowest`, at a rate that is right, and at `fastest`."""
    right: float

    def doubt(self, rate: float, kind: str, swiftest: float = 1.0) -> str | None:
        """A sentence on a rate at an end or beyond it. swiftest: the rate of the part that moves fastest, as a multiple
        of `rate` and of what it was where this was measured."""
        begin, slow, well, fast = self.losses
        if self.slowest < rate * swiftest < self.fastest:
            return None
        end, loss = (self.slowest, slow) if rate * swiftest <= self.slowest else (self.fastest, fast)
        return (
            f"training.learning_rate = {rate:g}: {kind} did badly at {end:g} (measured on the built-in model: a "
            f"loss of {begin:g} was {loss:g} after 60 steps, and {well:g} at {self.right:g})"
        )


RANGES: dict[type[Adapter], Range] = {
    IA3: Range(1e-5, 1.0, (2.389, 2.367, 0.174, 1.909), 5e-3),
    PTuning: Range(1e-5, 1.0, (2.583, 1.751, 0.281, 1.979), 2e-2),
    PrefixTuning: Range(1e-5, 1.0, (2.19, 2.177, 0.207, 3.568), 1e-2),
}
"""Of adapters with one rate; the prefix began at rows."""
RESIDUAL_RANGES: dict[type[Adapter], Range] = {
    PTuning: Range(1e-5, 1.0, (3.706, 2.667, 0.137, 1.371), 3e-3),
    PromptTuning: Range(1e-5, 1.0, (3.706, 2.467, 0.158, 1.007), 3e-3),
}
"""Of those whose vectors have a rate of their own, with this multiple of the encoder's, and began at a text."""
MEASURED_VECTOR_RATE = 30.0


def doubtful_rate(adapter: Adapter, rate: float) -> str | None:
    """A sentence on a rate that is known not to work for this adapter; None for all others.

    rate: training.learning_rate, settled.
    """
    match adapter:
        case PromptTuning(residual=False) if rate < SLOWEST_PROMPT:
            return (
                f"training.learning_rate = {rate:g}: prompt tuning hardly moves below {SLOWEST_PROMPT:g} (PEFT's "
                "comparison on MetaMathQA: 5.7 % right at 1e-4, 34.3 % at 1e-3); "
                f'"auto" is {adapter.auto_learning_rate[0]:g}'
            )
        case IA3() | PTuning(residual=False) | PrefixTuning():
            return RANGES[type(adapter)].doubt(rate, adapter.kind)
        case PTuning() | PromptTuning() if adapter.residual:
            vectors = adapter.vector_rate / MEASURED_VECTOR_RATE
            return RESIDUAL_RANGES[type(adapter)].doubt(rate, f"{adapter.kind} with residual", max(1.0, vectors))
        case Lora():
            scaled_rank = adapter.alpha * (adapter.rank**0.5 if adapter.rslora else 1)
            if rate * scaled_rank <= SLOWEST_LORA * (1 + ROUNDING):
                return (
                    f"training.learning_rate = {rate:g}: with rank {adapter.rank} and alpha {adapter.alpha} a LoRA "
                    "hardly moves (measured on the built-in model at 1e-6 with rank 16 and alpha 32: a loss of 2.37 "
                    f'after 60 steps, where 1e-2 had left 0.11 after 16); "auto" is {adapter.auto_learning_rate[0]:g}'
                )
            if (strength := rate * scaled_rank) > FASTEST_LORA * (1 + ROUNDING):
                fitting = _rounded_down(FASTEST_LORA / scaled_rank)
                return (
                    f"training.learning_rate = {rate:g}: with rank {adapter.rank} and alpha {adapter.alpha} each of "
                    f"the first steps changes the output of every layer by about {0.5 * strength:.0%} of its input's "
                    f"size, which is likely to diverge (three times as much did, measured); at most {fitting:g}, or a "
                    "smaller alpha"
                )
    return None


def _rounded_down(value: float) -> float:
    """To one digit, in decimal: divided in binary, 0.0007 is six and a bit of 0.0001."""
    exact = Decimal(f"{value:.12g}")
    power = Decimal(10) ** exact.adjusted()
    return float(exact // power * power)
