"""Deep models are traced with fewer layers only where the bytes are those of tracing every layer, at every tick.

That is on a CPU: for a card every layer is traced, since its allocator is played with every tensor.
"""

import itertools

import numpy
import pytest
import torch
from test_memory_trace import CPU, recipe_with, tiny
from test_memory_tracing_families import GROUPED, HIDDEN
from transformers import AutoConfig, PretrainedConfig

from qtune.memory.predict import Longest, build, predict, training_step
from qtune.memory.tracing.history import History
from qtune.memory.tracing.layers import Repetition, repetition, shortened, signatures
from qtune.memory.tracing.trace import trace
from qtune.model.load import attention_rule
from qtune.plan import make_plan
from qtune.recipe.schema import Recipe

# peft 0.21 looks for the experts among the modules, where transformers 5 has fused parameters.
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")

ROUTED = {**GROUPED, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {
    "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 4,
}  # fmt: skip
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
WINDOWED = {**GROUPED, "head_dim": 16, "sliding_window": 32}


def config_of(family: str, layers: int, **given) -> PretrainedConfig:
    return AutoConfig.for_model(family, **{**given, "num_hidden_layers": layers})


def model_of(config: PretrainedConfig) -> torch.nn.Module:
    recipe = recipe_with()
    return build(config, recipe, make_plan(recipe, CPU, attention_rule(config)))


def repeats(config: PretrainedConfig) -> Repetition | None:
    return repetition(signatures(model_of(config)), config.get_text_config())


LORA = {"kind": "lora", "rank": 4}
P_TUNING = {"kind": "p-tuning", "virtual_tokens": 8}
KEPT, CHECKPOINTED = {"gradient_checkpointing": False}, {"gradient_checkpointing": True}

# Families against settings: each way of repeating, each adapter, with and without checkpointing, 8-bit states.
STRETCHED = {
    "llama": (tiny(layers=10), {"training": CHECKPOINTED}),
    "llama, kept": (
        tiny(layers=10),
        {"training": KEPT, "adapter": {**LORA, "target_modules": ["q_proj", "down_proj"]}},
    ),
    "llama, accumulated": (tiny(layers=10), {"training": {**CHECKPOINTED, "batch_size": 8}, "adapter": P_TUNING}),
    "tied embeddings": (
        tiny(layers=11, tie_word_embeddings=True),
        {"training": {**CHECKPOINTED, "optimizer": "adamw-8bit"}, "adapter": {**LORA, "target_modules": ["o_proj"]}},
    ),
    "gpt2": (
        config_of("gpt2", 10, n_embd=64, n_head=4, vocab_size=256, n_positions=256, pad_token_id=0),
        {"adapter": P_TUNING, "training": {**KEPT, "optimizer": "paged-adamw-8bit"}},
    ),
    "gpt_neox": (config_of("gpt_neox", 10, **HIDDEN), {"adapter": P_TUNING}),
    "mixtral": (
        config_of("mixtral", 10, **GROUPED, num_local_experts=4, num_experts_per_tok=2),
        {"adapter": P_TUNING, "training": KEPT},
    ),
    "dense layers first": (
        config_of("deepseek_v3", 14, **{**ROUTED, **LATENT}, first_k_dense_replace=3),
        {"adapter": P_TUNING},
    ),
    "every second layer with experts": (
        config_of("qwen2_moe", 21, **ROUTED, num_experts=4, decoder_sparse_step=2, shared_expert_intermediate_size=32),
        {"adapter": P_TUNING},
    ),
    "two windows": (config_of("gemma2", 20, **WINDOWED), {"adapter": P_TUNING, "training": KEPT}),
}  # fmt: skip


def stretched_and_whole(config: PretrainedConfig, recipe: Recipe) -> tuple[History, History, int]:
    plan = make_plan(recipe, CPU, attention_rule(config))
    step = training_step(recipe, plan, Longest(64))
    short = trace(config, lambda shape: build(shape, recipe, plan), step, card=None)
    whole = trace(config, lambda shape: build(shape, recipe, plan), step, card=None, every_layer=True)
    assert whole.layers_executed == config.num_hidden_layers
    return short.history, whole.history, short.layers_executed


@pytest.mark.slow
@pytest.mark.parametrize("name", STRETCHED)
def test_a_stretched_history_is_that_of_tracing_every_layer(name):
    config, tables = STRETCHED[name]
    stretched, whole, executed_layers = stretched_and_whole(config, recipe_with(**tables))
    assert executed_layers < config.num_hidden_layers
    assert stretched.names == whole.names
    assert numpy.array_equal(stretched.bytes, whole.bytes)
    assert stretched.labels == whole.labels
    assert stretched.paged == whole.paged


@pytest.mark.slow
def test_how_layers_repeat_is_read_from_what_they_are_made_of():
    latent = {**ROUTED, **LATENT}
    assert repeats(tiny(layers=10)) == Repetition(0, 1)
    assert repeats(config_of("gemma3_text", 60, **WINDOWED)) == Repetition(0, 6)
    hybrid = {**ROUTED, **LINEAR, "head_dim": 16, "num_experts": 4, "shared_expert_intermediate_size": 32}
    assert repeats(config_of("qwen3_next", 40, **hybrid)) == Repetition(0, 4)
    # A first group of its own is allowed, so one dense layer is no front, and two of three are.
    assert repeats(config_of("deepseek_v3", 20, **latent, first_k_dense_replace=1)) == Repetition(0, 1)
    assert repeats(config_of("deepseek_v3", 20, **latent, first_k_dense_replace=3)) == Repetition(2, 1)


@pytest.mark.slow
def test_layers_that_do_not_repeat_are_not_taken_for_repeated_ones():
    experts = {**ROUTED, "num_experts": 4, "shared_expert_intermediate_size": 32}
    irregular = {
        "a window in the upper layers": config_of(
            "qwen2", 12, **GROUPED, use_sliding_window=True, sliding_window=32, max_window_layers=7
        ),
        "one dense layer among experts": config_of("qwen2_moe", 12, **experts, mlp_only_layers=[8]),
        "the last layer": config_of("qwen2_moe", 12, **experts, mlp_only_layers=[11]),
        "few layers": tiny(layers=9),
    }
    assert {name: repeats(config) for name, config in irregular.items()} == dict.fromkeys(irregular)


@pytest.mark.slow
def test_one_layer_that_is_not_like_the_others_is_noticed_whatever_it_is():
    def changed(change) -> Repetition | None:
        model = model_of(config)
        change(model.get_base_model().model.layers[7])
        return repetition(signatures(model), config)

    config = tiny(layers=12)
    assert changed(lambda layer: None) == Repetition(0, 1)
    assert changed(lambda layer: setattr(layer.self_attn, "sliding_window", 32)) is None
    assert changed(lambda layer: setattr(layer.mlp, "forward", lambda x: x)) is None
    assert changed(lambda layer: layer.mlp.register_buffer("extra", torch.empty(3))) is None
    assert changed(lambda layer: setattr(layer, "mlp", torch.nn.Identity())) is None
    assert changed(lambda layer: layer.input_layernorm.weight.requires_grad_(True)) is None


def executed_layers(monkeypatch, change) -> int:
    """How many layers are traced of a model of 12, after `change` of each of its layers (its number, of how many)."""

    def changed(shape, recipe, plan):
        model = build(shape, recipe, plan)
        layers = model.get_base_model().model.layers
        for number, layer in enumerate(layers):
            change(layer, number, len(layers))
        return model

    monkeypatch.setattr("qtune.memory.predict.build", changed)
    monkeypatch.setattr("qtune.memory.tracing.trace._built", {})  # what was built before, without the change
    recipe = recipe_with(adapter=P_TUNING)
    return predict(tiny(layers=12), recipe, make_plan(recipe, CPU)).layers_executed


def extra(count: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty(count, device="meta"), requires_grad=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "executed"),
    [
        (lambda layer, number, total: setattr(layer, "extra", extra(1024 if number == 0 else 1)), 9),
        (lambda layer, number, total: setattr(layer, "extra", extra(1 + number**2)), 12),
        (lambda layer, number, total: setattr(layer, "of_so_many", total), 12),
    ],
    ids=["a first layer of its own", "growing layers", "layers that depend on the depth"],
)
def test_what_is_not_the_same_with_fewer_layers_is_traced_whole(monkeypatch, change, executed):
    assert executed_layers(monkeypatch, change) == executed


def test_a_shorter_configuration_keeps_its_lists_in_step():
    gemma = STRETCHED["two windows"][0]
    short = shortened(gemma, 4)
    assert short.num_hidden_layers == len(short.layer_types) == 4
    assert gemma.num_hidden_layers == len(gemma.layer_types) == 20
    assert short.layer_types == list(itertools.islice(gemma.layer_types, 4))
