"""A step that does not walk through the whole model leaves it as transformers' walks would."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from qtune.training.walks import forget_gradients_of, switch_once


@pytest.fixture
def model():
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
    adapted = get_peft_model(LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)), LoraConfig(lora_dropout=0.1))
    switch_once(adapted)
    return adapted


def modes(model) -> set[bool]:
    return {module.training for module in model.modules()}


def counted(model, monkeypatch) -> list[object]:
    """Modules that are switched from here on, apart from the outermost."""
    seen: list[object] = []
    original = torch.nn.Module.train
    monkeypatch.setattr(torch.nn.Module, "train", lambda self, mode=True: [seen.append(self), original(self, mode)][1])
    return seen


def test_the_whole_model_is_switched_and_again_only_where_the_mode_is_another(model, monkeypatch):
    seen = counted(model, monkeypatch)
    for switch, expected in ((model.train, True), (model.eval, False), (model.train, True)):
        assert switch() is model
        assert modes(model) == {expected}
        assert seen
        seen.clear()
        switch()
        assert seen == []
        assert modes(model) == {expected}


@pytest.mark.parametrize(
    "part", [lambda m: m.base_model, lambda m: m.get_base_model(), lambda m: m.get_base_model().model.layers[1]]
)
def test_a_part_that_was_switched_alone_is_switched_back(model, part):
    model.train()
    part(model).eval()
    assert modes(model) == {True, False}
    model.train()
    assert modes(model) == {True}


def test_a_model_that_was_never_switched_is_believed_nothing(model):
    model.base_model.model.lm_head.eval()
    model.train()
    assert modes(model) == {True}


@pytest.mark.parametrize("set_to_none", [True, False])
def test_no_gradient_is_left(model, set_to_none):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    forget_gradients_of(model, trained)
    ids = torch.arange(20)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert any(float(parameter.grad.abs().max()) > 0 for parameter in trained)
    model.zero_grad(set_to_none)
    found = [parameter.grad for parameter in model.parameters()]
    assert all(grad is None or float(grad.abs().max()) == 0 for grad in found)
    assert all(grad is None for grad in found) is set_to_none
