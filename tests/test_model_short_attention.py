"""Attention of short rows in 16 bits on a processor: computed in float32, and nobody else's attention is touched."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qtune.memory.tracing.device_state import answered_as_on_a_card
from qtune.model import short_attention
from qtune.model.short_attention import SHORT, install_short_attention

MODULE = SimpleNamespace(num_key_value_groups=3, is_causal=True)


@pytest.fixture(autouse=True)
def attend():
    before = AttentionInterface._global_mapping["sdpa"]
    install_short_attention()
    yield AttentionInterface._global_mapping["sdpa"]
    AttentionInterface.register("sdpa", before)


class Computed(TorchDispatchMode):
    """The types in which attention was computed."""

    def __init__(self) -> None:
        super().__init__()
        self.types: list[tuple[str, torch.dtype]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "scaled_dot_product" in str(func):
            self.types.append(("backward" if "backward" in str(func) else "forward", args[0].dtype))
        return func(*args, **(kwargs or {}))


def inputs(length: int, dtype: torch.dtype, scale: float = 3.0):
    torch.manual_seed(length)
    query = (scale * torch.randn(2, length, 6, 16)).to(dtype).transpose(1, 2)
    key, value = (torch.randn(2, length, 2, 16).to(dtype).transpose(1, 2) for _ in range(2))
    return tuple(tensor.detach().requires_grad_() for tensor in (query, key, value))


def masks(length: int, dtype: torch.dtype):
    seen = torch.ones(length, length, dtype=torch.bool).tril().expand(2, 1, length, length).clone()
    seen[0, :, :, 0] &= torch.arange(length) < 1  # a row that begins with padding
    return {
        "none": None,
        "bool": seen,
        "added": torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min),
    }


def gradients(attention, tensors, mask):
    out = attention(MODULE, *tensors, mask)[0]
    slope = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    return out, *torch.autograd.grad(out, tensors, slope)


@pytest.mark.parametrize("kind", ["none", "bool", "added"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_output_and_gradients_are_nearer_to_exact_ones_than_pytorchs(attend, dtype, kind):
    tensors = inputs(37, dtype)
    wide = tuple(tensor.detach().double().requires_grad_() for tensor in tensors)
    mask, exact_mask = masks(37, dtype)[kind], masks(37, torch.float64)[kind]
    exact = gradients(sdpa_attention_forward, wide, exact_mask)
    theirs = gradients(sdpa_attention_forward, tensors, mask)
    for ours, other, true in zip(gradients(attend, tensors, mask), theirs, exact, strict=True):
        assert ours.dtype is other.dtype is dtype
        assert ours.shape == true.shape
        assert (ours.double() - true).norm() <= 1.01 * (other.double() - true).norm()
        assert (ours.double() - true).norm() < 2 * torch.finfo(dtype).eps * true.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_rows_are_computed_in_float32_forward_and_backward(attend, dtype):
    with Computed() as computed:
        gradients(attend, inputs(SHORT - 1, dtype), None)
    assert computed.types == [("forward", torch.float32), ("backward", torch.float32)]


def test_under_autocast_the_result_has_its_type(attend):
    tensors = inputs(20, torch.float32)
    with torch.autocast("cpu", torch.bfloat16), Computed() as computed:
        out = attend(MODULE, *tensors, None)[0]
        assert torch.is_autocast_enabled("cpu")
    assert out.dtype is torch.bfloat16
    assert computed.types == [("forward", torch.float32)]


@pytest.mark.parametrize("case", ["long", "no gradient", "float32", "one query", "traced for a card"])
def test_every_other_attention_is_transformers_own(attend, monkeypatch, case):
    length = {"long": SHORT, "one query": 1}.get(case, 20)
    tensors = inputs(length, torch.float32 if case == "float32" else torch.bfloat16)
    given = []
    monkeypatch.setattr(short_attention, "sdpa_attention_forward", lambda module, *others: (given.append(others), None))
    with torch.set_grad_enabled(case != "no gradient"):
        if case == "traced for a card":
            with answered_as_on_a_card((9, 0)):
                attend(MODULE, *tensors, None)
        else:
            attend(MODULE, *tensors, None)
    ((query, key, value, mask),) = given
    assert (query is tensors[0], key is tensors[1], value is tensors[2], mask) == (True, True, True, None)


def test_a_model_is_given_it_with_the_lean_step(tiny_model):
    """By the public register, under the name that the model already has, so that its masks stay what they are."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from qtune.adapter.lean import install_lean_step

    AttentionInterface.register("sdpa", sdpa_attention_forward)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    install_lean_step(model, torch.bfloat16)
    ids = torch.arange(20)[None]
    with Computed() as computed:
        model(input_ids=ids, labels=ids).loss.backward()
    assert computed.types
    assert {dtype for _, dtype in computed.types} == {torch.float32}
