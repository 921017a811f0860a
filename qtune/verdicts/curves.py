"""Does it overfit, and was the learning rate right? What the curves of a run carry, and no more."""

import math
from collections.abc import Sequence
from statistics import fmean

from qtune.recipe.steps import FEWEST
from qtune.run.metrics import EvalRecord, TrainRecord
from qtune.run.summary import Losses, number
from qtune.verdicts.facts import Facts
from qtune.verdicts.interval import Fall, fall_between
from qtune.verdicts.learning import LITTLE, SEEN, by_how_much, fall_of
from qtune.verdicts.verdict import Verdict

SPLIT = (
    "data.validation = 0.05 in the recipe keeps 5 % of the rows apart, and training.eval_every says when they are "
    "looked at"
)
SURE = 0.99
"""Confidence of an alarm, all comparisons of a run together."""
FEWEST_FOR_RATE = 30
"""Logged steps after the warm-up: three thirds of ten."""


def overfits(facts: Facts) -> Verdict:
    """Validation above its best by more than noise while training went on falling.

    That is what early stopping looks for (Prechelt, Early Stopping - But When?, 1998; Goodfellow et al., Deep Learning,
    section 7.8). The best of several evaluations is partly luck, so the interval is widened for as many
    comparisons as there were (Bonferroni), and it is one of 99 %: this is an alarm.
    """
    found = [one for one in facts.validation if math.isfinite(one.judged_loss)]
    if not found and facts.validation:
        told = f"the validation loss is no number at step {facts.validation[-1].step:,}"
        return Verdict("overfits", "unsure", "Not certain", told)
    if not found:
        told = f"no validation row was looked at{'' if facts.is_finished else ' yet'}"
        return Verdict("overfits", "open", "Not measured", told, SPLIT if facts.is_finished else None)
    best, last = min(found, key=lambda one: one.judged_loss), found[-1]
    if len(found) == 1:
        so_far = "" if facts.is_finished else " so far"
        told = f"validation was looked at once{so_far}: {number(last.judged_loss)} at step {last.step:,}"
        often = f"training.eval_every = {max(1, last.steps // FEWEST)} would show its course"
        return Verdict("overfits", "open", "Not measured", told, often if facts.is_finished else None)
    if last.are_seen:
        return Verdict("overfits", "unsure", "Cannot be told", SEEN)
    at_last = f"{number(last.judged_loss)} at the last, step {last.step:,}"
    if last is best:
        return Verdict("overfits", "good", "No", f"validation was best, {at_last}{last.about_rows}")
    told = f"validation was {number(best.judged_loss)} at its best, step {best.step:,}, and {at_last}"
    told += last.about_rows
    rise = fall_of(last, best, 1 - (1 - SURE) / (len(found) - 1))
    if rise is None:
        return Verdict("overfits", "unsure", "Not certain", f"{told}; whether that is more than noise was not measured")
    if not rise.is_positive:
        return Verdict("overfits", "good", "No", f"{told}, no more than noise ({_rise(rise)})")
    if rise.mean < LITTLE * best.judged_loss:
        return Verdict("overfits", "good", "No", f"{told}, a rise of less than {100 * LITTLE:.0f} %")
    size, before, after = _training_around(facts, best, last)
    told += f", more than noise ({_rise(rise)})"
    if not size:
        told += "; how training went meanwhile was not logged"
        return Verdict("overfits", "unsure", "Not certain", told, "training.log_every = 1 logs every step")
    if after >= before:
        return Verdict("overfits", "unsure", "Not by itself", f"{told}, but training did not go on falling either")
    means = f"means of {size} logged steps, {'before each' if best.step else 'the first and the last'}"
    told += f", while training went on from {number(before)} to {number(after)} ({means})"
    if facts.adapter_step is not None:
        return Verdict("overfits", "bad", f"Yes, and the adapter is that of step {facts.adapter_step:,}", told)
    return Verdict("overfits", "bad", "Yes", told, f"training.steps = {best.step} would end at its best")


def _rise(rise: Fall) -> str:
    return f"a rise by {number(rise.mean)}, {100 * SURE:.0f} % interval {number(rise.low)} to {number(rise.high)}"


def _training_around(facts: Facts, best: EvalRecord, last: EvalRecord) -> tuple[int, float, float]:
    """The mean training loss up to the best evaluation and up to the last one, over as many records each, and how many:
    as many as make the end of the run, where there are so many. 0: there are none. Where nothing was trained before the
    best, what was trained first stands for it."""
    losses = [(one.step, one.loss) for one in facts.train if one.is_finite]
    until_best = [loss for step, loss in losses if step <= best.step]
    since = [loss for step, loss in losses if best.step < step <= last.step]
    if not best.step:
        until_best, since = since[: len(since) // 2], since[len(since) // 2 :]
        until_best = until_best[: facts.losses.count if facts.losses else 0]
    size = min(len(until_best), len(since), facts.losses.count if facts.losses else 0)
    return (size, fmean(until_best[-size:]), fmean(since[-size:])) if size else (0, math.nan, math.nan)


def rate(facts: Facts) -> Verdict:
    """Whether the training loss looks like a rate that is too high or too low.

    Too high: the loss is no number, breaks out far above its first (`Losses.outbreak`), ends above its start, or comes
    back up to it after it had fallen (instability: Godbole et al., Deep Learning Tuning Playbook, 2023; Smith,
    arXiv:1506.01186, section 3.3). Too low: it falls in a straight line to the end, where a sufficient rate falls
    steeply first (Stanford's CS231n, Neural Networks Part 3, "Babysitting the learning process"). More steps would
    look the same, and that is said.
    """
    lower = "a lower training.learning_rate, or a longer training.warmup"
    for one in facts.train:
        if not one.is_finite:
            return Verdict("rate", "bad", "Too high", f"the loss is no number at step {one.step:,}", lower)
    losses, whole = after_warmup(facts.train), facts.losses
    if facts.diverged and whole is not None:
        told = f"the training loss ended at {number(whole.end)}, no better than guessing"
        return Verdict("rate", "bad", "Too high", told, lower)
    if whole is not None and (highest := whole.outbreak) is not None:
        ended = "ended above it" if whole.end > whole.values[0] else "has come back since"
        first_logged = f"the training loss was {number(whole.values[0])} at its first logged step"
        told = f"{first_logged}, {number(highest)} later, and {ended}"
        return Verdict("rate", "bad", "Too high", f"{told}: {number(whole.end)}", lower)
    if whole is None or len(losses) < max(FEWEST_FOR_RATE, 3 * whole.count):
        told = f"logged steps after the warm-up: {len(losses)}, too few to judge by"
        return Verdict("rate", "open", "Too few steps", told)
    first = Losses(losses).first
    fall = fall_between(first, whole.last)
    start = fmean(first)
    when = " after the warm-up" if len(losses) < len(facts.train) else ""
    means = f"means of the first {len(first)} and the last {whole.count} logged steps"
    told = f"the training loss{when} went from {number(start)} to {number(whole.end)} ({means})"
    if fall is None or fall.is_negative:
        return Verdict("rate", "bad", "Too high", f"{told}, above its start", lower)
    if not fall.is_positive:
        told = f"{told}, {by_how_much(fall)}: no fall to judge the rate by"
        return Verdict("rate", "unsure", "Not certain", told, "try three times training.learning_rate, then a third")
    if (peak := _return(losses, start, fall.half_width)) is not None:
        told = f"{told}, but came back up to {number(peak)} after it had fallen"
        return Verdict("rate", "bad", "Too high", told, lower)
    thirds = [losses[at * len(losses) // 3 : (at + 1) * len(losses) // 3] for at in range(3)]
    early, late = fall_between(thirds[0], thirds[1]), fall_between(thirds[1], thirds[2])
    if early is not None and late is not None and late.is_positive and late.mean >= 0.8 * early.mean:
        told = (
            f"{told}, and fell as fast in its last third (by {number(late.mean)}) as before (by {number(early.mean)})"
        )
        return Verdict("rate", "unsure", "Perhaps too low", told, "a higher training.learning_rate, or more steps")
    return Verdict("rate", "good", "No sign against it", f"{told}, and did not come back up in between")


def after_warmup(train: Sequence[TrainRecord]) -> list[float]:
    """The losses from the step with the highest rate on; all of them where the rate does not change."""
    rates = [one.learning_rate for one in train]
    top = max(rates, default=0.0)
    begin = next((at for at, one in enumerate(rates) if one >= 0.999 * top), 0)
    return [one.loss for one in train[begin:]]


def _return(losses: Sequence[float], start: float, noise: float) -> float | None:
    """The highest mean of neighbouring steps at or above the start, after one that was clearly below; None: none."""
    size = max(FEWEST, len(losses) // 20)
    means = [fmean(losses[at : at + size]) for at in range(len(losses) - size + 1)]
    fallen = next((at for at, mean in enumerate(means) if mean < start - 2 * noise), len(means))
    highest = max(means[fallen + size :], default=-math.inf)
    return highest if highest >= start else None
