"""What a recipe saves: each way of training and each technique holds what a count by hand gives."""

import pytest
from test_memory_trace import CARD, recipe_with, tiny

from qtune.memory.cached import predicted
from qtune.memory.predict import Longest, Prediction
from qtune.memory.savings import Variant, attribution, baselines, trl_version
from qtune.plan import Plan, make_plan
from qtune.recipe.schema import Recipe

LENGTH = Longest(128, equal=True)
LINEAR = [64 * 64, 32 * 64, 32 * 64, 64 * 64, 128 * 64, 128 * 64, 128 * 64]
"""Weights of q, k, v, o, gate, up and down in a layer of `tiny()`."""
EMBEDDING = 256 * 64
NORMS = 3
ONE = {"kind": "lora", "rank": 4, "target_modules": ["q_proj"]}
ADAPTER = 2 * 4 * 64
"""Weights of A and B on q."""


def rounded(size: float) -> int:
    """The caching allocator's multiple of 512 bytes."""
    return -(-int(size) // 512) * 512


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def planned(**tables) -> tuple[Recipe, Plan]:
    recipe = recipe_with(**{"adapter": ONE, **tables})
    return recipe, make_plan(recipe, CARD)


@pytest.fixture(scope="module")
def usual() -> dict[str, Prediction]:
    found = baselines(tiny(layers=1), *planned(training={"gradient_checkpointing": True}), LENGTH)
    return {way.name: way.prediction for way in found}


def in_the_optimizer(prediction: Prediction) -> dict[str, int]:
    return prediction.by_phase["optimizer"].alive


def test_the_usual_ways_are_the_promised_ones(usual) -> None:
    assert list(usual) == [
        "full fine-tuning, fp32", "full fine-tuning, bf16", "lora, bf16 base", "QLoRA as in 2023",
        f"TRL {trl_version()} as it comes",
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "word", "size"), [("fp32", "fp32", 4), ("bf16", "bf16", 2)])
def test_full_fine_tuning_holds_weights_gradients_and_two_moments_of_every_parameter(usual, name, word, size) -> None:
    alive = in_the_optimizer(usual[f"full fine-tuning, {name}"])
    weights = [*LINEAR, *[64] * NORMS]
    assert alive[f"base weights {word}"] == sum(rounded(size * count) for count in weights)
    assert alive["embeddings"] == alive["head"] == size * EMBEDDING
    one_for_each = sum(rounded(size * count) for count in (*weights, EMBEDDING, EMBEDDING))
    assert alive["gradients"] == one_for_each
    assert alive["optimizer state"] == 2 * one_for_each + 512 * (len(weights) + 2)  # and a step count


def test_a_16_bit_base_takes_two_bytes_a_weight_and_only_the_adapter_trains(usual) -> None:
    alive = in_the_optimizer(usual["lora, bf16 base"])
    assert alive["base weights bf16"] == 2 * sum(LINEAR) + 512 * NORMS
    assert alive["adapter"] == alive["gradients"] == 4 * ADAPTER
    assert alive["optimizer state"] == 8 * ADAPTER + 2 * 512


def test_the_script_of_2023_has_4_bit_linears_and_everything_else_in_fp32(usual) -> None:
    alive = in_the_optimizer(usual["QLoRA as in 2023"])
    assert alive["base weights 4-bit"] == sum(LINEAR) // 2
    assert alive["base weights fp32"] == NORMS * 512
    assert alive["embeddings"] == alive["head"] == 4 * EMBEDDING
    assert alive["adapter"] == 4 * ADAPTER


def test_trl_holds_a_16_bit_adapter_and_leaves_the_rest_in_16_bits(usual) -> None:
    alive = in_the_optimizer(usual[f"TRL {trl_version()} as it comes"])
    assert alive["base weights 4-bit"] == sum(LINEAR) // 2
    assert alive["adapter"] == alive["gradients"] == 2 * ADAPTER
    assert alive["embeddings"] == alive["head"] == 2 * EMBEDDING


def test_the_usual_ways_of_old_hold_the_whole_logits_in_fp32_more_than_once(usual) -> None:
    logits = 2 * 128 * 256 * 4  # rows x length x vocabulary x fp32
    for name, prediction in usual.items():
        if name.startswith("TRL"):
            continue
        assert prediction.by_phase["forward"].alive["logits and loss"] >= 2 * logits, name


STORED = {
    "int8": {"load_in_8bit": True},
    "nf4": {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", STORED)
def test_of_a_base_that_is_stored_quantized_the_usual_ways_hold_what_they_would_of_the_weights(kind, usual) -> None:
    stored = tiny(layers=1, quantization_config={"quant_method": "bitsandbytes", **STORED[kind]})
    recipe, plan = planned(quantization={"kind": kind}, training={"gradient_checkpointing": True})
    for way in baselines(stored, recipe, plan, LENGTH)[:4]:
        assert way.prediction.peak == usual[way.name].peak, way.name


def test_of_a_base_that_is_stored_quantized_each_technique_saves_what_it_would_of_the_weights() -> None:
    recipe, plan = planned()
    stored = tiny(layers=1, quantization_config={"quant_method": "bitsandbytes", **STORED["nf4"]})
    bare = {way.name: way.prediction for way in attribution(tiny(layers=1), recipe, plan, LENGTH)}
    for way in attribution(stored, recipe, plan, LENGTH):
        assert way.prediction.peak == bare[way.name].peak, way.name


def test_the_usual_ways_accumulate_where_the_recipe_does() -> None:
    recipe, plan = planned(training={"batch_size": 4, "micro_batch_size": 2})
    whole = baselines(tiny(layers=1), recipe, plan, LENGTH)[0].prediction
    # The gradients of the earlier micro-batch are there while the next one goes forward.
    assert whole.by_phase["forward"].alive["gradients"] == in_the_optimizer(whole)["gradients"]


def explained(config, recipe: Recipe, plan: Plan, rows: Longest = LENGTH) -> tuple[Prediction, dict[str, Variant]]:
    found = attribution(config, recipe, plan, rows)
    return predicted(config, recipe, plan, rows), {way.name: way for way in found}


def single(weights: int) -> int:
    """Constants of an NF4 weight: an fp32 absmax for each block of 64, and the code book."""
    return rounded(4 * weights / 64) + 512


def double(weights: int) -> int:
    """The absmax in 8 bits, with an fp32 one for 256 of them, two code books and an offset."""
    blocks = weights // 64
    return rounded(blocks) + rounded(4 * -(-blocks // 256)) + 512 + 1024 + 512


@pytest.mark.slow
def test_each_technique_saves_what_a_count_by_hand_gives() -> None:
    """Weights large enough that rounding hides nothing; in the optimizer's phase there are no activations."""
    config = tiny(layers=1, hidden_size=512, intermediate_size=1024)
    adapter = {"kind": "lora", "rank": 64, "target_modules": ["q_proj"]}
    ours, found = explained(config, *planned(adapter=adapter, training={"optimizer": "adamw-8bit"}))
    assert set(found) == {
        "nf4 weights", "double quantization", "lean step", "gradient checkpointing", "adamw-8bit optimizer",
        "tiled loss",
    }  # fmt: skip

    def at_rest(name: str) -> int:
        alive = in_the_optimizer(found[name].prediction)
        return sum(alive.values()) - sum(in_the_optimizer(ours).values()) - alive["other"] + mine["other"]

    mine = in_the_optimizer(ours)
    linear = [512 * 512, 256 * 512, 256 * 512, 512 * 512, *[1024 * 512] * 3]
    assert at_rest("nf4 weights") == sum(2 * count - count // 2 - double(count) for count in linear)
    assert at_rest("double quantization") == sum(single(count) - double(count) for count in linear) > 0
    trained = 512 * 64  # each of A and B
    plain = 2 * (2 * 4 * trained + 512)  # two fp32 moments and a step count
    blocks = 2 * rounded(4 * trained / 256)  # an fp32 absmax for each block of 256, of each moment
    assert at_rest("adamw-8bit optimizer") == plain - 2 * (2 * trained + blocks) - 2 * 1024  # two code books for all
    assert at_rest("lean step") == -2 * 2 * trained  # A and B once more, in the 16 bits of their products
    assert found["nf4 weights"].prediction.peak.bytes - ours.peak.bytes > 0


@pytest.mark.slow
def test_checkpointing_saves_the_activations_of_all_layers_but_one() -> None:
    peaks = {}
    plan = planned(quantization={"kind": "none"}, training={"gradient_checkpointing": True})
    for layers in (2, 4):
        ours, found = explained(tiny(layers=layers), *plan)
        without = found["gradient checkpointing"].prediction
        assert ours.peak.alive["checkpointed activations"] > 0
        assert not {"checkpointed activations", "recomputed activations"} & set(without.peak.alive)
        peaks[layers] = ours.peak.alive["recomputed activations"], without.peak.alive["activations"]
    assert peaks[4][0] == peaks[2][0]  # one layer is recomputed at a time, however many there are
    hidden = 2 * 128 * 64 * 2
    assert (peaks[4][1] - peaks[2][1]) / 2 > 4 * hidden  # kept of each layer: attention's and the MLP's inputs alone


def test_a_tiled_loss_saves_the_logits() -> None:
    config, rows = tiny(layers=1, vocab_size=8192), Longest(512, equal=True)
    ours, found = explained(config, *planned(quantization={"kind": "none"}, memory={"loss_tile": "1MiB"}), rows)
    logits = 2 * 512 * 8192 * 4
    whole = found["tiled loss"].prediction.by_phase["forward"].alive["logits and loss"]
    assert whole >= logits
    assert ours.by_phase["forward"].alive.get("logits and loss", 0) <= 4 * 2**20
    tile = 64 * 2**20
    assert found["smaller loss tiles"].prediction.peak.bytes > ours.peak.bytes
    assert found["smaller loss tiles"].how == f"tiles of {tile // 2**20} MiB"


@pytest.mark.slow
def test_what_waits_in_host_memory_is_what_it_saves_on_the_card() -> None:
    rows = Longest(4096, equal=True)  # a hidden state of a layer is 1 MiB, the least that is moved
    memory = {"embeddings": "host", "activations": "host"}
    ours, found = explained(tiny(layers=3), *planned(quantization={"kind": "none"}, memory=memory), rows)
    moved = in_the_optimizer(found["embeddings on the host"].prediction)
    mine = in_the_optimizer(ours)
    for name in ("embeddings", "head"):
        assert moved[name] - mine.get(name, 0) == 2 * EMBEDDING - 512  # an empty stand-in stays
    on_card = found["activations on the host"].prediction.peak
    hidden = 2 * 4096 * 64 * 2
    kept = on_card.alive["checkpointed activations"] - ours.peak.alive["checkpointed activations"]
    assert 1 * hidden <= kept <= 3 * hidden
    assert on_card.bytes > ours.peak.bytes
