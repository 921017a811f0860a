"""Rows with other words say the same thing of other words: what an answer copies is still in its request."""

import json
import random
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qtune.data.conversation import Conversation
from qtune.data.swapped import (
    Copy,
    Incoming,
    exchangeable,
    own_words,
    shared_words,
    spelled_words,
    swapped,
    usual_words,
    with_other_words,
)
from qtune.model.load import load_tokenizer
from qtune.recipe.schema import Model

DATA = Path(__file__).resolve().parent.parent / "recipes" / "data"
WORDS = ["walrus", "granite", "seldom"]
NAMES = ("Maria", "Tom", "Anna", "David", "Sarah", "Peter", "Olga", "Lucas", "Paul", "Elena", "Laura", "René")


def talk(request: str, answer: str, *before: dict, **more: object) -> Conversation:
    return Conversation(
        (*before, {"role": "user", "content": request}, {"role": "assistant", "content": answer}), **more
    )


def filled(*talks: Conversation) -> list[Conversation]:
    """Among so many others that no word of theirs is common."""
    return [*talks, *(talk(f"number {'abcdefghij'[n % 10] * 3}{n}", f"{n}") for n in range(30))]


def copies_of(one: Conversation, count: int = 20, **given: object) -> list[Copy]:
    """Of the first of many rows."""
    rows = filled(one)
    return list(swapped(rows, Incoming(WORDS), count, **given))[:: len(rows)]


def texts(one: Conversation) -> list[str]:
    return [message["content"] for message in one.messages]


def test_a_word_that_is_copied_becomes_the_same_other_word_wherever_it_stands() -> None:
    seen = set()
    for copy in copies_of(talk("Call Maria, or Maria's brother", '{"call": "Maria"}')):
        request, answer = texts(copy.talk)
        name = json.loads(answer)["call"]
        assert request == f"Call {name}, or {name}'s brother"
        assert copy.exchanged == ({} if name == "Maria" else {"Maria": name})
        seen.add(name)
    assert seen == {"Maria", *(word.capitalize() for word in WORDS)}


def test_words_of_the_form_of_answers_stay() -> None:
    rows = [talk("call a number now", f'{{"call": "number", "of": "{name}"}}') for name in NAMES]
    assert not own_words(rows)
    assert [copy.talk for copy in swapped(rows, Incoming(WORDS), 1)] == rows, (
        "names stand in no request, and the rest is form"
    )


@pytest.mark.parametrize(
    "one",
    [
        pytest.param(talk("set a timer of 5 minutes", '{"minutes": 5}'), id="a key of JSON"),
        pytest.param(talk("feed the cat", "cats"), id="a part of a longer word"),
        pytest.param(talk("room 101, 5 pm", "101 5 pm"), id="numbers and marks"),
        pytest.param(talk("Book book club", "book it"), id="what the caller keeps"),
        pytest.param(talk("who is anna", '{"text": "Dear\\nanna and anna"}'), id="behind an escape"),
        pytest.param(
            talk("the weather", "weather", tools=({"type": "function", "function": {"name": "weather"}},)),
            id="what a tool describes",
        ),
    ],
)
def test_what_says_something_by_itself_stays(one: Conversation) -> None:
    assert all(copy.talk == one and not copy.exchanged for copy in copies_of(one, keep=["BOOK"]))


def test_different_words_become_different_ones_that_the_row_has_not() -> None:
    rows = filled(talk(f"Call {WORDS[0]}, Maria and Tom", f"{WORDS[0]}, Maria, Tom"))
    for copy in with_other_words(rows[:1], exchangeable(rows)[:1], Incoming(WORDS), 60):
        names = texts(copy.talk)[1].casefold().split(", ")
        assert len(set(names)) == 3
        assert not set(map(str.casefold, copy.exchanged.values())) & {WORDS[0], "maria", "tom", "call", "and"}
    few = Incoming(["call"])
    assert all(not copy.exchanged for copy in with_other_words(rows[:1], exchangeable(rows)[:1], few, 3))


def test_each_copy_is_another_row_where_a_word_can_be_exchanged() -> None:
    rows = filled(talk("Call Maria", "Maria"))
    made = list(with_other_words(rows, exchangeable(rows), Incoming(WORDS), 30))
    assert all(copy.exchanged for copy in made[:: len(rows)])


def test_what_answers_say_by_themselves_is_not_copied() -> None:
    asked = [talk(f"The lamp of Room{n}x is broken", f"The lamp of Room{n}x: with spares") for n in range(40)]
    said = [talk(f"Is {name} here with you", f"With pleasure: {name} with a coat") for name in ("Maria", "Tom")]
    alone = [talk(f"heat {'abcdefghij'[n % 10]}{n}", f"{n} with care") for n in range(60)]
    names = [talk(f"The printer of {name} sticks", f"The printer of {name} is sent for") for name in ("Ann", "Bob")]
    printers = [talk(f"a printer, number {n}", f"{n}") for n in range(9)]
    titles = [talk(f"Printer {name} sticks", f"Printer {name} is sent for") for name in ("Ida", "Ute")]
    own = {word for words in exchangeable([*asked, *said, *alone, *names, *printers, *titles]) for word in words}
    assert own >= {"Maria", "Tom", "Ann", "Bob", "Ida", "Ute"}
    assert not own & {"The", "with", "With", "Printer"}


def test_a_word_in_another_case_is_another_word() -> None:
    for copy in copies_of(talk("Book book club at NOON", "book at NOON")):
        request, answer = texts(copy.talk)
        title, _, time = answer.split()
        assert request == f"Book {title} club at {time}"
        assert title.islower()
        assert time.isupper()


@pytest.mark.parametrize(
    ("request_", "answer", "own"),
    [
        ("Make an address for Karl Lange.", "Karl Lange: karl.lange@firm.example", []),
        ("Make an address for Karl Lange.", "Karl Lange: klange@firm.example", []),
        ("Make an address for Karl Lange.", "Karl Lange: k.lange@firm.example", []),
        ("Make an address for Karl Lange.", "Karl Lange: karllange7@firm.example", []),
        ("A user name for Karl of Lange", "Karl is lange_2, of Lange", ["Karl"]),
        ("A slug for Karl in Malta, please", "in Malta: a-day-with-karl, for Karl", ["Malta"]),
        ("A heading and a line on Karl in Malta", "KARL IN TOWN\n\nKarl is in Malta", ["Malta"]),
        ("Is anna.kovacs@firm.example the address of Anna in Malta?", "Yes, of Anna in Malta", ["Malta"]),
        ("An address for Jürgen in Malta", "Jürgen in Malta: jurgen@firm.example", ["Malta"]),
        ("An address for Jürgen in Malta", "Jürgen in Malta: juergen@firm.example", ["Malta"]),
        ("Wem gehört Karl, Herrn Lange?", "Karl ist Langes Hund, sagt Lange", ["Karl"]),
        ("Which room is free, Karl?", "Room: the room is free, Karl", ["Karl"]),
        ("Add Ann and Annette", "Ann, Annette", ["Ann", "Annette"]),
        ("Write to Karl: karl@firm.example", "Karl has karl@firm.example", []),
    ],
)
def test_a_word_that_its_row_has_in_another_form_as_well_stays(request_: str, answer: str, own: list[str]) -> None:
    rows = filled(talk(request_, answer))
    names = {"Karl", "Lange", "karl", "Malta", "Anna", "anna", "Jürgen", "room", "Ann", "Annette"}
    assert [word for word in exchangeable(rows)[0] if word in names] == own


def test_earlier_turns_speak_of_the_same_word() -> None:
    system = {"role": "system", "content": "The owner is Maria"}
    turns = ({"role": "user", "content": "Maria has a cat"}, {"role": "assistant", "content": "Good for Maria"})
    for copy in copies_of(talk("Whose is it?", "It is Maria's", system, *turns)):
        name = copy.exchanged.get("Maria", "Maria")
        assert texts(copy.talk) == [
            f"The owner is {name}", f"{name} has a cat", f"Good for {name}", "Whose is it?", f"It is {name}'s"
        ]  # fmt: skip


def test_a_system_message_of_all_rows_stays_as_it_is() -> None:
    system = {"role": "system", "content": "Rooms: kitchen, attic"}
    rooms = ["kitchen", "attic"] + [f"room{n}" for n in range(30)]
    rows = [talk(f"light in the {room}", room, system) for room in rooms]
    assert all(copy.talk.messages[0] == system for copy in swapped(rows, Incoming(WORDS), 5))


def test_arguments_of_calls_are_answers_and_names_and_keys_in_them_are_form() -> None:
    def call(room: str) -> list[dict]:
        arguments = {"light": {"rooms": [room, 7]}, "on": True}
        return [{"type": "function", "function": {"name": "switch", "arguments": arguments}}]

    asked = {"role": "user", "content": "switch the light on in the attic"}
    one = Conversation((asked, {"role": "assistant", "tool_calls": call("attic")}))
    seen = set()
    for copy in copies_of(one):
        room = copy.exchanged.get("attic", "attic")
        assert copy.talk.messages[0]["content"] == f"switch the light on in the {room}"
        assert copy.talk.messages[1]["tool_calls"] == call(room)
        seen.add(room)
    assert seen == {"attic", *WORDS}
    assert one.messages[1]["tool_calls"] == call("attic"), "the row that was given is as it was"


def test_what_is_thought_before_an_answer_speaks_of_the_same_word() -> None:
    answer = {"role": "assistant", "content": "Maria", "reasoning_content": "They mean Maria."}
    one = Conversation(({"role": "user", "content": "Call Maria"}, answer))
    for copy in copies_of(one):
        name = copy.exchanged.get("Maria", "Maria")
        assert copy.talk.messages[1] == {
            "role": "assistant", "content": name, "reasoning_content": f"They mean {name}."
        }  # fmt: skip


def test_what_else_a_message_says_of_itself_stays() -> None:
    one = Conversation(
        ({"role": "user", "content": "Call Maria"}, {"role": "assistant", "content": "Maria", "weight": 0})
    )
    for copy in copies_of(one):
        assert copy.talk.messages[1] == {
            "role": "assistant", "content": copy.exchanged.get("Maria", "Maria"), "weight": 0
        }  # fmt: skip


def test_words_with_letters_beyond_ascii_are_words() -> None:
    assert shared_words(talk("Ruf Jürgen an", "Jürgen")) == {"Jürgen"}
    assert any(copy.exchanged for copy in copies_of(talk("Ruf Jürgen an", "Jürgen")))
    assert usual_words(["über das Jahr, über"], least=2) == ["über"]


@pytest.mark.parametrize("name", ["कमलेश", "सरस्वती", "Rene\u0301", "Đo\u0302\u0303"])
def test_a_word_does_not_end_where_a_letter_has_a_mark(name: str) -> None:
    """As Devanagari writes vowels, and macOS accents: none of these is exchanged in part."""
    one = talk(f"Call {name} now", f"Tell {name}.")
    assert shared_words(one) == {name}
    for copy in copies_of(one):
        assert name in texts(copy.talk)[0]
        assert name in texts(copy.talk)[1]


def test_copies_come_in_the_order_of_their_rows_and_the_same_ones_each_time() -> None:
    rows = filled(talk("Call Maria", "Maria"))
    made = list(swapped(rows, Incoming(WORDS), 3))
    assert made == list(swapped(rows, Incoming(WORDS), 3))
    assert [texts(copy.talk)[0] for copy in made[1:31]] == [texts(one)[0] for one in rows[1:]]
    assert len(made) == 3 * len(rows)


# --- what comes in ---


def test_a_word_has_the_case_of_the_one_that_it_replaces() -> None:
    words, draw = Incoming(["walrus"], ["Oslo"]), random.Random(1)
    assert [words.other(word, draw) for word in ("cat", "Maria", "NOON")] == ["walrus", "Oslo", "OSLO"]
    assert [Incoming(["walrus"]).other(word, draw) for word in ("Maria", "NOON")] == ["Walrus", "WALRUS"]


def test_words_that_are_asked_and_words_in_other_letters_do_not_come_in() -> None:
    words = Incoming(["walrus", "granite", "öl"], ["Oslo", "Rome"])
    assert words.without([talk("A WALRUS in Rome", "granite")]) == Incoming(["öl"], ["Oslo"])
    assert words.of_letters("WALRUSom") == Incoming(["walrus"], ["Oslo"])


def test_words_that_a_model_has_to_spell_are_one_token_behind_a_space_and_several_behind_a_quotation_mark() -> None:
    """By the tokenizer's own pieces, which are the outside truth."""
    tokenizer = load_tokenizer(Model(base="builtin:smollm2-135m-instruct"))
    words = spelled_words(tokenizer)
    assert min(len(words.small), len(words.capital)) > 5000
    quote = tokenizer('"', add_special_tokens=False)["input_ids"]
    for word in (*words.small[::500], *words.capital[::200]):
        assert len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) == 1, word
        behind = tokenizer(f'"{word}', add_special_tokens=False)["input_ids"]
        assert behind[:1] == quote, word
        assert len(behind) > 2, word
    assert all(word.islower() for word in words.small)
    assert all(word.istitle() for word in words.capital)


LLAMA = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
"""Of Llama 2, Mistral 0.1 and Phi-3, from their tokenizer.json."""


@pytest.mark.parametrize("decoder", [decoders.Metaspace(), LLAMA], ids=["Metaspace", "Llama 2"])
def test_words_are_found_where_a_tokenizer_marks_the_space_with_a_sign_of_its_own(decoder: decoders.Decoder) -> None:
    """SentencePiece's; such decoders take the space of the first token away."""
    letters = [(letter, -9.0) for letter in 'abcdefghijklmnopqrstuvwxyzAB"▁']
    pieces = [("<unk>", 0.0), ("▁walrus", -2.0), ("▁Anna", -2.0), ("▁known", -2.0), ("known", -2.0), ('▁"', -2.0)]
    made = Tokenizer(models.Unigram([*pieces, ("granite", -2.0), *letters], unk_id=0))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoder
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    assert tokenizer.tokenize('known walrus "walrus')[:4] == ["▁known", "▁walrus", '▁"', "w"]
    assert spelled_words(tokenizer) == Incoming(["walrus"], ["Anna"]), "one token behind a space, spelled elsewhere"


def test_a_vocabulary_without_words_has_none_to_spell() -> None:
    made = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ('"', -1.0), ("▁", -1.0)], unk_id=0))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    words = spelled_words(PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>"))
    assert (words, words.choice) == (Incoming(()), 0)


# --- the quickstart's ---


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / f"quickstart_{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def contents(row: dict) -> tuple[str, str]:
    request, answer = (message["content"] for message in row["messages"])
    return request, answer


def test_no_swapped_row_is_a_test_row() -> None:
    asked, answered = ({contents(one)[place].casefold() for one in read("test")} for place in (0, 1))
    assert not asked & {contents(one)[0].casefold() for one in read("swapped")}
    assert not answered & {contents(one)[1].casefold() for one in read("swapped")}


def test_what_an_answer_takes_from_its_request_is_still_there() -> None:
    for one in read("swapped"):
        request, answer = contents(one)
        for key, value in json.loads(answer).items():
            assert key == "command" or re.search(rf"(?i)\b{re.escape(str(value))}\b", request), (request, answer)


def test_the_share_of_words_that_are_exchanged_leaves_names_beside_new_ones() -> None:
    counts = {len(copy.exchanged) for copy in copies_of(talk("Call Maria and Tom", "Maria, Tom"), 60)}
    assert counts == {0, 1, 2}
