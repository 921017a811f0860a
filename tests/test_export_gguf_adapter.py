"""adapter.gguf: llama.cpp's --lora on the base's GGUF file predicts what the merged model does."""

import json
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
import torch
from export_models import live_adapter, merged, tiny_base, tiny_run, tiny_tokenizer
from gguf import GGUFReader
from peft import LoraConfig, PeftConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qtune.errors import ExportError
from qtune.export.adapter_weights import AdapterWeights, Update, open_adapter
from qtune.export.basis import Basis
from qtune.export.export import Options, export_run
from qtune.export.gguf import adapter as gguf_adapters
from qtune.export.gguf.adapter import (
    GgufAdapter,
    NoGgufAdapter,
    gguf_adapter,
    write_gguf_adapter,
)
from qtune.export.gguf.file import write_gguf
from qtune.export.llama_cpp import ADAPTER_FILE
from qtune.manifest import fault

# peft 0.21.2 asks transformers 5.23 for the name that it is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

EXACT = Basis("none", False, torch.float32, torch.float32)
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True}, {}),
    "llama, ranks and alphas of their own": (
        "llama",
        {"tie_word_embeddings": False},
        {
            "target_modules": ["q_proj", "k_proj", "down_proj"],
            "rank_pattern": {"down_proj": 2},
            "alpha_pattern": {"k_proj": 3},
        },
    ),
    "mistral, wide heads, rsLoRA": ("mistral", {"head_dim": 32}, {"use_rslora": True}),
    "qwen2": ("qwen2", {"vocab_size": 400}, {}),
    "qwen3": ("qwen3", {"head_dim": 32}, {}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 16}, {}),
    "gemma3": ("gemma3_text", {"query_pre_attn_scalar": 16}, {}),
    "phi3": ("phi3", {}, {}),
}


@pytest.mark.slow
@llama_cpp.needed
@pytest.mark.parametrize("variant", FAMILIES)
def test_llama_cpp_predicts_with_the_adapter_what_it_predicts_with_the_merged_file(
    variant: str, tmp_path: Path
) -> None:
    family, changes, settings = FAMILIES[variant]
    base = tiny_base(tmp_path / "base", family, dtype=torch.float16, **changes)
    tiny_tokenizer(base)
    config = LoraConfig(
        **{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": "all-linear", **settings}
    )
    live_adapter(base, config, tmp_path / "adapter", EXACT)
    merged(base, tmp_path / "adapter", tmp_path / "merged", basis=EXACT, dtype=torch.float16)
    tiny_tokenizer(tmp_path / "merged")
    whole, bare = (
        write_gguf(tmp_path / name, tmp_path / f"{name}.gguf", "f16", lambda _: None) for name in ("merged", "base")
    )
    made = gguf_adapter(open_adapter(tmp_path / "adapter"), AutoConfig.from_pretrained(base), "base")
    assert isinstance(made, GgufAdapter)
    file = write_gguf_adapter(made, tmp_path / ADAPTER_FILE, "tiny")
    ids = _ids_with_whole_answers(tmp_path / "merged", base)
    expected, _ = llama_cpp.ask(whole, ids)
    with_adapter, _ = llama_cpp.ask(bare, ids, lora=file)
    without, _ = llama_cpp.ask(bare, ids)
    both = expected.keys() & with_adapter.keys()
    assert len(both) >= 36  # the last of the 40 likeliest may change places
    assert max(abs(expected[token] - with_adapter[token]) for token in both) < 0.02
    changed = expected.keys() & without.keys()
    assert len(changed) < 36 or max(abs(expected[token] - without[token]) for token in changed) > 0.1


def _ids_with_whole_answers(*folders: Path) -> list[int]:
    """Ids after which each model's likeliest token is a whole character: of others llama.cpp gives no probabilities."""
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in folders]
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    for seed in range(500):
        ids = torch.randint(5, 300, (1, 40), generator=torch.Generator().manual_seed(seed))
        with torch.inference_mode():
            next_ids = [int(model(ids).logits[0, -1].argmax()) for model in models]
        if all(one > 4 and "\ufffd" not in tokenizer.decode([one]) for one in next_ids):
            return [int(one) for one in ids[0]]
    raise AssertionError("no such ids")


def test_an_export_with_gguf_has_the_adapter_beside_the_merged_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny_run(tmp_path)
    folder = export_run(run, Options(gguf="f16", verify=False))
    reader = GGUFReader(folder / ADAPTER_FILE)
    named = {key: reader.fields[key].contents() for key in ("general.type", "adapter.type", "general.architecture")}
    assert named == {"general.type": "adapter", "adapter.type": "lora", "general.architecture": "llama"}
    # Alpha over rank is the recipe's: peft's own scaling of the saved adapter.
    saved = PeftConfig.from_pretrained(str(run.adapter))
    assert isinstance(saved, LoraConfig)
    assert reader.fields["adapter.lora.alpha"].contents() == saved.lora_alpha
    assert {tuple(one.shape)[1 if one.name.endswith("a") else 0] for one in reader.tensors} == {saved.r}
    # Seven linear layers in each of two blocks.
    assert len(reader.tensors) == 2 * 7 * 2
    assert "adapter.gguf: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("adapter", "reason"),
    [
        ('kind = "lora"\nrank = 4\ndora = true', "DoRA sets the length of each row after its update"),
        ('kind = "ia3"', "IA3 scales what is there"),
        ('kind = "p-tuning"\nvirtual_tokens = 3', "a soft prompt is no change of weights"),
    ],
)
def test_what_llama_cpp_cannot_put_on_a_base_is_said_and_the_merged_file_is_there(
    adapter: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny_run(tmp_path, adapter)
    folder = export_run(run, Options(gguf="f16", verify=False))
    assert (folder / "run-f16.gguf").is_file()
    assert not (folder / ADAPTER_FILE).exists()
    assert f"no adapter.gguf for llama.cpp's --lora: {reason}" in capsys.readouterr().err


FACTORS = (torch.ones(2, 8), torch.ones(8, 2))


@pytest.mark.parametrize(
    ("parameter", "update", "tied", "reason"),
    [
        ("lm_head.weight", Update(factors=FACTORS), True, "the head is trained and is the embedding in the base"),
        ("model.embed_tokens.weight", Update(factors=FACTORS), False, "the embedding is trained"),
        ("lm_head.weight", Update(replacement=torch.ones(8, 8)), False, "parameters are trained as a whole"),
        ("model.layers.0.mlp.up_proj.bias", Update(bias=torch.ones(8)), False, "parameters are trained as a whole"),
        ("model.layers.0.mlp.up_proj.weight", Update(factors=FACTORS, principal=2), False, "PiSSA takes the leading"),
    ],
)
def test_an_update_that_is_not_low_rank_alone_is_refused_with_its_parameter(
    parameter: str, update: Update, tied: bool, reason: str
) -> None:
    config = AutoConfig.for_model("llama", num_hidden_layers=1, tie_word_embeddings=tied)
    made = gguf_adapter(AdapterWeights({parameter: update}), config, "base")
    assert isinstance(made, NoGgufAdapter)
    assert made.reason.startswith(reason)
    assert made.reason.endswith(f"({parameter})")


def test_a_file_that_reads_back_otherwise_is_refused_and_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = GgufAdapter("llama", 4.0, {"blk.0.ffn_up.weight.lora_a": torch.ones(2, 8).numpy()})
    monkeypatch.setattr(gguf_adapters.GGUFWriter, "add_tensor", _loses_a_value(gguf_adapters.GGUFWriter.add_tensor))
    with pytest.raises(ExportError, match=r"read back otherwise than it was written: blk\.0\.ffn_up\.weight\.lora_a"):
        write_gguf_adapter(made, tmp_path / ADAPTER_FILE, "tiny")
    assert not list(tmp_path.iterdir())


def _loses_a_value(original: Any) -> Any:
    def add_tensor(self: Any, name: str, values: Any) -> None:
        changed = values.copy()
        changed[0, 0] = 0
        original(self, name, changed)

    return add_tensor


def test_a_second_export_leaves_no_adapter_of_the_first(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    folder = export_run(run, Options(gguf="f16", verify=False))
    assert (folder / ADAPTER_FILE).exists()
    assert not (export_run(run, Options(verify=False, force=True)) / ADAPTER_FILE).exists()


NOT_SEALED = {"manifest.json", "verify.json", "README.md"}
"""verify.json has a checksum of its own."""


def test_a_flipped_bit_in_the_adapter_is_noticed(tmp_path: Path) -> None:
    folder = export_run(tiny_run(tmp_path), Options(gguf="f16", verify=False))
    assert fault(folder) is None
    files = {file.name for file in folder.iterdir()}
    assert "Modelfile" in files
    assert set(json.loads((folder / "manifest.json").read_text())["files"]) == files - NOT_SEALED
    file = folder / ADAPTER_FILE
    values = bytearray(file.read_bytes())
    values[-1] ^= 1
    file.write_bytes(values)
    assert ADAPTER_FILE in str(fault(folder))
