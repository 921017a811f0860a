"""What is scored: the assistant's text and its end of turn, for every family's template, and nothing else."""

import re
from functools import cache
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import pytest
import trl
from chat_families import FAMILIES, R1, VICUNA, Family, byte_level_tokenizer, tokenizer_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from qtune.data.conversation import Conversation, RowError
from qtune.data.masks import IGNORED, Encoded, Encoder, render_examples
from qtune.data.template import ALPACA, CHATML, PLAIN, Renderer, prompt_ids

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)


def talk(*texts: str, system: str | None = None) -> Conversation:
    """Turns of user and assistant, one after the other."""
    roles = ["user", "assistant"] * len(texts)
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return Conversation(tuple(([{"role": "system", "content": system}] if system else []) + turns))


def encode(
    family: Family, conversation: Conversation, loss_on: str = "all-answers", on_rewritten: str = "split"
) -> list[Encoded]:
    tokenizer = tokenizer_of(family)
    renderer = Renderer.of(tokenizer, tokenizer.chat_template)
    return Encoder(renderer).encode(render_examples(renderer, conversation, loss_on, on_rewritten))


def scored_texts(family: Family, example: Encoded) -> list[str]:
    """The decoded runs of scored tokens. SentencePiece drops the first space of what it decodes: it is put back."""
    tokenizer = tokenizer_of(family)
    runs: list[list[int]] = [[]]
    for label in example.labels:
        if label != IGNORED:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def decodes_to(family: Family, answer: str) -> str:
    """What the scored tokens of an answer decode to."""
    framed = family.before + answer + family.after
    return framed.removeprefix(" ") if family.style.startswith("sentencepiece") else framed


@EVERY_FAMILY
def test_one_answer_and_its_end_of_turn_are_scored(family):
    (example,) = encode(family, talk("What is 2+2?", "It is 4."))
    assert scored_texts(family, example) == [decodes_to(family, "It is 4.")]
    assert example.notes == frozenset()


@EVERY_FAMILY
def test_every_answer_of_a_long_conversation_is_scored_after_the_prompt_the_model_will_see(family):
    conversation = talk("Hi", "Hello\nthere", "And 3 + 3?", "It is 6, of course!", "Thanks", "🙂 né?")
    examples = encode(family, conversation)
    scored = [text for example in examples for text in scored_texts(family, example)]
    assert scored == [decodes_to(family, answer) for answer in ("Hello\nthere", "It is 6, of course!", "🙂 né?")]
    assert not {note for example in examples for note in example.notes} - {"rewritten-turn"}


@EVERY_FAMILY
def test_the_ids_before_a_scored_answer_are_those_of_generation(family):
    conversation = talk("Hi", "Hello there", "And 3 + 3?", "It is 6, of course!")
    last = encode(family, conversation)[-1]
    asked = prompt_ids(tokenizer_of(family), conversation)
    assert last.input_ids[: len(asked)] == asked
    assert last.labels[len(asked)] != IGNORED
    assert last.labels[len(asked) - 1] == IGNORED


@EVERY_FAMILY
def test_a_system_message_is_never_scored(family):
    conversation = talk("Hi", "Hello there", system="Be brief.")
    if not family.system:
        with pytest.raises(RowError, match="the chat template refuses this conversation"):
            encode(family, conversation)
        return
    (example,) = encode(family, conversation)
    assert "Be brief." in tokenizer_of(family).decode(example.input_ids)
    assert scored_texts(family, example) == [decodes_to(family, "Hello there")]


@EVERY_FAMILY
def test_only_the_last_answer_is_scored_when_asked_for(family):
    (example,) = encode(family, talk("Hi", "Hello there", "And?", "It is 6."), loss_on="last-answer")
    assert scored_texts(family, example) == [decodes_to(family, "It is 6.")]
    assert example.notes == frozenset()


@EVERY_FAMILY
def test_an_answer_of_weight_0_is_not_scored(family):
    conversation = talk("Hi", "Hello there", "And?", "It is 6.")
    skipped = {**conversation.messages[1], "weight": 0}
    conversation = Conversation((conversation.messages[0], skipped, *conversation.messages[2:]))
    (example,) = encode(family, conversation)
    assert scored_texts(family, example) == [decodes_to(family, "It is 6.")]


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "mistral_v3", "llama3_1"])
def test_a_tool_call_and_the_answer_after_its_result_are_scored_and_the_result_is_not(name):
    family = FAMILIES[name]
    messages = (
        {"role": "user", "content": "Weather in Paris?"},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "name": "weather", "content": "22"},
        {"role": "assistant", "content": "It is 22 degrees."},
    )
    examples = encode(family, Conversation(messages, (WEATHER,)))
    call, answer = [text for example in examples for text in scored_texts(family, example)]
    ends = {"qwen2_5": "</tool_call><|im_end|>", "qwen3": "</tool_call><|im_end|>", "mistral_v3": "]</s>"}
    assert call.endswith(ends.get(name, "}<|eom_id|>"))
    assert '"weather"' in call
    assert "22" not in call
    assert answer.endswith("It is 22 degrees." + family.after)
    assert not {note for example in examples for note in example.notes} - {"rewritten-turn"}


def test_the_mask_equals_the_one_of_templates_with_generation_markers():
    family = FAMILIES["chatml_generation"]
    conversation = talk("Hi", "Hello\nthere", "And 3 + 3?", "It is 6, of course!")
    marked = tokenizer_of(family).apply_chat_template(
        list(conversation.messages), return_dict=True, return_assistant_tokens_mask=True
    )
    (example,) = encode(family, conversation)
    assert example.input_ids == marked["input_ids"]
    assert [int(label != IGNORED) for label in example.labels] == marked["assistant_masks"]


# Templates as the families publish them, from the package that trains with them, where the same template also exists
# with {% generation %} marks: somebody else's idea of what is scored. Theirs may add what our masks leave out on
# purpose: white space and the end of text that some templates write behind the end of turn.
PUBLISHED = Path(trl.__file__).parent / "chat_templates"
MARKED = ("cohere", "cohere2", "gemma", "gemma3", "lfm2", "llama3", "phi3", "phi3_5", "qwen2_5", "qwen3_instruct_2507")
CHAT = ("gemma4", "glm4moe", "gptoss", "llama3_1", "llama3_2", "qwen3", "qwen3_5_nothink")


@cache
def published(name: str) -> tuple[PreTrainedTokenizerFast, str]:
    """A byte-level tokenizer that has every <special token> of a published template, and that template."""
    text = (PUBLISHED / f"{name}.jinja").read_text(encoding="utf-8")
    special = sorted(
        set(re.findall(r"<\|[^<>\s'\"]+?\|>|<\w+\|>|<\|\w+>|</?(?:start_of_turn|end_of_turn|think)>", text))
    )
    return byte_level_tokenizer(("<s>", "</s>", *special)), text


def encode_with(tokenizer, template: str, conversation: Conversation) -> list[Encoded]:
    renderer = Renderer.of(tokenizer, template)
    return Encoder(renderer).encode(render_examples(renderer, conversation, "all-answers", "split"))


def runs(tokenizer, ids: list[int], scored: list[bool]) -> list[str]:
    """The decoded runs of scored tokens."""
    return [
        tokenizer.decode([one for one, _ in run])
        for is_scored, run in groupby(zip(ids, scored, strict=True), key=itemgetter(1))
        if is_scored
    ]


@pytest.mark.parametrize("name", MARKED)
def test_the_mask_is_that_of_published_templates_with_generation_markers(name):
    tokenizer, template = published(name)
    marked = (PUBLISHED / f"{name}_training.jinja").read_text(encoding="utf-8")
    conversation = talk("Hi", "Hello\nthere", "And 3 + 3?", "It is 6, of course!")
    theirs = tokenizer.apply_chat_template(
        list(conversation.messages), chat_template=marked, return_dict=True, return_assistant_tokens_mask=True
    )
    (example,) = encode_with(tokenizer, template, conversation)
    assert example.input_ids == theirs["input_ids"]
    assert not example.notes
    ours = runs(tokenizer, example.input_ids, [label != IGNORED for label in example.labels])
    others = runs(tokenizer, theirs["input_ids"], [mask == 1 for mask in theirs["assistant_masks"]])
    assert ours == [other.removesuffix("</s>").strip() for other in others]


@pytest.mark.parametrize("name", CHAT)
def test_published_templates_are_scored_from_the_prompt_to_the_end_of_turn_or_refused(name):
    tokenizer, template = published(name)
    examples = encode_with(tokenizer, template, talk("Hi", "Hello\nthere", "And 3 + 3?", "It is 6, of course!"))
    texts = [
        text for one in examples for text in runs(tokenizer, one.input_ids, [label != IGNORED for label in one.labels])
    ]
    notes = {note for example in examples for note in example.notes}
    ends = {"gemma4": "<turn|>", "gptoss": "<|return|>", "glm4moe": ""}
    end = ends.get(name, "<|eot_id|>" if name.startswith("llama") else "<|im_end|>")
    assert [
        text.endswith(answer + end) for text, answer in zip(texts, ("Hello\nthere", "It is 6, of course!"), strict=True)
    ] == [True, True]
    # GLM ends an answer with the token that opens the next turn: nothing of its own says stop.
    assert notes - {"rewritten-turn"} == ({"no-end-of-turn"} if name == "glm4moe" else set())


@pytest.mark.parametrize("name", ["mistral_v3", "qwen3"])
def test_a_template_that_rewrites_earlier_turns_gets_an_example_for_each_answer(name):
    conversation = talk("Hi", "Hello there", "And?", "It is 6.", system="Be brief.")
    first, second = encode(FAMILIES[name], conversation)
    assert first.notes == second.notes == {"rewritten-turn"}
    assert [message["content"] for message in first.conversation.messages] == ["Be brief.", "Hi", "Hello there"]
    assert second.conversation == conversation
    asked = prompt_ids(tokenizer_of(FAMILIES[name]), first.conversation)
    assert first.input_ids[: len(asked)] == asked


def test_of_a_rewritten_conversation_the_last_answer_can_be_scored_alone():
    (example,) = encode(FAMILIES["qwen3"], talk("Hi", "Hello there", "And?", "It is 6."), on_rewritten="last")
    assert scored_texts(FAMILIES["qwen3"], example) == ["<think>\n\n</think>\n\nIt is 6.<|im_end|>"]


def test_thinking_that_the_template_keeps_is_scored_with_the_answer():
    thought = "<think>\n2 and 2.\n</think>\n\nIt is 4."
    (example,) = encode(FAMILIES["qwen3"], talk("2+2?", thought))
    assert scored_texts(FAMILIES["qwen3"], example) == [thought + "<|im_end|>"]
    assert example.notes == frozenset()


def test_thinking_that_the_template_removes_is_noted():
    (example,) = encode(R1, talk("2+2?", "<think>\n2 and 2.\n</think>\n\nIt is 4."))
    assert example.notes == {"answer-changed", "generation-prompt"}


def test_a_generation_prompt_that_rows_do_not_have_is_noted():
    (example,) = encode(R1, talk("2+2?", "It is 4."))
    assert example.notes == {"generation-prompt"}
    assert scored_texts(R1, example) == ["It is 4.<｜end▁of▁sentence｜>"]


def test_a_template_without_a_generation_prompt_whose_header_would_be_learned_is_noted():
    (example,) = encode(VICUNA, talk("2+2?", "It is 4."))
    assert "generation-prompt" in example.notes


@pytest.mark.parametrize("template", [ALPACA, PLAIN, CHATML], ids=["alpaca", "plain", "chatml"])
@pytest.mark.parametrize("name", ["llama2", "llama3", "olmo2", "chatml"])
def test_built_in_templates_score_the_answer_and_one_end_token_where_the_tokenizer_has_it(template, name):
    family = FAMILIES[name]
    tokenizer = tokenizer_of(family)
    renderer = Renderer.of(tokenizer, template)
    conversation = talk("Hi", "Hello there", "And 3 + 3?", "It is 6.")
    (example,) = Encoder(renderer).encode(render_examples(renderer, conversation, "all-answers", "split"))
    if template is CHATML and name != "chatml":
        assert {"no-end-of-turn"} <= example.notes
        return
    assert scored_texts(family, example) == [text + family.eos for text in ("Hello there", "It is 6.")]
    assert "no-end-of-turn" not in example.notes


def test_pad_never_decides_what_is_scored():
    family = FAMILIES["chatml"]
    assert tokenizer_of(family).pad_token == family.eos
    (example,) = encode(family, talk("Hi", "Hello"))
    assert example.labels[-2] == tokenizer_of(family).pad_token_id


def test_a_special_token_in_a_message_is_noted():
    (example,) = encode(FAMILIES["llama3"], talk("Hi<|eot_id|><|start_header_id|>", "Hello"))
    assert "control-token" in example.notes


def test_a_tag_that_is_an_ordinary_word_of_the_tokenizer_is_not_noted():
    (example,) = encode(FAMILIES["llama3"], talk("What does </s> mean in HTML?", "<s> strikes text out."))
    assert example.notes == frozenset()


def test_bos_twice_is_noted():
    family = FAMILIES["llama3"]
    tokenizer = tokenizer_of(family)
    renderer = Renderer.of(tokenizer, "{{ bos_token }}" + tokenizer.chat_template)
    (example,) = Encoder(renderer).encode(render_examples(renderer, talk("Hi", "Hello"), "all-answers", "split"))
    assert example.notes == {"double-bos"}


def test_a_missing_bos_is_noted():
    tokenizer = tokenizer_of(FAMILIES["llama2"])
    renderer = Renderer.of(tokenizer, PLAIN.replace("{{- bos_token or '' -}}", ""))
    (example,) = Encoder(renderer).encode(render_examples(renderer, talk("Hi", "Hello"), "all-answers", "split"))
    assert "missing-bos" in example.notes


@pytest.mark.parametrize("answer", ["\nHello", "\n\n  Hello", " Hello", "\tHello", "…", "\u2581x", "a\u0301b"])
@EVERY_FAMILY
def test_answers_that_begin_with_white_space_are_learned_after_the_ids_of_the_prompt(family, answer):
    conversation = talk("Hi", answer)
    (example,) = encode(family, conversation)
    if "token-boundary" in example.notes:
        assert family.style.startswith("sentencepiece")  # joins what stands on both sides of a border
        return
    asked = prompt_ids(tokenizer_of(family), conversation)
    assert example.input_ids[: len(asked)] == asked
    assert example.labels[: len(asked)] == [IGNORED] * len(asked)
    assert example.labels[len(asked) :].count(IGNORED) <= 2  # a new line and phi3's end of text after the turn


# Everything but what would be a token of its own, or half a character.
texts = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30).filter(lambda text: text.strip())
plain_texts = texts.filter(lambda text: not re.search(r"<|\[|\]|｜|think|tool", text))


@pytest.mark.slow
@EVERY_FAMILY
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_masks_cover_exactly_the_answers_and_their_ends_whatever_is_said(family, data):
    turns = data.draw(st.lists(plain_texts, min_size=2, max_size=6).filter(lambda turns: len(turns) % 2 == 0))
    system = data.draw(st.none() | plain_texts) if family.system else None
    tokenizer = tokenizer_of(family)
    examples = encode(family, talk(*turns, system=system))
    answers = turns[1::2]
    runs = [(example, text) for example in examples for text in scored_texts(family, example)]
    assert len(runs) == len(answers)
    for (_, text), answer in zip(runs, answers, strict=True):
        inner = text.removeprefix(family.before.lstrip() if family.before.strip() else "")
        assert inner.endswith(family.after.strip())
        assert (
            inner.removesuffix(family.after.strip()).replace("\u2581", " ").strip()
            == answer.replace("\u2581", " ").strip()
        )
    for example in examples:
        assert [i for i, label in enumerate(example.labels) if label not in (IGNORED, example.input_ids[i])] == []
        trimmed = {"answer-trimmed"} if any(text != text.strip() for text in answers) else set()
        assert not example.notes - {"rewritten-turn", "token-boundary"} - trimmed
    assert tokenizer.eos_token_id is not None
