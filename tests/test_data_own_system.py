"""The system message that a chat template writes of itself, by what the families' documentation says of theirs."""

import pytest
from chat_families import FAMILIES, tokenizer_of

from qtune.data.own_system import own_system
from qtune.data.template import Renderer, default_template

WRITTEN = {
    "smollm2": "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    "qwen2_5": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
}
"""Those of the model cards; the other families write none."""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_template_writes_what_its_family_is_known_to_write(family: str) -> None:
    tokenizer = tokenizer_of(FAMILIES[family])
    assert own_system(Renderer.of(tokenizer, default_template(tokenizer))) == WRITTEN.get(family)
