"""`qtune export` hands over a folder that plain transformers loads, with the evidence that it is the trained model."""

import json
import re
from pathlib import Path

import pytest
import torch
from export_models import tiny_run
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from qtune.errors import InputError, ModelError, VerificationError
from qtune.export.export import Options, export_run, verify_only
from qtune.export.verification import read_proof
from qtune.model.trust import grant_for
from qtune.preflight import examine
from qtune.recipe.file import load_recipe
from qtune.screens.export import show
from qtune.tuned.load import load_run, load_untuned

# peft 0.21.2 asks transformers 5.23 for the name that it is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def test_a_run_becomes_a_verified_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_run(tmp_path)
    folder = export_run(run, Options(), show)
    assert folder == run.path / "model"
    written = capsys.readouterr()
    begun = [line.removesuffix(" …") for line in written.err.splitlines() if line.endswith("…")]
    begun = [what for what in begun if not what.startswith("tokenizing")]
    assert begun[-6].startswith("merging")
    assert begun[-5:] == [
        "hashing what was written",
        f"loading {folder}",
        f"loading {tmp_path / 'base'}",
        "comparing with the trained model, 12 rows",
        "asking both models 3 questions",
    ]
    assert sorted(file.name for file in folder.iterdir()) == [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "verify.json",
    ]
    proof = json.loads((folder / "verify.json").read_text())
    assert proof["verified"] is True
    assert proof["failures"] == []
    assert (proof["rows"], proof["rows_from"]) == (12, "of 12 validation rows")
    assert proof["exported"]["kl"] < 1e-5 < proof["bare_base"]["kl"]
    assert len(proof["answers"]) == 3
    assert "KL divergence, nats per token" in written.out
    card = (folder / "README.md").read_text()
    assert "**Verified.**" in card
    assert re.findall(r"^# .*", card, re.MULTILINE)[0] == "# run", "the name of what was trained, and not of its folder"


def test_the_folder_loads_with_plain_transformers_and_stops_at_the_end_of_a_turn(tmp_path: Path) -> None:
    folder = export_run(tiny_run(tmp_path), Options(verify=False))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float16
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == (
        "<|im_start|>user\nHi<|im_end|>\n"
    )
    assert model.generation_config.eos_token_id == [2, tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_the_template_that_the_recipe_names_is_the_one_that_is_exported(tmp_path: Path) -> None:
    folder = export_run(tiny_run(tmp_path, data='chat_template = "plain"'), Options())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "<s>Hi"


def test_original_weights_are_verified_against_the_adapter_on_them_and_their_cost_is_told(tmp_path: Path) -> None:
    folder = export_run(tiny_run(tmp_path), Options(weights="original"))
    proof = json.loads((folder / "verify.json").read_text())
    assert proof["verified"] is True
    assert proof["cost"]["original"]["kl"] > 100 * proof["exported"]["kl"]
    assert "the original weights cost a KL divergence of" in (folder / "README.md").read_text()


INT8 = 'kind = "int8"\ncompute_dtype = "float32"\nminimum_share = 0.0'
FP4 = INT8.replace("int8", "fp4")
NONE = 'kind = "none"\ncompute_dtype = "float32"'


@pytest.mark.slow
@pytest.mark.parametrize(
    ("adapter", "quantization"),
    [
        ('kind = "ia3"', None),
        ('kind = "lora"\nrank = 4\ndora = true', None),
        ('kind = "lora"\nrank = 4\nrslora = true', FP4),
        ('kind = "lora"\nrank = 4', NONE),
    ],
    ids=["ia3", "dora", "rslora on fp4", "unquantized"],
)
def test_other_adapters_and_other_bases_are_verified_whole(
    adapter: str, quantization: str | None, tmp_path: Path
) -> None:
    run = (
        tiny_run(tmp_path, adapter) if quantization is None else tiny_run(tmp_path, adapter, quantization=quantization)
    )
    proof = json.loads((export_run(run, Options()) / "verify.json").read_text())
    assert (proof["verified"], proof["streamed"]) == (True, False)
    assert proof["exported"]["kl"] < proof["bare_base"]["kl"] / 100


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_an_int8_export_is_compared_with_the_trained_weights_and_its_distance_from_the_live_model_is_told(
    tmp_path: Path,
) -> None:
    """LLM.int8() rounds activations in every product; what that costs is no fault of the export."""
    folder = export_run(tiny_run(tmp_path, quantization=INT8), Options())
    proof = json.loads((folder / "verify.json").read_text())
    assert proof["verified"] is True
    assert proof["exported"]["kl"] < 1e-5 < proof["live"]["kl"]
    assert proof["cost"]["dequantized"]["kl"] == proof["exported"]["kl"]
    assert "Computing with int8 products, as it was trained" in (folder / "README.md").read_text()


def test_a_folder_can_be_verified_again_by_itself(tmp_path: Path) -> None:
    folder = export_run(tiny_run(tmp_path), Options(verify=False))
    said = json.loads((folder / "verify.json").read_text())
    assert said == {
        "verified": False,
        "failures": ["not compared with the trained model"],
        "weights": "dequantized",
        "crc32": said["crc32"],
    }
    assert verify_only(folder, None) == folder
    assert json.loads((folder / "verify.json").read_text())["verified"] is True


@pytest.mark.slow
def test_a_folder_that_was_merged_into_the_original_weights_is_verified_against_them(tmp_path: Path) -> None:
    """Also where its first verification was left out, or could not load it."""
    folder = export_run(tiny_run(tmp_path), Options(verify=False, weights="original"))
    verify_only(folder, None)
    assert read_proof(folder).figures is not None
    assert read_proof(folder).weights == "original"
    shard = folder / "model.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100])
    with pytest.raises(VerificationError, match="cannot be loaded"):
        verify_only(folder, None)
    shard.write_bytes(whole)
    assert read_proof(folder).verified is False
    verify_only(folder, None)
    assert read_proof(folder).weights == "original"
    assert read_proof(folder).verified is True


@pytest.mark.parametrize(
    ("options", "option"),
    [
        (Options(gguf="f16"), "--gguf"),
        (Options(compare_bases=True), "--compare-bases"),
        (Options(weights="original"), "--base"),
        (Options(dtype="bfloat16"), "--dtype"),
        (Options(verify=False), "--no-verify"),
        (Options(given=frozenset({"--dtype", "--dtype float16"})), "--dtype"),
    ],
)
def test_what_only_a_whole_model_can_have_is_refused_of_a_prefix(options: Options, option: str, tmp_path: Path) -> None:
    run = tiny_run(tmp_path, 'kind = "prefix-tuning"\nvirtual_tokens = 3')
    with pytest.raises(InputError) as caught:
        export_run(run, options)
    assert str(caught.value).startswith(f"{option}: prefix-tuning cannot be put into a model's weights, so the adapter")
    assert not (run.path / "adapter-export").exists()
    assert export_run(run, Options()).name == "adapter-export"


@pytest.mark.slow
def test_code_that_comes_with_a_model_is_trusted_all_the_way_where_the_recipe_trusts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers asks a person, for 15 seconds, wherever it is not told."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a person was asked"))
    run = tiny_run(tmp_path)
    base = tmp_path / "base"
    (base / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    (base / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\n\nfrom .configuration_own import OwnConfig\n\n\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((base / "config.json").read_text())
    own = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (base / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": own}))
    text = run.resolved_file.read_text().replace("[model]", "[model]\ntrust_remote_code = true")
    run.write_text(run.resolved_file, text)
    recipe = tmp_path / "own.toml"
    recipe.write_text(text.replace("minimum_share = 0.0", "minimum_share = 1.0"))
    with pytest.raises(ModelError, match="a recipe cannot agree to it for you"):
        export_run(run, Options())
    grant_for(str(base), None)
    with pytest.raises(ModelError, match=r"quantization\.minimum_share asks for 100%"):
        examine(load_recipe(recipe), traced=True).require()
    folder = export_run(run, Options())
    assert read_proof(folder).verified is True
    assert (folder / "modeling_own.py").is_file()


def test_a_folder_outside_its_run_needs_the_run_named(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(InputError, match="is not inside a run; name the run: qtune export RUN --verify-only DIR"):
        verify_only(tmp_path / "model", None)


@pytest.mark.parametrize(
    "adapter",
    ['kind = "lora"\nrank = 4', 'kind = "prefix-tuning"\nvirtual_tokens = 3', 'kind = "p-tuning"\nvirtual_tokens = 3'],
)
def test_an_adapter_alone_is_peft_s_and_holds_no_path_of_this_computer(adapter: str, tmp_path: Path) -> None:
    run = tiny_run(tmp_path, adapter)
    folder = export_run(run, Options(adapter_only=True))
    names = {file.name for file in folder.iterdir()}
    assert names == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "manifest.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not {"auto_mapping", "parent_library"} & config.keys()
    assert not any("qtune" in key for key in config)
    ids = torch.arange(5, 15).unsqueeze(0)
    with torch.inference_mode():
        expected = load_run(run).model(ids).logits
        found = PeftModel.from_pretrained(load_untuned(run).model, str(folder)).eval()(ids).logits
    assert torch.equal(found, expected)
