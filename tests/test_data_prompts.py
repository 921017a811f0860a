"""What is asked in rows: all of a row is on one side of a split, and what stands on both sides is named."""

import json
from pathlib import Path
from typing import Any

import pytest
from chat_families import FAMILIES, tokenizer_of

from qtune.data.conversation import Conversation
from qtune.data.findings import Finding
from qtune.data.inspection import inspect
from qtune.data.prepare import Prepared, survey
from qtune.data.prompts import prompt_hash, prompts_of
from qtune.recipe.schema import Data
from qtune.tuned.seen import prompts_in, stand_in_training

CHATML = tokenizer_of(FAMILIES["chatml"])
REWRITES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>"
    "\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A template under which each answer of a talk becomes an example of its own."""


def talk(number: int, turns: int, first: str = "") -> dict[str, Any]:
    messages = []
    for turn in range(turns):
        asked = first if first and not turn else f"Of talk {number}: what is {turn}?"
        said = f"It is {turn}." if asked == first else f"Of talk {number} it is {turn}."
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return {"messages": messages}


def split(folder: Path, rows: list[dict[str, Any]], **keys: Any) -> Prepared:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewrites.jinja").write_text(REWRITES)
    data = Data(train="rows.jsonl", **{"validation": 0.1, **keys})
    return survey(data, CHATML, folder, cache=folder / "cache")


def rows_of(prepared: Prepared, part: str) -> list[tuple[str, list[dict[str, Any]]]]:
    rows = prepared.examples[part]
    talks = [rows.example(n) for n in range(len(rows))] if prepared.stream is rows else rows
    return [(one["place"], json.loads(one["conversation"])["messages"]) for one in talks]


@pytest.mark.parametrize("streaming", [False, True])
def test_all_answers_of_a_row_are_on_one_side_of_the_split(tmp_path: Path, streaming: bool) -> None:
    rows = [talk(number, 4) for number in range(25)]
    for seed in range(4):
        given = {"chat_template": "rewrites.jinja", "validation_seed": seed, "streaming": streaming}
        prepared = split(tmp_path, rows, **given)
        trained, aside = ({place for place, _ in rows_of(prepared, part)} for part in ("train", "validation"))
        assert not trained & aside
        assert (len(prepared.train), len(prepared.validation)) == (88, 12)


@pytest.mark.parametrize("template", [None, "rewrites.jinja"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_log_that_grows_turn_by_turn_is_on_one_side_of_the_split(
    tmp_path: Path, template: str | None, streaming: bool
) -> None:
    rows = [talk(number, turns) for number in range(20) for turns in (1, 2, 3)]
    prepared = split(tmp_path, rows, chat_template=template, streaming=streaming)
    trained, aside = ({talk[0]["content"] for _, talk in rows_of(prepared, part)} for part in ("train", "validation"))
    assert len(aside) >= 2
    assert not trained & aside
    assert "overlap" not in {finding.kind for finding in inspect(prepared, Data(train="rows.jsonl"), 50_000).findings}


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_that_all_begin_alike_are_set_aside_whole(tmp_path: Path, streaming: bool) -> None:
    rows = [talk(number, 3, first="Hello!") for number in range(30)]
    prepared = split(tmp_path, rows, chat_template="rewrites.jinja", streaming=streaming)
    trained, aside = ({place for place, _ in rows_of(prepared, part)} for part in ("train", "validation"))
    assert len(aside) == 3
    assert not trained & aside


def test_a_row_of_one_answer_is_drawn_by_its_prompt_and_one_of_several_by_the_first() -> None:
    def of(*roles: str, **more: Any) -> Conversation:
        return Conversation(tuple({"role": role, "content": f"{n}"} | more for n, role in enumerate(roles)))

    single, long = of("system", "user", "assistant"), of("system", "user", "assistant", "user", "assistant")
    assert (prompts_of(single, [2], [2]).first, prompts_of(single, [2], [2]).whole) == (prompt_hash(single),) * 2
    assert prompts_of(long, [2, 4], [2, 4]).first == prompt_hash(single)
    assert prompts_of(long, [2, 4], [4]).whole == prompt_hash(long) == prompts_of(long, [4], [4]).first
    text = of("document")
    assert prompts_of(text, (), ()).first == prompts_of(text, (), ()).whole == prompt_hash(text)


def overlap(folder: Path, train: list[dict[str, Any]], aside: list[dict[str, Any]], **keys: Any) -> Finding | None:
    (folder / "aside.jsonl").write_text("".join(json.dumps(row) + "\n" for row in aside))
    prepared = split(folder, train, validation="aside.jsonl", **keys)
    findings = inspect(prepared, Data(train="rows.jsonl"), 50_000).findings
    return next((one for one in findings if one.kind == "overlap"), None)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_prompt_that_is_nearly_one_of_training_is_named(tmp_path: Path, streaming: bool) -> None:
    def asked(question: str, answer: str = "It is so.", **more: str) -> dict[str, Any]:
        return {"question": question, "answer": answer, **more}

    train = [asked(f"What is number {n} called?", f"It is {n}.") for n in range(30)]
    aside = [
        asked("What is number 1 called? "),
        asked("what is\nnumber 2 called?"),
        asked("What is number 3 called?", "it is 3.", system="Be kind."),
        asked("What is number 4 called?"),
        asked("What is number 5 called?", "Nummer 5.", system="Speak German."),
        asked("What is number 77 called?", "It is 7."),
    ]
    finding = overlap(tmp_path, train, aside, streaming=streaming)
    assert finding is not None
    assert finding.places == tuple(f"aside.jsonl:{line}" for line in (1, 2, 3, 4))
    assert finding.detail == "3 of them but for white space, case, a system message or the turns behind it"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_question_inside_a_longer_talk_is_named_on_either_side(tmp_path: Path, streaming: bool) -> None:
    train = [talk(0, 1), talk(1, 3), talk(2, 2)]
    aside = [talk(0, 2), talk(1, 2), talk(3, 2), talk(2, 2)]
    finding = overlap(tmp_path, train, aside, streaming=streaming)
    assert finding is not None
    assert finding.places == ("aside.jsonl:1", "aside.jsonl:2", "aside.jsonl:4")
    nearly, earlier = finding.detail.split("; ")
    assert nearly == "1 of them but for white space, case, a system message or the turns behind it"
    assert earlier == "1 of them in an earlier turn alone"
    assert overlap(tmp_path, train, [talk(0, 2), talk(1, 1)], streaming=streaming, loss_on="last-answer") is None


def test_what_is_set_aside_of_a_stream_is_not_compared_with_itself(tmp_path: Path) -> None:
    prepared = split(tmp_path, [talk(number, 1) for number in range(40)], streaming=True)
    assert len(prepared.validation) == 4
    assert "overlap" not in {one.kind for one in inspect(prepared, Data(train="rows.jsonl"), 50_000).findings}
    assert prepared.stream is not None
    asked = [one for hashes in prepared.examples["validation"]["asked_hashes"] for one in hashes]
    assert not prepared.stream.has_asked(asked).any()


def test_first_prompts_of_talks_that_all_begin_alike_count_as_seen(tmp_path: Path) -> None:
    rows = [talk(number, 3, first="Hello!") for number in range(30)]
    prepared = split(tmp_path, rows, chat_template="rewrites.jinja")
    aside = prepared.examples["validation"]
    assert stand_in_training(prepared, prompts_in(aside)).tolist() == [True, False, False] * 3
