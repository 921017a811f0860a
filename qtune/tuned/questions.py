"""Held-out rows as questions: what stands before a row's last scored answer, and that answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from qtune.data.conversation import Conversation
from qtune.data.masks import IGNORED
from qtune.run.metrics import CUT
from qtune.tuned.asked import AskedTurn, asked_turns, last_words
from qtune.tuned.generate import Ends
from qtune.tuned.vocabulary import decoded


@dataclass(frozen=True)
class Question:
    """One held-out row: ids [prompt], the ids and text that are expected, and where it comes from."""

    place: str
    request: str
    prompt: tuple[int, ...]
    expected_ids: tuple[int, ...]
    expected: str
    turns: tuple[AskedTurn, ...] = ()
    """What the prompt says, as `Comparison.turns`."""


def to_question(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, ends: Ends) -> Question | None:
    """The row's last scored answer and what stands before it; None for raw text, which has no question, and for rows of
    which nothing is scored."""
    ids, labels = row["input_ids"], row["labels"]
    scored = [position for position, label in enumerate(labels) if label != IGNORED]
    if not scored:  # its answer was cut away
        return None
    end = scored[-1] + 1
    start = end
    while start > 0 and labels[start - 1] != IGNORED:
        start -= 1
    if start == 0:
        return None
    expected = [token for token in ids[start:end] if token not in ends.stop]
    conversation = Conversation.from_json(row["conversation"], row["place"])
    request = last_words(conversation.prompt)
    turns = asked_turns(conversation.prompt, conversation.tools)
    return Question(
        row["place"], request, tuple(ids[:start]), tuple(expected), decoded(tokenizer, expected).strip(), turns
    )


def answer_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, is_whole: bool) -> str:
    """An answer as compared and shown; an ellipsis says that it was stopped at its limit."""
    return decoded(tokenizer, ids, is_whole=is_whole).strip() + ("" if is_whole else CUT)
