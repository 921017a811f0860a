"""Rows that went wrong before they came here are named: words for nothing, broken characters, foreign tokens."""

import re
import shlex
import tomllib

import pytest
from test_data_lost import batch_of, examples, notes, scored, text_of

from qtune.data.conversation import RowError
from qtune.data.findings import KINDS
from qtune.data.formats import detect_format, renamed, to_conversation, unknown_columns
from qtune.data.suspect import Suspicions, is_broken
from qtune.recipe.file import load_recipe


@pytest.mark.parametrize("word", ["nan", "NaN", "None", "null", "<NA>", " nan "])
@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Say red.", "input": "WORD", "output": "red"},
        {"prompt": "Say red.", "completion": "WORD"},
        {"messages": [{"role": "user", "content": "WORD"}, {"role": "assistant", "content": "red"}]},
    ],
)
def test_a_word_for_nothing_is_named_wherever_it_stands(row, word):
    def put(value):
        if isinstance(value, list):
            return [{key: put(inner) for key, inner in one.items()} for one in value]
        return word if value == "WORD" else value

    batch = batch_of({key: put(value) for key, value in row.items()})
    assert notes(batch) == {"word-for-nothing"}
    assert word.strip() in text_of(batch)  # as a label it may be meant, so it is learned


def test_an_empty_cell_is_no_word():
    batch = batch_of({"instruction": "Say red.", "input": "", "output": "red"})
    assert notes(batch) == set()
    assert "user\nSay red.<|im_end|>" in text_of(batch)


@pytest.mark.parametrize("text", ["café", "it’s", "naïve", "€5", "日本", "🙂", "Straße", "Ação", "łódź"])
def test_utf_8_that_was_read_as_another_encoding_is_broken_and_what_was_meant_is_not(text):
    assert not is_broken(text)
    assert is_broken(text.encode().decode("latin-1"))
    try:
        windows = text.encode().decode("cp1252")
    except UnicodeDecodeError:
        return  # Windows-1252 has no character for one of the bytes
    assert is_broken(windows)


@pytest.mark.parametrize("text", ["NÃO", "ÂNGELA", "“Ã”", "Ð°", "São Paulo – “x”", "ÇÃO…"])
def test_capitals_that_begin_broken_pairs_are_fine_before_other_letters(text):
    assert is_broken(text) is (text == "Ð°")  # which is U+0430, a Cyrillic letter, in two bytes


@pytest.mark.parametrize("text", ["caf\ufffd", "\ufeffHello", "a\ufeffb"])
def test_lost_characters_and_marks_of_a_files_start_are_noted_in_any_turn(text):
    assert notes(batch_of({"prompt": text, "completion": "x"})) == {"broken-text"}
    assert notes(batch_of({"prompt": "x", "completion": text})) == {"broken-text"}
    assert "broken-text" in notes(batch_of({"text": text}))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Stop.</s>", {"foreign-token"}),
        ("Stop.<|eot_id|>\n", {"foreign-token"}),
        ("<s>Stop.", {"foreign-token"}),
        ("<s>Stop.</s>", set()),  # HTML strikes it out
        ("The token </s> ends a text.", set()),
        ("Stop.<|im_end|>", {"control-token"}),  # this tokenizer's own
    ],
)
def test_special_tokens_of_other_models_at_the_ends_of_texts_are_noted(text, expected):
    batch = batch_of({"prompt": "Red?", "completion": text})
    assert notes(batch) == expected
    assert text.strip() in scored(batch)[0] or expected == {"control-token"}


def test_a_tokenizers_own_tokens_are_not_foreign():
    assert "</s>" not in Suspicions.of(re.compile("</s>|<s>")).ends
    assert "<s>" not in Suspicions.of(re.compile("</s>|<s>")).starts


@pytest.mark.parametrize("mark", ["<image>", "<|image|>", "[IMG]", "<|vision_start|>", "<audio>"])
def test_a_placeholder_for_a_picture_is_noted_and_its_column_refused(mark):
    assert notes(batch_of({"prompt": f"{mark}\nWhat is it?", "completion": "A cat."})) == {"missing-media"}
    (bad,) = batch_of({"prompt": f"{mark} What is it?", "completion": "A cat.", "image": "cat.png"}).bad
    assert bad.message.startswith('image = "cat.png": only text can be trained on')


@pytest.mark.parametrize(
    "row",
    [
        {"context": "Bob did it.", "question": "Who?", "answer": "Bob"},
        {"choices": ["red", "blue"], "question": "Which?", "answer": "red"},
        {"instruction": "Who?", "context": "Bob did it.", "output": "Bob"},
        {"prompt": "Who?", "passage": "Bob did it.", "completion": "Bob"},
    ],
)
def test_a_column_that_belongs_to_the_question_is_an_error_where_it_is_not_used(row):
    assert notes(batch_of(row)) == {"unused-input"}
    kept = {key: value for key, value in row.items() if key not in ("context", "choices", "passage")}
    assert notes(batch_of(kept | {"context": None, "options": []})) == set()


def test_the_mapping_that_is_advised_learns_the_context():
    row = {"context": "Bob did it.", "question": "Who?", "answer": "Bob"}
    columns = {"instruction": "question", "input": "context", "output": "answer"}
    batch = batch_of(row, row_format="alpaca", columns=columns)
    assert notes(batch) == set()
    assert "Who?\n\nBob did it.<|im_end|>" in text_of(batch)
    assert len(examples(batch)) == 1


@pytest.mark.parametrize(
    ("row", "mapping"),
    [
        ({"Question": "a", "Answer": "b"}, 'question = "Question", answer = "Answer"'),
        ({"query": "a", "response": "b"}, 'prompt = "query", completion = "response"'),
        ({"input": "a", "output": "b"}, 'prompt = "input", completion = "output"'),
        ({"instruction": "a", "context": "b", "response": "c"}, 'input = "context", output = "response"'),
        ({"dialogue": []}, 'messages = "dialogue"'),
        ({" prompt": "a", "completion ": "b"}, 'prompt = " prompt", completion = "completion "'),
    ],
)
def test_columns_of_other_names_get_the_line_that_maps_them(row, mapping):
    line = f"columns = {{ {mapping} }}"
    changed = line.replace(" = ", "=", 1)
    assert unknown_columns(row).endswith(f"; write [data] {line} in the recipe, or add --set 'data.{changed}'")


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"ticket": "a", "reply": "b"}, {"question": "ticket", "answer": "reply"}),
        ({"reply": "b", "ticket": "a"}, {"question": "ticket", "answer": "reply"}),
        (
            {"id": "T-7", "Ticket": "My lamp is broken.", "Reply": "Send it back."},
            {"question": "Ticket", "answer": "Reply"},
        ),
        ({"system": "Be kind.", "ticket": "My lamp.", "cure": "A new one."}, {"question": "ticket", "answer": "cure"}),
        ({"id": 7, "ticket": "a", "solved it": "b"}, {"question": "ticket", "answer": "solved it"}),
        ({"Frage": "a", "die 'Antwort'": "b"}, {"question": "Frage", "answer": "die 'Antwort'"}),
        ({"question": "a", "id": 7, "note": "b"}, {"answer": "note"}),
    ],
)
def test_columns_of_any_names_get_lines_that_can_be_pasted(row, columns, tmp_path):
    said = unknown_columns(row)
    line = said.rpartition("write [data] ")[2].partition(" in the recipe, or add ")[0]
    assert tomllib.loads(line) == {"columns": columns}
    words = shlex.split(said.rpartition(" in the recipe, or add ")[2])
    (tmp_path / "rows.jsonl").write_text("{}\n")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[model]\nbase = "org/model"\n[data]\ntrain = "rows.jsonl"\n')
    assert words[0] == "--set"
    assert load_recipe(recipe, words[1:]).recipe.data.columns == columns
    assert detect_format(renamed(row, columns)) == "question-answer"


@pytest.mark.parametrize(
    ("there", "missing"),
    [("question", "answer"), ("answer", "question"), ("prompt", "completion"), ("instruction", "output")],
)
def test_half_of_a_shape_is_said_to_lack_the_other(there, missing):
    said = unknown_columns({there: "a", "id": 7})
    assert said.endswith(f"{there!r} is there and {missing!r} is missing")


def test_columns_that_are_near_no_shape_are_told_the_shapes_and_numbers_that_they_teach_nothing():
    assert unknown_columns({"a": "x", "b": [1]}) == (
        "columns a, b fit no known shape; a row has question and answer, prompt and completion, instruction and "
        "output, messages, conversations, or text alone: rename them with columns"
    )
    assert unknown_columns({"height": 7, "label": 3}) == (
        "columns height, label fit no known shape; none of them holds text to learn from"
    )


def test_rows_inside_of_one_object_are_pointed_at():
    said = unknown_columns({"version": "1.0", "data": [{"prompt": "a", "completion": "b"}]})
    assert said.endswith("its 'data' holds rows: write that list alone into the file")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ('{"a": 1, "a": 2}', 'the key "a" stands twice in one object'),
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": 1e999}', "the number 1e999 is larger than any float"),
        ("{'a': 1}", "a text that is not JSON"),
    ],
)
def test_arguments_as_text_say_one_thing(arguments, message):
    call = {"function": {"name": "f", "arguments": arguments}}
    turns = [{"role": "user", "content": "Red?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    with pytest.raises(RowError) as caught:
        to_conversation({"messages": turns}, "messages", "")
    assert str(caught.value).startswith("messages[1].tool_calls[0].function.arguments = ")
    assert message in str(caught.value)


def test_the_advice_for_a_column_that_is_not_used_fits_choices_and_a_context() -> None:
    """A context can be mapped to the input; choices are a list, which no column takes."""
    advice = KINDS["unused-input"].advice
    lead, _, mapped = advice.partition(": columns = ")
    assert "choices" in lead
    table = tomllib.loads("columns = " + mapped.partition("}")[0] + "}")["columns"]
    context = {"question": "Q", "context": "C", "answer": "A"}
    assert to_conversation(renamed(context, table), "alpaca", "row").messages[0]["content"] == "Q\n\nC"
    choices = {"question": "Q", "choices": ["a", "b"], "answer": "A"}
    with pytest.raises(RowError):
        to_conversation(renamed(choices, {**table, "input": "choices"}), "alpaca", "row")
