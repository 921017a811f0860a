"""Whoever asks an export asks what training asked: transformers, llama.cpp's metadata and Ollama, token for token."""

import json
from pathlib import Path

import pytest
from export_models import tiny_run, tiny_tokenizer
from gguf import GGUFReader
from transformers import AutoTokenizer

from qtune.data.asking import asking_template, merging_template
from qtune.data.conversation import Conversation, RowError
from qtune.data.formats import to_conversation
from qtune.data.template import CHATML, ChatTemplate, Renderer
from qtune.errors import ExportError
from qtune.export.export import Options, export_run
from qtune.export.gguf.modelfile import ollama_prompt
from qtune.export.opened_run import open_for_export
from qtune.export.verify.asked import asked_in_training, require_same_questions
from qtune.export.verify.rows import GENERAL, general_rows
from qtune.recipe.schema import Data

PROMPTS = ["Answer in capital letters.", 'Say "{{ x }}" and {% y %}\n\n\\n `a` ``b`` 🙂 {# no #}', "'"]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("policy", ["keep", "drop", "merge"])
def test_the_template_asks_as_a_row_would(tmp_path: Path, policy: str, prompt: str) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    data = Data(train="rows.jsonl", system=policy, system_prompt=prompt)
    trained, asking = ChatTemplate(CHATML, ""), asking_template(ChatTemplate(CHATML, ""), data)
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "?"},
    ]
    row = {"messages": [*turns, {"role": "assistant", "content": "!"}]}
    expected = Renderer.of(tokenizer, trained.text).prompt(to_conversation(row, "messages", "", policy, prompt))
    assert Renderer.of(tokenizer, asking.text).render(turns, generation_prompt=True) == expected
    # Rows that were rendered with it are not asked twice.
    already = to_conversation(row, "messages", "", policy, prompt)
    assert Renderer.of(tokenizer, asking.text).prompt(already) == expected
    own = [{"role": "system", "content": "Be kind."}, *turns]
    shown = Renderer.of(tokenizer, asking.text).render(own, generation_prompt=True)
    assert prompt not in shown
    assert "Be kind." in shown


def test_who_gives_the_system_message_may_give_none(tmp_path: Path) -> None:
    data = Data(train="rows.jsonl", system="merge", system_prompt="Be brief.")
    template = merging_template(ChatTemplate(CHATML, ""), data)
    renderer = Renderer.of(tiny_tokenizer(tmp_path), template.text)
    turns = [{"role": "user", "content": "Hi"}]
    assert renderer.render(turns) == "<|im_start|>user\nHi<|im_end|>\n"
    told = renderer.render([{"role": "system", "content": "Be kind."}, *turns])
    assert told == "<|im_start|>user\nBe kind.\n\nHi<|im_end|>\n"


@pytest.mark.parametrize("policy", ["keep", "merge"])
def test_transformers_the_gguf_and_ollama_ask_the_same(tmp_path: Path, policy: str) -> None:
    prompt = "Answer in one word."
    run = tiny_run(tmp_path, data=f'chat_template = "chatml"\nsystem = "{policy}"\nsystem_prompt = "{prompt}"')
    folder = export_run(run, Options(gguf="f16", verify=False))
    source = open_for_export(run)
    expected = asked_in_training(source, "Hello")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = [{"role": "user", "content": "Hello"}]

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    assert ids(tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)) == expected
    file = folder / f"{run.name}-f16.gguf"
    field = GGUFReader(file).get_field("tokenizer.chat_template")
    assert field is not None
    text = tokenizer.apply_chat_template(
        asked, chat_template=field.contents(), add_generation_prompt=True, tokenize=False
    )
    assert ids(text) == expected
    modelfile = (folder / "Modelfile").read_text()
    template = modelfile.partition('TEMPLATE """')[2].partition('"""')[0]
    assert f'SYSTEM """{prompt}"""' in modelfile
    for system in ([{"role": "system", "content": prompt}], []):
        talk = Conversation((*system, *asked, {"role": "assistant", "content": ""}))
        assert ids(ollama_prompt(template, talk)) == expected
    card = (folder / "README.md").read_text()
    assert f"```text\n{prompt}\n```" in card


def test_an_adapter_alone_asks_the_same(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, data='chat_template = "chatml"\nsystem_prompt = "Answer in one word."')
    folder = export_run(run, Options(adapter_only=True))
    require_same_questions(open_for_export(run), folder)
    assert "Answer in one word." in (folder / "README.md").read_text()


def test_an_export_that_asks_in_other_words_is_an_error(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, data='chat_template = "chatml"\nsystem_prompt = "Answer in one word."')
    folder = export_run(run, Options(adapter_only=True))
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text().replace("one word", "two words"))
    with pytest.raises(ExportError, match="its chat template puts other words before 'Hello' than training did"):
        require_same_questions(open_for_export(run), folder)
    assert json.loads((folder / "adapter_config.json").read_text())


TURNS_OF_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ONE_QUESTION = "{% if messages | length > 2 %}{{ raise_exception('one question only') }}{% endif %}"
WITH_SYSTEM = "{% if messages[0].role != 'system' %}{{ raise_exception('a system message first') }}{% endif %}"


@pytest.mark.parametrize("refusal", [ONE_QUESTION, WITH_SYSTEM])
def test_a_template_that_takes_no_plain_talk_is_asked_what_it_takes(tmp_path: Path, refusal: str) -> None:
    template = tmp_path / "own.jinja"
    template.write_text(refusal + TURNS_OF_CHATML)
    run = tiny_run(tmp_path, data=f'chat_template = "{template}"')
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    if refusal is WITH_SYSTEM:
        rows = [{"messages": [{"role": "system", "content": "Be brief."}, *row["messages"]]} for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = export_run(run, Options(adapter_only=True))
    file = folder / "chat_template.jinja"
    text = file.read_text()
    file.write_text(text.replace("<|im_start|>assistant", "<|im_start|>model"))
    with pytest.raises(ExportError, match="its chat template puts other words before "):
        require_same_questions(open_for_export(run), folder)
    file.write_text("{{ raise_exception('nothing at all') }}" + text)
    with pytest.raises(ExportError, match=r"its chat template refuses .*, which training's takes: nothing at all$"):
        require_same_questions(open_for_export(run), folder)


def test_of_general_conversations_those_that_a_template_refuses_are_left_out(tmp_path: Path) -> None:
    template = tmp_path / "own.jinja"
    template.write_text(
        "{% if 'France' in messages[0].content %}{{ raise_exception('no') }}{% endif %}" + TURNS_OF_CHATML
    )
    run = tiny_run(tmp_path, data=f'chat_template = "{template}"')
    assert 0 < len(general_rows(open_for_export(run))) < len(GENERAL)


RULE = {"role": "system", "content": "Now in French."}
TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Ho"},
    {"role": "user", "content": "What is red?"},
]


@pytest.mark.parametrize("prompt", [None, "Be brief."])
@pytest.mark.parametrize(
    "asked",
    [
        [*TURNS, RULE],  # right before the answer that is asked for
        [TURNS[0], RULE, *TURNS[1:]],  # right before an earlier answer
        [*TURNS[:2], RULE, RULE, TURNS[2]],
        [RULE, TURNS[0], RULE],
        [TURNS[0], RULE, {"role": "system", "content": "And in capitals."}],
    ],
)
def test_a_system_message_in_any_place_is_merged_as_in_training(
    tmp_path: Path, asked: list[dict[str, str]], prompt: str | None
) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    data = Data(train="rows.jsonl", system="merge", system_prompt=prompt)
    row = {"messages": [*asked, {"role": "assistant", "content": "!"}]}
    trained = to_conversation(row, "messages", "", "merge", prompt)
    expected = Renderer.of(tokenizer, CHATML).prompt(trained)
    exported = asking_template(ChatTemplate(CHATML, ""), data)
    assert Renderer.of(tokenizer, exported.text).render(asked, generation_prompt=True) == expected


def test_a_system_message_beside_no_question_is_refused_and_not_dropped(tmp_path: Path) -> None:
    template = asking_template(ChatTemplate(CHATML, ""), Data(train="rows.jsonl", system="merge"))
    renderer = Renderer.of(tiny_tokenizer(tmp_path), template.text)
    for turns in ([RULE], [RULE, TURNS[1]], [*TURNS[:2], RULE]):
        with pytest.raises(RowError, match="a system message stands beside no user turn"):
            renderer.render(turns, generation_prompt=True)
