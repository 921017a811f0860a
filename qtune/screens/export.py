"""The screen of `qtune export`."""

from typing import TYPE_CHECKING

from qtune import console
from qtune.run.metrics import other_turns_text
from qtune.tuned.asked import other_turns

if TYPE_CHECKING:
    from qtune.export.verification import Answer, Verification


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
        if verification.verified and verification.answers_equal < len(verification.answers):
            console.out(why_answers_part(verification))


def why_answers_part(verification: "Verification") -> str:
    """What it means that a verified export answers otherwise, and where each answer parts."""
    lines = [
        "  A greedy answer takes the likeliest token, however narrowly, and goes its own way after one that differs; "
        "what is compared and bounded is every token's distribution (KL above)."
    ]
    for answer in verification.answers:
        if answer.trained != answer.exported:
            at = _first_difference(answer.trained, answer.exported)
            shared = f"the same up to “{_end_of(answer.trained[:at])}”, then" if at else "from the first word:"
            after = f"“{_begin_of(answer.trained[at:])}” and “{_begin_of(answer.exported[at:])}”"
            lines.append(f"  “{_begin_of(answer.request)}”{_others(answer)}: {shared} {after}")
    return "\n".join(lines)


def _others(answer: "Answer") -> str:
    told = other_turns_text(*other_turns(answer.turns))
    return f" ({told})" if told else ""


def _first_difference(one: str, other: str) -> int:
    return next(
        (at for at, (left, right) in enumerate(zip(one, other, strict=False)) if left != right),
        min(len(one), len(other)),
    )


SHOWN = 30
"""Characters of an answer beside the place where it parts from the other."""


def _begin_of(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else f"{line[:SHOWN]}…"


def _end_of(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else f"…{line[-SHOWN:]}"
