"""A verdict: an answer in a few words, one sentence with its numbers, and where it is open what would answer it."""

from dataclasses import dataclass
from typing import Literal

Question = Literal["learned", "overfits", "rate", "fits", "export"]
Standing = Literal["good", "bad", "unsure", "open"]

QUESTIONS: dict[Question, str] = {
    "learned": "Did it learn?",
    "overfits": "Does it overfit?",
    "rate": "Was the learning rate right?",
    "fits": "Does it fit the memory?",
    "export": "Is the export the model that was trained?",
}

MARKS: dict[Standing, str] = {"good": "✓", "bad": "✗", "unsure": "?", "open": "–"}
"""A sign for each standing, so that no colour is needed."""


@dataclass(frozen=True)
class Verdict:
    """The answer to one question about a run."""

    question: Question
    standing: Standing
    """good and bad: the numbers carry it. unsure: measured, and too close or too mixed to say. open: not measured."""
    answer: str
    """A few words, as on a tile: "Did not learn"."""
    sentence: str
    """The answer with the numbers that it rests on."""
    command: str | None = None
    """What would tell more, or what to do about it."""

    @property
    def text(self) -> str:
        """Everything in one line."""
        return f"{self.told}{'' if self.command is None else f'; {self.command}'}"

    @property
    def told(self) -> str:
        """The answer and the sentence."""
        return f"{self.answer}: {self.sentence}"
