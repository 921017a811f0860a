"""Verdicts: one sentence for each question about a run, right about runs of which the truth is known."""

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from qtune.export.verification import Closeness, GgufProof, Proof
from qtune.run.lock import Lock, LockedDevice
from qtune.run.memory import RunMemory
from qtune.run.metrics import GROUPS, EvalRecord, TrainRecord, grouped
from qtune.screens.verdicts import show
from qtune.tuned.evaluation import Comparison, Evaluation, RowLoss, Score
from qtune.verdicts.curves import overfits, rate
from qtune.verdicts.export import exported
from qtune.verdicts.facts import Facts
from qtune.verdicts.interval import fall_between, paired_fall, student_t
from qtune.verdicts.learning import learned
from qtune.verdicts.memory import fits
from qtune.verdicts.of_run import verdicts
from qtune.verdicts.verdict import QUESTIONS, Verdict

NOTHING = Facts("runs/x", True, (), (), None, None, None, ())


def training(losses: Sequence[float], rates: Sequence[float] | None = None) -> tuple[TrainRecord, ...]:
    """Records of these losses; the rate warms up in three steps where none is given."""
    rates = rates or [min(1.0, (step + 1) / 3) * 1e-4 for step in range(len(losses))]
    return tuple(
        TrainRecord(step, len(losses), 0.1, float(step), loss, 0.5, one, 1.0, 50.0, 1, 1)
        for step, (loss, one) in enumerate(zip(losses, rates, strict=True), 1)
    )


def noisy(curve: Callable[[float], float], steps: int = 100, noise: float = 0.1, seed: int = 0) -> list[float]:
    """A curve over 0 to 1 with the noise of batches around it."""
    draw = random.Random(seed)
    return [curve(step / steps) + draw.gauss(0, noise) for step in range(steps)]


def validation(step: int, losses: Sequence[float], tokens: int = 20) -> EvalRecord:
    mean = sum(losses) / len(losses)
    return EvalRecord(step, 100, 0.1, 1.0, mean, 0.5, tuple(losses), (tokens,) * len(losses))


def spread(mean: float, rows: int = 30, width: float = 0.5, noise: float = 0.02, seed: int = 0) -> list[float]:
    """Rows of unequal hardness, always the same, around a mean, with a little noise of their own."""
    draw = random.Random(seed)
    return [mean + width * (2 * row / (rows - 1) - 1) + draw.gauss(0, noise) for row in range(rows)]


def evaluation(base: Sequence[float], tuned: Sequence[float], right: tuple[int, int] = (0, 0)) -> Evaluation:
    rows = tuple(RowLoss(f"t:{at}", 10, *both) for at, both in enumerate(zip(base, tuned, strict=True)))
    compared = tuple(
        Comparison("t", "Q", "A", "A" if at < right[0] else "x", "A" if at < right[1] else "x")
        for at in range(len(rows))
    )
    scores = [
        Score(sum(losses) / len(rows), 0.5, count / len(rows))
        for losses, count in zip((base, tuned), right, strict=True)
    ]
    return Evaluation("runs/x", "test rows", len(rows), len(rows), 10 * len(rows), 0, *scores, compared, rows)


# --- intervals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("freedom", "confidence", "table"),
    [(4, 0.95, 2.776), (9, 0.95, 2.262), (29, 0.95, 2.045), (100, 0.95, 1.984), (10, 0.99, 3.169), (20, 0.999, 3.850)],
)
def test_students_t_is_that_of_the_printed_tables(freedom: float, confidence: float, table: float) -> None:
    assert student_t(freedom, confidence) == pytest.approx(table, rel=5e-3)


def test_a_paired_interval_over_equal_rows_is_the_textbooks_one() -> None:
    """Ten differences of mean 0.75 and standard deviation 1.7873: Student's sleep data, 1908, drug 1."""
    falls = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    found = paired_fall(falls, [0.0] * 10, [7] * 10)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((-0.5297804, 2.0297804), rel=2e-3)


def test_a_rise_of_shares_ends_at_all_of_them_and_is_never_certain() -> None:
    ones, zeros, nearly = [1.0] * 120, [0.0] * 120, [1.0] * 119 + [0.0]
    for after, before, ends in (
        (ones, zeros, (0.9697, 1.0)), (zeros, ones, (-1.0, -0.9697)), (ones, ones, (-0.0303, 0.0303)),
        (nearly, zeros, (0.9752, 1.0)),
    ):  # fmt: skip
        found = paired_fall(after, before, [1] * 120, are_shares=True)
        assert found is not None
        assert (found.low, found.high) == pytest.approx(ends, abs=5e-5)
    untouched = paired_fall([2.5] * 120, [2.5] * 120, [1] * 120)
    assert untouched is not None
    assert (untouched.low, untouched.high) == (0.0, 0.0)


def test_two_samples_differ_by_welchs_interval() -> None:
    """R's t.test(extra ~ group, data = sleep): -3.3654832 to 0.2054832."""
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    found = fall_between(first, second)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((-3.3654832, 0.2054832), rel=2e-3)


def test_nineteen_of_twenty_intervals_over_rows_of_unequal_length_hold_the_truth() -> None:
    """Rows of 5 to 60 tokens; how far a row's loss falls depends on its length, so that tokens are no units."""
    draw = random.Random(1)
    held = 0
    for _ in range(400):
        tokens = [draw.randint(5, 60) for _ in range(60)]
        after = [2.0 - 0.01 * count - draw.gauss(0.2, 0.3) for count in tokens]
        found = paired_fall([2.0] * 60, after, tokens)
        truth = 0.2 + 0.01 * sum(count**2 for count in range(5, 61)) / sum(range(5, 61))
        held += found is not None and found.low <= truth <= found.high
    assert 0.91 <= held / 400 <= 0.98


@pytest.mark.parametrize("values", [[1.0] * 4, [1.0] * 9 + [math.nan], [1.0] * 9 + [math.inf]])
def test_too_few_rows_or_what_is_no_number_has_no_interval(values: list[float]) -> None:
    assert paired_fall(values, [0.5] * len(values), [1] * len(values)) is None
    assert fall_between(values, values) is None


def test_rows_keep_their_group_however_many_there_are() -> None:
    assert grouped([3.0, 0.0, 8.0], [2, 0, 4]) == ((1.5, 2.0), (2, 4))
    losses, tokens = grouped([float(row) for row in range(1000)], [1] * 1000)
    assert (len(losses), sum(tokens)) == (GROUPS, 1000)
    assert sum(loss * count for loss, count in zip(losses, tokens, strict=True)) == pytest.approx(999 * 500)
    assert grouped([], []) == ((), ())


# --- learned -------------------------------------------------------------------------------------------------------


def test_a_fall_against_the_base_is_learning_and_has_its_interval() -> None:
    found = learned(replace(NOTHING, evaluation=evaluation(spread(2.4), spread(0.4, seed=1), right=(0, 29))))
    assert (found.standing, found.answer) == ("good", "Learned")
    assert found.sentence.startswith("on 30 held-out rows the loss went from 2.40 to 0.402 nats per token, a fall by ")
    assert found.sentence.endswith("; answers exactly right: 0 → 29 of 30")


def test_a_fall_that_is_as_large_as_its_noise_is_not_called_learning() -> None:
    """p-tuning from 3.05 to 3.01: rows move by 0.3 either way."""
    found = learned(replace(NOTHING, evaluation=evaluation(spread(3.05), spread(3.01, noise=0.3, seed=4))))
    assert (found.standing, found.answer) == ("bad", "Did not learn")
    assert "no more than noise" in found.sentence


def test_a_certain_fall_of_one_percent_is_called_little() -> None:
    found = learned(replace(NOTHING, evaluation=evaluation(spread(3.05), spread(3.01))))
    assert (found.standing, found.answer) == ("unsure", "Learned little")


def test_a_rise_is_worse_than_the_base_unless_more_answers_are_right() -> None:
    worse = evaluation(spread(1.0), spread(1.5))
    assert learned(replace(NOTHING, evaluation=worse)).answer == "Worse than the base"
    assert learned(replace(NOTHING, evaluation=worse)).standing == "bad"
    more = evaluation(spread(1.0), spread(1.5), right=(2, 25))
    assert (learned(replace(NOTHING, evaluation=more)).answer) == "Mixed"


def test_an_evaluation_of_an_older_version_is_judged_by_its_answers_or_not_at_all() -> None:
    older = replace(evaluation(spread(2.4), spread(0.4), right=(0, 29)), row_losses=())
    assert learned(replace(NOTHING, evaluation=older)).answer == "Learned"
    silent = replace(older, comparisons=())
    assert learned(replace(NOTHING, evaluation=silent)).command == "qtune eval runs/x measures it anew"


def test_an_evaluation_of_few_rows_says_that_they_are_few_and_how_to_ask_more() -> None:
    """Seven rows carry an interval, and a reader takes it for more than it is."""
    few = evaluation(spread(2.0, rows=7), spread(1.0, rows=7, seed=1))
    found = learned(replace(NOTHING, evaluation=few))
    assert found.answer == "Learned"
    assert "; 7 rows are few, and other rows may say otherwise (data.test or a larger data.validation" in found.sentence
    assert found.command is None
    more = learned(replace(NOTHING, evaluation=replace(few, rows_held_out=52)))
    assert more.sentence.endswith("7 rows are few, and other rows may say otherwise")
    assert more.command == "qtune eval runs/x --rows 52"
    many = learned(replace(NOTHING, evaluation=evaluation(spread(2.0), spread(1.0, seed=1))))
    assert "few" not in many.text


def test_what_noise_may_hide_is_not_called_nothing() -> None:
    """Five rows whose losses fell by a sixth, but for one: "did not learn" is no more certain than "learned"."""
    base, tuned = [4.0, 3.8, 4.1, 3.9, 3.9], [3.2, 2.6, 3.3, 4.2, 3.0]
    hidden = learned(replace(NOTHING, evaluation=evaluation(base, tuned)))
    assert (hidden.standing, hidden.answer) == ("unsure", "Cannot be told")
    assert "no more than noise (a fall by 0.68" in hidden.sentence
    nothing = learned(replace(NOTHING, evaluation=evaluation(spread(3.05), spread(3.04, seed=1))))
    assert (nothing.standing, nothing.answer) == ("bad", "Did not learn")


def test_four_rows_are_too_few_to_say() -> None:
    assert learned(replace(NOTHING, evaluation=evaluation([3.0] * 4, [1.0] * 4))).answer == "Too few rows"


def test_before_an_evaluation_the_validation_rows_tell_and_then_the_training_loss() -> None:
    falls = training(noisy(lambda at: 2.5 * math.exp(-8 * at) + 0.3))
    rows = (validation(0, spread(2.5)), validation(100, spread(0.5)))
    by_rows = learned(replace(NOTHING, train=falls, validation=rows))
    assert (by_rows.standing, by_rows.answer) == ("good", "Learned")
    assert by_rows.command == "against the base: qtune eval runs/x"
    by_training = learned(replace(NOTHING, train=falls))
    assert (by_training.standing, by_training.answer) == ("unsure", "Training loss fell")


def test_validation_rows_that_training_saw_are_in_no_verdict() -> None:
    """Their losses, which fell to nothing, are in the record's loss and in none of its groups."""
    rows = tuple(
        replace(validation(step, spread(mean, seed=step)), loss=mean / 2, left_out=30)
        for step, mean in ((0, 2.5), (50, 0.5), (100, 0.9))
    )
    facts = replace(NOTHING, train=FALLING, validation=rows)
    found, over = learned(facts), overfits(facts)
    assert found.answer == "Learned"
    assert "the loss of the validation rows went from 2.50 (step 0) to 0.9" in found.sentence
    assert found.sentence.endswith("(30 validation rows left out, for training saw their prompts)")
    assert over.answer == "Yes"
    assert "validation was 0.50" in over.sentence
    assert "left out, for training saw their prompts" in over.sentence
    unknown = learned(replace(facts, validation=(rows[0], replace(rows[2], is_seen_unknown=True))))
    assert unknown.sentence.endswith("(whether training saw others is not known)")
    seen = replace(facts, validation=tuple(replace(one, left_out=0, are_seen=True) for one in rows))
    assert (learned(seen).standing, learned(seen).answer) == ("unsure", "Cannot be told")
    assert (overfits(seen).standing, overfits(seen).answer) == ("unsure", "Cannot be told")
    assert "training saw the prompts of validation rows" in learned(seen).sentence


@pytest.mark.parametrize("seed", range(20))
def test_a_training_loss_that_only_wavers_has_not_fallen(seed: int) -> None:
    """3.05 to 3.01 in 100 steps whose batches differ by 0.2: nothing that could be told from noise."""
    found = learned(replace(NOTHING, train=training(noisy(lambda at: 3.05 - 0.04 * at, noise=0.2, seed=seed))))
    assert found.standing != "good"
    assert found.answer in ("Did not learn", "Loss rose", "Training loss fell")
    if found.answer == "Did not learn":
        assert "no more than noise" in found.sentence


def test_what_a_long_run_learns_in_its_first_steps_is_not_called_little() -> None:
    losses = noisy(lambda at: 1.0 + 2 * math.exp(-2000 * at), steps=10_000)
    assert learned(replace(NOTHING, train=training(losses))).answer == "Training loss fell"


def test_a_run_that_diverged_did_not_learn() -> None:
    found = learned(replace(NOTHING, train=training([2.0, 3.0, math.nan])))
    assert (found.standing, found.answer) == ("bad", "Diverged")


@pytest.mark.parametrize("steps", [0, 1, 9])
def test_a_run_of_few_steps_is_left_open(steps: int) -> None:
    assert learned(replace(NOTHING, train=training([2.0] * steps))).standing == "open"


# --- overfits ------------------------------------------------------------------------------------------------------

FALLING = training([2.0 - 0.018 * step for step in range(100)])


def test_validation_that_rises_while_training_falls_is_overfitting_and_its_best_is_named() -> None:
    rows = tuple(
        validation(step, spread(mean, seed=step)) for step, mean in ((20, 1.5), (40, 1.0), (60, 1.1), (100, 1.4))
    )
    found = overfits(replace(NOTHING, train=FALLING, validation=rows))
    assert (found.standing, found.answer) == ("bad", "Yes")
    assert found.command == "training.steps = 40 would end at its best"


def test_an_adapter_that_is_the_best_state_is_judged_by_it() -> None:
    rows = tuple(
        validation(step, spread(mean, seed=step)) for step, mean in ((20, 1.5), (40, 1.0), (60, 1.1), (100, 1.7))
    )
    facts = replace(NOTHING, train=FALLING, validation=rows, adapter_step=40)
    found = overfits(facts)
    assert (found.answer, found.command) == ("Yes, and the adapter is that of step 40", None)
    # The last state is worse than the first evaluation, and the adapter is not the last state.
    assert learned(facts).standing == "good"
    assert "from 1.50 (step 20) to 1.00 (step 40)" in learned(facts).sentence
    assert learned(replace(facts, adapter_step=None)).standing != "good"


def test_a_rise_that_is_certain_and_small_is_not_called_noise() -> None:
    small = (validation(40, spread(1.0, noise=0)), validation(100, spread(1.01, noise=1e-4)))
    found = overfits(replace(NOTHING, train=FALLING, validation=small))
    assert found.standing == "good"
    assert found.sentence.endswith(", a rise of less than 2 %")
    wide = (validation(40, spread(1.0, noise=0.5)), validation(100, spread(1.05, noise=0.5, seed=1)))
    said = overfits(replace(NOTHING, train=FALLING, validation=wide)).sentence
    assert re.search(r", no more than noise \(a rise by 0\.\d+, 99 % interval -0\.\d+ to 0\.\d+\)$", said)


@pytest.mark.parametrize("seed", range(20))
def test_validation_that_wavers_around_its_best_is_no_overfitting(seed: int) -> None:
    rows = tuple(validation(step, spread(1.0, noise=0.1, seed=100 * seed + step)) for step in range(10, 101, 10))
    assert overfits(replace(NOTHING, train=FALLING, validation=rows)).standing == "good"


def test_validation_that_rises_with_training_is_not_called_overfitting() -> None:
    rising = training([2.0 + 0.01 * step for step in range(100)])
    rows = (validation(50, spread(1.0)), validation(100, spread(1.4, seed=1)))
    assert overfits(replace(NOTHING, train=rising, validation=rows)).answer == "Not by itself"


def test_a_base_that_was_better_than_all_that_came_is_overfitting_where_training_fell() -> None:
    """training.evaluate_first: before the first step nothing was logged, and training fell all the same."""
    rows = (validation(0, spread(1.0)), validation(100, spread(2.0, seed=1)))
    found = overfits(replace(NOTHING, train=FALLING, validation=rows))
    assert (found.standing, found.answer) == ("bad", "Yes")
    assert "logged steps, the first and the last)" in found.sentence
    rising = training([2.0 + 0.01 * step for step in range(100)])
    assert overfits(replace(NOTHING, train=rising, validation=rows)).answer == "Not by itself"


def test_where_training_was_not_logged_nothing_is_said_of_how_it_went() -> None:
    rows = (validation(50, spread(1.0)), validation(60, spread(1.4, seed=1)))
    few = tuple(one for one in FALLING if one.step <= 50)
    found = overfits(replace(NOTHING, train=few, validation=rows))
    assert found.answer == "Not certain"
    assert found.sentence.endswith("; how training went meanwhile was not logged")


def test_without_two_evaluations_it_says_what_to_do() -> None:
    none, once = overfits(NOTHING), overfits(replace(NOTHING, validation=(validation(9, spread(1.0)),)))
    assert none.command == (
        "data.validation = 0.05 in the recipe keeps 5 % of the rows apart, and training.eval_every says when they are "
        "looked at"
    )
    assert once.command == "training.eval_every = 20 would show its course"
    assert (none.standing, once.standing) == ("open", "open")
    begun = overfits(replace(NOTHING, is_finished=False))
    assert (begun.sentence, begun.command) == ("no validation row was looked at yet", None)
    going_on = overfits(replace(NOTHING, is_finished=False, validation=(validation(9, spread(1.0)),)))
    assert going_on.sentence.startswith("validation was looked at once so far: ")
    assert going_on.command is None


def test_losses_that_are_no_numbers_are_no_best_and_rows_that_changed_are_not_paired() -> None:
    odd = replace(validation(50, spread(1.0)), loss=math.nan)
    best, last = validation(20, spread(0.9)), validation(100, spread(1.3, rows=20))
    found = overfits(replace(NOTHING, train=FALLING, validation=(best, odd, last)))
    assert (found.standing, found.answer) == ("unsure", "Not certain")
    alone = overfits(replace(NOTHING, train=FALLING, validation=(odd,)))
    assert (alone.sentence, alone.command) == ("the validation loss is no number at step 50", None)


# --- rate ----------------------------------------------------------------------------------------------------------


def of_rate(losses: Sequence[float]) -> Verdict:
    return rate(replace(NOTHING, train=training(losses)))


@pytest.mark.parametrize("seed", range(20))
def test_a_loss_that_falls_steeply_and_levels_off_is_no_alarm(seed: int) -> None:
    assert of_rate(noisy(lambda at: 2.0 * math.exp(-10 * at) + 1.0, seed=seed)).standing == "good"


@pytest.mark.parametrize(
    "losses",
    [
        [2.0, 3.0, math.nan],
        noisy(lambda at: 2.0 + 3 * at),
        noisy(lambda at: 2.0 * math.exp(-10 * at) + 1.0 + 4 * (0.5 < at < 0.65)),
    ],
    ids=["no number", "above its start", "back up"],
)
def test_a_loss_that_diverges_or_comes_back_up_means_too_high_a_rate(losses: list[float]) -> None:
    found = of_rate(losses)
    assert (found.standing, found.answer) == ("bad", "Too high")
    assert found.command == "a lower training.learning_rate, or a longer training.warmup"


BROKEN = [4.2, 4.0, 9.0, 18.0, 23.0, 22.0, 15.0, 10.0, 8.0, 7.0, 6.5, 6.3, 6.1, 5.9, 5.8, 5.9]


@pytest.mark.parametrize(
    ("losses", "ended"), [(BROKEN, "ended above it: 6.00"), ([*BROKEN, *[3.0] * 9], "has come back")]
)
def test_a_loss_that_breaks_out_means_too_high_a_rate_however_few_steps_there_were(
    losses: list[float], ended: str
) -> None:
    found = of_rate(losses)
    assert (found.standing, found.answer) == ("bad", "Too high")
    assert "the training loss was 4.20 at its first logged step, 18.0 later" in found.sentence
    assert ended in found.sentence


@pytest.mark.parametrize("losses", [[0.2, 0.9, 1.4, 0.3, 1.9], [0.5, 9.0, 0.4, 9.0], [2.0, 5.0]], ids=str)
def test_batches_that_differ_have_not_broken_out(losses: list[float]) -> None:
    assert of_rate(losses).standing == "open"


def test_a_fall_from_what_training_had_spoilt_is_nothing_learned() -> None:
    """The first evaluation came after three steps, when the loss had gone from 4.2 to 23."""
    spoilt = replace(
        NOTHING, train=training(BROKEN), validation=(validation(3, spread(23.0)), validation(16, spread(6.3)))
    )
    found = learned(spoilt)
    assert (found.standing, found.answer) == ("bad", "Did not learn")
    assert found.sentence.endswith(", but the training loss began with 4.20 and ended with 6.00")
    began = replace(spoilt, validation=(validation(0, spread(23.0)), validation(16, spread(6.3))))
    assert learned(began).standing == "good", "an untrained base may be that bad on these rows"
    well = replace(spoilt, train=training([4.2, 3.0, 2.0, 1.0, 0.9, 0.8]))
    assert learned(well).standing == "good", "training says otherwise"


def test_single_hard_batches_are_no_alarm() -> None:
    losses = noisy(lambda at: 2.0 * math.exp(-10 * at) + 1.0)
    losses[50], losses[70] = 4.0, 5.0
    assert of_rate(losses).standing == "good"


def test_a_straight_fall_to_the_end_is_perhaps_too_low_a_rate_or_too_few_steps() -> None:
    found = of_rate(noisy(lambda at: 3.0 - at, noise=0.05))
    assert (found.standing, found.answer) == ("unsure", "Perhaps too low")
    assert found.command == "a higher training.learning_rate, or more steps"


def test_a_rise_during_the_warm_up_is_no_alarm() -> None:
    warm = [2.0 + 0.2 * step for step in range(5)]
    losses = warm + noisy(lambda at: 2.0 * math.exp(-10 * at) + 1.0)
    rates = [1e-5 * step for step in range(5)] + [1e-4] * 100
    found = rate(replace(NOTHING, train=training(losses, rates)))
    assert found.standing == "good"
    first = sum(losses[5:15]) / 10
    assert f"the training loss after the warm-up went from {first:.3g} to " in found.sentence
    assert "(means of the first 10 and the last 10 logged steps)" in found.sentence


def test_no_fall_says_nothing_of_the_rate_and_few_steps_say_less() -> None:
    assert of_rate(noisy(lambda at: 3.0, seed=3)).answer == "Not certain"
    assert of_rate([2.0, 1.0]).standing == "open"


# --- fits ----------------------------------------------------------------------------------------------------------


def with_memory(peak: int, total: int | None, key: str = "device_used_bytes", device: str = "cuda:0") -> Facts:
    measured = {
        "device": device,
        "phases": {"load": {key: peak // 2}, "forward": {key: peak, "reserved_peak_bytes": 1}},
    }
    locked = Lock(device=LockedDevice("a card", total_bytes=total))
    return replace(NOTHING, memory=RunMemory(measured=measured), lock=locked)


def test_a_run_fits_with_what_it_took_of_what_there_is() -> None:
    found = fits(with_memory(6 << 30, 8 << 30))
    assert (found.standing, found.sentence) == ("good", "the card took 6.00 GiB of 8.00 GiB at the peak (75%)")
    on_cpu = fits(with_memory(2 << 30, 16 << 30, "resident_peak_bytes", "cpu"))
    assert on_cpu.sentence == "the process took 2.00 GiB of 16.00 GiB at the peak (12%)"


def test_a_peak_of_an_earlier_part_counts_as_in_the_summary_of_the_run() -> None:
    """memory.json is of the last part of a run that was resumed; on a card the two count different things."""
    earlier = tuple(replace(one, memory_peak_bytes=3 << 30) for one in training([2.0, 1.0]))
    on_cpu = with_memory(2 << 30, 16 << 30, "resident_peak_bytes", "cpu")
    assert "took 3.00 GiB of" in fits(replace(on_cpu, train=earlier)).sentence
    on_card = with_memory(2 << 30, 16 << 30)
    assert "took 2.00 GiB of" in fits(replace(on_card, train=earlier)).sentence


def test_the_highest_peak_of_all_parts_on_the_last_device_counts() -> None:
    facts = with_memory(2 << 30, 16 << 30)
    assert facts.memory is not None
    parts = tuple(with_memory(peak << 30, None, device=name).memory for peak, name in ((5, "cuda:0"), (9, "another")))
    earlier = tuple(part.measured for part in parts if part is not None and part.measured is not None)
    resumed = replace(facts, memory=replace(facts.memory, earlier=earlier))
    assert fits(resumed).sentence == "the card took 5.00 GiB of 16.00 GiB at the peak (31%)"


def test_a_full_card_is_said_and_so_is_one_that_ran_out() -> None:
    assert fits(with_memory(97, 100)).answer == "Fits barely"
    ran_out = fits(replace(NOTHING, memory=RunMemory(failure={"phase": "forward"})))
    assert (ran_out.standing, ran_out.command) == ("bad", "qtune profile runs/x")
    assert fits(NOTHING).standing == "open"
    assert fits(with_memory(6 << 30, None)).sentence == "the card took 6.00 GiB at the peak"


def test_an_interrupted_run_is_judged_by_what_its_steps_took() -> None:
    begun = replace(NOTHING, train=training([2.0]), lock=with_memory(1, 100).lock)
    assert fits(begun).sentence == "the card, so far, took 1 B of 100 B at the peak (1%)"


# --- export --------------------------------------------------------------------------------------------------------


def test_an_export_is_as_good_as_its_worst_proof() -> None:
    proven, failed = Proof(True, ()), Proof(False, ("KL 0.1 is above 0.0001",))
    assert exported(replace(NOTHING, exports=(("model", proven),))).answer == "Proven"
    found = exported(replace(NOTHING, exports=(("model", proven), ("other", failed))))
    assert (found.standing, found.sentence) == ("bad", "other: KL 0.1 is above 0.0001")
    gguf = GgufProof("m.gguf", "f16", Closeness(1, 0.0, 0.0, 1.0, 0.0, 0.0), True, ("tokens differ",))
    spoiled = exported(replace(NOTHING, exports=(("model", replace(proven, gguf={"f16": gguf})),)))
    assert spoiled.sentence == "model/m.gguf: tokens differ"


def test_without_an_export_the_next_command_is_named() -> None:
    assert exported(NOTHING).command == "qtune export runs/x"
    assert exported(replace(NOTHING, is_finished=False)).command == "qtune run --resume runs/x"
    assert exported(replace(NOTHING, is_finished=False, train=training([math.nan]))).command is None


# --- all of them ---------------------------------------------------------------------------------------------------


def test_every_question_is_answered_whatever_is_missing() -> None:
    assert [one.question for one in verdicts(NOTHING)] == list(QUESTIONS)
    assert {one.standing for one in verdicts(NOTHING)} == {"open"}


def test_the_screen_shows_a_line_for_each_with_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    show([exported(NOTHING)])
    shown = " ".join(capsys.readouterr().out.split())
    assert shown == "– export? Not exported: no export is in the run's folder qtune export runs/x"


def test_a_command_below_a_verdict_is_one_line_however_long_the_sentence_and_the_path_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = f"qtune eval runs/{'long' * 40}"
    show([Verdict("learned", "open", "Too few steps", "a word " * 40, command), exported(NOTHING)])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert sum(line.strip() == command for line in lines) == 1
    assert {line.index("Too few") for line in lines if "Too few" in line} == {
        line.index("Not exported") for line in lines if "Not exported" in line
    }
