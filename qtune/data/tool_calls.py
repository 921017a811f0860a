"""Tool calls and tool definitions in the forms that data sets write them in -> OpenAI's, which templates print."""

from collections.abc import Mapping, Sequence
from typing import Any

from qtune.data.account import Account
from qtune.data.conversation import RowError, require_json, shown
from qtune.data.json_stream import BrokenJson, strict_json

TOOLS = ("tools", "functions")
"""Columns that declare tools."""
# Names of a call's arguments: OpenAI's, Llama's, Anthropic's.
ARGUMENTS = ("arguments", "parameters", "input", "args")

Call = dict[str, Any]


def read_calls(calls: object, where: str, account: Account) -> list[Call]:
    """OpenAI's calls with their arguments as an object: templates print it, and a JSON text would be quoted twice.

    Raises:
        RowError: a call has no name, no arguments, or arguments that are no object.
    """
    if isinstance(calls, str):
        calls = parsed(calls, where)
    if not isinstance(calls, list):
        raise RowError(f"{where} = {shown(calls)}: not a list")
    return [_call(call, f"{where}[{index}]", account) for index, call in enumerate(calls)]


def calls_in_text(text: str, where: str, account: Account) -> list[Call]:
    """The calls of a turn of "function_call" or "tool_call", which writes them as JSON.

    Raises:
        RowError: it is something else.
    """
    try:
        value = strict_json(text)
    except BrokenJson as error:
        raise RowError(f"{where} = {shown(text)}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise RowError(
            f'{where} = {shown(text)}: a call is JSON like {{"name": …, "arguments": {{…}}}}; one that is written '
            "otherwise belongs into an assistant turn as text"
        ) from error
    return read_calls(value if isinstance(value, list) else [value], where, account)


def _call(call: object, where: str, account: Account) -> Call:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(f"{where} = {shown(call)}: no function with a name")
    if call.get("type") not in (None, "function", "tool_call", "tool_use"):
        raise RowError(f"{where}.type = {shown(call['type'])}: only calls of functions can be learned")
    named = [key for key in ARGUMENTS if function.get(key) is not None]
    if not named:
        raise RowError(f"{where} has no arguments; write {{}} where the call takes none")
    if len(named) > 1:
        raise RowError(f"{where} has both {' and '.join(named)}; keep the one that holds the call's arguments")
    arguments = function[named[0]]
    place = f"{where}.{named[0]}" if function is call else f"{where}.function.{named[0]}"
    if isinstance(arguments, str):
        arguments = parsed(arguments, place)
    if not isinstance(arguments, dict):
        raise RowError(f"{place} = {shown(arguments)}: not an object")
    require_json(arguments, place)
    require_json(call.get("id"), f"{where}.id")
    account.rest(call, ("function", "name", "type", "id", *ARGUMENTS), "messages[].tool_calls[].")
    if function is not call:
        account.rest(function, ("name", *ARGUMENTS), "messages[].tool_calls[].function.")
    identity = {"id": call["id"]} if call.get("id") is not None else {}
    return {**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def read_tools(tools: object, key: str, account: Account) -> list[dict[str, Any]]:
    """Tool definitions: a list, or the JSON text of one; each of them an object, its JSON text, or a bare function.

    Raises:
        RowError: they are something else.
    """
    if isinstance(tools, str):
        tools = parsed(tools, key)
    if not isinstance(tools, list):
        raise RowError(f"{key} = {shown(tools)}: not a list of tool descriptions")
    return [_tool(tool, f"{key}[{index}]", account) for index, tool in enumerate(tools)]


def _tool(tool: object, where: str, account: Account) -> dict[str, Any]:
    if isinstance(tool, str):
        tool = parsed(tool, where)
    if not isinstance(tool, dict):
        raise RowError(f"{where} = {shown(tool)}: not a tool description")
    function = tool.get("function", tool)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(f"{where} = {shown(tool)}: no function with a name")
    require_json(tool, where)
    described = tool if "function" in tool else {"type": "function", "function": tool}
    whole = _without_nulls(described)
    if whole != described:
        account.notes.add("padded-nulls")
    assert isinstance(whole, dict)
    return whole


def without_padding(calls: Sequence[Call], tools: Sequence[Mapping[str, Any]], account: Account) -> list[Call]:
    """The calls without the nulls that a table puts where a row has no value.

    A table gives every call the arguments of every other, and every object in them the keys of every other. What the
    call's own tool does not take, or takes but not as null, is such padding; where the row does not say, a null stays
    and is noted.
    """
    known = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}
    kept = []
    for call in calls:
        function = call["function"]
        arguments = _unpadded(function["arguments"], known.get(function["name"]), account)
        kept.append({**call, "function": {**function, "arguments": arguments}})
    return kept


def _unpadded(value: object, schema: object, account: Account) -> object:
    """A value of a call without what is padding in it by its JSON Schema."""
    if isinstance(value, list):
        items = schema.get("items") if isinstance(schema, dict) else None
        return [_unpadded(one, items, account) for one in value]
    if not isinstance(value, dict):
        return value
    declared = _properties(schema)
    kept = {}
    for key, held in value.items():
        of_key = None if declared is None else declared.get(key)
        if held is None and declared is None:
            account.notes.add("null-arguments")
        elif held is None and not _takes_null(of_key):
            account.notes.add("padded-nulls")
            continue
        kept[key] = _unpadded(held, of_key, account)
    return kept


def _properties(schema: object) -> Mapping[str, Any] | None:
    """What an object may hold, by name; None where its JSON Schema does not say it, or says it in several ways."""
    if not isinstance(schema, dict):
        return None
    ways = [schema, *(one for key in ("anyOf", "oneOf") for one in schema.get(key) or ())]
    declared = [way["properties"] for way in ways if isinstance(way, dict) and isinstance(way.get("properties"), dict)]
    return declared[0] if len(declared) == 1 else None


def _takes_null(schema: object) -> bool:
    """Whether a parameter's JSON Schema lets it be null. An undeclared one takes nothing."""
    if not isinstance(schema, dict):
        return False
    kinds = schema.get("type")
    is_typed = kinds is not None or any(key in schema for key in ("anyOf", "oneOf", "enum", "const", "$ref"))
    inner = [one for key in ("anyOf", "oneOf") for one in schema.get(key) or ()]
    return (
        not is_typed
        or "$ref" in schema
        or "null" in (kinds if isinstance(kinds, list) else [kinds])
        or bool(schema.get("nullable"))
        or None in (schema.get("enum") or ())
        or any(_takes_null(one) for one in inner)
    )


# Where a null in a JSON Schema means something: it is a value there.
_VALUES = ("default", "enum", "const", "examples", "example")


def _without_nulls(value: object) -> object:
    if isinstance(value, dict):
        return {
            key: held if key in _VALUES else _without_nulls(held)
            for key, held in value.items()
            if held is not None or key in _VALUES
        }
    return [_without_nulls(held) for held in value] if isinstance(value, list) else value


def parsed(text: str, key: str) -> object:
    """The value of a JSON text, which tables without nesting hold.

    Raises:
        RowError: it is no JSON.
    """
    try:
        return strict_json(text)
    except BrokenJson as error:
        raise RowError(f"{key} = {shown(text)}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise RowError(f"{key} = {shown(text)}: a text that is not JSON") from error
