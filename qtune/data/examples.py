"""A batch of rows -> a batch of examples as columns, the bad rows, and the rows that were dropped for their length.

This is what runs in each worker process: everything it needs is in `RowRules`, the tokenizer and the template.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from qtune.data.conversation import Conversation, RowError
from qtune.data.formats import renamed, to_conversation
from qtune.data.lengths import fit, windows
from qtune.data.masks import IGNORED, Encoded, Encoder, Rendered, render_examples
from qtune.data.rows import BadRow, Row
from qtune.data.template import Renderer

COLUMNS = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("length", pa.int32()),
        ("scored", pa.int32()),
        ("largest_id", pa.int32()),
        ("place", pa.string()),
        ("notes", pa.string()),
        ("conversation", pa.string()),
        ("row_hash", pa.int64()),
        ("prompt_hash", pa.int64()),
        ("answer_hash", pa.int64()),
        ("opening_hash", pa.int64()),
        ("answer_start", pa.string()),
    ]
)


OPENING_WORDS = 6
# How models decline. Only the start counts: an answer may well speak of being sorry later on.
REFUSAL = re.compile(
    r"""\s*(?:
        I(?:['’]m|\ am)\ (?:(?:really|very|truly)\ )?sorry,?\ (?:but|I)\b
        | (?:I(?:['’]m|\ am)\ sorry[.,]\ )? I(?:\ cannot|\ can['’]t|(?:['’]m|\ am)\ unable\ to|\ won['’]t\ be\ able\ to)
          \ (?:assist|help|provide|fulfill|comply|answer|do)\b
        | As\ (?:an\ AI|a\ language\ model)\b
    )""",
    re.IGNORECASE | re.VERBOSE,
)


@dataclass(frozen=True)
class RowRules:
    """Everything in a recipe that decides how a row becomes ids."""

    row_format: str
    columns: Mapping[str, str]
    system: str
    system_prompt: str | None
    loss_on: str
    on_rewritten: str
    max_length: int
    on_long_row: str


@dataclass
class EncodedBatch:
    """Examples as an Arrow batch with COLUMNS, and what became of the other rows."""

    examples: pa.RecordBatch
    bad: list[BadRow] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    rows: int = 0


class RowEncoder:
    """Rows -> examples with one tokenizer, template and set of rules."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, rules: RowRules) -> None:
        self.rules = rules
        self.renderer = Renderer.of(tokenizer, template)
        self.encoder = Encoder(self.renderer)

    def __call__(self, rows: Sequence[Row | BadRow]) -> EncodedBatch:
        bad: list[BadRow] = []
        dropped: list[str] = []
        # Rendered texts wait here to be tokenized together; documents need nothing rendered.
        waiting: list[Rendered | Encoded] = []
        for row in rows:
            if isinstance(row, BadRow):
                bad.append(row)
                continue
            try:
                waiting.extend(self._read(row))
            except RowError as fault:
                bad.append(BadRow(row.place, str(fault)))
        encoded = iter(self.encoder.encode([one for one in waiting if isinstance(one, Rendered)]))
        examples: list[Encoded] = []
        for one in waiting:
            if isinstance(one, Encoded):
                examples.extend(windows(one, self.rules.max_length))
                continue
            bos = self.encoder.tokenizer.bos_token_id
            fitted = fit(next(encoded), self.rules.max_length, self.rules.on_long_row, bos)
            if fitted is None:
                dropped.append(one.conversation.place)
            else:
                examples.append(fitted)
        return EncodedBatch(_columns(examples), bad, dropped, len(rows))

    def _read(self, row: Row) -> Sequence[Rendered | Encoded]:
        rules = self.rules
        value = renamed(row.value, rules.columns)
        conversation = to_conversation(value, rules.row_format, row.place, rules.system, rules.system_prompt)
        if conversation.is_document:
            return [self.encoder.document(conversation)]
        return render_examples(self.renderer, conversation, rules.loss_on, rules.on_rewritten)


def _columns(examples: Sequence[Encoded]) -> pa.RecordBatch:
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS.names}
    for example in examples:
        scored = [position for position, label in enumerate(example.labels) if label != IGNORED]
        talk = example.conversation
        notes = set(example.notes)
        if not scored:
            notes.add("empty-mask")
        if not talk.is_document and REFUSAL.match(talk.answer):
            notes.add("refusal")
        prompt = talk.answer if talk.is_document else json.dumps(talk.prompt, ensure_ascii=False)
        values = (
            example.input_ids,
            example.labels,
            len(example.input_ids),
            len(scored),
            max(example.input_ids, default=-1),
            talk.place,
            " ".join(sorted(notes)),
            talk.to_json(),
            text_hash(_identity(talk)),
            text_hash(prompt),
            text_hash(talk.answer),
            _opening_hash(talk),
            talk.answer[:60],
        )
        for name, value in zip(COLUMNS.names, values, strict=True):
            columns[name].append(value)
    return pa.RecordBatch.from_pydict(columns, schema=COLUMNS)


def _identity(conversation: Conversation) -> str:
    """What makes two examples the same; the pieces of one document differ by their part."""
    part = conversation.place.partition(" (part ")[2]
    return conversation.to_json() + part


def _opening_hash(conversation: Conversation) -> int:
    """The first words of an answer that goes on after them; 0 for short ones, which repeat naturally."""
    words = conversation.answer.split(maxsplit=2 * OPENING_WORDS)
    if conversation.is_document or len(words) < 2 * OPENING_WORDS:
        return 0
    return text_hash(" ".join(words[:OPENING_WORDS]))


def text_hash(text: str) -> int:
    """64 bits of BLAKE2b as a signed integer, the same in every process and version."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)
