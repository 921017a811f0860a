"""Whoever asks an exported folder asks what training asked: the same words before the user's, token for token."""

from pathlib import Path

from transformers import AutoTokenizer

from qtune.data.conversation import Conversation
from qtune.data.formats import to_conversation
from qtune.data.template import Renderer
from qtune.errors import ExportError
from qtune.export.opened_run import OpenedRun

QUESTIONS = ("Hello", "What is 2 + 2?")


def as_trained(source: OpenedRun, *questions: str) -> Conversation:
    """Questions and answers in turn, as a row of the run's data would become them; the last answer is asked for."""
    turns = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(questions)]
    data = source.recipe.data
    row = {"messages": [*turns, {"role": "assistant", "content": "…"}]}
    return to_conversation(row, "messages", "a question", data.system, data.system_prompt)


def asked_in_training(source: OpenedRun, *questions: str) -> list[int]:
    """The ids that the run's own rows put before an answer to `questions`."""
    renderer = Renderer.of(source.tokenizer, source.trained_template.text)
    text = renderer.prompt(as_trained(source, *questions))
    return list(source.tokenizer(text, add_special_tokens=False)["input_ids"])


def require_same_questions(source: OpenedRun, folder: Path, virtual_ids: tuple[int, ...] = ()) -> None:
    """Asks the folder's own tokenizer as the model card does.

    Raises:
        ExportError: it asks in other words than training.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=source.trusts(folder))
    for questions in (QUESTIONS[:1], (QUESTIONS[0], "Hi.", QUESTIONS[1])):
        turns = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(questions)]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        found = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if found != [*virtual_ids, *asked_in_training(source, *questions)]:
            message = f"its chat template puts other words before {questions[-1]!r} than training did"
            raise ExportError(f"{folder}: {message}")
