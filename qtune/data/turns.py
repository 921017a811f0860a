"""Turns as data sets write them -> messages as chat templates take them, each with its place in the row."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from qtune.data.account import Account, holds_something
from qtune.data.conversation import ROLES, Message, RowError, shown, text_of
from qtune.data.json_stream import BrokenJson, strict_json
from qtune.data.tool_calls import calls_in_text, read_calls
from qtune.data.turn_keys import REASONING, SWITCHES, loss_weight, reasoning_of

# Other names of our roles, in ShareGPT files, in ms-swift's and in exports of chat programs.
ROLE_NAMES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "developer": "system",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "ipython": "tool",
}
# A turn of its own for the assistant's call, written as JSON.
CALL_ROLES = ("function_call", "tool_call")
# Kept in the message, for templates that print them.
_PRINTABLE = ("name", "tool_call_id")
# They would change what the model is asked, and no template takes them there.
_MISPLACED = ("tools", "functions", "images", "videos", "audios", "image", "audio", "video")


class Turn(NamedTuple):
    """A message and where it stands in its row, as "messages[2]"."""

    where: str
    message: Message


def read_turns(value: object, key: str, account: Account, *, role_key: str, content_key: str) -> list[Turn]:
    """The turns of a list in their order.

    Raises:
        RowError: one of them is no message.
    """
    turns: list[Turn] = []
    for index, given in enumerate(listed(value, key)):
        where = f"{key}[{index}]"
        turn = Turn(where, _message(given, where, role_key, content_key, account))
        is_call = isinstance(given, dict) and given[role_key] in CALL_ROLES
        if is_call and turns and _is_bare_call(turns[-1].message):
            # Calls that one answer makes together stand in turns of their own.
            _add_call(turns[-1], turn, account)
        else:
            turns.append(turn)
    return turns


def listed(value: object, key: str) -> Sequence[Any]:
    """A list; tables without nesting (CSV) keep it as JSON text."""
    if isinstance(value, str):
        text = value
        try:
            value = strict_json(text)
        except BrokenJson as error:
            raise RowError(f"{key} is a text that is not usable JSON: {error}") from error
        except (ValueError, RecursionError) as error:
            pythons = "; single quotes are Python's, JSON has double ones" if "{'" in text else ""
            raise RowError(f"{key} is a text that is not a JSON list{pythons}") from error
    if not isinstance(value, list):
        raise RowError(f"{key} = {shown(value)}: not a list of messages")
    return value


def _is_bare_call(message: Message) -> bool:
    return message["role"] == "assistant" and bool(message.get("tool_calls")) and "content" not in message


def _add_call(answer: Turn, call: Turn, account: Account) -> None:
    """Puts a call behind those of its answer.

    Raises:
        RowError: the answer could not hold what else the call's turn says.
    """
    message, other = answer.message, call.message
    if message.get("weight", 1) != other.get("weight", 1):
        raise RowError(
            f"{call.where} is a call of the same answer as {answer.where}, and only one of them is to be learned; "
            "give both the same weight"
        )
    if other.get("reasoning_content") not in (None, message.get("reasoning_content")):
        raise RowError(
            f"{call.where} holds reasoning between two calls of one answer, which templates print before both; "
            f"write it into {answer.where}, or leave it out"
        )
    for key in _PRINTABLE:
        if key in other and message.setdefault(key, other[key]) != other[key]:
            account.rest({key: other[key]}, (), "messages[].")
    message["tool_calls"].extend(other["tool_calls"])


def _message(turn: object, where: str, role_key: str, content_key: str, account: Account) -> Message:
    if not isinstance(turn, dict):
        raise RowError(f"{where} = {shown(turn)}: not an object with {role_key} and {content_key}")
    if role_key not in turn:
        raise RowError(f"{where} has no {role_key!r}; found {', '.join(map(str, turn)) or 'nothing'}")
    role = _role(turn[role_key], f"{where}.{role_key}")
    for key in _MISPLACED:
        if holds_something(turn.get(key)):
            raise RowError(f"{where}.{key}: a message holds text; tools stand beside the messages, in a column tools")
    message: Message = {"role": role}
    thought = None
    content, calls = turn.get(content_key), turn.get("tool_calls")
    if turn[role_key] in CALL_ROLES:
        message["tool_calls"] = calls_in_text(
            text_of(content, f"{where}.{content_key}"), f"{where}.{content_key}", account
        )
        content = None
    elif calls or turn.get("function_call"):
        # function_call: OpenAI's older form.
        key = "tool_calls" if calls else "function_call"
        message["tool_calls"] = read_calls(calls or [turn["function_call"]], f"{where}.{key}", account)
    if "tool_calls" in message and role != "assistant":
        raise RowError(f"{where}: a turn of {role} with tool calls; only the assistant calls tools")
    if content is None and "tool_calls" not in message:
        what = "is null" if content_key in turn else "is missing"
        raise RowError(f"{where}.{content_key} {what}; expected a text")
    if content is not None:
        message["content"], thought = _content(content, f"{where}.{content_key}", account)
    thought = _thought(turn, thought, where, account)
    if thought is not None:
        message["reasoning_content"] = thought
    for extra in _PRINTABLE:
        if turn.get(extra) is not None:
            message[extra] = text_of(turn[extra], f"{where}.{extra}")
    weight = loss_weight(turn, role, where)
    if weight is not None and role == "assistant":
        message["weight"] = weight
    used = (role_key, content_key, "tool_calls", *REASONING, *_PRINTABLE, *SWITCHES)
    account.rest(turn, used if calls else (*used, "function_call"), "messages[].")
    return message


def _role(given: object, where: str) -> str:
    role = ROLE_NAMES.get(given, given) if isinstance(given, str) else given
    role = "assistant" if role in CALL_ROLES else role
    if role not in ROLES:
        lower = str(given).lower()
        meant = lower if lower in ROLES else ROLE_NAMES.get(lower)
        close = f"; did you mean '{meant}'?" if meant else ""
        raise RowError(f"{where} = {shown(given)}: not one of {', '.join(ROLES)}{close}")
    return str(role)


def _thought(turn: Any, from_parts: str | None, where: str, account: Account) -> str | None:
    beside = reasoning_of(turn, f"{where}.", account)
    if beside is not None and from_parts is not None and beside != from_parts:
        raise RowError(f"{where}: content and a key beside it hold different reasoning; keep one")
    return from_parts if beside is None else beside


def _content(content: object, where: str, account: Account) -> tuple[str, str | None]:
    """A text and what was thought before it: a text alone, or a list of parts (OpenAI's, Anthropic's, Mistral's)."""
    if not isinstance(content, list):
        return text_of(content, where), None
    parts, thoughts = [], []
    for index, part in enumerate(content):
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if isinstance(part, dict) and kind in ("text", "input_text", "output_text"):
            parts.append(text_of(part.get("text"), f"{where}[{index}].text"))
        elif isinstance(part, dict) and kind in ("thinking", "reasoning") and not parts:
            key = kind if kind in part else "text"
            thoughts.append(text_of(part.get(key), f"{where}[{index}].{key}"))
        else:
            raise RowError(f"{where}[{index}] is of type {shown(kind)}; only text can be trained on")
        account.rest(part, ("type", "text", "thinking", "reasoning"), "messages[].content[].")
    return "".join(parts), "".join(thoughts) or None
