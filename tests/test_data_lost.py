"""Nothing of a row is lost in silence: what it holds is obeyed, in the text, named as unused, or refused by name."""

import json
from datetime import datetime
from decimal import Decimal

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from chat_families import FAMILIES, tokenizer_of
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qtune.data.conversation import RowError, emptiness
from qtune.data.examples import RowEncoder, RowRules
from qtune.data.files import data_files
from qtune.data.formats import detect_format, to_conversation
from qtune.data.masks import IGNORED
from qtune.data.rows import Row, read_rows, without_inner_nulls
from qtune.data.sources import Source
from qtune.data.template import CHATML, ChatTemplate
from qtune.recipe.schema import HubSource

TOKENIZER = tokenizer_of(FAMILIES["chatml"])
BARE = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + (m.content or '') + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)
TALK = [{"role": "user", "content": "Red?"}, {"role": "assistant", "content": "Stop."}]
WEATHER = {
    "name": "weather",
    "description": "Weather of a place",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
}


def batch_of(row, template=CHATML, **changes):
    rules = RowRules("messages", {}, "keep", None, "all-answers", "split", 4096, "error", is_detected=True)
    rules = RowRules(**{**rules.__dict__, "row_format": detect_format(row) or "messages", **changes})
    return RowEncoder(TOKENIZER, ChatTemplate(template, "the test's"), rules)([Row("rows:1", row)])


def examples(batch):
    return batch.examples.to_pylist()


def text_of(batch):
    return "".join(TOKENIZER.decode(one["input_ids"]) for one in examples(batch))


def scored(batch):
    return [
        TOKENIZER.decode([label for label in one["labels"] if label != IGNORED]).removesuffix("<|im_end|>")
        for one in examples(batch)
    ]


def notes(batch):
    return {note for one in examples(batch) for note in one["notes"].split()}


def messages_of(row, row_format=None, **policy):
    return list(to_conversation(row, row_format or detect_format(row), "rows:1", **policy).messages)


def refusal(row, **changes):
    (bad,) = batch_of(row, **changes).bad
    return bad.message


# --- 1: what is not used is said -----------------------------------------------------------------------------------


def test_columns_and_keys_that_nothing_reads_are_counted_by_name():
    answer = {**TALK[1], "confidence": 0.5, "annotator": {"id": 7}}
    batch = batch_of({"messages": [TALK[0], answer], "topic": "lights", "empty": None, "none": []})
    assert batch.unused == {"messages[].confidence": 1, "messages[].annotator": 1, "topic": 1}
    assert batch.rows_with_unused == 1
    assert examples(batch)[0]["unused"] == ["topic", "messages[].confidence", "messages[].annotator"]


@pytest.mark.parametrize(
    "switch",
    [
        {"weight": 0},
        {"train": False},
        {"training": 0},
        {"trainable": "false"},
        {"weight": "0"},
        {"masked": "1"},
        {"masked": True},
        {"loss_scale": 0.0},
        {"loss": False, "weight": 0},
    ],
    ids=str,
)
def test_switches_of_other_libraries_keep_an_answer_out_of_the_loss(switch):
    row = {"messages": [TALK[0], {"role": "assistant", "content": "No.", **switch}, *TALK]}
    assert scored(batch_of(row)) == ["Stop."]


def test_a_last_answer_that_is_not_learned_is_not_said_to_be_every_one():
    row = {"messages": [*TALK, TALK[0], {**TALK[1], "weight": 0}]}
    said = "no assistant turn is left to learn: "
    assert refusal(row, loss_on="last-answer") == (
        f'{said}the last answer has weight 0, and loss_on = "last-answer" learns no other; '
        '"all-answers" learns those before it'
    )
    row["messages"][1] = {**TALK[1], "weight": 0}
    assert refusal(row, loss_on="last-answer") == f"{said}every weight is 0"


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (
            {"loss_mask": 0},
            "messages[1].loss_mask = 0: looks like a switch of the loss whose meaning is not known here",
        ),
        ({"isMasked": True}, "messages[1].isMasked = true: looks like a switch of the loss"),
        ({"train_detail": [{"train": False}]}, "messages[1].train_detail = "),
        ({"loss": 0.3}, "messages[1].loss = 0.3: not 0 or 1 (true or false); a turn is learned whole or not at all"),
        ({"train": True, "masked": True}, "messages[1]: train = true, masked = true disagree about whether"),
    ],
)
def test_switches_that_cannot_be_obeyed_are_refused_by_name(turn, message):
    row = {"messages": [TALK[0], {**TALK[1], **turn}]}
    assert refusal(row).startswith(message)


def test_a_question_that_is_to_be_learned_is_refused():
    row = {"messages": [{**TALK[0], "train": True}, TALK[1]]}
    assert refusal(row).startswith("messages[0].train = true on a turn of user: only answers of the assistant")
    assert scored(batch_of({"messages": [{**TALK[0], "train": False}, TALK[1]]})) == ["Stop."]


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Red?", "output": "Stop.", "history": [["Blue?", "Turn."], ["Grey?", "Wait."]]},
        {"question": "Red?", "answer": "Stop.", "history": '[["Blue?", "Turn."], ["Grey?", "Wait."]]'},
        {"prompt": "Red?", "completion": "Stop.", "history": [["Blue?", "Turn."], ["Grey?", "Wait."]]},
    ],
)
def test_history_is_earlier_turns(row):
    assert [message["content"] for message in messages_of(row)] == ["Blue?", "Turn.", "Grey?", "Wait.", "Red?", "Stop."]
    assert not batch_of(row).unused


@pytest.mark.parametrize("column", ["system", "system_prompt", "system_message"])
@pytest.mark.parametrize(
    "row", [{"messages": TALK}, {"prompt": "Red?", "completion": "Stop."}, {"instruction": "Red?", "output": "Stop."}]
)
def test_a_system_column_is_obeyed_in_every_shape(row, column):
    assert messages_of({**row, column: "Be brief."})[0] == {"role": "system", "content": "Be brief."}
    with pytest.raises(RowError, match="are different system messages; keep one"):
        messages_of({"messages": [{"role": "system", "content": "Be kind."}, *TALK], column: "Be brief."})


@pytest.mark.parametrize("key", ["reasoning", "thinking", "reasoning_content"])
def test_reasoning_is_read_under_its_usual_names_in_messages_and_in_columns(key):
    thought = "Red lights stop cars."
    for row in (
        {"messages": [TALK[0], {**TALK[1], key: thought}]},
        {"question": "Red?", "answer": "Stop.", key: thought},
        {"messages": [TALK[0], {"role": "assistant", "content": [{"type": "thinking", "thinking": thought}, "x"][:1]}]},
    ):
        if row.get("messages") and isinstance(row["messages"][1]["content"], list):
            row["messages"][1]["content"].append({"type": "text", "text": "Stop."})
        assert scored(batch_of(row)) == [f"<think>\n{thought}\n</think>\n\nStop."]
        assert "reasoning-lost" in notes(batch_of(row, BARE))


def test_a_template_that_calls_reasoning_thinking_is_given_it_under_that_name():
    template = BARE.replace("(m.content or '')", "(m.thinking or '') + '|' + m.content")
    assert scored(batch_of({"messages": [TALK[0], {**TALK[1], "reasoning": "Hm."}]}, template)) == ["Hm.|Stop."]


@pytest.mark.parametrize("blank", ["", " ", "\n"])
@pytest.mark.parametrize("policy", ["keep", "drop", "merge"])
def test_a_blank_system_message_is_as_if_there_were_none(blank, policy):
    row = {"messages": [{"role": "system", "content": blank}, *TALK]}
    assert messages_of(row, system=policy) == TALK
    assert messages_of({"messages": TALK, "system": blank}, system=policy) == TALK
    assert messages_of({**row, "system": "Be brief."})[0]["content"] == "Be brief."
    assert messages_of(row, system_prompt="Be brief.")[0]["content"] == "Be brief."


def test_a_system_message_that_is_dropped_need_not_say_anything_that_is_seen():
    row = {"messages": [{"role": "system", "content": "\u200b"}, *TALK]}
    assert messages_of(row, system="drop") == TALK
    assert refusal(row).startswith("messages[0].content is empty: nothing but characters that cannot be seen")


@pytest.mark.parametrize("result", ["", " ", "\u200b"])
def test_a_tool_may_have_nothing_to_say(result):
    row = call_row({"place": "Paris"})
    row["messages"][2]["content"] = result
    batch = batch_of(row)
    assert messages_of(row)[2] == {"role": "tool", "content": result}
    assert notes(batch) == set()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "Red?", "completion": "Go.", "label": False},
            "label = false: an answer that is marked as undesired",
        ),
        ({"messages": TALK, "weight": 0.5}, "weight = 0.5: a row has no weight of its own; give sources weights"),
        ({"messages": TALK, "loss_mask": [0, 1]}, "loss_mask = [0, 1]: looks like a mask or switch of the loss"),
        ({"messages": TALK, "images": ["a.png"]}, 'images = ["a.png"]: only text can be trained on'),
        ({"messages": TALK, "chat_template_kwargs": {"x": 1}}, 'chat_template_kwargs = {"x": 1}: a row cannot choose'),
        (
            {"messages": [{**TALK[0], "tools": [WEATHER]}, TALK[1]]},
            "messages[0].tools: a message holds text; tools stand",
        ),
    ],
)
def test_columns_that_would_change_what_is_learned_are_refused_by_name(row, message):
    assert refusal(row).startswith(message)


@pytest.mark.parametrize("value", ["addition of numbers", {"name": "addition"}, "2 apples"])
@pytest.mark.parametrize("name", ["learning_goal", "training_set", "weight_class", "isMasked"])
def test_a_text_is_no_switch_of_the_loss_whatever_its_name(name, value):
    assert batch_of({"messages": TALK, name: value, "weight": value}).unused == {name: 1, "weight": 1}
    assert batch_of({"messages": [TALK[0], {**TALK[1], name: value}]}).unused == {f"messages[].{name}": 1}


@pytest.mark.parametrize("value", [0, 1.0, False, [1, 0], "0", " 0.5 ", "False", "no", "[1, 0]", {"user": False}])
def test_a_value_that_could_be_a_switch_is_refused_as_a_text_too(value):
    for row in ({"messages": TALK, "loss_mask": value}, {"messages": [TALK[0], {**TALK[1], "loss_mask": value}]}):
        assert "looks like a" in refusal(row)


def test_a_label_or_weight_that_says_what_happens_anyway_is_no_matter():
    assert not batch_of({"messages": TALK, "weight": 1.0}).unused
    for text in ("1", "1.0", " 1 ", "1e0"):
        batch = batch_of({"question": "Red?", "answer": "Stop.", "weight": text})
        assert (len(examples(batch)), batch.bad, batch.unused) == (1, [], {})
    for other in ("0.5", "0", "0,5", 10**400):
        assert "a row has no weight of its own" in refusal({"messages": TALK, "weight": other})
    assert batch_of({"prompt": "Red?", "completion": "Stop.", "label": True}).unused == {"label": 1}


# --- 2: the rendered text holds what the row holds -----------------------------------------------------------------


def call_row(arguments, content=None, name="weather", **extra):
    call = {"type": "function", "function": {"name": name, "arguments": arguments, **extra}}
    turns = [TALK[0], {"role": "assistant", "content": content, "tool_calls": [call]}]
    return {"messages": [*turns, {"role": "tool", "content": "22"}, TALK[1]], "tools": [WEATHER]}


@pytest.mark.parametrize("content", [None, "", "weather place Paris", "One moment."])
def test_a_call_that_is_not_printed_is_lost_whatever_stands_beside_it(content):
    row = call_row({"place": "Paris"}, content)
    assert notes(batch_of(row, BARE)) >= {"tool-call-lost", "tools-lost"}
    assert not notes(batch_of(row)) & {"tool-call-lost", "tools-lost"}


@pytest.mark.parametrize(
    "printed",
    [
        "{{ c.function.name }}",
        "{{ c.function.name }}({{ c.function.arguments.keys() | list }})",
        "{{ c.function.arguments | tojson }}",
        "{{ c.function.name }}{{ c.function.arguments | tojson | upper }}",
    ],
)
def test_a_call_that_is_printed_in_part_is_lost(printed):
    template = BARE.replace("(m.content or '')", "(m.content or '') ~ CALLS").replace(
        "{{ '<|im_start|>' + m.role",
        "{%- set CALLS %}{%- for c in m.tool_calls or [] %}" + printed + "{%- endfor %}"
        "{%- endset %}{{ '<|im_start|>' + m.role",
    )
    assert "tool-call-lost" in notes(batch_of(call_row({"place": "Paris", "days": [1, 2]}), template))
    whole = template.replace(printed, "{{ c.function.name }}{{ c.function.arguments }}")
    assert "tool-call-lost" not in notes(batch_of(call_row({"place": "Paris", "days": [1, 2]}), whole))


def test_a_system_message_or_a_result_that_a_template_passes_over_is_lost():
    template = BARE.replace("%}{{ '<|im_start|>' + m.role", " if m.role != 'system' %}{{ '<|im_start|>' + m.role", 1)
    row = {"messages": [{"role": "system", "content": "Red"}, *TALK]}
    assert "message-lost" in notes(batch_of(row, template))
    assert not notes(batch_of(row))
    no_results = template.replace("'system'", "'tool'")
    assert "message-lost" in notes(batch_of(call_row({"place": "Paris"}), no_results))


def test_tools_that_are_printed_only_without_a_system_message_are_lost_with_one():
    # LLaMA-Factory#4187: a row with a system message of its own lost its tools.
    template = "{%- if messages[0].role != 'system' %}{{ tools | tojson }}{%- endif %}" + BARE
    row = {"messages": TALK, "tools": [WEATHER]}
    assert "tools-lost" not in notes(batch_of(row, template))
    assert "tools-lost" in notes(batch_of({**row, "system": "Be brief."}, template))


@pytest.mark.parametrize(
    ("answer", "note"),
    [
        ("    return 1", "answer-changed"),
        ("\treturn 1", "answer-changed"),
        ("\n\n  - one\n  - two", "answer-changed"),
        (" Stop.", "answer-trimmed"),
        ("Stop.\n", "answer-trimmed"),
        ("\nStop.", "answer-trimmed"),
        ("Stop.", None),
        ("a\n    b", None),
    ],
)
def test_white_space_that_a_template_trims_is_found(answer, note):
    trims = BARE.replace("(m.content or '')", "(m.content or '') | trim")
    row = {"messages": [TALK[0], {"role": "assistant", "content": answer}]}
    assert notes(batch_of(row, trims)) == ({note} if note else set())
    assert notes(batch_of(row, BARE)) == set()
    assert scored(batch_of(row, BARE)) == [answer]


def test_a_tokenizer_that_loses_line_breaks_is_found():
    from tokenizers import normalizers

    backend = TOKENIZER.backend_tokenizer
    backend.normalizer = normalizers.Replace("\n    ", " ")
    try:
        row = {"messages": [TALK[0], {"role": "assistant", "content": "if x:\n    go()"}]}
        assert "label-text" not in notes(batch_of({"messages": TALK}, BARE))
        assert scored(batch_of(row, BARE)) == ["if x: go()"]
    finally:
        backend.normalizer = None


def test_extra_ids_and_names_are_named_where_no_template_prints_them():
    row = call_row({"place": "Paris"})
    row["messages"][1]["tool_calls"][0] |= {"id": "call_77", "index": 3}
    row["messages"][2] |= {"tool_call_id": "call_77", "name": "forecast"}
    assert set(batch_of(row).unused) == {
        "messages[].tool_calls[].index",
        "messages[].tool_calls[].id",
        "messages[].tool_call_id",
        "messages[].name",
    }


# --- calls in other forms ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["arguments", "parameters", "input", "args"])
@pytest.mark.parametrize("as_text", [False, True])
def test_arguments_are_read_under_their_usual_names(key, as_text):
    arguments = {"place": "Paris"}
    call = {"function": {"name": "weather", key: json.dumps(arguments) if as_text else arguments}}
    (_, answer, *_) = messages_of({"messages": [TALK[0], {"role": "assistant", "tool_calls": [call]}]})
    assert answer["tool_calls"] == [{"type": "function", "function": {"name": "weather", "arguments": arguments}}]


@pytest.mark.parametrize("call", [{"name": "now"}, {"function": {"name": "now", "arguments": None}}])
def test_a_missing_argument_list_is_not_an_empty_one(call):
    message = refusal({"messages": [TALK[0], {"role": "assistant", "tool_calls": [call]}]})
    assert message == "messages[1].tool_calls[0] has no arguments; write {} where the call takes none"
    assert not batch_of(
        {"messages": [TALK[0], {"role": "assistant", "tool_calls": [{"name": "n", "arguments": {}}]}]}
    ).bad


@pytest.mark.parametrize(("role", "key"), [("function_call", "from"), ("tool_call", "role")])
def test_calls_in_turns_of_their_own_are_the_assistants(role, key):
    content = "value" if key == "from" else "content"
    calls = [{"name": "weather", "arguments": {"place": place}} for place in ("Paris", "Rome")]
    names = {"from": ("human", "observation", "gpt"), "role": ("user", "tool_response", "assistant")}[key]
    turns = [(names[0], "?"), *((role, json.dumps(call)) for call in calls), (names[1], "22"), (names[2], "Warm.")]
    row = {"conversations": [{key: who, content: said} for who, said in turns], "tools": json.dumps([WEATHER])}
    read = to_conversation(row, "sharegpt", "rows:1")
    assert [message["role"] for message in read.messages] == ["user", "assistant", "tool", "assistant"]
    assert [call["function"] for call in read.messages[1]["tool_calls"]] == calls
    assert read.tools == ({"type": "function", "function": WEATHER},)
    assert notes(batch_of(row)) == set()


def two_calls(first, second):
    calls = [
        {"role": "tool_call", "content": json.dumps({"name": name, "arguments": {}}), **keys}
        for name, keys in (("one", first), ("two", second))
    ]
    return {"messages": [TALK[0], *calls, {"role": "tool", "content": "22"}, TALK[1]]}


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({}, {"loss": False}, "messages[2] is a call of the same answer as messages[1], and only one of them is to be"),
        ({"weight": 0}, {}, "messages[2] is a call of the same answer as messages[1], and only one of them is to be"),
        ({}, {"reasoning": "Two."}, "messages[2] holds reasoning between two calls of one answer"),
        ({"thinking": "One."}, {"thinking": "Two."}, "messages[2] holds reasoning between two calls of one answer"),
    ],
)
def test_calls_of_one_answer_that_do_not_go_together_are_refused(first, second, message):
    assert refusal(two_calls(first, second)).startswith(message)


def test_calls_of_one_answer_have_its_switch_reasoning_and_name():
    off = {"loss": False, "reasoning": "Both."}
    (_, answer, *_) = messages_of(two_calls(off, {**off, "weight": 0}))
    assert [call["function"]["name"] for call in answer["tool_calls"]] == ["one", "two"]
    assert (answer["weight"], answer["reasoning_content"]) == (0, "Both.")
    (_, answer, *_) = messages_of(two_calls({"weight": 1}, {"name": "bot"}))
    assert (answer["weight"], answer["name"]) == (1, "bot")
    batch = batch_of(two_calls({"tool_call_id": "a"}, {"tool_call_id": "b"}))
    assert batch.unused["messages[].tool_call_id"] == 1


def test_a_call_that_is_no_json_is_refused():
    turns = [("human", "?"), ("function_call", "weather(Paris)"), ("observation", "22"), ("gpt", "Warm.")]
    message = refusal({"conversations": [{"from": who, "value": said} for who, said in turns]})
    assert message.startswith('conversations[1].value = "weather(Paris)": a call is JSON like {"name"')


def test_nulls_that_a_table_put_into_calls_and_tools_are_not_learned():
    padded = {**WEATHER, "parameters": {"type": "object", "properties": {"place": {"type": "string"}, "amount": None}}}
    row = {**call_row({"place": "Paris", "amount": None, "unit": None}), "tools": [padded]}
    batch = batch_of(row)
    assert '{"place": "Paris"}}' in scored(batch)[0]
    assert "null" not in text_of(batch)
    assert notes(batch) == {"padded-nulls"}


def test_a_null_that_a_tool_takes_is_learned_and_one_that_nobody_explains_is_noted():
    nullable = {**WEATHER, "parameters": {"type": "object", "properties": {"place": {"type": ["string", "null"]}}}}
    known = {**call_row({"place": None}), "tools": [nullable]}
    assert '"place": null' in scored(batch_of(known))[0]
    assert notes(batch_of(known)) == set()
    unknown = {key: value for key, value in call_row({"place": None}).items() if key != "tools"}
    assert '"place": null' in scored(batch_of(unknown))[0]
    assert notes(batch_of(unknown)) == {"null-arguments"}


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "feather", "hub"])
@pytest.mark.parametrize("key", ["arguments", "parameters", "input", "args"])
@pytest.mark.parametrize("is_bare", [False, True])
def test_a_null_that_a_tool_takes_is_learned_from_files_of_every_kind(tmp_path, kind, key, is_bare):
    properties = {"a": {"type": ["string", "null"]}, "b": {"type": "string"}}
    tools = [{"name": "f", "parameters": {"type": "object", "properties": properties}}]
    rows = []
    for arguments in ({"a": None, "b": "y"}, {"a": "z", "b": None}):
        call = {"name": "f", key: arguments}
        answer = {"role": "assistant", "content": "", "tool_calls": [call if is_bare else {"function": call}]}
        rows.append({"messages": [TALK[0], answer], "tools": json.dumps(tools)})
    path = tmp_path / f"rows.{kind}"
    if kind == "hub":
        source = Source("hub:someone/rows", "auto", {}, 1.0, HubSource(hub="someone/rows"), hub=Dataset.from_list(rows))
        read = list(source.rows())
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        {"parquet": pq.write_table, "feather": feather.write_feather}[kind](pa.Table.from_pylist(rows), path)
    if kind != "hub":
        read = [row for file in data_files(path.name, tmp_path) for row in read_rows(file)]
    (with_null, padded) = (row.value for row in read)
    assert '"arguments": {"a": null, "b": "y"}' in scored(batch_of(with_null))[0]
    assert notes(batch_of(with_null)) == set()
    assert '"arguments": {"a": "z"}' in scored(batch_of(padded))[0]
    assert notes(batch_of(padded)) == {"padded-nulls"}


def test_nulls_that_a_table_put_into_calls_of_which_no_tool_tells_are_padding():
    """Of rows with many tools a table gives each call the arguments of all; rows that declare a tool keep theirs."""
    call = {"name": "f", "arguments": {"a": None, "b": "y"}}
    row = {"messages": [TALK[0], {"role": "assistant", "tool_calls": [call]}], "tools": None}
    assert without_inner_nulls(row)["messages"][1]["tool_calls"] == [{"name": "f", "arguments": {"b": "y"}}]
    for column in ("tools", "functions"):
        kept = without_inner_nulls({**row, column: [{"name": "f"}]})
        assert kept["messages"][1]["tool_calls"] == [call]


def test_nulls_inside_the_objects_of_a_call_are_decided_by_what_its_tool_declares_of_them():
    inner = {"type": "object", "properties": {"a": {"type": ["integer", "null"]}, "b": {"type": "integer"}}}
    declared = {"one": {"anyOf": [inner, {"type": "null"}]}, "all": {"type": "array", "items": inner}}
    tools = [{"name": "weather", "parameters": {"type": "object", "properties": declared}}]
    row = {**call_row({"one": {"a": None, "b": None}, "all": [{"a": None, "b": 1}, {"b": None}]}), "tools": tools}
    assert '"arguments": {"one": {"a": null}, "all": [{"a": null, "b": 1}, {}]}' in scored(batch_of(row))[0]
    assert notes(batch_of(row)) == {"padded-nulls"}
    open_object = {"name": "weather", "parameters": {"type": "object", "properties": {"one": {"type": "object"}}}}
    row = {**call_row({"one": {"a": None}}), "tools": [open_object]}
    assert '"arguments": {"one": {"a": null}}' in scored(batch_of(row))[0]
    assert notes(batch_of(row)) == {"null-arguments"}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            datetime(2026, 1, 2),
            '.when = "2026-01-02 00:00:00": JSON has no values of type datetime; write it as a text',
        ),
        (Decimal("1.5"), '.when = "1.5": JSON has no values of type Decimal; write it as a text'),
        (b"x", ".when = \"b'x'\": JSON has no values of type bytes; write it as a text"),
        (float("nan"), ".when = NaN: JSON has no such number; write null, or leave it out"),
        ([{"to": float("inf")}], ".when[0].to = Infinity: JSON has no such number; write null, or leave it out"),
    ],
    ids=str,
)
def test_a_value_of_a_table_that_json_does_not_have_is_no_value_of_a_call_or_tool(tmp_path, value, message):
    rows = [call_row({"when": value}), {**call_row({"place": "x"}), "tools": [{**WEATHER, "when": value}]}]
    for number, row in enumerate(rows):
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / f"{number}.parquet")
    (call, tool) = (row.value for file in data_files("*.parquet", tmp_path) for row in read_rows(file))
    assert refusal(call) == f"messages[1].tool_calls[0].function.arguments{message}"
    assert refusal(tool) == f"tools[0]{message}"


def test_an_id_of_a_call_is_a_value_of_json():
    row = call_row({})
    row["messages"][1]["tool_calls"][0]["id"] = datetime(2026, 1, 2)
    assert refusal(row).startswith('messages[1].tool_calls[0].id = "2026-01-02 00:00:00": JSON has no values of type')


@pytest.mark.parametrize("number", [10**308, 10**309, -(10**900), 1.5e300, 1e22], ids=lambda one: str(one)[:6])
def test_a_number_of_any_size_is_looked_for_in_a_call(number):
    assert notes(batch_of(call_row({"place": number}))) == set()


# --- 3: documents --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Once upon a time.", set()),
        ("[INST] Red? [/INST] Stop.", {"rendered-chat"}),
        (
            "<|start_header_id|>user<|end_header_id|>\n\nRed?<|start_header_id|>assistant<|end_header_id|>",
            {"rendered-chat"},
        ),
        ("### Instruction:\nRed?\n\n### Response:\nStop.", {"rendered-chat"}),
        ("Human: Red?\n\nAssistant: Stop.", {"rendered-chat"}),
        ("A Human: is what an Assistant: is not.", set()),
        ("one<|im_end|>two", {"control-token"}),
        ("one<|im_end|>", set()),
    ],
)
def test_raw_text_passes_a_gate_of_its_own(text, expected):
    batch = batch_of({"text": text})
    assert notes(batch) == expected
    whole = TOKENIZER.decode(examples(batch)[0]["input_ids"])
    assert whole == (text if text.endswith("<|im_end|>") else text + "<|im_end|>")


def test_raw_text_that_begins_with_bos_is_noted_where_the_tokenizer_puts_one():
    tokenizer = tokenizer_of(FAMILIES["llama3"])
    rules = RowRules("text", {}, "keep", None, "all-answers", "split", 4096, "error")
    encoder = RowEncoder(tokenizer, ChatTemplate(tokenizer.chat_template, ""), rules)
    for text, expected in (("Once.", ""), ("<|begin_of_text|>Once.", "double-bos")):
        (example,) = examples(encoder([Row("rows:1", {"text": text})]))
        assert example["notes"] == expected


# --- 4: order ------------------------------------------------------------------------------------------------------


def test_merging_a_system_message_in_the_middle_moves_it_to_its_neighbour_only():
    rule = {"role": "system", "content": "Now in French."}
    row = {"messages": [*TALK, rule, {"role": "user", "content": "Green?"}, {"role": "assistant", "content": "Va."}]}
    assert messages_of(row, system="keep")[2] == rule
    merged = messages_of(row, system="merge")
    assert [message["content"] for message in merged] == ["Red?", "Stop.", "Now in French.\n\nGreen?", "Va."]
    before_answer = {"messages": [TALK[0], rule, TALK[1]]}
    assert messages_of(before_answer, system="merge")[0]["content"] == "Red?\n\nNow in French."
    assert messages_of(row, system="drop") == [*TALK, *row["messages"][3:]]


def test_a_place_in_an_error_is_that_of_the_row_and_not_of_the_policy():
    row = {"messages": [{"role": "system", "content": "x"}, *TALK, {"role": "assistant", "content": "Again."}]}
    for policy in ("keep", "drop", "merge"):
        assert refusal(row, system=policy).startswith("turns out of order: messages[3] is assistant after assistant")


def test_merged_answers_keep_their_calls_and_their_weights():
    first = {"role": "assistant", "content": "One moment.", "weight": 1}
    second = {"role": "assistant", "content": None, "tool_calls": [{"name": "weather", "arguments": {}}]}
    row = {"messages": [TALK[0], first, second, {"role": "tool", "content": "22"}, TALK[1]]}
    (_, answer, *_) = messages_of(row, turn_order="merge")
    assert answer["content"] == "One moment."
    assert answer["tool_calls"][0]["function"]["name"] == "weather"
    mixed = {"messages": [TALK[0], {**first, "weight": 0}, {**TALK[1]}]}
    assert "only one of them is to be learned" in refusal(mixed, on_turn_order="merge")


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            {"content": None, "tool_calls": [{"name": "weather", "arguments": {}}]},
            {"content": "The call is made."},
            "messages[2] says something after a call of its own role, and a turn calls at its end",
        ),
        (
            {"content": "One moment."},
            {"content": "It is warm.", "reasoning": "22 is warm."},
            "messages[2] thinks after a turn of its own role, and a turn thinks at its beginning",
        ),
        (
            {"content": "Warm.", "name": "anna"},
            {"content": "Cold.", "name": "bert"},
            "messages[2] follows a turn of its own role that has another name or id",
        ),
    ],
)
def test_turns_that_merging_would_turn_around_or_mix_are_not_merged(first, second, message):
    row = {"messages": [TALK[0], {"role": "assistant", **first}, {"role": "assistant", **second}]}
    assert refusal(row, on_turn_order="merge") == message


def test_a_blank_text_behind_a_call_is_merged_into_it():
    call = {"role": "assistant", "tool_calls": [{"name": "weather", "arguments": {}}]}
    second = {**call, "content": ""}
    (_, answer) = messages_of({"messages": [TALK[0], call, second]}, turn_order="merge")
    assert len(answer["tool_calls"]) == 2


def test_rows_that_are_dropped_for_their_order_are_counted():
    batch = batch_of({"messages": [TALK[0], *TALK]}, on_turn_order="drop")
    assert (len(batch.out_of_order), batch.bad, examples(batch)) == (1, [], [])


# --- 11: what cannot be seen ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["\u200b", "\ufeff \u2060", "\u3164\u2800", "\u00ad\u200d", "\u034f\ufe0f", "\u202e", "\x00"]
)
def test_text_of_characters_that_cannot_be_seen_is_empty(text):
    assert emptiness(text)
    assert "empty" in refusal({"messages": [TALK[0], {"role": "assistant", "content": text}]})
    assert "empty" in refusal({"prompt": "Red?", "completion": text})


@pytest.mark.parametrize("text", ["a", "\u200ba", "👍🏽", "👨‍👩‍👧", "می‌خواهم", "."])
def test_text_with_anything_to_see_is_not(text):
    assert emptiness(text) is None


# --- any row -------------------------------------------------------------------------------------------------------

words = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Cf", "Zl", "Zp")), min_size=1, max_size=12
)
names = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)
plain = words | st.integers(-(10**9), 10**9) | st.booleans() | st.none()
values = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=6
)
seldom = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def held(value):
    """Every plain text and number in a value."""
    if isinstance(value, dict):
        return [*value, *(one for inner in value.values() for one in held(inner))]
    return [one for inner in value for one in held(inner)] if isinstance(value, list) else [value]


def is_said(row, batch, key):
    return (bool(batch.bad) and any(key in bad.message for bad in batch.bad)) or any(
        name.rpartition(".")[2] == key or name == key for name in batch.unused
    )


@seldom
@given(key=names, value=values, place=st.sampled_from(["row", "message", "call"]))
@pytest.mark.slow
def test_any_extra_key_is_in_the_text_or_named(key, value, place):
    row = call_row({"place": "Paris"})
    target = {"row": row, "message": row["messages"][1], "call": row["messages"][1]["tool_calls"][0]}[place]
    if key in target or key in ("content", "role"):
        return
    target[key] = value
    batch = batch_of(row)
    if value in (None, [], {}):
        assert not batch.unused
        return
    obeyed = not batch.bad and all(str(one) in text_of(batch) for one in held(value) if one is not None)
    assert obeyed or is_said(row, batch, key) or key == "weight"


@seldom
@given(
    name=names,
    arguments=st.dictionaries(names, values, max_size=3),
    content=st.none() | words,
    template=st.sampled_from(
        [CHATML, BARE, *(tokenizer_of(FAMILIES[name]).chat_template for name in ("qwen2_5", "qwen3"))]
    ),
)
@pytest.mark.slow
def test_any_tool_call_is_in_the_scored_text_or_noted(name, arguments, content, template):
    row = call_row(arguments, content, name)
    row.pop("tools")
    batch = batch_of(row, template)
    if batch.bad:
        assert all("messages" in bad.message or "template" in bad.message for bad in batch.bad)
        return
    printed = json.dumps(arguments, ensure_ascii=False)
    is_there = any(printed in text and json.dumps(name) in text for text in scored(batch))
    assert is_there or "tool-call-lost" in notes(batch)
    if template is BARE:
        assert "tool-call-lost" in notes(batch)
    elif template is CHATML:
        assert "tool-call-lost" not in notes(batch)


@seldom
@given(answer=words, before=st.text(" \t\n", max_size=4), after=st.text(" \t\n", max_size=3), trims=st.booleans())
def test_any_answer_is_learned_to_the_letter_or_noted(answer, before, after, trims):
    row = {"messages": [TALK[0], {"role": "assistant", "content": before + answer + after}]}
    template = BARE.replace("(m.content or '')", "(m.content or '') | trim") if trims else BARE
    batch = batch_of(row, template)
    if batch.bad or "<|im" in answer:
        return
    is_whole = scored(batch) == [before + answer + after]
    assert is_whole or notes(batch) & {"answer-changed", "answer-trimmed", "label-text"}
    assert not (is_whole and notes(batch) & {"answer-changed", "answer-trimmed", "label-text"})
