"""A merged model is the live 4-bit model with its adapter, whatever the adapter changes."""

from pathlib import Path

import pytest
import torch
from export_models import NF4, SHAPE, live_adapter, live_base, merged, some_ids, tiny_base
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel
from transformers import AutoModelForCausalLM

from qtune.errors import ExportError, RunError
from qtune.export.basis import Basis
from qtune.model.checkpoint import Checkpoint

pytestmark = [
    # peft 0.21.2 asks transformers 5.23 for the name that it is about to drop.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    # peft says that it saves the embedding, which is what these tests are about, and calls biases misshapen.
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape.*bias"),
]


def lora(**changes: object) -> LoraConfig:
    return LoraConfig(
        **{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": "all-linear", **changes}  # type: ignore[arg-type]
    )


FP32 = Basis("none", False, torch.float32, torch.float32)
ADAPTERS: dict[str, PeftConfig] = {
    "plain": lora(),
    "rank-stabilised": lora(use_rslora=True),
    "dora": lora(use_dora=True),
    "rank patterns": lora(rank_pattern={"q_proj": 2}, alpha_pattern={r"layers\.1\..*down_proj": 32, "k_proj": 1}),
    "some layers": lora(target_modules=["q_proj"], layers_to_transform=[1]),
    "trained embedding and head": lora(modules_to_save=["embed_tokens", "lm_head"]),
    "trained embedding": lora(modules_to_save=["embed_tokens"]),
    "trained norm": lora(modules_to_save=["norm"]),
    "lora on the embedding": lora(target_modules=["q_proj", "embed_tokens"]),
    "lora on the head": lora(target_modules=["q_proj", "lm_head"]),
    "trained token rows": lora(trainable_token_indices={"embed_tokens": [5, 9]}),
    "biases": lora(bias="all"),
    "bias of its own": lora(target_modules=["q_proj", "k_proj"], lora_bias=True),
    "ia3": IA3Config(
        task_type="CAUSAL_LM", target_modules=["q_proj", "k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_merged_logits_equal_those_of_the_live_4_bit_model(name: str, tied: bool, tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", "qwen2", tie_word_embeddings=tied)
    live = live_adapter(base, ADAPTERS[name], tmp_path / "adapter")
    _, model = merged(base, tmp_path / "adapter", tmp_path / "merged")
    bare = live_base(base)
    with torch.inference_mode():
        expected, bare_logits = live(some_ids()).logits, bare(some_ids()).logits
        assert (model(some_ids()).logits - expected).abs().max() < 2e-4
        assert (bare_logits - expected).abs().max() > 0.02, "the adapter changes nothing; this test would prove nothing"


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "gpt_neox"]
)
def test_families_merge(family: str, tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", family)
    live = live_adapter(base, lora(), tmp_path / "adapter")
    _, model = merged(base, tmp_path / "adapter", tmp_path / "merged")
    with torch.inference_mode():
        assert (model(some_ids()).logits - live(some_ids()).logits).abs().max() < 5e-4


def test_conv1d_weights_merge_in_their_own_orientation(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", "gpt2", n_embd=64, n_layer=2, n_head=4, n_inner=160)
    live = live_adapter(base, lora(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True), tmp_path / "adapter")
    _, model = merged(base, tmp_path / "adapter", tmp_path / "merged")
    with torch.inference_mode():
        assert (model(some_ids()).logits - live(some_ids()).logits).abs().max() < 5e-4


def test_pissa_takes_the_principal_components_out_of_the_base_as_training_did(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", "llama")
    live = live_adapter(base, lora(init_lora_weights="pissa"), tmp_path / "adapter", FP32)
    _, model = merged(base, tmp_path / "adapter", tmp_path / "merged", basis=FP32)
    with torch.inference_mode():
        assert (model(some_ids()).logits - live(some_ids()).logits).abs().max() < 5e-4


@pytest.mark.parametrize("name", ["plain", "rank-stabilised", "dora", "rank patterns", "ia3"])
def test_merged_tensors_are_peft_s_within_one_rounding(name: str, tmp_path: Path) -> None:
    """peft's merge of the same adapter into the same dequantized weights, both in fp32."""
    base = tiny_base(tmp_path / "base", "llama")
    live_adapter(base, ADAPTERS[name], tmp_path / "adapter")
    dequantized = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    dequantized.load_state_dict(live_base(base).dequantize().state_dict())
    expected = PeftModel.from_pretrained(dequantized, str(tmp_path / "adapter")).merge_and_unload().state_dict()
    merged(base, tmp_path / "adapter", tmp_path / "merged", dtype=torch.float16)
    written = Checkpoint.open(tmp_path / "merged")
    for key in written.tensors:
        ulp = torch.finfo(torch.float16).eps * expected[key].abs().clamp(min=torch.finfo(torch.float16).tiny)
        assert ((written.read(key).float() - expected[key]).abs() <= 0.51 * ulp).all(), key


def test_original_weights_take_the_adapter_without_quantization(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", "llama")
    live_adapter(base, lora(), tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).merge_and_unload()
    _, model = merged(base, tmp_path / "adapter", tmp_path / "merged", weights="original")
    for key, value in model.state_dict().items():
        assert torch.allclose(value, expected.state_dict()[key], atol=1e-6), key


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "fp4", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_untouched_weights_are_the_values_that_training_multiplied_with(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    basis = Basis(kind, True, dtype, dtype)  # type: ignore[arg-type]
    base = tiny_base(tmp_path / "base", "llama", dtype=torch.float32)
    live_adapter(base, lora(target_modules=["q_proj"]), tmp_path / "adapter")
    _, model = merged(base, tmp_path / "adapter", tmp_path / "merged", basis=basis)
    live = live_base(base, basis)
    if kind != "none":
        live = live.dequantize()
    for key, value in model.state_dict().items():
        if "q_proj" not in key:
            assert torch.equal(value, live.state_dict()[key].float()), key


def test_a_checkpoint_stored_in_4_bits_merges_into_plain_weights(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", "llama")
    live_base(base).save_pretrained(tmp_path / "stored")
    live = live_adapter(
        tmp_path / "stored", lora(), tmp_path / "adapter", Basis("none", False, torch.float32, torch.float32)
    )
    _, model = merged(tmp_path / "stored", tmp_path / "adapter", tmp_path / "merged")
    assert not hasattr(model.config, "quantization_config")
    with torch.inference_mode():
        assert (model(some_ids()).logits - live(some_ids()).logits).abs().max() < 2e-4


def test_new_tokens_come_with_their_rows(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", "llama", tie_word_embeddings=True)
    resized = live_base(base)
    resized.resize_token_embeddings(SHAPE["vocab_size"] + 8, mean_resizing=False)
    from peft import get_peft_model

    live = get_peft_model(resized, lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True)).eval()
    live.save_pretrained(str(tmp_path / "adapter"))
    _, model = merged(base, tmp_path / "adapter", tmp_path / "merged")
    assert model.config.vocab_size == SHAPE["vocab_size"] + 8
    ids = some_ids() + 8
    with torch.inference_mode():
        assert (model(ids).logits - live(ids).logits).abs().max() < 2e-4


def test_a_value_beyond_float16_is_an_error_that_names_the_tensor_and_the_way_out(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", "llama")
    config = lora(target_modules=["q_proj"], lora_alpha=100_000_000)
    live_adapter(base, config, tmp_path / "adapter")
    with pytest.raises(
        ExportError,
        match=r"q_proj\.weight: its largest value .* does not fit float16 \(65504\); export with --dtype bfloat16",
    ):
        merged(base, tmp_path / "adapter", tmp_path / "merged", dtype=torch.float16)


def test_an_adapter_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", "llama")
    other = tiny_base(tmp_path / "other", "gpt2", n_embd=64, n_layer=2, n_head=4)
    live_adapter(other, lora(target_modules=["c_attn"], fan_in_fan_out=True), tmp_path / "adapter")
    with pytest.raises(RunError, match=r"has no transformer\.h\.0\.attn\.c_attn\.weight, which the adapter changes"):
        merged(base, tmp_path / "adapter", tmp_path / "merged")


def test_an_adapter_of_another_size_is_refused_by_name(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", "llama")
    other = tiny_base(tmp_path / "other", "llama", hidden_size=96, head_dim=24)
    live_adapter(other, lora(target_modules=["q_proj"]), tmp_path / "adapter")
    with pytest.raises(RunError, match=r"q_proj\.weight is \[64, 64\], the adapter was trained for \[96, 96\]"):
        merged(base, tmp_path / "adapter", tmp_path / "merged")


def test_nf4_is_the_default_of_these_tests() -> None:
    assert NF4.kind == "nf4"
    assert NF4.double_quantization
