"""Laps end where work is done; what is no training does not count; a run far slower than predicted says so once."""

import pytest

from qtune.training.pace import ExpectedPace, Lap, Pace


class Hands:
    """A clock that is set by hand, and a device that finishes what is queued when it is waited for."""

    def __init__(self) -> None:
        self.now = 0.0
        self.queued = 0.0

    def wait(self) -> None:
        self.now, self.queued = self.now + self.queued, 0.0

    def clock(self) -> float:
        return self.now


@pytest.fixture
def hands() -> Hands:
    return Hands()


def test_a_lap_is_its_steps_tokens_and_the_time_until_they_are_done(hands: Hands) -> None:
    pace = Pace(hands.wait, hands.clock)
    hands.now = 100.0  # building a model is no training
    pace.takes(300, [128, 64])
    pace.takes(200, [100])
    hands.now += 4
    lap = pace.lap()
    assert (lap.steps, lap.tokens, lap.seconds) == (((128, 64), (100,)), 500, 4.0)
    assert (lap.tokens_per_second, lap.step_seconds) == (125.0, 2.0)
    pace.takes(50, [50])
    hands.now += 1
    assert pace.lap() == Lap(((50,),), 50, 1.0, False)


def test_an_evaluation_or_a_checkpoint_does_not_count_and_work_queued_before_it_does(hands: Hands) -> None:
    pace = Pace(hands.wait, hands.clock)
    pace.takes(100, [100])
    hands.queued = 3.0
    with pace.stopped():
        hands.now += 50
        hands.queued = 7.0  # the evaluation's last batch
    hands.now += 1
    assert pace.lap().seconds == 4.0


def test_steps_that_the_meter_slows_down_are_told_apart_until_the_next_lap(hands: Hands) -> None:
    pace = Pace(hands.wait, hands.clock)
    pace.takes(1, [1])
    pace.disturb()
    assert pace.lap().is_disturbed
    pace.takes(1, [1])
    assert not pace.lap().is_disturbed


def laps(comparison: ExpectedPace, seconds: list[float], *, disturbed: bool = False) -> list[str | None]:
    said = []
    for each in seconds:
        comparison.add(Lap(((100,),), 100, each, disturbed))
        said.append(comparison.warning())
    return said


def test_a_run_as_fast_as_predicted_says_nothing_until_its_end() -> None:
    comparison = ExpectedPace(lambda lengths: sum(lengths) / 100, "a data sheet", on_card=True)
    assert laps(comparison, [9.0, 9.0, 9.0, 1.1, 1.2, 1.0, 1.1, 1.1, 1.1]) == [None] * 9
    assert str(comparison) == "1.10 s a step, predicted 1.00 (+10%)"


def test_a_run_far_slower_than_predicted_says_so_once_when_that_is_sure() -> None:
    comparison = ExpectedPace(lambda lengths: 1.0, "a data sheet", on_card=True)
    said = laps(comparison, [2.0] * 12)
    (sentence,) = filter(None, said)
    assert said.index(sentence) == 3 + 5 - 1  # three first steps, five that are compared
    assert sentence.startswith("steps take 2.0 times as long as predicted, 2.00 s instead of 1.00 (a data sheet): ")
    assert sentence.endswith("heat or its power limit hold it back; nvidia-smi shows both")


def test_a_slow_processor_is_not_looked_for_on_a_card() -> None:
    comparison = ExpectedPace(lambda lengths: 1.0, "a data sheet", on_card=False)
    (sentence,) = filter(None, laps(comparison, [2.0] * 12))
    assert sentence.endswith("(a data sheet): something else may use the processor; top shows what does")


def test_disturbed_laps_are_not_compared() -> None:
    comparison = ExpectedPace(lambda lengths: 1.0, "a data sheet", on_card=True)
    assert laps(comparison, [5.0] * 20, disturbed=True) == [None] * 20
    assert str(comparison) == "too few steps to compare their time with the prediction"
