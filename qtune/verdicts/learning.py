"""Did it learn? Against the base where that was measured, else on validation rows, else by the training loss."""

from collections.abc import Sequence
from statistics import fmean

from qtune.recipe.steps import FEWEST
from qtune.run.metrics import EvalRecord
from qtune.run.summary import Losses, number
from qtune.tuned.evaluation import Evaluation
from qtune.verdicts.facts import Facts
from qtune.verdicts.interval import Fall, fall_between, paired_fall
from qtune.verdicts.scores import AnswerScores, answer_scores
from qtune.verdicts.verdict import Standing, Verdict

LITTLE = 0.02
"""A share of the base's loss below which a fall, however certain, is called little. Ours: no source names one."""

FEW = 30
"""Rows below which an evaluation says that they are few. Ours: the intervals are normal ones with Student's t, which
for means of skewed values are too narrow on small samples; thirty is the usual rule of thumb."""


SEEN = "training saw the prompts of validation rows, and hardly any others are left"


def learned(facts: Facts) -> Verdict:
    """The verdict of a run, by the strongest of what it has measured."""
    if facts.train and not facts.train[-1].is_finite:
        last = facts.train[-1]
        return Verdict("learned", "bad", "Diverged", f"the training loss is no number at step {last.step:,}")
    if facts.evaluation is not None:
        return learned_against_base(facts.evaluation, facts.run)
    ask = f"against the base: qtune eval {facts.run}" if facts.is_finished else None
    by_validation = _on_validation(facts.judged, facts.losses, ask)
    if by_validation is None and facts.diverged and facts.losses is not None:
        went = f"from {number(facts.losses.start)} to {number(facts.losses.end)} ({facts.losses.taken_over})"
        return Verdict("learned", "bad", "Diverged", f"the training loss went {went}, no better than guessing")
    return by_validation or _by_training(facts.losses, facts.judged, ask)


def learned_against_base(evaluation: Evaluation, run: str) -> Verdict:
    """The verdict of `qtune eval`: the fall of the loss from base to tuned, row by row."""
    base, tuned, rows = evaluation.base, evaluation.tuned, evaluation.judged_rows
    losses = f"{number(base.loss)} to {number(tuned.loss)} nats per token"
    told = f"on {evaluation.rows_judged} held-out rows the loss went from {losses}"
    asked = answer_scores(evaluation)
    answers, more = ("", None) if asked is None else (_answers(asked), asked.rise)
    if evaluation.are_seen:
        told = f"{evaluation.about_rows}, and what training saw says nothing of new rows; {told}{answers}"
        return Verdict("learned", "unsure", "Cannot be told", told, _unseen_rows(evaluation, run))
    if evaluation.left_out or evaluation.seen_unknown is not None:
        answers = f"{answers}; {evaluation.about_rows}"
    few, command = _few(evaluation, run)
    if not rows:
        if more is not None and more.is_positive:
            return Verdict("learned", "good", "Learned", f"{told}{answers}")
        told = f"{told}{answers}, kept without the rows' own losses and so without an interval"
        return Verdict("learned", "unsure", "Not certain", told, f"qtune eval {run} measures it anew")
    fall = paired_fall([one.base for one in rows], [one.tuned for one in rows], [one.tokens for one in rows])
    if fall is None:
        return Verdict("learned", "unsure", "Too few rows", f"{told}{answers}; fewer than {FEWEST} rows say little")
    standing, answer = _judged(fall, base.loss)
    if standing == "bad" and more is not None and more.is_positive:
        standing, answer = "unsure", "Mixed"
    return Verdict("learned", standing, answer, f"{told}, {by_how_much(fall)}{answers}{few}", command)


def _unseen_rows(evaluation: Evaluation, run: str) -> str:
    """The command that asks rows which training has not seen."""
    if evaluation.rows_held_out > evaluation.rows:
        return f"qtune eval {run} --rows {evaluation.rows_held_out}  # all that were held out"
    return f"qtune eval {run} --data FILE  # rows that were not trained on"


def _few(evaluation: Evaluation, run: str) -> tuple[str, str | None]:
    """What is said of an evaluation of few rows, and the command that asks more of them where more were held out."""
    if evaluation.rows_judged >= FEW:
        return "", None
    said = f"; {evaluation.rows_judged} rows are few, and other rows may say otherwise"
    if evaluation.rows_held_out > evaluation.rows:
        return said, f"qtune eval {run} --rows {min(evaluation.rows_held_out, 100)}"
    return f"{said} (data.test or a larger data.validation holds more)", None


def _judged(fall: Fall, base: float) -> tuple[Standing, str]:
    if fall.is_negative:
        return "bad", "Worse than the base"
    if not fall.is_positive and fall.mean >= LITTLE * base:  # what noise hides may be there
        return "unsure", "Cannot be told"
    if not fall.is_positive:
        return "bad", "Did not learn"
    return ("unsure", "Learned little") if fall.mean < LITTLE * base else ("good", "Learned")


def by_how_much(fall: Fall) -> str:
    """The fall with its interval; where noise is as large, that is said."""
    interval = f"95 % interval {number(fall.low)} to {number(fall.high)}"
    if fall.is_negative:
        return f"a rise by {number(-fall.mean)} (95 % interval {number(-fall.high)} to {number(-fall.low)})"
    if not fall.is_positive:
        return f"no more than noise (a fall by {number(fall.mean)}, {interval})"
    return f"a fall by {number(fall.mean)} ({interval})"


def _answers(asked: AnswerScores) -> str:
    """Both models' answers by the measure that the rows have chosen, and how many are what was expected."""
    if asked.is_free:
        rise = asked.rise
        noise = " (no more than noise)" if rise is not None and not rise.is_positive and not rise.is_negative else ""
        exact = f"{asked.exact} of {len(asked.tuned)} exactly right"
        return f"; {asked.name} {fmean(asked.base):.2f} → {fmean(asked.tuned):.2f}{noise}, {exact}"
    return f"; {asked.name}: {sum(asked.base):.0f} → {sum(asked.tuned):.0f} of {len(asked.tuned)}"


def _on_validation(records: Sequence[EvalRecord], losses: Losses | None, ask: str | None) -> Verdict | None:
    """From the first evaluation to that of the adapter; None where that carries nothing.

    A first evaluation that came after some steps may have found what they had spoilt: a fall from there is none to be
    proud of where training and validation both ended above the training loss of the first logged step.
    """
    if len(records) < 2:
        return None
    first, last = records[0], records[-1]
    fall = fall_of(first, last)
    if fall is None or not fall.is_positive or fall.mean < LITTLE * first.judged_loss:
        return None
    went = f"from {number(first.judged_loss)} (step {first.step:,}) to {number(last.judged_loss)} (step {last.step:,})"
    told = f"the loss of the validation rows went {went}, {by_how_much(fall)}"
    if last.are_seen:
        return Verdict("learned", "unsure", "Cannot be told", f"{SEEN}, which says nothing of new rows; {told}", ask)
    if first.step and losses is not None and min(last.judged_loss, losses.end) > losses.values[0]:
        began = f"the training loss began with {number(losses.values[0])} and ended with {number(losses.end)}"
        return Verdict("learned", "bad", "Did not learn", f"{told}{last.about_rows}, but {began}", ask)
    return Verdict("learned", "good", "Learned", f"{told}{last.about_rows}", ask)


def fall_of(before: EvalRecord, after: EvalRecord, confidence: float = 0.95) -> Fall | None:
    """How far the validation loss fell between two evaluations of the same rows; None where they cannot be paired."""
    if not before.group_tokens or before.group_tokens != after.group_tokens:
        return None
    return paired_fall(before.group_losses, after.group_losses, before.group_tokens, confidence)


def _by_training(losses: Losses | None, validation: Sequence[EvalRecord], ask: str | None) -> Verdict:
    if losses is None:
        return Verdict("learned", "open", "No step yet", "nothing was trained so far")
    told = f"the training loss went from {number(losses.start)} to {number(losses.end)} ({losses.taken_over})"
    fall = fall_between(losses.first, losses.last)
    if fall is None:
        what = "a rise" if losses.end > losses.start else "a fall"
        return Verdict("learned", "open", "Too few steps", f"{told}, too early to tell {what}", ask)
    told = f"{told}, {by_how_much(fall)}"
    if fall.is_positive and fall.mean >= LITTLE * losses.start:
        held_out = f"; validation ended at {number(validation[-1].judged_loss)}" if validation else ""
        return Verdict("learned", "unsure", "Training loss fell", f"{told}{held_out}", ask)
    answer = "Learned little" if fall.is_positive else "Loss rose" if fall.is_negative else "Did not learn"
    return Verdict("learned", "unsure" if fall.is_positive else "bad", answer, told, ask)
