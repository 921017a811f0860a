"""The screen of `qtune export`."""

from typing import TYPE_CHECKING

from qtune import console

if TYPE_CHECKING:
    from qtune.export.verification import Verification


def show(verification: "Verification") -> None:
    """Prints the figures of a verification."""
    exported, bare = verification.exported, verification.bare_base
    rows = [
        ["KL divergence, nats per token", f"{exported.kl:.2e}", f"{bare.kl:.2e}", f"≤ {verification.limits.kl:.2e}"],
        ["same likeliest token", f"{exported.top1:.2%}", f"{bare.top1:.2%}", f"≥ {verification.limits.top1:.1%}"],
        ["largest logit gap", f"{exported.gap:.3g}", f"{bare.gap:.3g}", ""],
        ["perplexity", *(f"{verification.perplexity[name]:.4g}" for name in ("exported", "bare base")), ""],
    ]
    title = f"Against the trained model (perplexity {verification.perplexity['trained']:.4g})"
    title += f", {verification.rows} {verification.rows_from}, {exported.tokens} tokens"
    console.out(console.table(title, ["", "exported", "bare base", "limit"], rows, right=(1, 2, 3)))
    for weights, cost in verification.cost.items():
        if len(verification.cost) > 1 or cost != exported:
            console.out(f"merged into the {weights} weights: KL {cost.kl:.2e}, same likeliest token {cost.top1:.2%}")
    if (live := verification.live) is not None:
        console.out(
            f"compared in float32; computing with {verification.compute_dtype} alone changes the trained model by KL "
            f"{live.kl:.2e}, same likeliest token {live.top1:.2%}"
        )
    if verification.answers:
        console.out(f"greedy answers equal: {verification.answers_equal} of {len(verification.answers)}")
