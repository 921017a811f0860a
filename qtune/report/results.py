"""What was measured of a run's results, as parts of the page: base against tuned, exported models."""

from collections.abc import Sequence

from qtune.report.html import Html, details, element, table
from qtune.report.record import Json
from qtune.report.sections import paragraph, section

SHOWN_ANSWERS = 10

# Figures of closeness in verify.json, with their names and formats.
CLOSENESS = {"kl": ("KL divergence, nats per token", ".2e"), "top1": ("same likeliest token", ".2%")}


def evaluation(found: Json) -> Html:
    """Base against tuned: the scores, and answers side by side, wrong ones first."""
    base, tuned = found["base"], found["tuned"]
    scores = [
        ("loss, nats per token", f"{base['loss']:.4f}", f"{tuned['loss']:.4f}"),
        ("tokens right", f"{base['token_accuracy']:.1%}", f"{tuned['token_accuracy']:.1%}"),
    ]
    if base.get("exact_match") is not None:
        scores.append(("answers exactly right", f"{base['exact_match']:.1%}", f"{tuned['exact_match']:.1%}"))
    compared = sorted(found.get("comparisons", ()), key=lambda one: one["tuned"] == one["expected"])
    head = ("", "request", "expected", "base", "tuned")
    answers = [_comparison(one) for one in compared]
    more = [details(f"{len(answers) - SHOWN_ANSWERS} more", table(head, answers[SHOWN_ANSWERS:], class_="answers"))]
    return section(
        "Base against tuned",
        paragraph(f"{found['rows']} of {found['rows_held_out']} {found['source']}, which training did not see."),
        table(("", "base", "tuned"), scores, figures=(1, 2)),
        *([table(head, answers[:SHOWN_ANSWERS], class_="answers")] if answers else []),
        *(more if len(answers) > SHOWN_ANSWERS else []),
    )


def _comparison(one: Json) -> tuple[str, ...]:
    right = one["tuned"] == one["expected"]
    return ("✓" if right else "✗", one["request"], one["expected"], one["base"], one["tuned"])


def exports(found: Sequence[tuple[str, Json]]) -> Html:
    """Each exported model and whether it was proven to be the one that was trained."""
    return section("Exported models", *(part for name, proof in found for part in _export(name, proof)))


def _export(name: str, proof: Json) -> list[Html]:
    verdict = "✓ verified to be the model that was trained" if proof.get("verified") else "✗ not verified"
    drawn = [element("h3", f"{name}: {verdict}")]
    failures = [element("li", str(failure)) for failure in proof.get("failures", ())]
    if failures:
        drawn.append(element("ul", *failures))
    measured = [
        (title, *(_figure(proof, model, key, layout) for model in ("exported", "bare_base", "limits")))
        for key, (title, layout) in CLOSENESS.items()
    ]
    perplexity = proof.get("perplexity", {})
    if perplexity:
        named = f"perplexity (trained: {perplexity['trained']:.4g})"
        measured.append((named, f"{perplexity['exported']:.4g}", f"{perplexity['bare base']:.4g}", ""))
    if "exported" in proof:
        drawn.append(
            paragraph(
                f"Compared on {proof['rows']} {proof['rows_from']}, computed in float32; merged into the "
                f"{proof['weights']} weights.{_noise(proof)}"
            )
        )
        drawn.append(table(("", "exported", "base without adapter", "limit"), measured, figures=(1, 2, 3)))
    answers = [(one["request"], one["trained"], one["exported"]) for one in proof.get("answers", ())]
    if answers:
        head = ("request", "trained model", "exported model")
        drawn.append(details("Its answers", table(head, answers, class_="answers")))
    return drawn


def _noise(proof: Json) -> str:
    """What the precision of training does to the trained model itself, where that was measured."""
    live = proof.get("live")
    if not live:
        return ""
    return f" Computing with {proof['compute_dtype']} alone changes the trained model by a KL of {live['kl']:.2e}."


def _figure(proof: Json, model: str, key: str, layout: str) -> str:
    value = proof.get(model, {}).get(key)
    return "" if value is None else format(value, layout)
