"""A model's config.json: what cannot be built or trained is said at once, by its key, with what would be right."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from conftest import WriteRecipe
from test_memory_trace import CARD, recipe_with, tiny
from transformers import AutoConfig

from qtune import cli
from qtune.errors import ModelError
from qtune.memory.predict import Longest, predict
from qtune.model.config import read_config
from qtune.model.load import load_base, load_config
from qtune.plan import make_plan
from qtune.recipe.schema import Model, Unquantized

GOOD = json.loads(tiny().to_json_string(use_diff=False))
WHOLE = "must be a whole number above 0"
QUANTIZED = (
    "qtune trains on weights that are unquantized or quantized by bitsandbytes; name the same model without this "
    "quantization"
)


def problems(tmp_path: Path, content: Any) -> list[str]:
    """What is said of a folder with this config.json, without the file's name, which stands before each."""
    file = tmp_path / "config.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ModelError) as caught:
        read_config(str(tmp_path))
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"{file}: ") for line in lines), lines
    return [line.removeprefix(f"{file}: ") for line in lines]


@pytest.mark.parametrize(
    ("changes", "said"),
    {
        "text for a number": ({"hidden_size": "64"}, f'hidden_size = "64": {WHOLE}'),
        "a fraction": ({"hidden_size": 64.5}, f"hidden_size = 64.5: {WHOLE}"),
        "null": ({"num_hidden_layers": None}, f"num_hidden_layers = null: {WHOLE}"),
        "no tokens": ({"vocab_size": 0}, f"vocab_size = 0: {WHOLE}"),
        "no layers": ({"num_hidden_layers": 0}, f"num_hidden_layers = 0: {WHOLE}"),
        "no heads": ({"num_attention_heads": 0}, f"num_attention_heads = 0: {WHOLE}"),
        "negative": ({"num_attention_heads": -4}, f"num_attention_heads = -4: {WHOLE}"),
        "true": ({"num_key_value_heads": True}, f"num_key_value_heads = true: {WHOLE}"),
        "shared heads": (
            {"num_attention_heads": 8, "num_key_value_heads": 3},
            "num_key_value_heads = 3: must divide num_attention_heads = 8: 1, 2, 4, 8",
        ),
        "heads of no size": (
            {"hidden_size": 66, "head_dim": None},
            "cannot be: The hidden size (66) is not a multiple of the number of attention heads (4).",
        ),
        "head size": (
            {"head_dim": 15},
            "cannot be: RoPE requires an even rotary dimension, but got `head_dim`=15 with `partial_rotary_factor`=1.0 "
            "for `full_attention`.",
        ),
        "more experts than there are": (
            {"num_experts_per_tok": 4, "num_local_experts": 2},
            "num_experts_per_tok = 4: there are only num_local_experts = 2",
        ),
        "a type": (
            {"dtype": "float3"},
            'dtype = "float3": is no type of PyTorch; "bfloat16", "float16" and "float32" are',
        ),
        "an architecture": (
            {"model_type": "lama"},
            f"model_type = \"lama\": unknown to transformers {transformers.__version__}; did you mean 'llama'?",
        ),
        "an encoder": (
            {"model_type": "bert"},
            'model_type = "bert": is an encoder, whose tokens see what follows them; is_decoder is false',
        ),
        "two halves": (
            {"model_type": "t5", "is_encoder_decoder": True},
            'model_type = "t5": has an encoder and a decoder; qtune trains causal language models',
        ),
        "no language": (
            {"model_type": "clip"},
            f'model_type = "clip": is no causal language model in transformers {transformers.__version__}',
        ),
        "gptq": (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            f'quantization_config.quant_method = "gptq": {QUANTIZED}',
        ),
        "awq": (
            {"quantization_config": {"quant_method": "awq", "bits": 4}},
            f'quantization_config.quant_method = "awq": {QUANTIZED}',
        ),
        "codes of another type": (
            {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"}},
            'quantization_config.bnb_4bit_quant_storage = "bfloat16": its codes are kept as numbers of another type, '
            "which cannot be checked; name the same model unquantized, or stored with uint8",
        ),
        "no method": ({"quantization_config": {"bits": 4}}, f"quantization_config.quant_method = null: {QUANTIZED}"),
        "a list": ({"quantization_config": [4]}, "quantization_config = [4]: must be an object"),
    }.values(),
)  # fmt: skip
def test_what_cannot_be_is_said_by_its_key(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    assert problems(tmp_path, {**GOOD, **changes}) == [said]


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
def test_a_missing_size_is_not_taken_from_another_model(tmp_path: Path, key: str) -> None:
    given = {name: value for name, value in GOOD.items() if name != key}
    default = getattr(transformers.LlamaConfig(), key)
    assert problems(tmp_path, given) == [f"{key}: is missing; transformers would take {default}, of another model"]


def test_a_missing_architecture_is_said(tmp_path: Path) -> None:
    given = {name: value for name, value in GOOD.items() if name != "model_type"}
    assert problems(tmp_path, given) == ['model_type: is missing; it names the architecture, as "llama"']


def test_everything_is_said_at_once(tmp_path: Path) -> None:
    said = problems(tmp_path, {**GOOD, "vocab_size": -1, "head_dim": 0, "num_attention_heads": "4"})
    assert said == [f'num_attention_heads = "4": {WHOLE}', f"vocab_size = -1: {WHOLE}", f"head_dim = 0: {WHOLE}"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON: Expecting property name enclosed in double quotes (line 1, column 2)"),
        ("", "is not JSON: Expecting value (line 1, column 1)"),
        ("[1, 2]", "must be an object with keys, not [1, 2]"),
        ("null", "must be an object with keys, not null"),
    ],
)
def test_a_file_that_is_no_configuration_is_said(tmp_path: Path, content: str, said: str) -> None:
    assert problems(tmp_path, content) == [said]


def test_a_folder_without_a_configuration_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"^{tmp_path}: has no config.json, so it is no model folder$"):
        load_config(Model(base=str(tmp_path)))
    with pytest.raises(ModelError, match=rf"^{tmp_path}/none: no such file or folder$"):
        load_config(Model(base=f"{tmp_path}/none"))
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ModelError, match=rf"^{tmp_path}/config.json: is not UTF-8 text \(byte 0\)$"):
        load_config(Model(base=str(tmp_path)))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "bloom", "mamba", "gemma3", "gemma3n_text", "nemotron_h"])
def test_families_have_names_and_lists_of_their_own(tmp_path: Path, family: str) -> None:
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    assert read_config(str(tmp_path)).model_type == family


def test_a_checkpoint_in_bitsandbytes_words_is_read(tmp_path: Path) -> None:
    for stored in ({"quant_method": "bitsandbytes", "load_in_4bit": True}, {"load_in_8bit": True}, {}, None):
        (tmp_path / "config.json").write_text(json.dumps({**GOOD, "quantization_config": stored}))
        assert read_config(str(tmp_path)).hidden_size == 64


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_act": "frob"}, "no model can be built from its config.json: nothing is called 'frob'"),
        (
            {"pad_token_id": 999},
            "no model can be built from its config.json: Padding_idx must be within num_embeddings",
        ),
    ],
)
def test_what_only_a_layer_notices_is_an_error_too(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**GOOD, **changes}))
    recipe = recipe_with(model={"base": str(tmp_path)})
    with pytest.raises(ModelError) as caught:
        predict(load_config(recipe.model), recipe, make_plan(recipe, CARD))
    assert str(caught.value) == f"{tmp_path}: {said}"


def test_flash_attention_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GOOD))
    recipe = recipe_with(model={"base": str(tmp_path), "attention": "flash_attention_2"})
    config, plan = load_config(recipe.model), make_plan(recipe, CARD)
    said = (
        'model.attention: "flash_attention_2" needs the package flash-attn, which is not installed; '
        'pip install flash-attn, or use "sdpa"'
    )
    monkeypatch.setattr("qtune.model.load.find_spec", lambda name: None)
    for step in (
        lambda: predict(config, recipe, plan),
        lambda: load_base(recipe.model, Unquantized(kind="none"), plan),
    ):
        with pytest.raises(ModelError) as caught:
            step()
        assert str(caught.value) == said
    # Where it is installed, the step is traced with PyTorch's kernel, which keeps the same.
    monkeypatch.setattr("qtune.model.load.find_spec", lambda name: "here")
    same = recipe_with(model={"base": str(tmp_path)})
    traced = [predict(config, given, make_plan(given, CARD), Longest(32)).history for given in (recipe, same)]
    assert traced[0].peak() == traced[1].peak()


@pytest.mark.parametrize("verb", ["profile", "run", "fit", "check"])
def test_every_verb_ends_with_the_message_and_code_2(
    verb: str, write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({**GOOD, "num_key_value_heads": 3}))
    recipe, base = write_recipe(), f"model.base={tmp_path / 'model'}"
    monkeypatch.setattr(sys, "argv", ["qtune", verb, str(recipe), "--set", base])
    monkeypatch.setattr(cli, "quiet_libraries", lambda: None)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    said = "num_key_value_heads = 3: must divide num_attention_heads = 4: 1, 2, 4"
    assert f"{tmp_path}/model/config.json: {said}" in capsys.readouterr().err.replace("\n", "")
