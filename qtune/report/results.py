"""What was measured of a run's results, as parts of the page: base against tuned, exported models."""

from collections.abc import Sequence

from qtune.export.verification import Proof, Verification
from qtune.report.html import Html, details, element, table
from qtune.report.sections import paragraph, section
from qtune.tuned.asked import asked_text, shared_system
from qtune.tuned.evaluation import Evaluation
from qtune.tuned.forgotten import Forgetting
from qtune.tuned.task_scores import TaskScores
from qtune.verdicts.scores import forgetting_table, score_table, worst_first
from qtune.verdicts.tasks import COLUMNS, asked_how, task_table

SHOWN_ANSWERS = 10
SCORED = ("", "base", "tuned", "change, 95 % interval")


def evaluation(results: Evaluation) -> Html:
    """Base against tuned: the scores, and answers side by side, the worst first."""
    head = ("", "request", "expected", "base", "tuned")
    title, compared = worst_first(results)
    system = shared_system([one.turns for _, one in compared])
    answers = [
        (mark, asked_text(one.request, one.turns, system), one.expected, one.base, one.tuned) for mark, one in compared
    ]
    asked = f"{results.rows_judged} of {results.rows_held_out} {results.source}"
    more = [details(f"{len(answers) - SHOWN_ANSWERS} more", table(head, answers[SHOWN_ANSWERS:], class_="answers"))]
    return section(
        "Base against tuned",
        paragraph("; ".join(filter(None, (asked, results.about_interval, results.about_rows))) + "."),
        table(SCORED, score_table(results), figures=(1, 2, 3), class_="scores"),
        *(
            [element("h3", title), *_alike(system), table(head, answers[:SHOWN_ANSWERS], class_="answers")]
            if answers
            else []
        ),
        *(more if len(answers) > SHOWN_ANSWERS else []),
    )


def _alike(system: str | None) -> list[Html]:
    """What all requests begin with, said once."""
    return [] if system is None else [paragraph(f"Each request begins with the system message: {system}")]


def forgetting(found: Forgetting) -> Html:
    """What the tuned model predicts worse than its base, where nothing is about its rows."""
    tokens = sum(one.tokens for one in found.pieces)
    return section(
        "What it has forgotten",
        paragraph(
            "Both models on a text that comes with qtune (tuned/neutral.txt) and is about none of the rows, "
            f"{len(found.pieces)} pieces and {tokens:,} scored tokens: by how much the loss rises there was forgotten. "
            "Measured by qtune compare."
        ),
        table(SCORED, forgetting_table(found), figures=(1, 2, 3), class_="scores"),
    )


def tasks(found: TaskScores) -> Html:
    """What benchmarks said of both models."""
    return section(
        "Benchmarks",
        paragraph(f"Asked by {asked_how(found)}, without a chat template, as others publish them."),
        table(COLUMNS, task_table(found), figures=(2, 3, 4), class_="scores"),
    )


def exports(found: Sequence[tuple[str, Proof]]) -> Html:
    """Each exported model and whether it was proven to be the one that was trained."""
    return section("Exported models", *(part for name, proof in found for part in _export(name, proof)))


def _export(name: str, proof: Proof) -> list[Html]:
    verdict = "✓ verified to be the model that was trained" if proof.verified else "✗ not verified"
    drawn = [element("h3", f"{name}: {verdict}")]
    if proof.failures:
        drawn.append(element("ul", *(element("li", failure) for failure in proof.failures)))
    if proof.figures is not None:
        drawn += _figures(proof.figures)
    return drawn


def _figures(verification: Verification) -> list[Html]:
    exported, bare, limits, perplexity = (
        verification.exported,
        verification.bare_base,
        verification.limits,
        verification.perplexity,
    )
    measured = [
        ("KL divergence, nats per token", *(f"{one.kl:.2e}" for one in (exported, bare, limits))),
        ("same likeliest token", *(f"{one.top1:.2%}" for one in (exported, bare, limits))),
        (
            f"perplexity (trained: {perplexity['trained']:.4g})",
            *(f"{perplexity[name]:.4g}" for name in ("exported", "bare base")),
            "",
        ),
    ]
    drawn = [
        paragraph(
            f"Compared on {verification.rows} {verification.rows_from}, computed in float32; merged into the "
            f"{verification.weights} weights.{_noise(verification)}"
        ),
        table(("", "exported", "base without adapter", "limit"), measured, figures=(1, 2, 3)),
    ]
    system = shared_system([one.turns for one in verification.answers])
    answers = [(asked_text(one.request, one.turns, system), one.trained, one.exported) for one in verification.answers]
    if answers:
        head = ("request", "trained model", "exported model")
        drawn.append(details("Its answers", *_alike(system), table(head, answers, class_="answers")))
    return drawn


def _noise(verification: Verification) -> str:
    """What the precision of training does to the trained model itself, where that was measured."""
    if verification.live is None:
        return ""
    change = f"changes the trained model by a KL of {verification.live.kl:.2e}"
    return f" Computing with {verification.compute_dtype} alone {change}."
