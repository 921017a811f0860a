"""Rows of every known shape become the same conversation."""

import json

import pytest

from qtune.data.conversation import Conversation, RowError
from qtune.data.formats import detect_format, renamed, to_conversation

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SYSTEM = {"role": "system", "content": "Be brief."}
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def messages(row, row_format=None, **policy):
    found = row_format or detect_format(row)
    assert found, row
    return list(to_conversation(row, found, "file:1", **policy).messages)


@pytest.mark.parametrize(
    ("row_format", "row"),
    [
        ("messages", {"messages": TALK}),
        ("messages", {"messages": json.dumps(TALK)}),
        (
            "messages",
            {"messages": [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in TALK]},
        ),
        ("sharegpt", {"conversations": SHAREGPT, "id": "x"}),
        ("sharegpt", {"conversations": [{"from": "user", "value": "Hi"}, {"from": "model", "value": "Hello"}]}),
        ("sharegpt", {"conversations": TALK}),
        ("prompt-completion", {"prompt": "Hi", "completion": "Hello"}),
        ("prompt-completion", {"prompt": TALK[:1], "completion": TALK[1:]}),
        ("prompt-completion", {"prompt": TALK[:1], "completion": "Hello"}),
        ("prompt-completion", {"prompt": json.dumps(TALK[:1]), "completion": json.dumps(TALK[1:], indent=1)}),
        ("prompt-completion", {"prompt": json.dumps(TALK[:1]), "completion": "Hello"}),
        ("alpaca", {"instruction": "Hi", "output": "Hello"}),
        ("alpaca", {"instruction": "Hi", "input": "", "output": "Hello", "text": "Below is …"}),
        ("alpaca", {"instruction": "Hi", "input": None, "output": "Hello"}),
        ("question-answer", {"question": "Hi", "answer": "Hello"}),
    ],
)
def test_a_shape_is_recognized_and_read(row_format, row):
    assert detect_format(row) == row_format
    assert messages(row) == TALK


@pytest.mark.parametrize(
    "completion",
    ['[{"role": "engineer", "content": "steel"}]', '[{"role": "user"}]', "[1, 2]", '{"role": "user", "content": "x"}'],
)
def test_an_answer_that_is_json_but_no_list_of_turns_stays_a_text(completion):
    assert messages({"prompt": "Hi", "completion": completion})[1]["content"] == completion


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            str(TALK[1:]),
            "completion is a text that is not a JSON list; single quotes are Python's, JSON has double ones",
        ),
        (json.dumps(TALK[1:])[:-1], "completion is a text that is not a JSON list"),
    ],
)
def test_turns_of_a_prompt_or_completion_that_are_no_json_are_refused(text, message):
    with pytest.raises(RowError) as caught:
        messages({"prompt": "Hi", "completion": text})
    assert str(caught.value) == message


def test_raw_text_is_a_document_of_its_own():
    read = to_conversation({"text": "Once upon a time"}, "text", "file:1")
    assert read.is_document
    assert read.answer == "Once upon a time"


def test_an_alpaca_input_stands_below_the_instruction():
    row = {"instruction": "Translate.", "input": "Hello", "output": "Bonjour"}
    assert messages(row)[0]["content"] == "Translate.\n\nHello"


@pytest.mark.parametrize("row", [{"question": "Hi", "answer": "Hello"}, {"conversations": SHAREGPT}])
def test_a_system_column_comes_first(row):
    assert messages({**row, "system": "Be brief."}) == [SYSTEM, *TALK]
    assert messages({**row, "system": ""}) == TALK


def test_columns_of_other_names_are_renamed_and_others_left_out():
    row = {"query": "Hi", "reply": "Hello", "answer": "not this one", "id": 1}
    read = renamed(row, {"question": "query", "answer": "reply"})
    assert read == {"question": "Hi", "answer": "Hello", "id": 1}
    assert messages(read) == TALK


def test_unknown_columns_are_no_shape():
    assert detect_format({"query": "Hi", "reply": "Hello"}) is None


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ({"system": "keep"}, [SYSTEM, *TALK]),
        ({"system": "drop"}, TALK),
        ({"system": "merge"}, [{"role": "user", "content": "Be brief.\n\nHi"}, TALK[1]]),
        ({"system": "keep", "system_prompt": "Be kind."}, [SYSTEM, *TALK]),
        ({"system": "drop", "system_prompt": "Be kind."}, [{"role": "system", "content": "Be kind."}, *TALK]),
    ],
)
def test_the_recipe_decides_about_system_messages(policy, expected):
    assert messages({"messages": [SYSTEM, *TALK]}, **policy) == expected


def test_rows_without_a_system_message_get_the_recipes():
    assert messages({"messages": TALK}, system_prompt="Be brief.") == [SYSTEM, *TALK]
    merged = messages({"messages": TALK}, system="merge", system_prompt="Be brief.")
    assert merged[0] == {"role": "user", "content": "Be brief.\n\nHi"}


def test_tool_calls_keep_their_arguments_as_an_object_and_tools_may_be_json_text():
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    row = {
        "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "22"},
            {"role": "assistant", "content": "22 degrees"},
        ],
        "tools": json.dumps([TOOL]),
    }
    read = to_conversation(row, "messages", "file:1")
    assert read.tools == (TOOL,)
    assert read.messages[1] == {
        "role": "assistant",
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
        ],
    }
    assert read.messages[2] == {"role": "tool", "content": "22", "tool_call_id": "1"}


def test_openais_older_functions_are_tools():
    call = {"name": "weather", "arguments": '{"city": "Paris"}'}
    row = {
        "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": None, "function_call": call},
            {"role": "function", "name": "weather", "content": "22"},
            {"role": "assistant", "content": "22 degrees"},
        ],
        "functions": [TOOL["function"]],
    }
    read = to_conversation(row, "messages", "file:1")
    assert read.tools == (TOOL,)
    assert read.messages[1]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Paris"}}
    assert read.messages[2] == {"role": "tool", "content": "22", "name": "weather"}


def test_a_sharegpt_function_call_is_the_assistants_call():
    call = '{"name": "weather", "arguments": {"city": "Paris"}}'
    turns = [("human", "Weather?"), ("function_call", call), ("observation", "22"), ("gpt", "22 degrees")]
    row = {"conversations": [{"from": name, "value": text} for name, text in turns]}
    read = messages(row)
    assert [message["role"] for message in read] == ["user", "assistant", "tool", "assistant"]
    assert read[1]["tool_calls"] == [
        {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
    ]


def test_a_conversation_survives_its_json():
    talk = Conversation((SYSTEM, *TALK), (TOOL,), "file:1")
    assert Conversation.from_json(talk.to_json(), "file:1") == talk


def test_a_conversation_knows_its_prompt_and_answer():
    talk = Conversation((SYSTEM, *TALK))
    assert talk.prompt == (SYSTEM, TALK[0])
    assert talk.answer == "Hello"


def test_half_a_character_in_a_tool_call_is_found():
    call = {"function": {"name": "f", "arguments": {"x": "\ud800"}}}
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": [call]}]}
    with pytest.raises(RowError, match="half a character"):
        to_conversation(row, "messages", "file:1")
