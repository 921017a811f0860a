"""eval.json: what an evaluation has found, as a value and as a file. Reading it needs no library that computes."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from qtune.recipe.steps import FEWEST
from qtune.records import plain
from qtune.run.folder import RunDir
from qtune.run.measured_adapter import read_figures
from qtune.run.metrics import was_cut
from qtune.tuned.asked import AskedTurn
from qtune.tuned.free_text import TextScore

EXTRA_TOKENS = 8
"""Room behind the expected answer: enough to see that an answer goes on where it should have ended."""
FREE_TEXT_TIMES = 2
"""Free text may be longer than expected: its length, its end and its repetitions are measured."""


@dataclass(frozen=True)
class Score:
    """How one model does on the rows.

    loss: mean negative log-likelihood of a scored token, in nats. token_accuracy: share of scored tokens that were the
    likeliest. exact_match: share of answers equal to the expected one; None for raw text, which asks nothing.
    """

    loss: float
    token_accuracy: float
    exact_match: float | None
    text: TextScore | None = None
    """Where the expected answers are free text, of which exact match says nothing."""


@dataclass(frozen=True)
class RowLoss:
    """One row under both models: its scored tokens, and their mean negative log-likelihood in nats."""

    place: str
    tokens: int
    base: float
    tuned: float
    content: str = ""
    """What the row says, as `content_of` names it; none in files of older versions."""
    is_seen: bool | None = None
    """Whether its prompt stands in rows that were trained on; None where that is not known, and in older files."""


@dataclass(frozen=True)
class Comparison:
    """One row and the greedy answers to it, without white space around them."""

    place: str
    request: str
    """The last words of the user."""
    expected: str
    base: str
    tuned: str
    is_base_cut: bool | None = None
    """Whether it was stopped at its limit; None: an older version did not tell. The same of the tuned model's:"""
    is_tuned_cut: bool | None = None
    is_seen: bool | None = None
    """As `RowLoss.is_seen`."""
    turns: tuple[AskedTurn, ...] = ()
    """All that stood before the answer, `request` among it; none in files of older versions."""

    @property
    def base_was_cut(self) -> bool:
        """Whether the base's answer was stopped, as far as an older version tells."""
        return was_cut(self.base, self.is_base_cut)

    @property
    def tuned_was_cut(self) -> bool:
        """Whether the tuned model's answer was stopped, as far as an older version tells."""
        return was_cut(self.tuned, self.is_tuned_cut)

    @property
    def is_right(self) -> bool:
        """Whether the tuned model gave the expected answer."""
        return self.tuned == self.expected


ANSWER_TOKENS = 512
"""The most that an answer has, unless said otherwise."""
NO_ANSWERS = "raw text has no question, so that no answers are scored (no ROUGE-L, no F1): loss and perplexity tell"


def leaves_out(seen: Sequence[bool | None], scored: Sequence[int]) -> list[bool]:
    """Which rows no figure is about: those that training saw, unless hardly any with scored tokens would be left."""
    others = sum(not is_seen and tokens > 0 for is_seen, tokens in zip(seen, scored, strict=True))
    return [bool(is_seen) and others >= FEWEST for is_seen in seen]


@dataclass(frozen=True)
class Evaluation:
    """The scores of both models on the same rows.

    The scores are about the rows that training has not seen: what it saw says nothing of new rows. Only where hardly
    any are left are they about all of them, and then no verdict is given.
    """

    run: str
    source: str
    rows: int
    """That were asked, `left_out` among them."""
    rows_held_out: int
    scored_tokens: int
    answers_cut: int
    """Rows whose expected answer is longer than what was generated, so that they cannot match."""
    base: Score
    tuned: Score
    comparisons: tuple[Comparison, ...]
    """Of each row that was asked, those that are left out of the scores too."""
    row_losses: tuple[RowLoss, ...] = ()
    """Of each row with a scored token; none in files of older versions."""
    adapter: str | None = None
    """`run.measured_adapter.adapter_name` of what was asked; None in files of older versions."""
    rows_trained_on: int | None = None
    """Rows whose prompt stands in rows that were trained on, by the run or by those it started from, as far as these
    could be read; None where none could be, and in files of older versions."""
    left_out: int = 0
    """How many of them the scores are not about."""
    seen_unknown: str | None = None
    """Why training may have seen more of the rows; None where all that it saw was read, and in older files."""
    max_new_tokens: int | None = None
    """The most tokens that any answer could have; None in files of older versions."""
    is_limited: bool = False
    """Whether that stood in the way of an answer, whose limit is else what the expected one takes, and some more."""

    def would_be_the_same(self, max_new_tokens: int) -> bool:
        """Whether answers of at most so many tokens are those that were made."""
        if self.max_new_tokens is None:  # an older version's: of its limit is known what it cut
            return not self.answers_cut
        return max_new_tokens == self.max_new_tokens or (max_new_tokens > self.max_new_tokens and not self.is_limited)

    @property
    def judged_rows(self) -> tuple[RowLoss, ...]:
        """Those of `row_losses` that the scores are about."""
        return tuple(one for one in self.row_losses if not (self.left_out and one.is_seen))

    @property
    def judged_answers(self) -> tuple[Comparison, ...]:
        """Those of `comparisons` that the scores are about."""
        return tuple(one for one in self.comparisons if not (self.left_out and one.is_seen))

    @property
    def rows_judged(self) -> int:
        """How many rows the scores are about."""
        return self.rows - self.left_out

    @property
    def are_seen(self) -> bool:
        """Whether the scores are about rows that training has seen, as far as is known."""
        return bool(self.rows_trained_on) and not self.left_out

    @property
    def about_interval(self) -> str:
        """Why the changes have no interval, as a sentence without its stop; empty where they can have one."""
        rows = len(self.judged_rows) if self.row_losses else self.rows_judged
        return "" if rows >= FEWEST else f"changes are not told from noise: an interval takes {FEWEST} rows"

    @property
    def about_rows(self) -> str:
        """Whether training has seen the rows, as a sentence without its stop; empty in files of older versions."""
        told = []
        if self.left_out:
            one, several = self._compared
            seen = f"its {one}" if self.left_out == 1 else f"their {several}"
            told.append(f"{self.left_out} more {_was(self.left_out)} asked and left out: training saw {seen}")
        elif self.are_seen:
            told.append(self._about_seen())
        elif self.rows_trained_on is not None and self.seen_unknown is None:
            told.append(f"training saw none of these {self._compared[1]}")
        if self.seen_unknown is not None:
            told.append(f"whether training saw {'others' if told else 'them'} is not known: {self.seen_unknown}")
        return "; ".join(told)

    @property
    def about_answers(self) -> str:
        """Why there are no scores of answers, or none of some rows, as a sentence without its stop; empty where every
        row was asked."""
        asked = len(self.judged_answers)
        mute = len(self.judged_rows) - asked
        if mute <= 0 and (asked or self.tuned.exact_match is not None):
            return ""
        if asked:
            return f"{mute} {_was(mute)} not asked: raw text has no question, and counts in loss and perplexity alone"
        return NO_ANSWERS

    @property
    def _compared(self) -> tuple[str, str]:
        """What of a row, and of several, was looked for in those that were trained on: a prompt, or all of raw text."""
        if not self.comparisons and self.tuned.exact_match is None:
            return "text", "texts"
        if len(self.row_losses) > len(self.comparisons) > 0:
            return "prompt or text", "prompts and texts"
        return "prompt", "prompts"

    def _about_seen(self) -> str:
        seen, others = self.rows_trained_on or 0, self.rows - (self.rows_trained_on or 0)
        one, several = self._compared
        if not others:
            return f"training saw {f'its {one}' if seen == 1 else f'the {several} of all {seen}'}"
        told = f"training saw the {one if seen == 1 else several} of {seen}"
        if others < FEWEST:
            return f"{told}, and {others} {'other is' if others == 1 else 'others are'} too few to judge by"
        return f"{told}, and which these are was not kept"  # by an older version

    def to_json(self) -> dict[str, Any]:
        """What is written to eval.json."""
        values: dict[str, Any] = plain(self)
        absent = {field.name for field in fields(self) if field.default is None}
        return {name: value for name, value in values.items() if value is not None or name not in absent}


def _was(count: int) -> str:
    return "was" if count == 1 else "were"


def read_evaluation(run_dir: RunDir) -> Evaluation | None:
    """RUN/eval.json, as the last `evaluate` has written it; None where there was none of this adapter.

    Raises:
        RunError: it is damaged.
    """
    return read_figures(run_dir, run_dir.eval_file, Evaluation)
