"""The rows that an export is checked on: held out from training, or general ones where a run has none."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from qtune.data.conversation import Conversation, RowError
from qtune.data.held_out import held_out_rows, spread_unlike
from qtune.data.masks import IGNORED
from qtune.data.template import Renderer
from qtune.errors import DataError, Problem
from qtune.export.opened_run import OpenedRun
from qtune.run.resolved import as_written

# Positions compared in each row; more of one row says little more.
LONGEST = 512

GENERAL = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Write one sentence about the sea.", "The sea keeps the light of the day long after the sun is gone."),
    ("How do I sort a list in Python?", "Call sorted(values) for a new list, or values.sort() to sort it in place."),
    ("Translate to German: good morning", "Guten Morgen"),
)


@dataclass(frozen=True)
class CheckedRow:
    """One conversation as ids [length] with labels [length] (-100: not scored), and as messages where it has any."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    conversation: Conversation | None


@dataclass(frozen=True)
class CheckedRows:
    """Rows, and where they come from, in words behind their number: "of 24 test rows, each text once"."""

    origin: str
    rows: tuple[CheckedRow, ...]


def rows_for(source: OpenedRun, count: int = 32) -> CheckedRows:
    """At most `count` of a run's held-out rows, spread over all; rows that say the same are one.

    Raises:
        DataError: the run's chat template renders nothing of a conversation.
    """
    try:
        recipe, folder = as_written(source.run, source.recipe)
        name, examples = held_out_rows(recipe, source.tokenizer, folder)
        chosen = spread_unlike(len(examples), count, lambda row: str(examples[row]["conversation"]))
        rows = [_row(example) for example in examples.select(chosen)]
        # `qtune eval` asks all of them, and whoever reads both numbers wonders.
        name = f"of {len(examples)} {name}" + (", each text once" if len(chosen) < min(count, len(examples)) else "")
    except DataError:
        name, rows = "general conversations (the run has no held-out rows)", general_rows(source)
    rows = [row for row in rows if row.ids]
    if not rows:
        message = "its chat template renders nothing of a conversation: there is nothing to compare models on"
        raise DataError(Problem(source.base_name, message))
    return CheckedRows(name, tuple(rows))


def general_rows(source: OpenedRun) -> list[CheckedRow]:
    """Short conversations that any model can be asked, rendered as the run would; without those that its template
    refuses, which may be all."""
    renderer = Renderer.of(source.tokenizer, source.template.text)
    rows = []
    for question, answer in GENERAL:
        messages = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
        conversation = Conversation(messages, place="general")
        try:
            prompt, whole = renderer.prompt(conversation), renderer.render(messages)
        except RowError:
            continue
        ids = encode(source.tokenizer, whole)
        prompted = len(encode(source.tokenizer, prompt))
        rows.append(CheckedRow(ids, (IGNORED,) * prompted + ids[prompted:], conversation))
    return rows


def encode(tokenizer: PreTrainedTokenizerBase, rendered: str) -> tuple[int, ...]:
    """The ids of a rendered conversation, which holds its special tokens already."""
    return tuple(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def rendered_ids(
    tokenizer: PreTrainedTokenizerBase, template: str, conversation: Conversation, *, generation_prompt: bool
) -> tuple[int, ...]:
    """A conversation's ids with a tokenizer and template; with a generation prompt, without its last answer."""
    renderer = Renderer.of(tokenizer, template)
    if generation_prompt:
        return encode(tokenizer, renderer.prompt(conversation))
    return encode(tokenizer, renderer.render(conversation.messages, conversation.tools))


def probes(rows: Sequence[CheckedRow]) -> list[Conversation]:
    """Conversations whose rendering must survive an export: those of the rows, a system text, several turns."""
    several = Conversation(
        (
            {"role": "user", "content": "Name a colour."},
            {"role": "assistant", "content": "Blue."},
            {"role": "user", "content": 'Another, please.\nOnly one word: Straße, 颜色, "it\'s".'},
            {"role": "assistant", "content": "Green."},
        ),
        place="several turns",
    )
    with_system = Conversation(({"role": "system", "content": "You are brief."}, *several.messages), place="system")
    own = [row.conversation for row in rows if row.conversation is not None and not row.conversation.is_document]
    return [*own[:8], several, with_system]


def _row(example: dict[str, Any]) -> CheckedRow:
    conversation = Conversation.from_json(example["conversation"], example["place"])
    return CheckedRow(tuple(example["input_ids"][:LONGEST]), tuple(example["labels"][:LONGEST]), conversation)
