"""Families of causal LMs: what is traced is what a real step on the CPU takes, and what loading would have loaded."""

import pytest
import torch
from test_memory_trace import CARD, CPU, executed, recipe_with
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from qtune.memory.predict import Longest, predict
from qtune.memory.tracing.bare_model import bare_model
from qtune.model.load import attention_rule, load_base
from qtune.model.quantization import quantization_config
from qtune.plan import make_plan

# peft 0.21 looks for Mixtral's experts among the modules, where transformers 5 has fused parameters.
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")

HIDDEN = {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 256,
    "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**HIDDEN, "num_key_value_heads": 2}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 256, "n_positions": 256, "pad_token_id": 0},
    "gpt_neox": HIDDEN,
    "phi": {**HIDDEN, "num_key_value_heads": 4},
    "qwen2": GROUPED,
    "gemma2": {**GROUPED, "head_dim": 16, "sliding_window": 32},
    "mixtral": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**GROUPED, **EXPERTS, "head_dim": 16, "num_experts": 4},
    "olmo2": GROUPED,
}


def config_of(family: str) -> PretrainedConfig:
    return AutoConfig.for_model(family, **FAMILIES[family])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_steps_of_a_family_take_the_traced_bytes(tmp_path, family):
    config = config_of(family)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    given = {"minimum_share": 0.0}
    recipe = recipe_with(quantization=given, training={"gradient_checkpointing": True}, data={"max_length": 64})
    plan, longest = make_plan(recipe, CPU, attention_rule(config)), Longest(64, equal=True)
    real = executed(str(tmp_path), recipe, plan, longest)
    traced = predict(config, recipe, plan, longest).history
    for phase in ("forward", "backward", "optimizer"):
        assert traced.peak(phase).bytes == pytest.approx(real.peak(phase).bytes, rel=0.01), phase


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "phi", "gpt_neox", "gemma2", "mixtral"])
def test_a_checkpointed_step_can_be_traced_as_on_a_card(family):
    config = config_of(family)
    recipe = recipe_with(training={"gradient_checkpointing": True}, data={"max_length": 64})
    traced = predict(config, recipe, make_plan(recipe, CARD, attention_rule(config)), Longest(64))
    assert traced.history.peak("backward").bytes > 0


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "mixtral"])
def test_a_bare_model_has_the_dtypes_of_a_loaded_one(tmp_path, family):
    config = config_of(family)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    recipe = recipe_with(quantization={"minimum_share": 0.0, "compute_dtype": "bfloat16"})
    plan = make_plan(recipe, CPU)
    loaded = load_base(recipe.model.model_copy(update={"base": str(tmp_path)}), recipe.quantization, plan)
    quantization = quantization_config(recipe.quantization, torch.bfloat16)
    bare = bare_model(config, torch.bfloat16, quantization, plan.attention)
    types = [{name: (p.dtype, p.numel()) for name, p in model.named_parameters()} for model in (loaded, bare)]
    assert types[0] == types[1]


def test_a_class_without_sdpa_is_given_eager_attention():
    assert attention_rule(config_of("gemma2")) == ("eager", "Gemma2ForCausalLM cannot be given sdpa")
    assert attention_rule(config_of("qwen2")) == ("sdpa", "runs on every device")
