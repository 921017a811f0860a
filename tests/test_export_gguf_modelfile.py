"""A Modelfile's template gives the tokens of the chat template, for every family that has one; the others get none."""

from pathlib import Path
from typing import Any

import pytest
from export_models import tiny_tokenizer
from transformers import PreTrainedTokenizerBase

from qtune.data.conversation import Conversation
from qtune.export.gguf.modelfile import Modelfile, NoModelfile, modelfile_for, ollama_prompt
from qtune.export.verify.rows import probes

TEMPLATES = Path(__file__).parent / "chat_templates"
PROVEN = [
    "chatml",
    "gemma2",
    "gemma3",
    "llama3",
    "mistral_v3",
    "phi3",
    "phi4",
    "qwen2_5",
    "smollm2",
    "zephyr",
    "vicuna",
    "olmo2",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def made(tokenizer: PreTrainedTokenizerBase, template: str, **changes: Any) -> Modelfile | NoModelfile:
    tokenizer.chat_template = template
    settings = {"system": None, "adds_bos": False, "generation": {}, "context": 8192, **changes}
    return modelfile_for(tokenizer, probes([]), **settings)


def read(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PROVEN)
@pytest.mark.parametrize("adds_bos", [False, True])
def test_families_have_a_template_with_the_same_tokens(
    tokenizer: PreTrainedTokenizerBase, name: str, adds_bos: bool
) -> None:
    begins = read(name).find("bos_token") >= 0
    modelfile = made(tokenizer, read(name), adds_bos=adds_bos and begins)
    assert isinstance(modelfile, Modelfile), modelfile
    bos = "<s>" if adds_bos and begins else ""
    for conversation in probes([]):
        try:
            expected = tokenizer.apply_chat_template(
                list(conversation.prompt), tokenize=False, add_generation_prompt=True
            )
        except Exception:
            continue
        assert bos + ollama_prompt(modelfile.template, conversation) == expected


def test_llama_3_1_says_a_date_around_the_system_text_that_stays_the_same(tokenizer: PreTrainedTokenizerBase) -> None:
    assert isinstance(made(tokenizer, read("llama3_1")), Modelfile)


def test_the_default_system_text_is_used_when_there_is_none(tokenizer: PreTrainedTokenizerBase) -> None:
    modelfile = made(tokenizer, read("smollm2"))
    assert isinstance(modelfile, Modelfile)
    alone = Conversation(({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}))
    assert ollama_prompt(modelfile.template, alone) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "does not put every message into the text once"),
        (
            "{% for m in messages %}{{ m.content }}{{ loop.index }};{% endfor %}",
            "asks for the first answer in other words",
        ),
        (
            "{% for m in messages %}{{ m.content | replace('Name', 'name') }}\n{% endfor %}",
            "would give 'several turns' other tokens than the chat template",
        ),
        ("{{ raise_exception('no') }}", "refuses this conversation"),
    ],
)
def test_a_template_that_does_more_has_no_modelfile(
    tokenizer: PreTrainedTokenizerBase, template: str, reason: str
) -> None:
    refused = made(tokenizer, template)
    assert isinstance(refused, NoModelfile)
    assert reason in refused.reason


def test_the_file_has_template_system_stops_and_parameters(tokenizer: PreTrainedTokenizerBase) -> None:
    generation = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}
    modelfile = made(
        tokenizer,
        "{%- for m in messages -%}{{ m.role + ': ' + m.content + '<|im_end|>\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ 'assistant: ' }}{%- endif -%}",
        system="Be brief.",
        generation=generation,
    )
    assert isinstance(modelfile, Modelfile)
    assert modelfile.text("model-f16.gguf") == (
        "FROM ./model-f16.gguf\n"
        'TEMPLATE """{{ if .System }}system: {{ .System }}<|im_end|>\nuser: {{ else }}user: {{ end }}'
        '{{ range .Messages }}{{ if eq .Role "user" }}{{ .Content }}<|im_end|>\nassistant: {{ end }}'
        '{{ if eq .Role "assistant" }}{{ .Content }}<|im_end|>\nuser: {{ end }}{{ end }}"""\n'
        'SYSTEM """Be brief."""\n'
        'PARAMETER stop "<|im_end|>"\n'
        'PARAMETER stop "</s>"\n'
        "PARAMETER temperature 0\n"
        "PARAMETER repeat_penalty 1.0\n"
        "PARAMETER num_ctx 8192\n"
        "# It answers with the likeliest token each time, as qtune did. The base's own settings instead:\n"
        "# PARAMETER temperature 0.6\n"
        "# PARAMETER top_p 0.9\n"
        "# PARAMETER top_k 50\n"
        "# PARAMETER repeat_penalty 1.1\n"
    )


def test_a_greedy_model_is_asked_greedily(tokenizer: PreTrainedTokenizerBase) -> None:
    modelfile = made(tokenizer, read("chatml"))
    assert isinstance(modelfile, Modelfile)
    # Ollama's own penalty on repetitions, 1.1, would change greedy answers.
    assert modelfile.of_the_base == {}
    assert modelfile.parameters == {"temperature": 0, "repeat_penalty": 1.0, "num_ctx": 8192}
