"""Models computed in float32 on the values of their weights: what is compared, without 16-bit noise."""

import copy
from pathlib import Path

import pytest
import torch
from export_models import live_adapter, live_base, some_ids, tiny_base
from peft import IA3Config, LoraConfig, PromptEncoderConfig
from transformers import AutoModelForCausalLM

from qtune.export.basis import Basis, as_trained
from qtune.export.layout import empty_model, layout_of
from qtune.export.verify.exact import in_float32
from qtune.model.checkpoint import Checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
LOW = [torch.bfloat16, torch.float16]
FAMILIES = ["llama", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "gpt2", "gpt_neox", "mixtral", "qwen3_moe", "olmo2"]


@torch.inference_mode()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=some_ids(), use_cache=False).logits


@pytest.mark.slow
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_in_16_bits_computes_as_its_float32_copy(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    more = {"n_embd": 64, "n_layer": 2, "n_head": 4} if family == "gpt2" else {}
    base = tiny_base(tmp_path / "base", family, **more)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation="eager").eval()
    wide = copy.deepcopy(model).float()
    before = logits(model)
    with in_float32(model):
        found = logits(model)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, logits(wide), rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(model), before)  # and is what it was afterwards


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("dtype", LOW)
def test_a_quantized_model_computes_on_the_values_that_training_multiplied_with(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = tiny_base(tmp_path / "base", intermediate_size=160)  # rows that begin within a block, too
    basis = Basis(kind, kind != "int8", dtype, dtype)  # type: ignore[arg-type]
    live = live_base(base, basis).eval()
    with in_float32(live):
        found = logits(live)

    reference = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval().float()
    checkpoint = Checkpoint.open(base)
    layout = layout_of(empty_model(base), list(checkpoint.tensors))
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if name in layout.quantized:
                parameter.copy_(as_trained(checkpoint.read(name), basis).float())
    torch.testing.assert_close(found, logits(reference), rtol=1e-4, atol=1e-4)


ADAPTERS = {
    "lora": LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"),
    "dora": LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", use_dora=True),
    "ia3": IA3Config(task_type="CAUSAL_LM"),
    "p-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_in_16_bits_computes_as_its_float32_copy(name: str, tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base")
    unquantized = Basis("none", False, torch.bfloat16, torch.bfloat16)
    model = live_adapter(base, ADAPTERS[name], tmp_path / "adapter", unquantized).to(torch.bfloat16)
    wide = copy.deepcopy(model).float()
    before = logits(model)
    with in_float32(model):
        found = logits(model)
    torch.testing.assert_close(found, logits(wide), rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(model), before)


def test_an_error_inside_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base(tmp_path / "base"), dtype=torch.bfloat16).eval()
    before = logits(model)
    with pytest.raises(IndexError), in_float32(model):
        model(input_ids=torch.tensor([[10**6]]))
    assert torch.equal(logits(model), before)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
