"""The shapes that rows come in -> conversations. A shape is named in the recipe or recognized by its columns."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qtune.data.conversation import (
    ROLES,
    Conversation,
    Message,
    RowError,
    conversation,
    document,
    said,
    shown,
    text_of,
    with_system,
)

RawRow = Mapping[str, Any]

# Other names of our roles, in ShareGPT files and in exports of chat programs.
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
}
COLUMNS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt-completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "question-answer": ("question", "answer"),
    "text": ("text",),
}


def renamed(row: RawRow, columns: Mapping[str, str]) -> RawRow:
    """The row with the columns that the recipe renames: `columns` maps our name to the file's."""
    if not columns:
        return row
    taken = set(columns.values())
    kept = {key: value for key, value in row.items() if key not in taken and key not in columns}
    return kept | {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}


def detect_format(row: RawRow) -> str | None:
    """The first known shape whose columns the row has.

    "conversations" with role/content inside is messages under another name; the ShareGPT reader takes both.
    """
    return next((name for name, needed in COLUMNS.items() if all(key in row for key in needed)), None)


def unknown_columns(row: RawRow) -> str:
    """What to say about a row of no known shape."""
    known = "; ".join(f"{name}: {', '.join(keys)}" for name, keys in COLUMNS.items())
    return f"columns {', '.join(map(str, row)) or '(none)'} fit no known shape ({known}); rename them with columns"


def to_conversation(
    row: RawRow, row_format: str, place: str, system: str = "keep", system_prompt: str | None = None
) -> Conversation:
    """The conversation of a row under the system policy.

    Raises:
        RowError: the row does not have the shape, or its conversation cannot be learned from.
    """
    for key in COLUMNS[row_format]:
        if key not in row:
            raise RowError(f"no {key!r} in a {row_format} row; found {', '.join(map(str, row)) or 'nothing'}")
    if row_format == "text":
        return document(row["text"], place)
    messages = _READERS[row_format](row)
    tools = _tools(row["tools"], "tools") if row.get("tools") else _functions(row.get("functions"))
    return conversation(with_system(messages, system, system_prompt), tools, place)


def _from_messages(row: RawRow) -> list[Message]:
    return _message_list(row["messages"], "messages", "role", "content")


def _from_sharegpt(row: RawRow) -> list[Message]:
    turns = _listed(row["conversations"], "conversations")
    is_sharegpt = bool(turns) and isinstance(turns[0], dict) and "from" in turns[0]
    role_key, content_key = ("from", "value") if is_sharegpt else ("role", "content")
    messages = _message_list(turns, "conversations", role_key, content_key)
    # Some files keep the system message in a column of its own.
    system = row.get("system")
    return [{"role": "system", "content": text_of(system, "system")}, *messages] if system else messages


def _from_prompt_completion(row: RawRow) -> list[Message]:
    prompt, completion = row["prompt"], row["completion"]
    asked = (
        [{"role": "user", "content": said(prompt, "prompt")}]
        if not isinstance(prompt, list)
        else _message_list(prompt, "prompt", "role", "content")
    )
    answered = (
        [{"role": "assistant", "content": said(completion, "completion")}]
        if not isinstance(completion, list)
        else _message_list(completion, "completion", "role", "content")
    )
    return asked + answered


def _from_alpaca(row: RawRow) -> list[Message]:
    instruction, given = said(row["instruction"], "instruction"), row.get("input")
    if given is not None and text_of(given, "input").strip():
        instruction = f"{instruction}\n\n{given}"
    return _one_turn(row, instruction, said(row["output"], "output"))


def _from_question_answer(row: RawRow) -> list[Message]:
    return _one_turn(row, said(row["question"], "question"), said(row["answer"], "answer"))


def _one_turn(row: RawRow, question: str, answer: str) -> list[Message]:
    system = row.get("system")
    first = [{"role": "system", "content": text_of(system, "system")}] if system else []
    return [*first, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


_READERS: Mapping[str, Callable[[RawRow], list[Message]]] = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "prompt-completion": _from_prompt_completion,
    "alpaca": _from_alpaca,
    "question-answer": _from_question_answer,
}


def _listed(value: object, key: str) -> Sequence[Any]:
    """A list; tables without nesting (CSV) keep it as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RowError(f"{key} is a text that is not a JSON list") from error
    if not isinstance(value, list):
        raise RowError(f"{key} = {shown(value)}: not a list of messages")
    return value


def _message_list(value: object, key: str, role_key: str, content_key: str) -> list[Message]:
    return [_message(turn, f"{key}[{index}]", role_key, content_key) for index, turn in enumerate(_listed(value, key))]


def _message(turn: object, where: str, role_key: str, content_key: str) -> Message:
    if not isinstance(turn, dict):
        raise RowError(f"{where} = {shown(turn)}: not an object with {role_key} and {content_key}")
    if role_key not in turn:
        raise RowError(f"{where} has no {role_key!r}; found {', '.join(map(str, turn)) or 'nothing'}")
    given = turn[role_key]
    role = ROLE_NAMES.get(given, given) if isinstance(given, str) else given
    # A ShareGPT turn of "function_call" is the assistant's call, written out as text.
    role = "assistant" if role in ("function_call", "tool_call") else role
    if role not in ROLES:
        raise RowError(f"{where}.{role_key} = {shown(given)}: not one of {', '.join(ROLES)}")
    content, calls = turn.get(content_key), turn.get("tool_calls")
    if not calls and turn.get("function_call"):  # OpenAI's older form
        calls = [{"function": turn["function_call"]}]
    if content is None and not (role == "assistant" and calls):
        what = "is null" if content_key in turn else "is missing"
        raise RowError(f"{where}.{content_key} {what}; expected a text")
    message: Message = {"role": role}
    if content is not None:
        message["content"] = _content(content, f"{where}.{content_key}")
    if calls:
        message["tool_calls"] = _tool_calls(calls, f"{where}.tool_calls")
    for extra in ("reasoning_content", "name", "tool_call_id"):
        if turn.get(extra) is not None:
            message[extra] = text_of(turn[extra], f"{where}.{extra}")
    if turn.get("weight") is not None:
        if turn["weight"] not in (0, 1):
            raise RowError(f"{where}.weight = {shown(turn['weight'])}: not 0 or 1")
        message["weight"] = int(turn["weight"])
    return message


def _content(content: object, where: str) -> str:
    """A text, or OpenAI's list of parts where all of them are text."""
    if not isinstance(content, list):
        return text_of(content, where)
    parts = []
    for index, part in enumerate(content):
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if not isinstance(part, dict) or kind != "text":
            raise RowError(f"{where}[{index}] is of type {shown(kind)}; only text can be trained on")
        parts.append(text_of(part.get("text"), f"{where}[{index}].text"))
    return "".join(parts)


def _tool_calls(calls: object, where: str) -> list[dict[str, Any]]:
    """OpenAI's calls with their arguments as an object: templates print it, and a JSON text would be quoted twice."""
    if not isinstance(calls, list):
        raise RowError(f"{where} = {shown(calls)}: not a list")
    read = []
    for index, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"{where}[{index}] = {shown(call)}: no function with a name")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except ValueError as error:
                raise RowError(f"{where}[{index}].function.arguments is not JSON: {shown(arguments)}") from error
        if not isinstance(arguments, dict):
            raise RowError(f"{where}[{index}].function.arguments = {shown(arguments)}: not an object")
        identity = {"id": call["id"]} if isinstance(call, dict) and isinstance(call.get("id"), str) else {}
        read.append(identity | {"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return read


def _tools(tools: object, key: str) -> list[dict[str, Any]]:
    """A list of descriptions, or the JSON text of one."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise RowError(f"{key} is a text that is not JSON") from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError(f"{key} = {shown(tools)}: not a list of tool descriptions")
    return tools


def _functions(functions: object) -> list[dict[str, Any]]:
    """OpenAI's older form of tools."""
    described = _tools(functions, "functions") if functions else []
    return [{"type": "function", "function": function} for function in described]
