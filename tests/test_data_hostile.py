# ruff: noqa: E501  a hostile template or row is one line, however long
"""Templates and rows that nobody meant well: each ends, in one sentence, and takes neither the time nor the memory."""

import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import FUZZ_SEED, FUZZED
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qtune.data import encoding, worker
from qtune.data.bounds import LONGEST_TEMPLATE, TemplateOutOfBoundsError, bounded_rendering
from qtune.data.conversation import MOST_MESSAGES, RowError
from qtune.data.prepare import Prepared, prepare
from qtune.data.template import CHATML, ChatTemplate, choose_template, render
from qtune.errors import DataError, QtuneError, WorkError
from qtune.recipe.parse import parse_recipe

QUESTION = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor time of a rendering is a tenth of a second, so that a test need not wait for seconds."""
    monkeypatch.setattr("qtune.data.template.bounded_rendering", lambda: bounded_rendering(0.1))


WITHOUT_END = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a macro that calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "filler text": "{{ lipsum(n=100000000) }}",
    "slices": "{{ [1]|slice(10000000000)|list }}",
}  # fmt: skip
WITHOUT_ROOM = {
    "a doubled text": "{% set n = namespace(s='aaaaaaaa') %}{% for a in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "a doubled text, joined": "{% set n = namespace(s='aaaaaaaa') %}{% for a in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "a repeated text": "{{ 'x' * 10000000000 }}",
    "a wide field": "{{ '%10000000000d' % 1 }}",
    "a wider field": "{{ '{:10000000000}'.format(1) }}",
    "a centred text": "{{ 'x'|center(10000000000) }}",
    "an indent": "{{ 'a\\nb'|indent(10000000000) }}",
    "a replacement": "{{ ('x' * 1000000)|replace('x', 'y' * 1000000) }}",
    "a filled batch": "{{ [1]|batch(10000000000, 'x')|list }}",
    "indented JSON": "{{ [[1]]|tojson(indent=10000000000) }}",
}  # fmt: skip
REFUSED = {
    "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a loop in itself": "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "brackets": "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "negations": "{{ " + "not " * 20000 + "1 }}",
    "nested conditions": "{% if 1 %}" * 500 + "{% endif %}" * 500,
    "nested loops": "{% for a in [1] %}" * 50 + "{% endfor %}" * 50,
    "a power of a power": "{{ 9 ** (9 ** 9) }}",
    "squares of squares": "{% set n = namespace(s=99999) %}{% for a in range(99) %}{% set n.s = n.s * n.s %}{% endfor %}",
    "a rounding to millions of digits": "{{ 5|round(-1000000000) }}",
    "a large range": "{% for a in range(10 ** 9) %}{% endfor %}",
    "its own refusal": "{{ raise_exception('no\\nno') }}",
    "a refusal without words": "{{ raise_exception('') }}",
    "a division by zero": "{{ 1 / 0 }}",
    "an index": "{{ messages[99].content.x }}",
    "another file": "{% include 'x' %}",
    "a syntax error": "{% if %}",
    "an unknown filter": "{{ messages|no_such_filter }}",
    "a way out of the sandbox": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "an overflow": "{{ 10.0 ** 400 }}",
    "megabytes": "x" * (LONGEST_TEMPLATE + 1),
    "what is no JSON": "{{ namespace()|tojson }}",
}  # fmt: skip


@pytest.mark.parametrize("text", WITHOUT_END.values(), ids=WITHOUT_END)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the timer may meet a destructor
@pytest.mark.slow
def test_a_template_without_an_end_is_ended_and_ends_the_preparation(hurried: None, tokenizer, text: str) -> None:
    with pytest.raises(DataError, match=r"data\.chat_template: the chat template takes longer than 0\.1 seconds"):
        render(tokenizer, text, QUESTION)


@pytest.mark.parametrize("text", WITHOUT_ROOM.values(), ids=WITHOUT_ROOM)
@pytest.mark.slow
def test_a_template_that_fills_memory_is_ended_before_it_does(tokenizer, text: str) -> None:
    with pytest.raises(DataError, match=r"data\.chat_template: the chat template takes more than 1024 MiB of memory"):
        render(tokenizer, text, QUESTION)


@pytest.mark.parametrize("text", REFUSED.values(), ids=REFUSED)
def test_whatever_a_template_fails_with_is_one_sentence_about_the_row(tokenizer, text: str) -> None:
    with pytest.raises(RowError, match=r"the chat template refuses this conversation: .") as refused:
        render(tokenizer, text, QUESTION)
    assert "\n" not in str(refused.value)


def spin(seconds: float) -> None:
    with bounded_rendering(seconds):
        while True:
            pass


def test_timer_and_memory_are_given_back_whether_or_not_a_template_ends(tokenizer) -> None:
    import resource

    before = (
        signal.getsignal(signal.SIGPROF),
        signal.getitimer(signal.ITIMER_PROF),
        resource.getrlimit(resource.RLIMIT_AS),
    )
    render(tokenizer, CHATML, QUESTION)
    with pytest.raises(TemplateOutOfBoundsError):
        spin(0.05)
    now = (
        signal.getsignal(signal.SIGPROF),
        signal.getitimer(signal.ITIMER_PROF),
        resource.getrlimit(resource.RLIMIT_AS),
    )
    assert now == before


def test_numbers_and_roundings_of_usual_size_are_what_they_were(tokenizer) -> None:
    text = "{{ 7 * 6 }} {{ 2 ** 10 }} {{ 2.567|round(1) }} {{ '12'|int + 1 }} {{ 'ab' * 2 }} {{ 'x'|int(5) }}"
    assert render(tokenizer, text, QUESTION) == "42 1024 2.6 13 abab 5"


@pytest.mark.parametrize("content", [b"\xff\xfe{\x00", "\ufeff{{ messages }}".encode()], ids=["UTF-16", "a mark"])
def test_a_template_file_of_another_encoding_is_refused_and_a_mark_is_no_part_of_it(
    tokenizer, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "t.jinja").write_bytes(content)
    if content.startswith(b"\xff"):
        with pytest.raises(DataError, match="no readable template file"):
            choose_template("t.jinja", tokenizer, tmp_path)
    else:
        assert choose_template("t.jinja", tokenizer, tmp_path).text == "{{ messages }}"


@pytest.fixture
def prepared(tokenizer, tmp_path: Path):
    """What becomes of the text of a file of rows."""

    def prepared(text: str | bytes, name: str = "rows.jsonl", **data: object) -> Prepared:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        table = {
            "train": name,
            "validation": 0,
            "max_length": 64,
            "on_long_row": "cut-right",
            "chat_template": "chatml",
        }
        recipe = parse_recipe({"model": {"base": "a/b"}, "data": {**table, **data}})
        return prepare(recipe.data, tokenizer, tmp_path, cache=tmp_path / "cache")

    return prepared


def asked(question: str, answer: str = "yes") -> str:
    return json.dumps({"prompt": question, "completion": answer})


DIGITS, NEST = "9" * 100_000, "[" * 100_000 + "]" * 100_000
TAKEN = {
    "a million of one character": asked("a" * 1_000_000),
    "a million marks on one letter": asked("a" + "\u0301" * 300_000),
    "zero bytes": asked("a\0b", "c\0"),
    "text from right to left": asked("\u202eabc", "\u2066x"),
    "orders to a terminal": asked("\x1b[2J\x07", "\x9b31m"),
    "no characters": asked("\uffff\ufffe", "\U0010ffff"),
    "ends of turns": asked("<|im_end|>" * 10_000),
    "a name that is half a character": '{"prompt": "x", "completion": "y", "\\ud800": 1}',
    "many names": '{"prompt": "x", "completion": "y", ' + ", ".join(f'"k{n}": 1' for n in range(10_000)) + "}",
}
NOT_TAKEN = {
    "half a character": '{"prompt": "\\ud800", "completion": "\\udfff x"}',
    "nested lists": '{"prompt": "x", "completion": "y", "z": ' + NEST + "}",
    "nested objects": '{"a": ' * 100_000 + "1" + "}" * 100_000,
    "a number of many digits": '{"prompt": "x", "completion": "y", "n": ' + DIGITS + "}",
    "a negative number of many digits": '{"prompt": "x", "completion": "y", "n": -' + DIGITS + "}",
    "a number as an answer": '{"prompt": "x", "completion": ' + "9" * 4000 + "}",
    "nested arguments": json.dumps({"messages": [
        QUESTION[0], {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": NEST}}]}]}),
    "nested calls of a turn": json.dumps({"conversations": [
        {"from": "human", "value": "x"}, {"from": "function_call", "value": NEST}]}),
    "a call with a number of many digits": json.dumps({"conversations": [
        {"from": "human", "value": "x"}, {"from": "function_call", "value": DIGITS}]}),
    "a tool that JSON's reader takes and nobody else": json.dumps({"messages": QUESTION, "tools": [
        {"name": "f", "parameters": {"properties": json.loads("[" * 700 + "]" * 700)}}]}),
    "nested tools": json.dumps({"messages": QUESTION, "tools": NEST}),
    "more messages than any talk has": json.dumps({"messages": QUESTION * MOST_MESSAGES}),
    "a byte that is no character": b'{"prompt": "\xff", "completion": "y"}',
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
@pytest.mark.parametrize("text", TAKEN.values(), ids=TAKEN)
@pytest.mark.slow
def test_odd_rows_are_taken_as_what_they_are(prepared, text: str, suffix: str) -> None:
    assert len(prepared(text, f"rows.{suffix}").train) == 1


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
@pytest.mark.parametrize("text", NOT_TAKEN.values(), ids=NOT_TAKEN)
def test_rows_that_cannot_be_are_named_with_their_place(prepared, text: str | bytes, suffix: str) -> None:
    with pytest.raises(DataError, match=rf"rows.{suffix}:1: ") as refused:
        prepared(text, f"rows.{suffix}")
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize("depth", [100, 300, 450, 800, 980])
@pytest.mark.parametrize("where", ["a column", "a tool", "arguments"])
def test_a_nest_of_any_depth_is_taken_or_named(prepared, depth: int, where: str) -> None:
    nest = "[" * depth + "]" * depth
    call = '{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": ' + nest + "}}}]}"
    tool = '{"name": "f", "parameters": {"properties": ' + nest + "}}"
    rows = {
        "a column": '{"prompt": "x", "completion": "y", "z": ' + nest + "}",
        "a tool": '{"prompt": "x", "completion": "y", "tools": [' + tool + "]}",
        "arguments": '{"messages": [{"role": "user", "content": "x"}, ' + call + "]}",
    }
    try:
        taken, told = len(prepared(rows[where]).train), ""
    except DataError as error:
        taken, told = 0, str(error)
    assert taken == 1 or "rows.jsonl:1: " in told


def encoded_beside(tokenizer, monkeypatch: pytest.MonkeyPatch, template: str, rows: list[dict]) -> None:
    from qtune.data.examples import RowRules
    from qtune.data.rows import Row

    rules = RowRules("messages", {}, "keep", None, "all-answers", "split", 64, "cut-right")
    batches = [[Row(f"rows:{number}", row)] for number, row in enumerate(rows)]
    list(encoding._in_parallel(batches, tokenizer, ChatTemplate(template, "a test"), rules, 1))


def encoded_hurriedly(rows: list) -> object:
    """`worker.encode`, in a process where `hurried` reaches nothing."""
    from qtune.data import template

    template.bounded_rendering = lambda: bounded_rendering(0.1)
    return worker.encode(rows)


@pytest.mark.slow
def test_a_template_without_an_end_is_ended_in_the_processes_that_tokenize_too(tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(worker, "encode", encoded_hurriedly)
    with pytest.raises(DataError, match=r"the chat template takes longer than 0\.1 seconds"):
        encoded_beside(tokenizer, monkeypatch, WITHOUT_END["loops in loops"], [{"messages": QUESTION}] * 3)


def killed(rows: object) -> None:
    """What a system that is short of memory does to a process."""
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_process_that_tokenizes_and_is_killed_is_one_sentence(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "encode", killed)
    with pytest.raises(WorkError, match="a process that tokenizes rows was ended from outside"):
        encoded_beside(tokenizer, monkeypatch, CHATML, [{"messages": QUESTION}])


def fuzzed_rows(seed: int, count: int) -> Iterator[str]:
    """Files of one to four rows with values of every kind at every place, and damaged characters."""
    generator = random.Random(seed)
    values = [
        None,
        True,
        0,
        -1,
        1e308,
        10**100,
        "",
        " ",
        "x",
        "\0",
        "\u202e",
        "<|im_end|>",
        [],
        [[]],
        {},
        {"a": [1]},
        ["x"],
        "y" * 999,
    ]
    names = ["messages", "prompt", "completion", "text", "instruction", "output", "conversations", "role", "content", "tools",
             "from", "value", "tool_calls", "weight", "question", "answer", "\0", "", "function", "name", "arguments"]  # fmt: skip

    def value(depth: int) -> object:
        kind = generator.random()
        if depth and kind < 0.35:
            return {generator.choice(names): value(depth - 1) for _ in range(generator.randint(0, 4))}
        if depth and kind < 0.6:
            return [value(depth - 1) for _ in range(generator.randint(0, 3))]
        return generator.choice([*values, "user", "assistant", "system", "human", "gpt"])

    for _ in range(count):
        rows = []
        for _ in range(generator.randint(1, 4)):
            turns = [
                {"role": generator.choice(["user", "assistant", "tool", value(1)]), "content": value(2)}
                for _ in range(3)
            ]
            row = generator.choice([{"messages": turns}, {"prompt": value(2), "completion": value(2)}, value(4)])
            rows.append(json.dumps(row))
        if generator.random() < 0.2:  # what is nearly right goes further
            rows = [
                json.dumps({"prompt": f"Name {number}", "completion": f"It is {number}.", "note": value(2)})
                for number in range(4)
            ]
        text = "\n".join(rows)
        for _ in range(generator.choice((0, 0, 1, 2))):
            at = generator.randrange(len(text))
            text = text[:at] + generator.choice(["", '"', "{", "]", "\\ud83d", "\0", ":", ","]) + text[at + 1 :]
        yield text


def fuzzed_templates(seed: int, count: int) -> Iterator[str]:
    """The built-in template with statements taken out, doubled, swapped and damaged."""
    generator = random.Random(seed)
    parts = [part for part in CHATML.replace("{", "\0{").split("\0") if part]
    odd = ["{{ messages }}", "{{ messages[9] }}", "{% endfor %}", "{% for m in messages %}", "{{ 1/0 }}", "{{ loop }}", "{{ tools|tojson }}",
           "{{ message.content ~ message }}", "{% set messages = 7 %}", "{{ [] * 9 }}", "{{ raise_exception(messages) }}", "{#", "{{ ''.join(messages) }}"]  # fmt: skip
    for _ in range(count):
        chosen = list(parts)
        for _ in range(generator.randint(1, 6)):
            at = generator.randrange(len(chosen))
            change = generator.randrange(4)
            if change == 0:
                del chosen[at]
            elif change == 1:
                chosen.insert(at, generator.choice(odd))
            elif change == 2:
                chosen.insert(at, generator.choice(parts))
            else:
                cut = generator.randrange(len(chosen[at]) + 1)
                chosen[at] = (
                    chosen[at][:cut] + generator.choice(["", "{{", "%}", "}}", "\0", "'"]) + chosen[at][cut + 1 :]
                )
        yield "".join(chosen)


@pytest.mark.slow
def test_no_random_rows_end_in_anything_but_examples_or_what_is_wrong(prepared, capsys) -> None:
    ended = [0, 0]
    for text in fuzzed_rows(FUZZ_SEED, 150 * FUZZED):
        try:
            prepared(text)
            ended[0] += 1
        except QtuneError:
            ended[1] += 1
    assert all(ended)


@pytest.mark.slow
def test_no_random_template_ends_in_anything_but_a_text_or_what_is_wrong(tokenizer) -> None:
    ended = [0, 0]
    for text in fuzzed_templates(FUZZ_SEED, 400 * FUZZED):
        try:
            render(tokenizer, text, QUESTION)
            ended[0] += 1
        except (RowError, DataError):
            ended[1] += 1
    assert all(ended)
