"""eval.json: what an evaluation has found, as a value and as a file. Reading it needs no library that computes."""

from dataclasses import dataclass
from typing import Any

from qtune.records import plain
from qtune.run.folder import RunDir
from qtune.run.measured_adapter import read_figures
from qtune.run.metrics import was_cut
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


@dataclass(frozen=True)
class Comparison:
    """One row and the greedy answers to it, without white space around them."""

    place: str
    request: str
    expected: str
    base: str
    tuned: str
    is_base_cut: bool | None = None
    """Whether it was stopped at its limit; None: an older version did not tell. The same of the tuned model's:"""
    is_tuned_cut: bool | None = None

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


@dataclass(frozen=True)
class Evaluation:
    """The scores of both models on the same rows."""

    run: str
    source: str
    rows: int
    rows_held_out: int
    scored_tokens: int
    answers_cut: int
    """Rows whose expected answer is longer than what was generated, so that they cannot match."""
    base: Score
    tuned: Score
    comparisons: tuple[Comparison, ...]
    row_losses: tuple[RowLoss, ...] = ()
    """Of each row with a scored token; none in files of older versions."""
    adapter: str | None = None
    """`run.measured_adapter.adapter_name` of what was asked; None in files of older versions."""
    rows_trained_on: int | None = None
    """Rows whose prompt stands in the training rows too; None where those could not be read, and in files of older
    versions."""

    @property
    def about_rows(self) -> str:
        """Whether training has seen the rows, as a part of a sentence; empty where that is not known."""
        if not self.rows_trained_on:
            return "" if self.rows_trained_on is None else "which training did not see"
        count = self.rows_trained_on
        return (
            f"of which training saw the {'prompt' if count == 1 else 'prompts'} of {count}: measuring on "
            f"{'it' if count == 1 else 'them'} says nothing of new rows"
        )

    def to_json(self) -> dict[str, Any]:
        """What is written to eval.json."""
        values: dict[str, Any] = plain(self)
        if self.adapter is None:
            del values["adapter"]
        return values


def read_evaluation(run_dir: RunDir) -> Evaluation | None:
    """RUN/eval.json, as the last `evaluate` has written it; None where there was none of this adapter.

    Raises:
        RunError: it is damaged.
    """
    return read_figures(run_dir, run_dir.eval_file, Evaluation)
