"""Weights that are missing, unknown, of other shapes or no numbers: an error that names them, in every way in."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import WriteRecipe, run_warm_qtune
from export_models import tiny_base
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from qtune.check import check
from qtune.device.present import Device, present_device
from qtune.errors import ModelError, OutOfMemory
from qtune.export.layout import open_base
from qtune.export.verify.streamed import streamed_exported
from qtune.model.completeness import require_complete
from qtune.model.load import load_base, load_plain
from qtune.plan import make_plan
from qtune.recipe.file import load_recipe
from qtune.recipe.schema import Model

Change = Callable[[dict[str, Tensor]], None]


def changed(folder: Path, change: Change) -> Path:
    """The folder with its weights changed."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    return folder


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "base"))


def without(name: str) -> Change:
    return lambda tensors: void(tensors.pop(name))


def void(_: object) -> None:
    pass


def refused(folder: Path) -> str:
    with pytest.raises(ModelError) as error:
        require_complete(folder, AutoConfig.from_pretrained(folder))
    return str(error.value)


FAMILIES = ["llama", "gpt2", "gemma2", "mixtral", "qwen3_moe", "phi3", "gpt_neox", "deepseek_v3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_checkpoint_of_a_family_is_whole(family, tmp_path):
    require_complete(tiny_base(tmp_path, family), AutoConfig.from_pretrained(tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_no_tensor_of_a_family_may_lack(family, tmp_path):
    tiny_base(tmp_path, family)
    whole = load_file(tmp_path / "model.safetensors")
    for name in {
        re.sub(r"\d+", "N", name): name for name in whole
    }.values():  # the last of layers and experts that are alike
        save_file({other: one for other, one in whole.items() if other != name}, tmp_path / "model.safetensors")
        said = refused(tmp_path)
        assert str(tmp_path / "model.safetensors") in said, name
        assert "would be random" in said or "cannot be put together" in said or "config.json makes it" in said, name


def test_the_missing_weight_is_named_with_its_file(base):
    changed(base, without("model.embed_tokens.weight"))
    assert refused(base) == (
        f"{base}/model.safetensors: has no model.embed_tokens.weight: a weight of the model would be random; "
        "fetch the model again"
    )


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_tied_head_may_be_stored_under_either_name(kept, tmp_path):
    tiny_base(tmp_path, tie_word_embeddings=True)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    changed(
        tmp_path, lambda tensors: void((tensors.pop("model.embed_tokens.weight"), tensors.update({kept: embedding})))
    )
    require_complete(tmp_path, AutoConfig.from_pretrained(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(model.lm_head.weight, embedding)
    assert torch.equal(model.get_input_embeddings().weight, embedding)


def test_a_head_that_is_not_tied_may_not_lack(base):
    changed(base, without("lm_head.weight"))
    assert "has no lm_head.weight" in refused(base)


def test_tensors_that_the_model_has_not_are_named(base):
    # config.json with one layer fewer would train a model that was cut off.
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    said = refused(base)
    assert "model.layers.1.input_layernorm.weight" in said
    assert "and 3 more, which the model that config.json describes has not" in said


def test_every_wrong_shape_is_named(base):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": 321}))
    said = refused(base)
    assert "lm_head.weight is [320, 64], config.json makes it [321, 64]" in said
    assert "model.embed_tokens.weight is [320, 64], config.json makes it [321, 64]" in said


def test_what_old_checkpoints_hold_too_much_and_transformers_knows_is_let_through(base):
    changed(base, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    require_complete(base, AutoConfig.from_pretrained(base))


@pytest.mark.parametrize("double", [False, True])
def test_a_checkpoint_that_bitsandbytes_packed_is_whole(double, base, write_recipe: WriteRecipe, tmp_path):
    from transformers import BitsAndBytesConfig

    packed = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
    AutoModelForCausalLM.from_pretrained(base, quantization_config=packed).save_pretrained(tmp_path / "packed")
    folder = tmp_path / "packed"
    require_complete(folder, AutoConfig.from_pretrained(folder))
    changed(folder, without("model.layers.1.mlp.up_proj.weight"))
    assert "model.layers.1.mlp.up_proj.weight" in refused(folder)


WAYS = {
    "4-bit": 'kind = "nf4"\nminimum_share = 0.0',
    "int8": 'kind = "int8"\nminimum_share = 0.0',
    "16-bit": 'kind = "none"',
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("model.norm.weight"), "has no model.norm.weight"),
        (lambda tensors: tensors.update(extra=torch.ones(2)), "holds extra, which"),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(63)}),
            "model.norm.weight is [63], config.json makes it [64]",
        ),
        (
            lambda tensors: void(tensors["model.layers.0.mlp.up_proj.weight"].view(-1)[5].fill_(torch.nan)),
            "1 of the 12,288 numbers of model.layers.0.mlp.up_proj.weight are not finite, the first nan at [0, 5]",
        ),
        (
            lambda tensors: void(tensors["model.embed_tokens.weight"][3].fill_(torch.inf)),
            "64 of the 20,480 numbers of model.embed_tokens.weight are not finite, the first inf at [3, 0]",
        ),
    ],
    ids=["missing", "unknown", "shape", "NaN", "infinite"],
)
def test_a_damaged_base_is_never_loaded(way, change, said, base, tiny_model, write_recipe):
    recipe = load_recipe(write_recipe(quantization=WAYS[way])).recipe
    changed(base, change)
    with pytest.raises(ModelError) as error:
        load_base(Model(base=str(base)), recipe.quantization, make_plan(recipe, present_device()))
    assert said in str(error.value)
    assert str(base) in str(error.value)
    with pytest.raises(ModelError) as error:
        load_plain(Model(base=str(base)), present_device(), torch.float32)
    assert said in str(error.value)


def test_numbers_too_large_for_the_compute_dtype_are_said_to_be_that(base):
    changed(base, lambda tensors: void(tensors["model.norm.weight"][0].fill_(70_000.0)))
    with pytest.raises(ModelError) as error:
        load_plain(Model(base=str(base)), present_device(), torch.float16)
    assert str(error.value) == (
        f"{base}: model.norm.weight reaches 7.014e+04, and float16 ends at 6.55e+04; use another "
        "quantization.compute_dtype"
    )


def test_an_export_reads_no_base_that_is_not_whole(base):
    changed(base, without("model.norm.weight"))
    with pytest.raises(ModelError, match=r"has no model\.norm\.weight"):
        open_base(base)
    with pytest.raises(ModelError, match=r"has no model\.norm\.weight"):
        streamed_exported(base, torch.device("cpu"))


def test_an_export_reads_no_odd_numbers(base):
    changed(base, lambda tensors: void(tensors["model.norm.weight"][0].fill_(torch.nan)))
    checkpoint, _ = open_base(base)
    with pytest.raises(ModelError, match=r"model\.norm\.weight are not finite"):
        checkpoint.read_finite("model.norm.weight")


def test_check_finds_it_without_reading_weights(base, write_recipe, monkeypatch):
    from qtune.model.checkpoint import Checkpoint

    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("weights are read"))
    changed(base, without("model.embed_tokens.weight"))
    resolved = load_recipe(write_recipe(), [f"model.base={base}"])
    assert any("has no model.embed_tokens.weight" in problem.message for problem in check(resolved).problems)


def test_shards_that_the_index_names_and_the_folder_has_not_are_named(base, write_recipe):
    model = AutoModelForCausalLM.from_pretrained(base)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="60KB")
    shards = sorted(base.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    resolved = load_recipe(write_recipe(), [f"model.base={base}"])
    assert any(shards[1].name in problem.message for problem in check(resolved).problems)
    assert shards[1].name in refused(base)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": 3}', "{}", '{"weight_map": {"a": "../x"}}'])
def test_an_index_that_is_none_is_one_sentence(text, base):
    (base / "model.safetensors.index.json").write_text(text)
    assert f"{base}/model.safetensors.index.json: " in refused(base)


@pytest.mark.slow
def test_a_run_on_such_a_base_ends_before_it_has_a_folder(base, write_recipe, tmp_path):
    changed(base, without("model.embed_tokens.weight"))
    done = run_warm_qtune("run", write_recipe(), "--set", f"model.base={base}")
    assert (done.returncode, done.stdout) == (2, "")
    assert "has no model.embed_tokens.weight" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_chat_with_such_a_folder_says_so(base):
    changed(base, without("model.norm.weight"))
    done = run_warm_qtune("chat", base, "-p", "Hello")
    assert (done.returncode, done.stdout) == (2, "")
    assert "has no model.norm.weight" in done.stderr


def test_a_gguf_file_without_a_weight_is_refused(base, tmp_path, monkeypatch):
    from qtune.model import builtin

    class Reading:
        config = None

        @staticmethod
        def from_pretrained(**_: object) -> tuple[None, dict[str, set[str]]]:
            missing = {"missing_keys": {"model.norm.weight"}, "unexpected_keys": set(), "mismatched_keys": set()}
            return None, missing

    import transformers

    monkeypatch.setattr(transformers, "AutoModelForCausalLM", Reading)
    monkeypatch.setattr(transformers, "AutoTokenizer", Reading)
    with pytest.raises(ModelError, match=r"model\.gguf: has no model\.norm\.weight"):
        builtin.convert(tmp_path / "model.gguf", tmp_path / "folder")


@pytest.mark.parametrize("is_whole", [True, False])
def test_a_hub_model_that_is_half_fetched_is_not_blamed_for_it(is_whole, base, tmp_path, monkeypatch):
    from huggingface_hub import constants

    from qtune.model.local import base_on_disk

    model = AutoModelForCausalLM.from_pretrained(base)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="60KB")
    hub = tmp_path / "hub" / "models--owner--name"
    snapshot = hub / "snapshots" / ("0" * 40)
    shutil.copytree(base, snapshot)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    if not is_whole:
        next(iter(snapshot.glob("model-*.safetensors"))).unlink()
    assert base_on_disk(Model(base="owner/name")) == (snapshot if is_whole else None)


def test_a_model_that_a_card_has_no_room_for_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base(tmp_path / "base")
    monkeypatch.setattr("qtune.model.load.load_weights", lambda *_, **__: pytest.fail("was read"))
    card = Device("cuda", "a card", 2**20, 1000, bf16=True, capability=(8, 6))
    with pytest.raises(OutOfMemory, match=r"takes .* as it is stored, and a card has .* free; .*: qtune chat RUN$"):
        load_plain(Model(base=str(base)), card, torch.float16)
