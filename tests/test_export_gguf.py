"""GGUF files of every family, read back by transformers' own reader: the same logits, tokens and template."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
import torch
from chat_families import FAMILIES as CHAT_FAMILIES
from chat_families import tokenizer_of
from export_models import CHATML, some_ids, tiny_base, tiny_run, tiny_tokenizer
from gguf import GGMLQuantizationType, GGUFReader, quants
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qtune import manifest
from qtune.data.conversation import Conversation
from qtune.errors import ExportError, InputError, ModelError, VerificationError
from qtune.export.closeness import shortfalls
from qtune.export.export import Options, _gguf_command, export_run, verify_only
from qtune.export.gguf.families import extra_tensors, family_of
from qtune.export.gguf.file import GgufType, write_gguf
from qtune.export.gguf.kept import said_of_gguf_files
from qtune.export.gguf.verify import (
    LIMITS,
    _compare,
    _config_to_read_with,
    _weight_failures,
    q8_0_rounding,
    verify_gguf,
)
from qtune.export.gguf.vocabulary import vocabulary_of
from qtune.export.llama_cpp import ignored_window
from qtune.export.opened_run import open_for_export
from qtune.export.output import refuse_existing_output
from qtune.export.verification import Closeness, GgufProof, add_gguf, damage_of, proof_today, read_proof
from qtune.export.verify.rows import CheckedRow
from qtune.recipe.file import check_recipe
from qtune.run.folder import RunDir
from qtune.training import train
from qtune.tuned.chat import open_session

# peft 0.21.2 asks transformers 5.23 for the name that it is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

GAPS: dict[GgufType, float] = {"f16": 1e-6, "bf16": 0.02, "q8_0": 0.06}


def fields(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


# What these families' real models have: attention scaled by the head's size, rows to spare for Qwen's own tokens.
REAL: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {"query_pre_attn_scalar": 16},
    "qwen2": {"vocab_size": 400},
}


def made(folder: Path, family: str, kind: GgufType = "f16", **changes: Any) -> tuple[Path, Path]:
    tiny_base(folder, family, dtype=torch.float16, **{**REAL.get(family, {}), **changes})
    tiny_tokenizer(folder)
    return folder, write_gguf(folder, folder / "model.gguf", kind, lambda _: None)


def gap(folder: Path, file: Path, **settings: Any) -> float:
    """Largest difference of logits, relative to the largest logit."""
    exported = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    read = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32, **settings
    ).eval()
    with torch.inference_mode():
        expected, found = exported(some_ids()).logits, read(some_ids()).logits
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("magnitude", [10.0**power for power in range(-5, 3)])
def test_q8_0_moves_no_weight_farther_than_it_may_and_comes_near_to_it(magnitude: float) -> None:
    """As gguf's own code rounds; a scale below fp16's smallest normal number, 6e-5, loses more of itself."""
    random = np.random.default_rng(0)
    values = (magnitude * random.uniform(0.3, 1, (4096, 1)) * random.uniform(-1, 1, (4096, 32))).astype(np.float32)
    stored = GGMLQuantizationType.Q8_0
    read = quants.dequantize(quants.quantize(values, stored), stored)
    moved = torch.from_numpy(np.abs(read - values).max(axis=1))
    allowed = q8_0_rounding(torch.from_numpy(np.abs(values).max(axis=1)))
    assert bool((moved <= allowed).all())
    assert float((moved / allowed).max()) > 0.5


@pytest.mark.slow
def test_a_file_that_memory_cannot_compare_is_refused_before_the_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(tmp_path)
    monkeypatch.setattr("qtune.export.gguf.verify._free_memory", lambda: 1000)
    with pytest.raises(InputError, match=r"^--gguf: reading the file back .* takes .* and 1,?000 B are free; close"):
        export_run(run, Options(gguf="q8_0"))
    assert not (run.path / "model").exists()
    assert export_run(run, Options(verify=False)).exists()


def test_a_file_that_is_not_the_export_is_kept_under_a_name_that_nothing_loads(
    exported: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = exported.path / "model"
    monkeypatch.setattr("qtune.export.gguf.verify._weight_failures", lambda *models: iter(["weight x is another"]))
    with pytest.raises(VerificationError, match=r"weight x is another; it is kept as \S+-q8_0\.gguf\.unverified, and"):
        export_run(exported, Options(gguf="q8_0"))
    assert not list(folder.glob("*.gguf"))
    assert read_proof(folder).verified
    monkeypatch.undo()
    export_run(exported, Options(gguf="q8_0"))
    assert [file.name for file in folder.glob("*-q8_0.gguf")] != []


@pytest.mark.slow
@pytest.mark.parametrize("kind", GAPS)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma2", "gemma3_text", "phi3"])
def test_logits_survive_the_way_into_a_gguf_file_and_back(family: str, kind: GgufType, tmp_path: Path) -> None:
    folder, file = made(tmp_path / "model", family, kind)
    # transformers' reader does not take Gemma's attention scale from the file: it is its default for real sizes.
    told = {"config": AutoConfig.from_pretrained(folder)} if family.startswith("gemma") else {}
    assert gap(folder, file, **told) <= GAPS[kind]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma2", "gemma3_text", "phi3"])
def test_each_weight_of_a_q8_0_file_is_the_rounded_one_and_one_that_is_not_is_named(
    family: str, tmp_path: Path
) -> None:
    folder, file = made(tmp_path / "model", family, "q8_0")
    exported = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    read = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file.name, config=_config_to_read_with(folder),
        quantization_config=GgufConfig(dequantize=True), dtype=torch.float32,
    )  # fmt: skip
    assert list(_weight_failures(exported, read)) == []
    for name in ("model.layers.1.mlp.down_proj.weight", "model.layers.0.input_layernorm.weight"):
        weight = read.state_dict()[name]
        with torch.no_grad():
            kept = weight.clone()
            weight.view(-1)[5] += 0.01 * weight.abs().max()  # a step of 8 bits is 1/127
            assert list(_weight_failures(exported, read)) == [f"{name} is not the exported one, rounded to 8 bits"]
            weight.copy_(kept)


@pytest.mark.slow
@pytest.mark.parametrize("kind", GAPS)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"])
def test_a_file_of_every_family_is_verified(family: str, kind: GgufType, tmp_path: Path) -> None:
    folder, file = made(tmp_path / "model", family, kind)
    rows = [CheckedRow(ids := tuple(range(3, 40)), ids, None)]
    closeness, misfits = _compare(folder, file, kind, rows, ())
    assert misfits == []
    assert shortfalls(closeness, LIMITS[kind]) == []


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.2 * i for i in range(8)],
    "original_max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
GEMMA = {"sliding_window": 16, "query_pre_attn_scalar": 16, "num_hidden_layers": 8}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"attention_bias": True}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, llama3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "llama, yarn": ("llama", {"rope_parameters": YARN}),
    "mistral, wide heads": ("mistral", {"head_dim": 32}),
    "qwen2": ("qwen2", {}),
    "qwen3, wide heads": ("qwen3", {"head_dim": 32}),
    "gemma2": ("gemma2", GEMMA),
    "gemma3": ("gemma3_text", {**GEMMA, "rope_parameters": LINEAR}),
    "phi3, longrope": ("phi3", {"rope_parameters": LONGROPE, "max_position_embeddings": 512}),
    "phi3, longrope of its own factor": ("phi3", {"rope_parameters": {**LONGROPE, "factor": 4.0}}),
    "phi3, partial": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
}


@pytest.mark.slow
@llama_cpp.needed
@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_cpp_itself_predicts_the_same_tokens(variant: str, tmp_path: Path) -> None:
    """60 tokens reach beyond the sliding windows of 16. Its products are in 16 bits, so a little is rounded."""
    family, changes = VARIANTS[variant]
    folder, file = made(tmp_path / "model", family, **changes)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for seed in range(100):
        ids = torch.randint(5, 300, (1, 60), generator=torch.Generator().manual_seed(seed))
        with torch.inference_mode():
            expected = model(ids).logits[0, -1].log_softmax(dim=-1)
        # llama.cpp gives no probabilities for a token that is a part of a character.
        if "\ufffd" not in tokenizer.decode([int(expected.argmax())]):
            break
    found, _ = llama_cpp.ask(file, ids[0].tolist())
    assert len(found) == 40
    assert max(abs(value - float(expected[token])) for token, value in found.items()) < 0.01
    assert float(expected.max() - expected.min()) > 0.5


@pytest.mark.parametrize(
    ("family", "changes", "difference"),
    [
        ("gemma2", {"query_pre_attn_scalar": 256}, "query_pre_attn_scalar = 256, there 16"),
        (
            "gemma3_text",
            GEMMA | {"layer_types": ["full_attention"] * 8},
            "layers [0, 1, 2, 3, 4, 5, 6, 7] have full attention, there every 6th",
        ),
        (
            "gemma3_text",
            GEMMA | {"rope_parameters": {kind: {"rope_type": "default", "rope_theta": 5e5} for kind in LINEAR}},
            "rope_theta = 500000 in sliding layers, there 10000",
        ),
    ],
)
def test_a_gemma_that_llama_cpp_would_compute_otherwise_is_refused(
    family: str, changes: dict[str, Any], difference: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=re.escape(difference)):
        made(tmp_path / "model", family, **changes)


@pytest.mark.parametrize(
    ("family", "window", "ignored"), [("mistral", 64, 64), ("mistral", None, None), ("gemma2", 64, None)]
)
def test_a_window_that_llama_cpp_ignores_is_known(family: str, window: int | None, ignored: int | None) -> None:
    assert ignored_window(AutoConfig.for_model(family, sliding_window=window, max_position_embeddings=256)) == ignored


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"the tokenizer has 320 tokens, the model's embedding 300 rows"):
        made(tmp_path / "model", "llama", vocab_size=300)


def test_qwen3_survives_with_its_head_size_told(tmp_path: Path) -> None:
    """transformers' reader takes Qwen 3's default head size whatever the file says; the file says it right."""
    folder, file = made(tmp_path / "model", "qwen3")
    assert gap(folder, file, config=AutoConfig.from_pretrained(folder)) <= GAPS["f16"]
    assert fields(file)["qwen3.attention.key_length"] == fields(file)["qwen3.attention.value_length"] == 16


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_head_is_left_out(tied: bool, tmp_path: Path) -> None:
    _, file = made(tmp_path / "model", "llama", tie_word_embeddings=tied)
    assert ("output.weight" in {tensor.name for tensor in GGUFReader(file).tensors}) is not tied


def test_the_metadata_is_what_llama_cpp_asks_for(tmp_path: Path) -> None:
    _, file = made(tmp_path / "model", "gemma2", sliding_window=64)
    found = fields(file)
    expected = {
        "general.architecture": "gemma2",
        "general.file_type": 1,
        "gemma2.context_length": 256,
        "gemma2.embedding_length": 64,
        "gemma2.block_count": 2,
        "gemma2.feed_forward_length": 192,
        "gemma2.attention.head_count": 4,
        "gemma2.attention.head_count_kv": 2,
        "gemma2.attention.key_length": 16,
        "gemma2.attention.value_length": 16,
        "gemma2.attention.sliding_window": 64,
        "gemma2.attn_logit_softcapping": 50.0,
        "gemma2.final_logit_softcapping": 30.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 4,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {name: found[name] for name in expected} == expected
    assert found["tokenizer.chat_template"] == AutoTokenizer.from_pretrained(file.parent).chat_template


def test_llama_3_s_slowed_frequencies_are_those_of_transformers(tmp_path: Path) -> None:
    folder, file = made(tmp_path / "model", "llama", rope_parameters=LLAMA3)
    config = AutoConfig.from_pretrained(folder)
    slowed, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / 500000.0 ** (torch.arange(0, 16, 2) / 16)
    assert torch.allclose(plain / extra_tensors(config)["rope_freqs.weight"], slowed, rtol=1e-5)
    assert "rope_freqs.weight" in {tensor.name for tensor in GGUFReader(file).tensors}


@pytest.mark.parametrize("name", ["llama3", "qwen2_5", "smollm2", "gemma2", "mistral_v3"])
def test_the_vocabulary_tokenizes_as_the_tokenizer_does(name: str, tmp_path: Path) -> None:
    """transformers rebuilds a tokenizer from the file alone."""
    tokenizer = tokenizer_of(CHAT_FAMILIES[name])
    family = {"qwen2_5": "qwen2", "gemma2": "gemma2"}.get(name, "llama")
    shape = {**REAL.get(family, {}), "vocab_size": len(tokenizer) + 8}
    folder = tiny_base(tmp_path / "model", family, dtype=torch.float16, **shape)
    tokenizer.save_pretrained(folder)
    file = write_gguf(folder, folder / "model.gguf", "f16", lambda _: None)
    (tmp_path / "alone").mkdir()
    file = file.rename(tmp_path / "alone" / "model.gguf")
    read = AutoTokenizer.from_pretrained(tmp_path / "alone", gguf_file="model.gguf")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "What is it? Add eggs, it's 3."}], tokenize=False)
    assert read(text, add_special_tokens=False)["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("name", "adds_space"), [("zephyr", True), ("llama2", True), ("mistral_v3", False), ("llama3", False)]
)
def test_the_space_before_words_is_llama_cpp_s(name: str, adds_space: bool) -> None:
    """Older SentencePiece tokenizers put it behind every special token, newer ones only where a text begins."""
    assert vocabulary_of(tokenizer_of(CHAT_FAMILIES[name]), 1000, name).adds_space is adds_space


def test_a_family_without_an_export_is_refused_by_name(tmp_path: Path) -> None:
    folder = tiny_base(tmp_path / "model", "gpt_neox")
    tiny_tokenizer(folder)
    with pytest.raises(ModelError, match=r"model type 'gpt_neox' has no GGUF export here; there is llama, mistral, "):
        write_gguf(folder, folder / "model.gguf", "f16", lambda _: None)
    assert not list(folder.glob("*gguf*"))


@pytest.mark.parametrize("family", ["smollm3", "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"])
def test_families_that_look_like_known_ones_are_refused_by_name(family: str) -> None:
    """Layers without rotation (SmolLM3) and experts would come out as another model."""
    with pytest.raises(ModelError, match=f"^base: model type '{family}' has no GGUF export here; there is llama, "):
        family_of(AutoConfig.for_model(family), "base")


def test_a_tokenizer_that_llama_cpp_would_not_follow_is_refused(tmp_path: Path) -> None:
    from tokenizers import Regex, pre_tokenizers

    tokenizer = tiny_tokenizer(tmp_path)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("a+"), behavior="isolated")
    with pytest.raises(ModelError, match=r"splits text in a way that llama\.cpp has no known name for"):
        vocabulary_of(tokenizer, 320, "model")


@pytest.mark.parametrize("adapter", ['kind = "lora"\nrank = 4', 'kind = "p-tuning"\nvirtual_tokens = 3'])
@pytest.mark.slow
def test_an_export_with_gguf_is_proven_and_has_a_modelfile(adapter: str, tmp_path: Path) -> None:
    run = tiny_run(tmp_path, adapter)
    folder = export_run(run, Options(gguf="q8_0"))
    proof = json.loads((folder / "verify.json").read_text())
    assert proof["verified"] is True
    assert proof["gguf"]["q8_0"]["failures"] == []
    assert proof["gguf"]["q8_0"]["closeness"]["tokens"] > 100
    modelfile = (folder / "Modelfile").read_text()
    assert modelfile.startswith('FROM ./run-q8_0.gguf\nTEMPLATE """')
    assert 'PARAMETER stop "<|im_end|>"' in modelfile
    assert ("<|qtune_0|><|qtune_1|><|qtune_2|>" in modelfile) is ("p-tuning" in adapter)


@pytest.fixture(scope="module", params=['kind = "lora"\nrank = 4', 'kind = "p-tuning"\nvirtual_tokens = 3'])
def verified(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run with a verified export in its folder."""
    run = tiny_run(tmp_path_factory.mktemp("verified"), request.param)
    export_run(run, Options())
    return run


@pytest.fixture
def exported(verified: RunDir, tmp_path: Path) -> RunDir:
    shutil.copytree(verified.path, tmp_path / "run")
    return RunDir.open(tmp_path / "run")


@pytest.mark.slow
def test_a_gguf_file_is_added_alone_to_a_verified_export(
    exported: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the very command that the end of the export has printed."""
    folder = exported.path / "model"
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix in (".safetensors", ".json")}
    command = _gguf_command(open_for_export(exported), folder, exported, Options())
    assert command == f"qtune export {exported.path} --gguf q8_0"
    for made_again in ("write_merged", "verify"):
        monkeypatch.setattr(f"qtune.export.export.{made_again}", lambda *args, **kwargs: pytest.fail("made again"))
    refuse_existing_output(exported, None, adapter_only=False, force=False, gguf="q8_0")
    assert export_run(exported, Options(gguf="q8_0")) == folder
    said = capsys.readouterr().err
    assert f"{folder} is the verified export of this run; llama.cpp's files alone are added\n" in said
    assert "llama-server" in said
    changed = {"verify.json", "manifest.json"}
    assert all((folder / name).read_bytes() == text for name, text in before.items() if name not in changed)
    proof = proof_today(folder, exported.path)
    assert (proof.verified, proof.failures) == (True, ())
    assert proof.figures is not None
    assert proof.gguf["q8_0"].failures == ()
    assert "-q8_0.gguf" in (folder / "README.md").read_text()
    with pytest.raises(InputError, match=r"run-q8_0\.gguf: is there already, and was verified; --force "):
        refuse_existing_output(exported, None, adapter_only=False, force=False, gguf="q8_0")
    # Who removes it, for its size or by mistake, has the export that there was, to which it can be added again.
    (file,) = folder.glob("*q8_0.gguf")
    content = file.read_bytes()
    file.unlink()
    (folder / "Modelfile").unlink()
    assert proof_today(folder, exported.path).verified
    refuse_existing_output(exported, None, adapter_only=False, force=False, gguf="q8_0")
    export_run(exported, Options(gguf="q8_0"))
    assert file.read_bytes() == content
    assert (folder / "Modelfile").exists()
    assert proof_today(folder, exported.path).verified


def test_a_gguf_file_is_added_to_nothing_that_is_not_the_verified_export_of_the_run(
    exported: RunDir, tmp_path: Path
) -> None:
    def refused(folder: Path | None = None, *given: str) -> str:
        with pytest.raises(InputError) as told:
            refuse_existing_output(exported, folder, adapter_only=False, force=False, gguf="f16", given=given)
        return str(told.value)

    folder = exported.path / "model"
    assert refused(None, "--dtype", "--gguf") == (
        f"--dtype: {folder} is a verified export, to which llama.cpp's files alone are added; --force exports it again"
    )
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "verify.json").unlink()
    assert refused(other) == (
        f"{other}: is there already, and is no verified export of this run, to which a GGUF file could be added; "
        f"qtune export {exported.path} --verify-only {other} verifies it, --force replaces it"
    )
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ExportError, match=r"it is not what was exported: model\.safetensors .*; --force exports it"):
        export_run(exported, Options(gguf="f16"))
    assert not list(folder.glob("*.gguf"))


@pytest.mark.slow
def test_a_gguf_without_a_modelfile_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.jinja").write_text('{# """ #}' + CHATML)
    run = tiny_run(tmp_path, data=f'chat_template = "{tmp_path / "own.jinja"}"')
    folder = export_run(run, Options(gguf="f16", verify=False))
    assert not (folder / "Modelfile").exists()
    said = capsys.readouterr().err
    assert 'no Modelfile for Ollama: a text with """ cannot stand in a Modelfile' in said
    assert "llama-server" in said
    assert "ollama create" not in said


@pytest.mark.slow
def test_the_proof_of_a_gguf_survives_another_verification_and_a_failed_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = export_run(tiny_run(tmp_path), Options(gguf="f16"))
    proven = read_proof(folder).gguf
    assert set(proven) == {"f16"}
    capsys.readouterr()
    verify_only(folder, None)
    told = f"KL divergence {proven['f16'].closeness.kl:.2e}, same likeliest token {proven['f16'].closeness.top1:.2%}"
    said = capsys.readouterr().err
    assert f"run-f16.gguf: byte for byte what was read back and compared when it was written ({told})\n" in said
    assert "adapter.gguf: byte for byte what was written of the adapter; what it answers was not compared\n" in said
    assert read_proof(folder).gguf == proven
    assert read_proof(folder).verified is True
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(VerificationError):
        verify_only(folder, None)
    assert read_proof(folder).gguf == proven
    assert read_proof(folder).verified is False


def test_gguf_files_of_others_in_and_beside_an_export_are_said_not_to_be_looked_at(tmp_path: Path) -> None:
    run, folder = tmp_path, tmp_path / "model"
    folder.mkdir()
    for name in ("run-f16.gguf", "failed-q8_0.gguf", "adapter.gguf"):
        (folder / name).write_bytes(b"GGUF")
    manifest.seal(folder)
    (folder / "run-Q4_K_M.gguf").write_bytes(b"GGUF")
    (tmp_path / "near.gguf").write_bytes(b"GGUF")
    closeness = Closeness(tokens=9, kl=1e-6, kl_largest=1e-5, top1=1.0, gap=0.1)
    add_gguf(folder, GgufProof("run-f16.gguf", "f16", closeness, True, ()))
    add_gguf(folder, GgufProof("failed-q8_0.gguf", "q8_0", closeness, True, ("it is another",)))
    unknown = (
        "not looked at, for it is no file of this export; llama.cpp compares two: llama-perplexity --kl-divergence"
    )
    assert list(said_of_gguf_files(folder, run)) == [
        "adapter.gguf: byte for byte what was written of the adapter; what it answers was not compared",
        f"failed-q8_0.gguf: {unknown}",
        f"run-Q4_K_M.gguf: {unknown}",
        "run-f16.gguf: byte for byte what was read back and compared when it was written (KL divergence 1.00e-06, same "
        "likeliest token 100.00%)",
        f"{tmp_path / 'near.gguf'}: {unknown}",
    ]
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    assert list(said_of_gguf_files(folder, run))[-1] == f"the 2 GGUF files in {tmp_path}: {unknown}"
    assert damage_of(folder) is None
    (folder / "run-f16.gguf").unlink()
    assert damage_of(folder) is None, "it was made of the others, and nothing of the model is lost with it"
    told = "run-f16.gguf is no longer there, with which nothing of the model is lost; made again by: qtune export"
    assert f"{told} {run} --gguf f16" in list(said_of_gguf_files(folder, run))
    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    assert f"{told} {run} --output {moved} --gguf f16" in list(said_of_gguf_files(moved, run))
    moved.rename(folder)
    (folder / "adapter.gguf").write_bytes(b"GGUX")
    assert "adapter.gguf" in str(damage_of(folder)), "one that is there and was changed is damage"
    (folder / manifest.NAME).unlink()
    (folder / "run-f16.gguf").write_bytes(b"GGUF")
    assert all(said.endswith(unknown) for said in said_of_gguf_files(folder, run)), "without one nothing is known"


def test_a_gguf_is_named_after_its_run_wherever_the_command_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(tmp_path)
    monkeypatch.chdir(run.path)
    folder = export_run(RunDir.open(Path()), Options(gguf="f16", verify=False))
    assert sorted(file.name for file in folder.glob("*.gguf")) == ["adapter.gguf", "run-f16.gguf"]
    assert "FROM ./run-f16.gguf" in (folder / "Modelfile").read_text()


@pytest.mark.slow
def test_chat_with_a_gguf_file_beside_its_folder_is_chat_with_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer lies beside the file; the file's own template and end of turn are the ones that count."""
    monkeypatch.setenv("QTUNE_CACHE", str(tmp_path / "cache"))
    folder = export_run(tiny_run(tmp_path, 'kind = "p-tuning"\nvirtual_tokens = 3'), Options(gguf="f16", verify=False))
    whole, file = open_session(str(folder)), open_session(str(folder / "run-f16.gguf"))
    assert file.tokenizer.chat_template == whole.tokenizer.chat_template
    assert set(file.ends.stop) == set(whole.ends.stop)
    whole.max_new_tokens = file.max_new_tokens = 8
    assert file.ask("Name a colour.", lambda _: None) == whole.ask("Name a colour.", lambda _: None)


def test_convertibility_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, 'kind = "lora"\nrank = 4\ntarget_modules = ["query_key_value"]', family="gpt_neox")
    with pytest.raises(ModelError, match="has no GGUF export here"):
        export_run(run, Options(gguf="f16"))
    assert not (run.path / "model").exists()


def test_a_recipe_that_asks_for_gguf_is_refused_before_training(tmp_path: Path) -> None:
    folder = tiny_base(tmp_path / "base", "gpt_neox")
    tiny_tokenizer(folder)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Name a colour.", "completion": "Blue."}\n' * 4)
    text = (
        f'[model]\nbase = "{folder}"\n[quantization]\nminimum_share = 0.0\n'
        f'[data]\ntrain = "rows.jsonl"\nvalidation = 0.0\n[output]\ndirectory = "{tmp_path / "runs"}"\ngguf = "q8_0"\n'
    )
    with pytest.raises(ModelError, match="model type 'gpt_neox' has no GGUF export here"):
        train.run(check_recipe(text, tmp_path / "recipe.toml"), ())


def test_the_recipe_s_gguf_is_written_by_a_plain_export(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    run.write_text(run.resolved_file, run.resolved_file.read_text() + '[output]\ngguf = "f16"\n')
    assert (export_run(run, Options(verify=False)) / "run-f16.gguf").exists()


@pytest.mark.slow
def test_a_file_with_one_tensor_changed_is_caught(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    folder = export_run(run, Options(gguf="f16", verify=False))
    file = folder / "run-f16.gguf"
    tensor = next(tensor for tensor in GGUFReader(file).tensors if tensor.name == "blk.1.ffn_up.weight")
    with file.open("r+b") as stream:
        stream.seek(int(tensor.data_offset))
        stream.write(bytes(int(tensor.n_bytes)))
    from qtune.export.verify.rows import rows_for

    proof = verify_gguf(folder, file, "f16", rows_for(open_for_export(run)).rows, ())
    assert any("KL divergence" in failure for failure in proof.failures)


def template_rows(tokenizer: Any, *messages: dict[str, str]) -> list[CheckedRow]:
    """One row to compare on, whose ids are a few of the model's."""
    conversation = Conversation(
        messages or ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"})
    )
    return [CheckedRow((5, 6, 7, 8), (-100, 6, 7, 8), conversation)]


@pytest.mark.parametrize("name", ["llama3", "mistral_v3", "gemma2"])
def test_a_template_with_the_names_of_special_tokens_is_no_failure_of_the_file(name: str, tmp_path: Path) -> None:
    """The tokenizer.json beside the file, read without its special tokens, once stood for the file's own tokens."""
    tokenizer = tokenizer_of(CHAT_FAMILIES[name])
    family = {"gemma2": "gemma2"}.get(name, "llama")
    folder = tiny_base(tmp_path, family, dtype=torch.float16, **{**REAL.get(family, {}), "vocab_size": len(tokenizer)})
    tokenizer.save_pretrained(folder)
    file = write_gguf(folder, folder / "model.gguf", "f16", lambda _: None)
    proof = verify_gguf(folder, file, "f16", template_rows(tokenizer), ())
    assert proof.tokens_compared
    assert proof.failures == ()


def test_a_file_whose_tokens_are_not_those_of_the_folder_is_caught(tmp_path: Path) -> None:
    folder, file = made(tmp_path / "model", "llama")
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    proof = verify_gguf(folder, file, "f16", template_rows(None), ())
    assert proof.failures[0].endswith("has other tokens in the GGUF file")


def test_a_row_that_the_exported_template_refuses_is_a_failure_in_words(tmp_path: Path) -> None:
    folder = tiny_base(tmp_path / "model", dtype=torch.float16)
    tiny_tokenizer(folder, "{{ raise_exception('no tools here') if messages[0]['content'] == 'Hi' }}")
    file = write_gguf(folder, folder / "model.gguf", "f16", lambda _: None)
    proof = verify_gguf(folder, file, "f16", template_rows(None), ())
    assert "cannot be rendered with the exported template: the chat template refuses" in proof.failures[0]
    assert "no tools here" in proof.failures[0]


def test_a_base_without_a_chat_template_is_exported_with_gguf(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    tiny_tokenizer(tmp_path / "base", None)
    (tmp_path / "base" / "chat_template.jinja").unlink()
    folder = export_run(run, Options(gguf="f16", verify=False))
    assert read_proof(folder).gguf["f16"].failures == ()
