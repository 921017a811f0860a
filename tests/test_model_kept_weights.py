"""Weights that stay dequantized change no loss and no gradient by a bit, and are read back once."""

import gc
import weakref
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from test_adapter_lean import HIDDEN, LAYERS, Case, Count, adapted, distance, ids, network, readied, trained

from qtune.model.kept_weights import keep_weights, kept_weights, weight_of
from qtune.model.layer_stream import stream_layers

F32 = torch.float32

CASES = {
    "nested nf4": Case(),
    "plain nf4": Case(nested=False),
    "nested fp4": Case(quantized="fp4"),
    "plain fp4": Case(quantized="fp4", nested=False),
    "rslora": Case(lora=(("use_rslora", True),)),
    "dropout": Case(lora=(("lora_dropout", 0.2),)),
    "biases": Case(config=(("attention_bias", True), ("mlp_bias", True))),
    "some layers": Case(lora=(("target_modules", ["q_proj", "v_proj", "down_proj"]),)),
    "dora": Case(lora=(("use_dora", True),)),
    "biases of the update": Case(config=(("attention_bias", True), ("mlp_bias", True)), lora=(("lora_bias", True),)),
    "gemma2": Case(family="gemma2"),
    "phi3": Case(family="phi3"),
}


def the_same(one: tuple[float, dict[str, Any]], other: tuple[float, dict[str, Any]]) -> bool:
    """To the last bit."""
    return one[0] == other[0] and all(torch.equal(one[1][name], other[1][name]) for name in one[1] | other[1])


@pytest.mark.slow
@pytest.mark.parametrize("layers", [True, 1], ids=["all", "one"])
@pytest.mark.parametrize("recompute", [False, True, 1], ids=["kept", "recomputed", "one layer recomputed"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_loss_and_every_gradient_are_those_without(case: Case, recompute: bool | int, layers: bool | int) -> None:
    model = adapted(case, lean=True, recompute=recompute)
    assert keep_weights(model, layers, F32)
    assert the_same(trained(model, micro_batches=3), trained(adapted(case, lean=True, recompute=recompute), F32, 3))


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_too(dtype: torch.dtype, recompute: bool) -> None:
    model, plain = (adapted(Case(), dtype, lean=True, recompute=recompute) for _ in range(2))
    keep_weights(model, True, dtype)
    assert the_same(trained(model, dtype), trained(plain, dtype))
    assert {kept.held.dtype for kept in kept_weights(model) if kept.held is not None} == {dtype}


SOFT = {
    "p-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=HIDDEN),
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prefix tuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "ia3": IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


def soft(name: str, *, recompute: bool, lean: bool = True, dtype: torch.dtype = F32) -> PeftModel:
    torch.manual_seed(3)
    return readied(get_peft_model(network(Case(), dtype), SOFT[name]), dtype, lean=lean, recompute=recompute)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "recompute"), [(name, again) for name in SOFT for again in (False, True) if not (again and "fix" in name)]
)
def test_products_of_bitsandbytes_own_are_the_same(name: str, recompute: bool, dtype: torch.dtype) -> None:
    model = soft(name, recompute=recompute, dtype=dtype)
    keep_weights(model, True, dtype)
    assert the_same(trained(model, dtype), trained(soft(name, recompute=recompute, dtype=dtype), dtype))
    assert all(kept.held is not None for kept in kept_weights(model))


def test_layers_that_stay_pefts_are_served_as_well() -> None:
    model = adapted(Case(), lean=False)
    keep_weights(model, True, F32)
    assert the_same(trained(model), trained(adapted(Case(), lean=False)))


def test_two_adapters_read_the_same_weights() -> None:
    def two() -> PeftModel:
        model = adapted(Case(), lean=True)
        torch.manual_seed(7)
        model.add_adapter("other", LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "up_proj"]))
        model.set_adapter("other")
        return model

    model = two()
    keep_weights(model, True, F32)
    assert the_same(trained(model), trained(two()))
    model.zero_grad()
    model.set_adapter("default")
    plain = two()
    plain.set_adapter("default")
    assert the_same(trained(model), trained(plain))


def dequantized_in(model: PeftModel, micro_batches: int = 1) -> int:
    """How many weights some micro-batches have read back."""
    with Count() as count:
        trained(model, micro_batches=micro_batches)
    return sum(calls for name, calls in count.calls.items() if name in ("dequantize_nested", "gemm_4bit"))


@pytest.mark.slow
def test_every_weight_is_dequantized_once() -> None:
    """Seven of a layer; without it each in forward and backward, but for three whose input wants no gradient."""
    model = adapted(Case(), lean=True)
    assert dequantized_in(model, 2) == 2 * (2 * 7 * LAYERS - 3)
    keep_weights(model, True, F32)
    assert dequantized_in(model, 3) == 7 * LAYERS
    assert dequantized_in(model) == 0
    keep_weights(model, 1, F32)
    assert dequantized_in(model, 1) == 7 + 2 * 7 * (LAYERS - 1)
    assert dequantized_in(model, 1) == 2 * 7 * (LAYERS - 1)


def test_they_are_made_together_at_the_first_product() -> None:
    model = adapted(Case(), lean=True)
    keep_weights(model, True, F32)
    first, *others = kept_weights(model)
    assert [kept.held for kept in (first, *others)] == [None] * 7 * LAYERS
    first.read(F32)
    assert all(kept.held is not None for kept in others)


def test_what_is_let_go_of_is_free() -> None:
    model = adapted(Case(), lean=True)
    keep_weights(model, True, F32)
    trained(model)
    held = [weakref.ref(kept.held) for kept in kept_weights(model) if kept.held is not None]
    assert len(held) == 7 * LAYERS
    assert keep_weights(model, False, F32)
    gc.collect()
    assert [one() for one in held] == [None] * len(held)
    assert not keep_weights(model, False, F32)
    model.zero_grad()
    assert the_same(trained(model), trained(adapted(Case(), lean=True)))


def test_what_is_kept_already_is_not_made_anew() -> None:
    model = adapted(Case(), lean=True)
    keep_weights(model, True, F32)
    trained(model)
    assert not keep_weights(model, LAYERS, F32)
    assert all(kept.held is not None for kept in kept_weights(model))


@pytest.mark.slow
def test_codes_that_were_loaded_or_moved_since_are_read_anew() -> None:
    torch.manual_seed(11)
    model, other = adapted(Case(), lean=True), adapted(Case(config=(("initializer_range", 0.5),)), lean=True)
    theirs = {kept: value for kept, value in other.state_dict().items() if ".absmax" not in kept}
    keep_weights(model, True, F32)
    trained(model)
    ours = dict(model.named_parameters())
    with torch.no_grad():  # in place, as a checkpoint is loaded
        for name, value in theirs.items():
            if name in ours and ours[name].dtype is torch.uint8:
                ours[name].copy_(value)
    plain = adapted(Case(), lean=True)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(ours[name])
    model.zero_grad()
    changed = trained(model)
    assert the_same(changed, trained(plain))
    model.zero_grad()
    for parameter in model.parameters():
        if parameter.dtype is torch.uint8:
            parameter.data = parameter.data.clone()  # elsewhere, and another number in them
            parameter.data[0] ^= 0x11
    for one in plain.parameters():
        if one.dtype is torch.uint8:
            with torch.no_grad():
                one[0] ^= 0x11
    plain.zero_grad()
    assert the_same(trained(model), trained(plain))
    assert distance(trained(model)[1], changed[1]) > 0


def test_another_type_is_the_callers_own() -> None:
    model = adapted(Case(), lean=True)
    keep_weights(model, True, F32)
    kept = kept_weights(model)[0]
    low = weight_of(kept.module, torch.bfloat16)
    assert (low.dtype, kept.held) == (torch.bfloat16, None)
    assert weight_of(kept.module, F32) is weight_of(kept.module, F32)


def test_calls_without_gradients_are_theirs() -> None:
    model, plain = soft("p-tuning", recompute=False), soft("p-tuning", recompute=False)
    keep_weights(model, True, F32)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids()).logits, plain(input_ids=ids()).logits)
    assert [kept.held for kept in kept_weights(model)] == [None] * 7 * LAYERS


def test_layers_that_wait_elsewhere_keep_nothing_here() -> None:
    base = network(Case(), F32)
    stream_layers(base, "host", "cpu")
    assert not keep_weights(base, True, F32)
    assert kept_weights(base) == []


def test_an_unquantized_base_has_nothing_to_keep() -> None:
    assert not keep_weights(adapted(Case(quantized=None), lean=True), True, F32)
