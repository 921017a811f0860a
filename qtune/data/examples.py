"""A batch of rows -> a batch of examples as columns, the bad rows, and the rows that were dropped for their length.

This is what runs in each worker process: everything it needs is in `RowRules`, the tokenizer and the template.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from qtune.data.conversation import Conversation, RowError
from qtune.data.formats import COLUMNS as SHAPES
from qtune.data.formats import RawRow, detect_format, renamed, replaced, to_conversation, with_the_files_names
from qtune.data.lengths import shortened, windows
from qtune.data.masks import IGNORED, Encoded, Encoder, Rendered, answers_to_learn, render_examples
from qtune.data.order import OutOfOrder
from qtune.data.prompts import Prompts, prompt_hash, prompts_of, text_hash
from qtune.data.render_gate import RenderGate
from qtune.data.rows import BadRow, Row
from qtune.data.suspect import Suspicions
from qtune.data.template import ChatTemplate, Renderer

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
        ("first_prompt_hash", pa.int64()),
        ("row_prompt_hash", pa.int64()),
        ("asked_hashes", pa.list_(pa.int64())),
        ("answer_hash", pa.int64()),
        ("opening_hash", pa.int64()),
        ("answer_start", pa.string()),
        ("unused", pa.list_(pa.string())),
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
    on_turn_order: str = "error"
    is_detected: bool = False
    """Whether row_format was recognized by the first rows, so that others may have another shape."""


@dataclass
class EncodedBatch:
    """Examples as an Arrow batch with COLUMNS, and what became of the other rows.

    `unused` counts, for each column or key that nothing reads, the rows that have it; `mapped` those that have each
    column of the recipe's `columns`.
    """

    examples: pa.RecordBatch
    bad: list[BadRow] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    out_of_order: list[str] = field(default_factory=list)
    rows: int = 0
    unused: Counter[str] = field(default_factory=Counter)
    rows_with_unused: int = 0
    mapped: Counter[str] = field(default_factory=Counter)
    shapes: Counter[str] = field(default_factory=Counter)
    origins: list[int] = field(default_factory=list)
    """Of each example the place of its row in the batch, ascending: a row may give several, or none."""


class RowEncoder:
    """Rows -> examples with one tokenizer, template and set of rules."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, rules: RowRules) -> None:
        self.rules = rules
        self.renderer = Renderer.of(tokenizer, template.text)
        self.encoder = Encoder(self.renderer)
        self.gate = RenderGate(self.renderer)
        self.suspicions = Suspicions.of(self.renderer.added_tokens)
        # Rows with tools may have a template of their own.
        with_tools = template.for_tools(["a tool"])
        self.tool_gate = self.gate if with_tools == template.text else RenderGate(Renderer.of(tokenizer, with_tools))
        self.batch = EncodedBatch(_columns([], []))

    def __call__(self, rows: Sequence[Row | BadRow]) -> EncodedBatch:
        self.batch = batch = EncodedBatch(_columns([], []), rows=len(rows))
        bad, dropped = batch.bad, batch.dropped
        # Rendered texts wait here to be tokenized together; documents need nothing rendered.
        waiting: list[tuple[Rendered | Encoded, Prompts]] = []
        origins: list[int] = []
        for number, row in enumerate(rows):
            if isinstance(row, BadRow):
                bad.append(row)
                continue
            try:
                waiting.extend(self._read(row))
                origins.extend([number] * (len(waiting) - len(origins)))
            except OutOfOrder as fault:
                if self.rules.on_turn_order == "drop":
                    batch.out_of_order.append(f"{row.place} ({fault})")
                else:
                    bad.append(BadRow(row.place, str(fault), advice=_order_advice(self.rules.on_turn_order)))
            except RowError as fault:
                bad.append(BadRow(row.place, with_the_files_names(str(fault), self.rules.columns)))
        encoded = iter(self.encoder.encode([one for one, _ in waiting if isinstance(one, Rendered)]))
        examples: list[Encoded] = []
        asked: list[Prompts] = []
        for (one, prompts), origin in zip(waiting, origins, strict=True):
            if isinstance(one, Encoded):
                examples.extend(windows(one, self.rules.max_length))
            else:
                bos = self.encoder.tokenizer.bos_token_id
                fitted = shortened(next(encoded), self.rules.max_length, self.rules.on_long_row, bos)
                if fitted is None:
                    dropped.append(one.conversation.place)
                else:
                    examples.append(fitted)
            batch.origins.extend([origin] * (len(examples) - len(batch.origins)))
            asked.extend([prompts] * (len(examples) - len(asked)))
        batch.examples = _columns(examples, asked)
        return batch

    def _read(self, row: Row) -> Sequence[tuple[Rendered | Encoded, Prompts]]:
        rules = self.rules
        self.batch.mapped.update(ours for ours, theirs in rules.columns.items() if theirs in row.value)
        value = renamed(row.value, rules.columns)
        row_format = self._format_of(value)
        self.batch.shapes[row_format] += 1
        conversation = to_conversation(
            value, row_format, row.place, rules.system, rules.system_prompt, rules.on_turn_order
        )
        unused = dict.fromkeys(map(_writable, [*replaced(row.value, rules.columns), *conversation.unused]))
        suspected = conversation.notes.union(self.suspicions.about(conversation))
        if conversation.is_document:
            self._count(unused)
            document = self.encoder.document(replace(conversation, unused=tuple(unused), notes=suspected))
            return [(document, prompts_of(conversation, (), ()))]
        gate = self.tool_gate if conversation.tools else self.gate
        rendered = render_examples(gate.renderer, conversation, rules.loss_on, rules.on_rewritten)
        lost = gate.lost(rendered)
        unused |= {_writable(name): None for name in lost.unused}
        self._count(unused)
        notes = suspected | lost.notes
        answers = answers_to_learn(conversation, rules.loss_on)
        return [
            (
                replace(one, conversation=replace(one.conversation, unused=tuple(unused), notes=notes)),
                prompts_of(conversation, answers, [turn.index for turn in one.turns] or answers),
            )
            for one in rendered
        ]

    def _format_of(self, value: RawRow) -> str:
        """The source's shape, or the row's own where the shape was recognized and this row has another."""
        given = self.rules.row_format
        if not self.rules.is_detected or all(key in value for key in SHAPES[given]):
            return given
        return detect_format(value) or given

    def _count(self, unused: Iterable[str]) -> None:
        names = list(unused)
        self.batch.unused.update(names)
        self.batch.rows_with_unused += bool(names)


def _writable(name: str) -> str:
    """JSON's keys may hold half a character, which no file can."""
    return name.encode(errors="backslashreplace").decode()


def _order_advice(policy: str) -> str:
    if policy == "merge":
        return 'on_turn_order = "drop" leaves rows out whose turns cannot be put in order'
    return 'on_turn_order = "merge" joins turns of one role and keeps such rows, "drop" leaves them out'


def _columns(examples: Sequence[Encoded], asked: Sequence[Prompts]) -> pa.RecordBatch:
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS.names}
    for example, prompts in zip(examples, asked, strict=True):
        scored = [position for position, label in enumerate(example.labels) if label != IGNORED]
        talk = example.conversation
        notes = example.notes | talk.notes
        if not scored:
            notes |= {"empty-mask"}
        if not talk.is_document and REFUSAL.match(talk.answer):
            notes |= {"refusal"}
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
            prompt_hash(talk),
            prompts.first,
            prompts.whole,
            prompts.asked,
            text_hash(talk.answer),
            _opening_hash(talk),
            talk.answer[:60],
            list(talk.unused),
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
    if conversation.is_document or len(conversation.answer.split(maxsplit=2 * OPENING_WORDS)) < 2 * OPENING_WORDS:
        return 0
    return text_hash(opening_of(conversation.answer))


def opening_of(answer: str) -> str:
    """The first words of an answer, by which answers are compared: what those share that begin alike."""
    return " ".join(answer.split(maxsplit=OPENING_WORDS)[:OPENING_WORDS])
