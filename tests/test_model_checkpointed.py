"""Checkpointed layers keep their inputs, and nothing before them."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_adapter_lean import Case, adapted, distance, network, readied, trained
from test_model_layer_stream import PEFT

from qtune.model.checkpointed import free_inputs


@pytest.mark.parametrize("lean", [False, True], ids=["peft", "lean"])
@pytest.mark.parametrize("adapter", PEFT)
def test_gradients_are_the_same_without_one_for_the_embeddings(adapter: str, lean: bool) -> None:
    found = []
    for frees in (False, True):
        torch.manual_seed(3)
        base = get_peft_model(network(Case(), torch.float32), copy.deepcopy(PEFT[adapter]))
        model = readied(base, torch.float32, lean=lean, recompute=True)
        if frees:
            free_inputs(model)
        found.append(trained(model))
    assert found[1][0] == found[0][0]
    assert distance(found[1][1], found[0][1]) < 1e-6


def test_the_embeddings_output_wants_no_gradient_once_it_is_let_go_of() -> None:
    seen = []
    for frees in (False, True):
        model = adapted(Case(), lean=True, recompute=True)
        if frees:
            free_inputs(model)
            free_inputs(model)
        layer = model.get_base_model().model.layers[0]
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].requires_grad))
        trained(model, micro_batches=1)
    assert seen == [True, False]


def test_embeddings_that_are_trained_keep_their_gradient() -> None:
    adapter = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "embed_tokens"])
    found = []
    for frees in (False, True):
        torch.manual_seed(3)
        model = readied(
            get_peft_model(network(Case(), torch.float32), adapter), torch.float32, lean=True, recompute=True
        )
        if frees:
            free_inputs(model)
        found.append(trained(model)[1])
    assert any("embed" in name for name in found[0])
    for name, gradient in found[0].items():
        assert gradient is not None
        torch.testing.assert_close(found[1][name], gradient)
