"""The one shape of an example: a conversation with the place it came from, checked when it is made."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
# Raw text for continued pretraining: a conversation of one message that no template renders.
DOCUMENT = "document"

Message = dict[str, Any]


class RowError(ValueError):
    """What is wrong with a row, said with the key, what was found and what is expected."""


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates take them, the tools they may call, and the place of their row.

    Each message has `role` and `content` (a text; it may be missing beside `tool_calls`). `weight = 0` on an
    assistant message leaves it out of the loss. A document is one message of the role "document".
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    place: str = ""

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


def conversation(messages: Sequence[Message], tools: Sequence[dict[str, Any]], place: str) -> Conversation:
    """A checked conversation.

    Raises:
        RowError: turns out of order, an empty text, or no answer at the end.
    """
    if not messages:
        raise RowError("messages is empty; expected at least a user and an assistant turn")
    for index, message in enumerate(messages):
        _check_text(message, f"messages[{index}]")
    _check_order([message["role"] for message in messages])
    made = Conversation(tuple(messages), tuple(tools), place)
    text_of(made.to_json(), "a tool call or tool description")
    return made


def document(text: object, place: str) -> Conversation:
    """A checked document: text that is learned as it stands."""
    return Conversation(({"role": DOCUMENT, "content": said(text, "text")},), (), place)


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


def said(value: object, key: str) -> str:
    """A text that says something.

    Raises:
        RowError: it is no text, or there is nothing but white space in it.
    """
    text = text_of(value, key)
    if not text.strip():
        raise RowError(f"{key} is empty")
    return text


def shown(value: object, length: int = 40) -> str:
    """A value as JSON, shortened, for a message."""
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= length else text[: length - 1] + "…"


def with_system(messages: Sequence[Message], policy: str, prompt: str | None) -> list[Message]:
    """The messages under the recipe's system policy.

    "keep" leaves system messages, "drop" removes them, "merge" puts them in front of the first user message (for
    templates without a system role). `prompt` is the system message of rows that have none.
    """
    turns = [message for message in messages if message["role"] != "system"]
    system = [message for message in messages if message["role"] == "system"] if policy != "drop" else []
    if prompt is not None and not system:
        system = [{"role": "system", "content": prompt}]
    if policy == "merge" and system and turns:
        text = "\n\n".join([*(message["content"] for message in system), turns[0]["content"]])
        return [{**turns[0], "content": text}, *turns[1:]]
    return [*system, *turns]


def _check_text(message: Message, where: str) -> None:
    content = message.get("content")
    if message["role"] == "assistant" and message.get("tool_calls"):
        return
    if content is None or not content.strip():
        what = "null" if content is None else "empty"
        noun = {"assistant": "an answer to learn", "user": "a question", "tool": "a result", "system": "a text"}
        raise RowError(f"{where}.content is {what}: expected {noun[message['role']]}")


# Which roles may stand after a role.
_NEXT: Mapping[str, tuple[str, ...]] = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


def _check_order(roles: Sequence[str]) -> None:
    previous = ""
    for index, role in enumerate(roles):
        if role not in _NEXT[previous]:
            after = f"after {previous}" if previous else "first"
            allowed = " or ".join(_NEXT[previous])
            raise RowError(f"turns out of order: messages[{index}] is {role} {after}; expected {allowed}")
        previous = role
    if previous != "assistant":
        raise RowError(f"the last turn is {previous}'s; expected an assistant turn to learn")
