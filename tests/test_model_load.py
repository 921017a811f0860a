"""The base model: loaded as the recipe says, counted in real parameters, and refused when it is not what was meant."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from export_models import SKIPPED, packed_base, tiny_base, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from qtune.adapter.attach import attach_adapter
from qtune.device.present import Device
from qtune.errors import InputError, ModelError
from qtune.memory.tracing.bare_model import bare_model
from qtune.model.config import read_config
from qtune.model.load import load_base, load_config, load_tokenizer
from qtune.model.local import base_folder
from qtune.model.loss import install_loss
from qtune.model.quantization import ParameterCount, count_parameters, require_kind
from qtune.plan import Plan, make_plan
from qtune.recipe.parse import parse_recipe
from qtune.recipe.schema import EightBit, FourBit, Lora, Model, Quantization, Unquantized

CPU = Device("cpu", "CPU", 8 * 2**30, 6 * 2**30, bf16=False)
QUANTIZATIONS = {
    "nf4": FourBit(minimum_share=0.5),
    "nf4 without double quantization": FourBit(double_quantization=False, minimum_share=0.5),
    "fp4": FourBit(kind="fp4", minimum_share=0.5),
    "int8": EightBit(kind="int8", minimum_share=0.5),
    "none": Unquantized(kind="none"),
}


def plan_for(quantization: Quantization | None = None) -> Plan:
    recipe = parse_recipe({"model": {"base": "x"}, "data": {"train": "y"}})
    return make_plan(recipe.model_copy(update={"quantization": quantization or FourBit()}), CPU)


def load(base: Path, quantization: Quantization):
    return load_base(Model(base=str(base)), quantization, plan_for(quantization))


def linear_types(network: torch.nn.Module) -> set[type]:
    layers = network.get_submodule("model.layers")
    return {type(module) for module in layers.modules() if isinstance(module, torch.nn.Linear)}


# --- loading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_every_quantization_loads_trains_and_leaves_the_base_alone(tiny_model: Path, name: str) -> None:
    quantization = QUANTIZATIONS[name]
    network = load(tiny_model, quantization)
    expected = {"int8": bnb.nn.Linear8bitLt, "none": torch.nn.Linear}.get(name, bnb.nn.Linear4bit)
    assert linear_types(network) == {expected}
    if isinstance(quantization, FourBit):
        state = network.model.layers[0].mlp.up_proj.weight.quant_state
        assert (state.quant_type, state.nested) == (quantization.kind, quantization.double_quantization)
    assert not any(parameter.requires_grad for parameter in network.parameters())
    # No k-bit preparation: what is not quantized is in the compute dtype, and nothing was cast up behind our back.
    assert network.model.embed_tokens.weight.dtype == torch.float32

    frozen = {key: value.clone() for key, value in network.state_dict().items() if isinstance(value, torch.Tensor)}
    model = attach_adapter(network, Lora(rank=2), plan_for(quantization))
    install_loss(network)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.arange(3, 35).reshape(2, 16)
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids), use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    after = network.state_dict()
    for key, value in frozen.items():
        adapted = re.sub(r"(_proj)\.", r"\1.base_layer.", key)
        assert torch.equal(after[adapted], value), key


def test_4_bit_weights_are_those_of_bitsandbytes(tiny_model: Path) -> None:
    network = load(tiny_model, FourBit(minimum_share=0.0))
    weight = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).model.layers[1].mlp.down_proj.weight
    codes, state = bnb.functional.quantize_4bit(weight.detach(), quant_type="nf4", compress_statistics=True)
    ours = network.model.layers[1].mlp.down_proj.weight
    assert torch.equal(ours.data, codes)
    torch.testing.assert_close(
        bnb.functional.dequantize_4bit(ours.data, ours.quant_state), bnb.functional.dequantize_4bit(codes, state)
    )


def test_a_checkpoint_that_is_quantized_already_is_loaded_as_it_is(tiny_model: Path, tmp_path: Path) -> None:
    stored = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False)
    AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=stored).save_pretrained(tmp_path)
    state = load(tmp_path, FourBit(kind="nf4")).model.layers[0].mlp.up_proj.weight.quant_state
    assert (state.quant_type, state.nested) == ("fp4", False)


def test_a_recipe_of_another_kind_than_the_stored_one_is_refused_with_the_kind_to_set(tmp_path: Path) -> None:
    stored = LlamaConfig(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    said = 'the checkpoint of the base is stored in int8 and is trained as it is; set it to "int8"'
    for quantization in (FourBit(), Unquantized(kind="none")):
        with pytest.raises(InputError, match=f'^quantization.kind = "{quantization.kind}": {said}$'):
            require_kind(stored, quantization)
    require_kind(stored, EightBit(kind="int8"))
    require_kind(LlamaConfig(), FourBit())
    unknown = LlamaConfig(quantization_config={"quant_method": "bitsandbytes"}, name_or_path="folder")
    said = "^folder, config.json: quantization_config names no quantization .*; remove it if there is none$"
    with pytest.raises(ModelError, match=said):
        require_kind(unknown, FourBit())


def test_a_stored_number_beyond_the_plans_type_is_named(tmp_path: Path) -> None:
    base = packed_base(tiny_base(tmp_path / "plain"), tmp_path / "packed", "nf4")
    file = base / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, file, metadata={"format": "pt"})
    said = "model.norm.weight holds numbers beyond float16; use another quantization.compute_dtype"
    with pytest.raises(ModelError, match=said):
        load(base, FourBit(compute_dtype="float16"))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_model_without_weights_holds_the_bytes_of_one_that_is_stored_quantized(kind: str, tmp_path: Path) -> None:
    base = packed_base(tiny_base(tmp_path / "plain"), tmp_path / "packed", kind, "float32", SKIPPED)
    live = load(base, QUANTIZATIONS[kind])
    bare = bare_model(read_config(str(base)), torch.float32, None, "sdpa")
    sizes = {name: parameter.nbytes for name, parameter in live.named_parameters()}
    assert {name: parameter.nbytes for name, parameter in bare.named_parameters()} == sizes


def test_a_gguf_file_is_a_base_and_is_made_into_a_folder_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_model_builtin import write_gguf

    monkeypatch.setenv("QTUNE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "tiny.gguf"
    weights = write_gguf(file)
    model = Model(base=str(file))
    network = load_base(model, FourBit(minimum_share=0.0), plan_for())
    assert linear_types(network) == {bnb.nn.Linear4bit}
    embeddings = torch.from_numpy(weights["token_embd"]).half().float()
    assert torch.equal(network.get_input_embeddings().weight, embeddings)
    assert load_tokenizer(model).chat_template is not None
    first = Path(base_folder(model))
    stamp = (first / "config.json").stat().st_mtime_ns
    assert Path(base_folder(model)) == first
    assert (first / "config.json").stat().st_mtime_ns == stamp
    # Another file of the same name is another model.
    write_gguf(file)
    file.touch()
    assert Path(base_folder(model)) != first


# --- counting ------------------------------------------------------------------------------------------------------


def hand_count(config: LlamaConfig) -> tuple[int, int]:
    """(all parameters, those of linear layers in the blocks) of an untied Llama."""
    hidden, heads = config.hidden_size, config.head_dim
    attention = hidden * heads * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    linear = config.num_hidden_layers * (attention + 3 * hidden * config.intermediate_size)
    norms = hidden * (2 * config.num_hidden_layers + 1)
    return linear + 2 * config.vocab_size * hidden + norms, linear


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_parameters_are_counted_as_the_models_author_counts_them(tiny_model: Path, name: str) -> None:
    quantization = QUANTIZATIONS[name]
    network = load(tiny_model, quantization)
    total, linear = hand_count(network.config)
    assert count_parameters(network) == ParameterCount(total, 0 if name == "none" else linear, 0)

    model = attach_adapter(network, Lora(rank=2, target_modules=("up_proj",)), plan_for(quantization))
    trained = 2 * 2 * (network.config.hidden_size + network.config.intermediate_size)
    count = count_parameters(model)
    assert (count.total, count.trainable) == (total + trained, trained)
    assert count.quantized_share == pytest.approx(0 if name == "none" else linear / total)


def test_tied_weights_are_one(tmp_path: Path) -> None:
    tiny_base(tmp_path, tie_word_embeddings=True)
    network = load(tmp_path, Unquantized(kind="none"))
    total, _ = hand_count(network.config)
    assert count_parameters(network).total == total - network.config.vocab_size * network.config.hidden_size


# --- refusing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_model_of_which_too_little_is_quantized_is_refused(tiny_model: Path, kind: str) -> None:
    quantization = EightBit(kind="int8", minimum_share=0.9) if kind == "int8" else FourBit(minimum_share=0.9)
    with pytest.raises(ModelError) as caught:
        load(tiny_model, quantization)
    assert str(caught.value) == (
        f"{tiny_model}: only 70% of its 0 M parameters could be quantized; quantization.minimum_share asks for 90%. "
        "The largest tensor left in torch.float32 is model.embed_tokens.weight (0 M): bitsandbytes "
        "quantizes linear layers "
        "only, so fused experts and embeddings stay. Lower quantization.minimum_share if the memory is there"
    )


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for read, said in ((load_config, "has no config.json"), (load_tokenizer, "has no tokenizer: ")):
        with pytest.raises(ModelError, match=rf"^{tmp_path}/empty: {said}"):
            read(Model(base=str(tmp_path / "empty")))
    with pytest.raises(
        ModelError, match=r"^owner/nothing: is not on this computer, and HF_HUB_OFFLINE is set; model.base can also be"
    ):
        load_config(Model(base="owner/nothing"))
    for base in ("meta-llama/Nothing-1B", "google/gemma-none"):  # the way that is left with a network is longer
        with pytest.raises(ModelError) as caught:
            load_config(Model(base=base))
        told = f"{base}: is not on this computer, and HF_HUB_OFFLINE is set; with a network it is given only to who "
        assert str(caught.value).startswith(told)
        assert "and log in with hf auth login; else model.base can also be a local folder" in str(caught.value)
    with pytest.raises(ModelError, match=rf"^{tmp_path}/no.gguf: no such GGUF file$"):
        load_config(Model(base=str(tmp_path / "no.gguf")))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(ModelError, match=rf"^{tmp_path}/bad.gguf: is no whole GGUF file: "):
        load_config(Model(base=str(tmp_path / "bad.gguf")))


def test_weights_that_are_broken_or_pickled_are_an_error_of_the_input(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tiny_model / "config.json").read_text())
    with pytest.raises(ModelError, match=rf"^{tmp_path}: no model.safetensors and no model.safetensors.index.json: "):
        load(tmp_path, Unquantized(kind="none"))
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickle files \(.bin\); convert them to safetensors"):
        load(tmp_path, Unquantized(kind="none"))
    (tmp_path / "model.safetensors").write_bytes((tiny_model / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ModelError, match=rf"^{tmp_path}/model.safetensors: is cut off or no safetensors file: "):
        load(tmp_path, Unquantized(kind="none"))


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path, tiny_model: Path) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(
        ModelError, match=rf"^{tmp_path}: brings Python code of its own; .*set model.trust_remote_code = true$"
    ):
        load_config(Model(base=str(tmp_path)))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json"])
@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, '"text"', "null", "[]", '{"version": "1.0"', "1" * 5000]
)
def test_a_file_of_a_tokenizer_that_holds_no_object_is_named(
    name: str, text: str, tiny_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model, tmp_path / "base")
    (tmp_path / "base" / name).write_text(text)
    with pytest.raises(ModelError) as caught:
        load_tokenizer(Model(base=str(tmp_path / "base")))
    assert str(caught.value).startswith(f"{tmp_path / 'base' / name}: ")
    assert "\n" not in str(caught.value)


def test_a_base_without_a_tokenizer_is_said_to_be_that(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").unlink()
    with pytest.raises(ModelError) as caught:
        load_tokenizer(Model(base=str(tmp_path / "base")))
    assert str(caught.value) == (
        f"{tmp_path / 'base'}: has no tokenizer: there is no tokenizer.json, and no file that one could be made of"
    )


def test_a_tokenizer_without_a_pad_token_pads_with_its_end(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    LlamaConfig().save_pretrained(tmp_path)
    assert load_tokenizer(Model(base=str(tmp_path))).pad_token == "</s>"


def test_the_attention_of_the_plan_is_used(tiny_model: Path) -> None:
    plan = replace(plan_for(), attention="eager")
    network = load_base(Model(base=str(tiny_model)), Unquantized(kind="none"), plan)
    assert network.config._attn_implementation == "eager"
