"""What can be wrong with prepared data: each kind with its level, its meaning and what to do about it."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from qtune.errors import GateError
from qtune.recipe.schema import Waivable

Level = Literal["error", "warning"]

# Places that a finding lists.
LISTED = 10
FEW_ROWS = 50
"""To train on; below it a model learns them by heart."""
# Thresholds under which a repetition is ordinary: a classifier repeats its labels, a helper says hello.
SAME_ANSWER_SHARE = 0.5
OPENING_SHARE = 0.2
ENOUGH_ROWS = 20
STRAY_SHARE, STRAY_TIMES = 0.01, 4
"""How many rows, one at least, may be so many times as long as all others and still be called strays: more of them are
the kind of rows that there are."""


@dataclass(frozen=True)
class Kind:
    """A kind of finding: what a row that has it is like, and the advice."""

    level: Level
    meaning: str
    advice: str


KINDS = {
    "empty-mask": Kind(
        "error",
        "no token is scored, so the row teaches nothing",
        "raise max_length, or see what the rows hold with qtune check",
    ),
    "no-end-of-turn": Kind(
        "error",
        "no end-of-turn token is scored, so the model would not learn to stop",
        "an answer has to end with one token of this tokenizer",
    ),
    "answer-changed": Kind(
        "error",
        "the chat template changes the answer, so something else than the row's text would be learned",
        "some templates remove thinking from answers, or trim indented code: set another chat_template",
    ),
    "answer-trimmed": Kind(
        "warning",
        "the chat template takes white space off the ends of the answer",
        "it is learned without; nothing to do where it means nothing",
    ),
    "tool-call-lost": Kind(
        "error",
        "the chat template does not print a tool call whole, so that the model would learn to end its turn instead",
        "set a chat_template that prints calls",
    ),
    "tools-lost": Kind(
        "error",
        "the chat template does not print the tool definitions, so that calls are learned without them",
        "set a chat_template that prints tools",
    ),
    "reasoning-lost": Kind(
        "error",
        "the chat template does not print the reasoning before an answer, so that it would not be learned",
        "set a chat_template that prints reasoning, or take it out of the rows",
    ),
    "message-lost": Kind(
        "error",
        "the chat template does not print a message, so that the answer is learned without it",
        'set a chat_template that prints it; for system messages [data] system = "merge" or "drop"',
    ),
    "rendered-chat": Kind(
        "warning",
        "the text is a chat that is rendered already: its questions and role markers are scored like its answers",
        "give the rows as messages (a list of role and content) to learn the answers alone",
    ),
    "unused": Kind(
        "warning",
        "the row has columns or keys that are not used",
        "map them with columns if they matter, else they may stay",
    ),
    "unused-input": Kind(
        "error",
        "a column that a question needs (context, choices) is not used, so answers are learned without it",
        "write it into the question (choices and options, which are lists, always); a text can be mapped instead, with "
        'the names that your rows have: columns = { instruction = "question", input = "context", output = "answer" } '
        "learns the input below the instruction",
    ),
    "word-for-nothing": Kind(
        "warning",
        "a text is what a program writes where a table has no value (nan, None, null)",
        "write an empty text there, or leave the row out; as a label it may be meant",
    ),
    "broken-text": Kind(
        "warning",
        "the text was decoded wrongly before (cafÃ©, \ufffd, a byte order mark inside)",
        "read the source as UTF-8 once more; the model will learn to write so",
    ),
    "foreign-token": Kind(
        "warning",
        "a text begins or ends with a special token of another model, which would be learned as ordinary text",
        "take it out of the rows: the chat template ends turns itself",
    ),
    "missing-media": Kind(
        "warning",
        "the text has a placeholder for a picture, video or sound that is not there",
        "only text is trained on; leave such rows out",
    ),
    "padded-nulls": Kind(
        "warning",
        "a tool call or tool had nulls where a table has no value; they are left out",
        "write rows from objects instead of a table to be sure",
    ),
    "null-arguments": Kind(
        "warning",
        "a tool call has arguments that are null, and the row has no definition that says whether they may be",
        "remove them if a table put them there",
    ),
    "merged-turns": Kind(
        "warning",
        "turns of one role that follow each other became one",
        'on_turn_order = "drop" leaves such rows out',
    ),
    "opening-answer": Kind(
        "warning",
        "the conversation begins with an answer, which is context and not scored",
        'on_turn_order = "drop" leaves such rows out',
    ),
    "unanswered-turn": Kind(
        "warning",
        "the last turns have no answer and are left out",
        'on_turn_order = "drop" leaves such rows out',
    ),
    "out-of-order": Kind(
        "warning",
        "the turns stand in an order that cannot be learned from, and the row is left out",
        'on_turn_order = "merge" keeps what it can',
    ),
    "tokens-without-embedding": Kind(
        "warning",
        "the tokenizer has more tokens than the model has embeddings for",
        "none may stand in a row, a question or an answer; use the tokenizer that belongs to the model",
    ),
    "label-text": Kind(
        "error",
        "the scored tokens do not decode to the answer",
        "the tokenizer loses text; use the one that belongs to the model",
    ),
    "generation-prompt": Kind(
        "error",
        "the row is not rendered as the model will be asked: its prompt is no beginning of the row",
        "set a chat_template whose generation prompt opens an answer, or allow it for a model that is asked otherwise",
    ),
    "double-bos": Kind(
        "error", "the row begins with BOS twice", "take the BOS out of the rows, or out of the chat template"
    ),
    "missing-bos": Kind(
        "error",
        "the tokenizer puts BOS before every text and the chat template does not",
        "add bos_token to the template",
    ),
    "control-token": Kind(
        "error",
        "the text holds a special token: it would be read as the border of a turn or text",
        "rows that are rendered already, or that quote such tokens, must be cleaned",
    ),
    "too-long": Kind(
        "error",
        "the row is longer than max_length",
        'raise max_length, or decide with on_long_row = "drop", "cut-left" or "cut-right"',
    ),
    "out-of-vocabulary": Kind(
        "error",
        "the row has a token that the model has no embedding for",
        "use the tokenizer that belongs to the model",
    ),
    "rewritten-turn": Kind(
        "error",
        "the chat template renders earlier turns differently than when they were answered",
        'decide with on_rewritten_turn = "split" or "last"',
    ),
    "split-turns": Kind(
        "warning",
        "the chat template renders earlier turns differently, so each answer became an example of its own",
        'on_rewritten_turn = "last" learns only the last answer of a conversation',
    ),
    "last-turn-only": Kind(
        "warning",
        "the chat template renders earlier turns differently, so only the last answer is scored",
        'on_rewritten_turn = "split" learns every answer',
    ),
    "skipped": Kind("warning", "the row cannot be used and is left out", "fix the rows to learn from them"),
    "dropped": Kind("warning", "the row is longer than max_length and is left out", "raise max_length to keep it"),
    "cut-answer": Kind(
        "warning", "the row is cut, and a part of its answer is lost", "raise max_length to learn whole answers"
    ),
    "cut-prompt": Kind("warning", "the row is cut outside its answers", "raise max_length to keep its prompt"),
    "token-boundary": Kind(
        "warning",
        "a token reaches from the prompt into the answer, so generation starts between other tokens",
        "harmless in few rows; in all of them, the template should end prompts with a special token",
    ),
    "duplicate": Kind("warning", "the row stands in the training data more than once", "remove the copies"),
    "overlap": Kind(
        "warning",
        "the row's prompt stands in the training data too, so measuring on it says nothing",
        "take the row out of one of them",
    ),
    "same-answer": Kind(
        "warning",
        "most rows have one and the same answer",
        "a model that learns only this answer looks good; check the data",
    ),
    "boilerplate": Kind(
        "warning",
        "answers begin with the same words",
        "the model will learn to begin so; remove what was not meant",
    ),
    "refusal": Kind(
        "warning", "the answer is a refusal", "the model will learn to refuse; remove them if that is not meant"
    ),
    "default-template": Kind(
        "warning",
        "the tokenizer has no chat template, so a built-in one is used",
        "base models have none; name one with chat_template to make this a choice",
    ),
    "dated-template": Kind(
        "warning",
        "the chat template writes today's date into every row",
        "the rows hold the day on which they were prepared; a copy of the template with a fixed date is reproducible",
    ),
    "stray-length": Kind(
        "warning",
        "far longer than all others, and memory and micro-batches are planned for the longest row",
        "see whether they are meant",
    ),
    "few-rows": Kind(
        "warning",
        "there are hardly any training rows",
        f"below some {FEW_ROWS} rows a model learns them by heart: collect a few hundred; fewer show that all runs, "
        "and not what can be learned",
    ),
}


@dataclass(frozen=True)
class Finding:
    """One kind of finding in one split: in how many of its rows, and where the first of them are."""

    kind: str
    level: Level
    split: str
    count: int
    total: int
    places: tuple[str, ...] = ()
    detail: str = ""
    hint: str = ""
    """What to do in this case, where that is known better than for the kind."""

    @property
    def advice(self) -> str:
        """What to do about it."""
        return self.hint or KINDS[self.kind].advice

    @property
    def waivable(self) -> bool:
        """Whether `allow` can name it."""
        return self.kind in get_args(Waivable)

    @property
    def sentence(self) -> str:
        """The finding in words, without its places and advice."""
        rows = f"{self.count:,} of {self.total:,} {self.split} rows: " if self.total else ""
        return f"{rows}{KINDS[self.kind].meaning}{f' ({self.detail})' if self.detail else ''}"

    def to_json(self) -> dict[str, Any]:
        """The finding with its words, for machines."""
        return asdict(self) | {"message": self.sentence, "advice": self.advice}


def found(
    kind: str,
    split: str,
    count: int,
    total: int,
    places: list[str] | None = None,
    detail: str = "",
    hint: str = "",
) -> Finding:
    """A finding of a kind, at its kind's level."""
    return Finding(kind, KINDS[kind].level, split, count, total, tuple((places or [])[:LISTED]), detail, hint)


def stopping(findings: list[Finding], allow: tuple[str, ...]) -> list[Finding]:
    """The errors among the findings that `allow` does not name."""
    return [finding for finding in findings if finding.level == "error" and finding.kind not in allow]


def gate(findings: list[Finding], allow: tuple[str, ...] = ()) -> None:
    """Lets data through whose every error is waived.

    Raises:
        GateError: with each finding that stops the run, its places, and how to go on.
    """
    stopped = stopping(findings, allow)
    if stopped:
        blocks = [_block(finding) for finding in stopped]
        raise GateError("\n".join(["the data would train the wrong thing", *blocks]))


def _block(finding: Finding) -> str:
    more = f" and {finding.count - len(finding.places):,} more" if finding.count > len(finding.places) else ""
    where = f"\n    at {', '.join(finding.places)}{more}" if finding.places else ""
    waive = f'; to go on all the same: [data] allow = ["{finding.kind}"]' if finding.waivable else ""
    return f"  {finding.kind}: {finding.sentence}{where}\n    {finding.advice}{waive}"


# What a run says before it starts, although it goes on: rows or parts of them that are not learned as they stand.
_SAID = (
    "unused",
    "skipped",
    "dropped",
    "out-of-order",
    "merged-turns",
    "opening-answer",
    "unanswered-turn",
    "padded-nulls",
    "null-arguments",
    "answer-trimmed",
    "rendered-chat",
    "word-for-nothing",
    "broken-text",
    "foreign-token",
    "missing-media",
    "tokens-without-embedding",
    "overlap",
)


def said_before_a_run(findings: list[Finding]) -> list[str]:
    """A sentence for each finding about something of the rows that is not learned as it stands."""
    return [f"{finding.kind}: {finding.sentence}" for finding in findings if finding.kind in _SAID]
