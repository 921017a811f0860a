"""What a model was asked, turn by turn, short enough to be read beside its answer. Reading it needs no library."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

KEPT = 300
"""Characters of a turn that are kept beside an answer."""
SHOWN_TURNS = 5
"""Of a long talk: how it began, and those before the answer."""


@dataclass(frozen=True)
class AskedTurn:
    """A message that stood before the answer: its role, or "tools", and its text, cut inside where it is long."""

    role: str
    text: str


def asked_turns(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> tuple[AskedTurn, ...]:
    """The turns of a prompt, the tools that may be called first."""
    names = [str(tool.get("function", tool).get("name", "?")) for tool in tools]
    offered = [AskedTurn("tools", shortened(", ".join(names), KEPT))] if names else []
    return (*offered, *(AskedTurn(str(one["role"]), shortened(text_of(one), KEPT)) for one in messages))


def last_words(messages: Sequence[dict[str, Any]]) -> str:
    """The last words of the user in a prompt."""
    asked = [message for message in messages if message["role"] == "user"]
    return str(asked[-1].get("content") or "") if asked else ""


def other_turns(turns: Sequence[AskedTurn]) -> tuple[int, int]:
    """How many turns stand before the last words of the user and how many after them; what is said by nobody in the
    conversation, the system message and the tools, is not counted."""
    roles = [turn.role for turn in turns if turn.role not in ("system", "tools")]
    if "user" not in roles:
        return len(roles), 0
    after = roles[::-1].index("user")
    return len(roles) - after - 1, after


def answered_turn(turns: Sequence[AskedTurn]) -> str:
    """The turn that the model answers, with its role, where it is not the user's; else nothing."""
    last = turns[-1] if turns else None
    return "" if last is None or last.role in ("user", "system", "tools") else f"{last.role}: {last.text}"


def text_of(message: dict[str, Any]) -> str:
    """What a message says, and what it calls."""
    calls = [call.get("function", call) for call in message.get("tool_calls") or ()]
    called = [f"{one.get('name')}({json.dumps(one.get('arguments', {}), ensure_ascii=False)})" for one in calls]
    return " ".join(filter(None, (str(message.get("content") or ""), *called)))


def shortened(text: str, most: int) -> str:
    """A text of at most so many characters: how it begins and how it ends, for what is asked often stands behind."""
    if len(text) <= most:
        return text
    begin = (most - 3) * 2 // 3
    return f"{text[:begin]} … {text[begin + 3 - most :]}"


def shared_system(requests: Sequence[tuple[AskedTurn, ...]]) -> str | None:
    """The system message with which each of several requests began; None where they differ, or there is none."""
    begins = {turns[0] if turns else None for turns in requests}
    first = next(iter(begins)) if len(begins) == 1 and len(requests) > 1 else None
    return first.text if first is not None and first.role == "system" else None


def asked_text(request: str, turns: tuple[AskedTurn, ...], system: str | None = None, most: int = KEPT) -> str:
    """A request to be read beside its answers: the user's words where they are all of it, else each turn with its role,
    those before the last words of the user cut to `most` characters.

    request: the last words of the user, which are among the turns. system: the message that is said for all already.
    """
    if system is not None and turns[:1] == (AskedTurn("system", system),):
        turns = turns[1:]
    if [turn.role for turn in turns] in ([], ["user"]):
        return request
    last = max((at for at, turn in enumerate(turns) if turn.role == "user"), default=None)
    lines = [f"{turn.role}: {request if at == last else shortened(turn.text, most)}" for at, turn in enumerate(turns)]
    if len(lines) > SHOWN_TURNS:
        begin, end = (1, 1 - SHOWN_TURNS)
        lines = [*lines[:begin], f"… {len(lines) - SHOWN_TURNS} turns …", *lines[end:]]
    return "\n".join(lines)
