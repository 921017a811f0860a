"""Whoever asks an exported folder asks what training asked: the same words before the user's, token for token."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from qtune.data.conversation import Conversation, RowError
from qtune.data.formats import to_conversation
from qtune.data.template import Renderer
from qtune.errors import ExportError, first_line
from qtune.export.opened_run import OpenedRun
from qtune.export.verify.rows import rows_for

QUESTIONS = ("Hello", "What is 2 + 2?")


def as_trained(source: OpenedRun, *questions: str) -> Conversation:
    """Questions and answers in turn, as a row of the run's data would become them; the last answer is asked for."""
    turns = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(questions)]
    data = source.recipe.data
    row = {"messages": [*turns, {"role": "assistant", "content": "…"}]}
    return to_conversation(row, "messages", "a question", data.system, data.system_prompt)


def asked_in_training(source: OpenedRun, *questions: str) -> list[int]:
    """The ids that the run's own rows put before an answer to `questions`.

    Raises:
        RowError: its template refuses such a conversation.
    """
    return _trained_ids(source, as_trained(source, *questions))


def _trained_ids(source: OpenedRun, conversation: Conversation) -> list[int]:
    text = Renderer.of(source.tokenizer, source.trained_template.text).prompt(conversation)
    return list(source.tokenizer(text, add_special_tokens=False)["input_ids"])


def require_same_questions(source: OpenedRun, folder: Path, virtual_ids: tuple[int, ...] = ()) -> None:
    """Asks the folder's own tokenizer as the model card does: what training's template takes, which may be one question
    alone, or none without a system message; then the run's own rows are asked.

    Raises:
        ExportError: it asks in other words than training, or refuses what training's template takes.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=source.trusts(folder))
    for turns, tools, expected in _asked(source):
        words = str(turns[-1].get("content"))
        try:
            text = tokenizer.apply_chat_template(turns, tools=tools, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template is a program: it fails in every way in which Python does
            message = f"its chat template refuses {words!r}, which training's takes: {first_line(error)}"
            raise ExportError(f"{folder}: {message}") from error
        found = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if found != [*virtual_ids, *expected]:
            message = f"its chat template puts other words before {words!r} than training did"
            raise ExportError(f"{folder}: {message}")


Asked = tuple[list[dict[str, Any]], list[Any] | None, list[int]]


def _asked(source: OpenedRun) -> list[Asked]:
    """Messages and tools that can be asked for an answer, with the ids that training puts before it."""
    found: list[Asked] = []
    for questions in (QUESTIONS[:1], (QUESTIONS[0], "Hi.", QUESTIONS[1])):
        turns = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(questions)]
        with suppress(RowError):
            found.append((turns, None, asked_in_training(source, *questions)))
    if found:
        return found
    for row in rows_for(source, ROWS).rows:
        if row.conversation is not None and not row.conversation.is_document:
            turns = [dict(message) for message in row.conversation.prompt]
            found.append((turns, list(row.conversation.tools) or None, _trained_ids(source, row.conversation)))
    return found


ROWS = 3
"""Of the run, that are asked where its template takes no plain question."""
