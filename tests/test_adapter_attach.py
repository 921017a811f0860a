"""Every kind and option of an adapter trains, keeps its dtype, and comes back from disk bit for bit."""

from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from datasets import Dataset
from export_models import tiny_base
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qtune.adapter.attach import attach_adapter
from qtune.adapter.prompt_encoder import measure_unit
from qtune.adapter.starts import Material, start_from_activations, start_from_residual, start_prompt
from qtune.adapter.state import (
    STATE_FILE,
    load_adapter,
    load_trained_state,
    save_adapter,
    save_trained_state,
    trained_state,
)
from qtune.device.present import Device
from qtune.errors import ModelError
from qtune.model.checkpoint import Checkpoint
from qtune.model.load import load_base
from qtune.model.loss import install_loss
from qtune.plan import Plan, make_plan
from qtune.recipe.parse import parse_recipe
from qtune.recipe.schema import IA3, Adapter, FourBit, Lora, Model, PrefixTuning, PromptTuning, PTuning, Unquantized

CPU = Device("cpu", "CPU", 8 * 2**30, 6 * 2**30, bf16=False)
IDS = torch.arange(3, 35).reshape(2, 16)

ROWS = Dataset.from_dict({"input_ids": IDS.tolist()})

ADAPTERS: dict[str, Adapter] = {
    "lora": Lora(rank=4, dropout=0.1),
    "lora on named layers": Lora(rank=4, target_modules=("q_proj", "down_proj")),
    "rslora": Lora(rank=4, rslora=True),
    "dora": Lora(rank=4, dora=True),
    "gaussian": Lora(rank=4, initialization="gaussian"),
    "p-tuning mlp": PTuning(kind="p-tuning", virtual_tokens=4, encoder_hidden_size=32),
    "p-tuning lstm": PTuning(
        kind="p-tuning", virtual_tokens=4, encoder="lstm", encoder_hidden_size=32, encoder_layers=1, encoder_dropout=0.0
    ),
    "p-tuning default width": PTuning(kind="p-tuning", virtual_tokens=4),
    "prompt-tuning": PromptTuning(kind="prompt-tuning", virtual_tokens=4),
    "prompt-tuning random": PromptTuning(kind="prompt-tuning", virtual_tokens=4, initialization="random"),
    "prompt-tuning text": PromptTuning(
        kind="prompt-tuning", virtual_tokens=9, initialization="text", text="You are brief."
    ),
    "prompt-tuning rows": PromptTuning(kind="prompt-tuning", virtual_tokens=9, initialization="rows"),
    "prompt-tuning residual": PromptTuning(
        kind="prompt-tuning", virtual_tokens=9, residual=True, encoder_hidden_size=16, initialization="rows"
    ),
    "p-tuning mlp residual": PTuning(
        kind="p-tuning", virtual_tokens=4, residual=True, vector_rate=3.0, initialization="text", text="You are brief."
    ),
    "p-tuning lstm residual": PTuning(
        kind="p-tuning", virtual_tokens=4, encoder="lstm", encoder_hidden_size=32, residual=True
    ),
    "prefix-tuning": PrefixTuning(kind="prefix-tuning", virtual_tokens=4),
    "prefix-tuning projection": PrefixTuning(
        kind="prefix-tuning", virtual_tokens=4, projection=True, encoder_hidden_size=32
    ),
    "ia3": IA3(kind="ia3"),
    "ia3 on named layers": IA3(kind="ia3", target_modules=("k_proj", "down_proj"), feedforward_modules=("down_proj",)),
}


def plan_for(dtype: str = "float32") -> Plan:
    recipe = parse_recipe({"model": {"base": "x"}, "data": {"train": "y"}, "adapter": {"dtype": dtype}})
    return make_plan(recipe, CPU)


def attached(base: Path, adapter: Adapter, *, dtype: str = "float32", quantized: bool = True) -> PeftModel:
    plan = plan_for(dtype)
    quantization = FourBit(minimum_share=0.0) if quantized else Unquantized(kind="none")
    network = load_base(Model(base=str(base)), quantization, plan)
    install_loss(network)
    torch.manual_seed(0)
    model = attach_adapter(network, adapter, plan)
    if getattr(adapter, "residual", False) or getattr(adapter, "initialization", None) in ("text", "rows"):
        measure_unit(model)
        start_prompt(model, adapter, Material(AutoTokenizer.from_pretrained(base), ROWS, 2), seed=0)
    return model


def loss_of(model: PeftModel) -> torch.Tensor:
    return model(input_ids=IDS, labels=IDS, attention_mask=torch.ones_like(IDS), use_cache=False).loss


def trained_a_little(model: PeftModel, steps: int = 3) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


# --- every kind and option -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTERS)
def test_it_learns_and_comes_back_bit_for_bit(tiny_model: Path, tmp_path: Path, name: str) -> None:
    adapter = ADAPTERS[name]
    model = attached(tiny_model, adapter)
    losses = trained_a_little(model, steps=6)
    assert losses[-1] < losses[0]
    state = {key: tensor.clone() for key, tensor in trained_state(model).items()}
    assert state
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    save_adapter(model, tmp_path)

    # Training goes on from the whole state, the prompt encoder's included …
    again = attached(tiny_model, adapter)
    load_trained_state(again, tmp_path)
    assert trained_state(again).keys() == state.keys()
    for key, tensor in trained_state(again).items():
        assert torch.equal(tensor, state[key]), key
    assert torch.equal(logits_of(again.eval()), logits_of(model))

    # … and peft's own file says the same to whoever only uses the adapter.
    used = load_adapter(load_base(Model(base=str(tiny_model)), FourBit(minimum_share=0.0), plan_for()), tmp_path)
    torch.testing.assert_close(logits_of(used.eval()), logits_of(model), rtol=1e-5, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in used.parameters())


@pytest.mark.parametrize("name", ["lora", "p-tuning lstm", "prompt-tuning", "prefix-tuning", "ia3"])
def test_what_is_trained_has_the_dtype_of_the_plan_and_nothing_else_does(tiny_model: Path, name: str) -> None:
    model = attached(tiny_model, ADAPTERS[name], dtype="bfloat16")
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.bfloat16, key
        elif not isinstance(parameter, bnb.nn.Params4bit):
            assert parameter.dtype == torch.float32, key


def test_all_linear_means_every_linear_layer_but_the_head(tiny_model: Path) -> None:
    model = attached(tiny_model, Lora(rank=2))
    adapted = {name.split(".lora_A")[0].split(".")[-1] for name in trained_state(model) if "lora_A" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(("rslora", "scale"), [(False, 32 / 16), (True, 32 / 4)])
def test_the_scale_is_alpha_over_rank_or_its_root(tiny_model: Path, rslora: bool, scale: float) -> None:
    model = attached(tiny_model, Lora(rank=16, alpha=32, rslora=rslora))
    assert model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] == scale


@pytest.mark.parametrize("name", ["lora", "rslora", "dora", "gaussian", "ia3"])
def test_a_fresh_adapter_on_the_weights_changes_nothing(tiny_model: Path, name: str) -> None:
    before = logits_of(load_base(Model(base=str(tiny_model)), FourBit(minimum_share=0.0), plan_for()))
    torch.testing.assert_close(logits_of(attached(tiny_model, ADAPTERS[name]).eval()), before, rtol=1e-4, atol=1e-5)


# --- starts --------------------------------------------------------------------------------------------------------


def test_a_text_start_is_the_texts_embeddings_repeated(tiny_model: Path) -> None:
    model = attached(tiny_model, ADAPTERS["prompt-tuning text"])
    ids = AutoTokenizer.from_pretrained(tiny_model)("You are brief.", add_special_tokens=False)["input_ids"]
    ids = (ids * 9)[:9]
    vectors = model.prompt_encoder["default"].embedding.weight
    assert torch.equal(vectors, model.get_base_model().get_input_embeddings()(torch.tensor(ids)))


def test_a_vocabulary_start_is_rows_of_the_table(tiny_model: Path) -> None:
    model = attached(tiny_model, ADAPTERS["prompt-tuning"])
    table = model.get_base_model().get_input_embeddings().weight
    for vector in model.prompt_encoder["default"].embedding.weight:
        assert (table == vector).all(dim=1).any()


@torch.no_grad()
def weight_errors(model: PeftModel, base: Path) -> list[tuple[float, float]]:
    """For each adapted layer: the distance of its weight from the original, without and with the adapter."""
    original = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    errors = []
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            exact = original.get_submodule(name).weight
            packed = module.get_base_layer().weight
            stored = bnb.functional.dequantize_4bit(packed.data, packed.quant_state).float()
            with_adapter = stored + module.get_delta_weight("default")
            errors.append((float((exact - stored).norm()), float((exact - with_adapter).norm())))
    return errors


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_loftq_starts_nearer_to_the_original_weights_than_the_4_bit_base(tiny_model: Path, kind: str) -> None:
    network = load_base(Model(base=str(tiny_model)), FourBit(kind=kind, minimum_share=0.0), plan_for())
    model = attach_adapter(network, Lora(rank=8, initialization="loftq"), plan_for())
    start_from_residual(model, Checkpoint.open(tiny_model))
    errors = weight_errors(model, tiny_model)
    assert len(errors) == 14
    for without, with_adapter in errors:
        # The best rank-8 approximation, of matrices of rank 32 to 64 (Eckart and Young 1936).
        assert with_adapter < 0.93 * without


def test_loftq_says_which_weight_it_does_not_find(tiny_model: Path, tmp_path: Path) -> None:
    save_file({"other.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    model = attached(tiny_model, Lora(rank=2, initialization="loftq"))
    with pytest.raises(ModelError) as caught:
        start_from_residual(model, Checkpoint.open(tmp_path))
    assert str(caught.value) == (
        f"{tmp_path}: LoftQ needs the unquantized model.layers.0.self_attn.q_proj.weight, which the checkpoint has not "
        "by that name"
    )


def test_eva_looks_along_the_activations_of_the_training_rows(tiny_model: Path) -> None:
    model = attached(tiny_model, Lora(rank=4, initialization="eva"))
    ids = torch.randint(3, 300, (12, 20), generator=torch.Generator().manual_seed(0)).tolist()
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    start_from_activations(model, rows, pad_id=0, micro_batch_size=4)
    for name, tensor in trained_state(model).items():
        if "lora_B" in name:
            assert not tensor.any(), name
        else:
            # The rows of A are directions: as many as the rank, of length 1 and at right angles.
            torch.testing.assert_close(tensor @ tensor.T, torch.eye(4), rtol=1e-3, atol=1e-3, msg=name)
    losses = trained_a_little(model)
    assert losses[-1] < losses[0]


def test_pissa_is_saved_for_the_original_base(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", dtype=torch.float32)
    adapter = Lora(rank=4, initialization="pissa")
    plan = plan_for()
    network = load_base(Model(base=str(base)), Unquantized(kind="none"), plan)
    install_loss(network)
    model = attach_adapter(network, adapter, plan)
    model.save_pretrained(tmp_path / "initial")
    losses = trained_a_little(model)
    assert losses[-1] < losses[0]
    live = logits_of(model)
    save_adapter(model, tmp_path / "adapter", initial=tmp_path / "initial")
    assert not (tmp_path / "adapter" / STATE_FILE).exists()
    assert not (tmp_path / "adapter" / "README.md").exists(), "peft's template of a card, with nothing filled in"

    original = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert not torch.allclose(logits_of(original), live, atol=1e-2)
    torch.testing.assert_close(
        logits_of(load_adapter(original, tmp_path / "adapter").eval()), live, rtol=1e-3, atol=1e-3
    )


# --- errors --------------------------------------------------------------------------------------------------------


def test_a_target_that_the_model_does_not_have_is_an_error_of_the_input(tiny_model: Path) -> None:
    message = r"^adapter.target_modules: 'no_proj': no module of the base is called so; did you mean 'o_proj'\?$"
    with pytest.raises(ModelError, match=message):
        attached(tiny_model, Lora(rank=2, target_modules=("no_proj",)))
    with pytest.raises(
        ModelError, match=r"its layers are q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj$"
    ):
        attached(tiny_model, Lora(rank=2, target_modules=("c_attn",)))


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (Lora(rank=2, target_modules=("q_proj", "gate_porj")), "did you mean 'gate_proj'?"),
        (Lora(rank=2, target_modules=("self_attn.q_proj", "self_attn.w")), "its layers are q_proj, k_proj, "),
        (IA3(kind="ia3", target_modules=("k_proj", "dwn_proj"), feedforward_modules=("dwn_proj",)), "'down_proj'?"),
        (IA3(kind="ia3", target_modules=("k_proj",), feedforward_modules=("down_proj",)), "not among target_modules"),
    ],
)
def test_every_name_of_a_module_matches_one_beside_others_that_do(tiny_model: Path, adapter, message) -> None:
    with pytest.raises(ModelError) as caught:
        attached(tiny_model, adapter)
    assert message in str(caught.value)


def test_a_state_of_another_adapter_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    model = attached(tiny_model, Lora(rank=4, target_modules=("q_proj",)))
    with pytest.raises(ModelError) as caught:
        load_trained_state(model, tmp_path)
    assert str(caught.value) == f"{tmp_path}/{STATE_FILE}: no such file: the adapter's state is not complete"

    save_trained_state(model, tmp_path)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    with pytest.raises(ModelError) as caught:
        load_trained_state(attached(tiny_model, Lora(rank=2, target_modules=("q_proj",))), tmp_path)
    assert str(caught.value) == f"{tmp_path}/{STATE_FILE}: {name} is [4, 64], the recipe makes it [2, 64]"
    with pytest.raises(ModelError, match=r"is of another adapter than the recipe's: base_model.*q_proj.*"):
        load_trained_state(attached(tiny_model, Lora(rank=4, target_modules=("v_proj",))), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [STATE_FILE]
    assert load_file(tmp_path / STATE_FILE)[name].shape == (4, 64)


@pytest.mark.parametrize(
    ("family", "sizes", "router"),
    [
        ("llama4_text", {"intermediate_size_mlp": 128, "head_dim": 16}, "feed_forward.router"),
        ("phimoe", {}, "mlp.router"),
    ],
)
def test_routers_keep_what_they_return_under_all_linear(family, sizes, router):
    """peft would give them an adapter, whose forward returns one tensor where scores and choices are expected."""
    config = AutoConfig.for_model(
        family, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=256, num_local_experts=2, pad_token_id=0, **sizes,
    )  # fmt: skip
    network = AutoModelForCausalLM.from_config(config)
    given = {"model": {"base": "tiny"}, "data": {"train": "rows.jsonl"}, "adapter": {"kind": "lora", "rank": 4}}
    recipe = parse_recipe(given)
    plan = make_plan(recipe, CPU)
    model = attach_adapter(network, recipe.adapter, plan)
    adapted = {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert any(name.endswith("self_attn.q_proj") for name in adapted)
    assert not any(name.endswith(router) for name in adapted)
    ids = torch.arange(16)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "q_proj.lora_B" in name)
