"""All verdicts of a run, in the order in which one asks."""

import logging

from qtune.run.folder import RunDir
from qtune.verdicts.curves import overfits, rate
from qtune.verdicts.export import exported
from qtune.verdicts.facts import Facts, read_facts
from qtune.verdicts.learning import learned
from qtune.verdicts.memory import fits
from qtune.verdicts.verdict import Verdict

log = logging.getLogger(__name__)


def verdicts(facts: Facts) -> tuple[Verdict, ...]:
    """One for each of `verdict.QUESTIONS`."""
    return learned(facts), overfits(facts), rate(facts), fits(facts), exported(facts)


def verdicts_of(run_dir: RunDir) -> tuple[Verdict, ...]:
    """The verdicts of a run's folder, finished or not.

    Raises:
        RunError: one of its files is damaged.
    """
    return verdicts(read_facts(run_dir))


def attempt_verdicts(run_dir: RunDir) -> tuple[Verdict, ...]:
    """`verdicts_of` after something that has succeeded, which they must not turn into a failure; else none."""
    try:
        return verdicts_of(run_dir)
    except Exception:
        log.debug("the verdicts could not be read", exc_info=True)
        return ()
