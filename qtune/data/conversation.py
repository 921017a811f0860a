"""The one shape of an example: a conversation with the place it came from, checked when it is made."""

import json
import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
# Raw text for continued pretraining: a conversation of one message that no template renders.
DOCUMENT = "document"

Message = dict[str, Any]


class RowError(ValueError):
    """What is wrong with a row, said with the key, what was found and what is expected."""


MOST_MESSAGES = 1000
"""Of a row: each answer is rendered with all that stands before it, which takes time by the square of their number."""


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates take them, the tools they may call, and the place of their row.

    Each message has `role` and `content` (a text; it may be missing beside `tool_calls`). `weight = 0` on an
    assistant message leaves it out of the loss. A document is one message of the role "document".
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    place: str = ""
    unused: tuple[str, ...] = field(default=(), compare=False)
    """Columns and keys of its row that nothing reads."""
    notes: frozenset[str] = field(default=frozenset(), compare=False)
    """Kinds of finding that reading the row has led to."""

    @property
    def is_document(self) -> bool:
        """Whether this is raw text, scored as a whole."""
        return self.messages[0]["role"] == DOCUMENT

    @property
    def prompt(self) -> tuple[Message, ...]:
        """Everything before the last answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The text of the last answer, or of the document."""
        return str(self.messages[-1].get("content") or "")

    def to_json(self) -> str:
        """The messages and tools; `from_json` reads them back."""
        value = {"messages": self.messages, "tools": self.tools} if self.tools else {"messages": self.messages}
        return json.dumps(value, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str, place: str = "") -> "Conversation":
        """The inverse of `to_json`."""
        value = json.loads(text)
        return cls(tuple(value["messages"]), tuple(value.get("tools", ())), place)


def conversation(
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]],
    place: str,
    unused: Iterable[str] = (),
    notes: Iterable[str] = (),
) -> Conversation:
    """A conversation in which every text can be tokenized.

    Raises:
        RowError: a tool call or description holds half a character; there are more messages than any talk has.
    """
    if len(messages) > MOST_MESSAGES:
        raise RowError(
            f"has {len(messages):,} messages; at most {MOST_MESSAGES:,} are read, so split it into several rows"
        )
    made = Conversation(tuple(messages), tuple(tools), place, tuple(unused), frozenset(notes))
    text_of(made.to_json(), "a tool call or tool description")
    return made


def document(text: object, place: str, unused: Iterable[str] = ()) -> Conversation:
    """A checked document: text that is learned as it stands."""
    return Conversation(({"role": DOCUMENT, "content": said(text, "text")},), (), place, tuple(unused))


def text_of(value: object, key: str) -> str:
    """A text that a tokenizer can take.

    Raises:
        RowError: it is not a text, or holds half of a surrogate pair (broken \\u escapes).
    """
    if value is None:
        raise RowError(f"{key} is null; expected a text")
    if not isinstance(value, str):
        raise RowError(f"{key} = {shown(value)}: not a text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        raise RowError(f"{key} holds half a character (\\u{code:04x}) at position {error.start + 1}") from error
    return value


def require_json(value: object, where: str) -> None:
    """A value that JSON has, in calls and descriptions of tools: tables also have times, bytes, decimals and NaN.

    Raises:
        RowError: it holds another one, with its place.
    """
    if isinstance(value, dict):
        for key, inner in value.items():
            require_json(inner, f"{where}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            require_json(inner, f"{where}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise RowError(f"{where} = {shown(value)}: JSON has no such number; write null, or leave it out")
    elif value is not None and not isinstance(value, (str, int, float)):
        kind = type(value).__name__
        raise RowError(f"{where} = {shown(value)}: JSON has no values of type {kind}; write it as a text")


def said(value: object, key: str) -> str:
    """A text that says something.

    Raises:
        RowError: it is no text, or there is nothing but white space in it.
    """
    text = text_of(value, key)
    if problem := emptiness(text):
        raise RowError(f"{key} is {problem}")
    return text


def emptiness(text: str) -> str | None:
    """In words, that nothing in a text can be seen; None where something can."""
    if not text.strip():
        return "empty"
    if all(unicodedata.category(one) in _UNSEEN or one in _BLANK for one in text):
        codes = dict.fromkeys(f"U+{ord(one):04X}" for one in text if not one.isspace())
        return f"empty: nothing but characters that cannot be seen ({', '.join(list(codes)[:5])})"
    return None


# Control and format characters (zero-width space and joiners, the byte order mark, the soft hyphen, tags), and spaces.
_UNSEEN = ("Cc", "Cf", "Zs", "Zl", "Zp")
# Letters, marks and signs that are drawn as nothing: grapheme joiner, Hangul fillers, Khmer's inherent vowels, an empty
# cell of braille, variation selectors.
_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0") | frozenset(map(chr, range(0xFE00, 0xFE10)))


def shown(value: object, length: int = 40) -> str:
    """A value as JSON, shortened, for a message."""
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= length else text[: length - 1] + "…"


def require_text(message: Message, where: str) -> None:
    """Every turn says something; an assistant's may call a tool instead, and a tool may have nothing to say.

    Raises:
        RowError: it does not.
    """
    content = message.get("content")
    if message["role"] == "tool" or (message["role"] == "assistant" and message.get("tool_calls")):
        return
    problem = "null" if content is None else emptiness(content)
    if problem:
        noun = {"assistant": "an answer to learn", "user": "a question", "system": "a text"}
        raise RowError(f"{where}.content is {problem}: expected {noun[message['role']]}")
