"""Adapters that a merge cannot express are refused by name, before anything is read or written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig
from safetensors.torch import save_file

from qtune.errors import RunError
from qtune.export.adapter_weights import NOT_MERGEABLE, open_adapter

FACTORS = {
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 4),
    "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": torch.ones(4, 2),
}


def adapter(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **changes: Any) -> Path:
    """A LoRA of rank 2 on one layer, its config changed as text as other tools would have written it."""
    folder.mkdir(parents=True)
    LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=["q_proj"]).save_pretrained(str(folder))
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    save_file(FACTORS if tensors is None else tensors, folder / "adapter_model.safetensors")
    return folder


def test_a_plain_adapter_is_read(tmp_path: Path) -> None:
    [(name, update)] = open_adapter(adapter(tmp_path / "a")).updates.items()
    assert name == "model.layers.0.self_attn.q_proj.weight"
    assert update.scaling == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layer_replication", [[0, 1]]),
        ("alora_invocation_tokens", [5]),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("use_qalora", True),
    ],
)
def test_what_cannot_be_merged_is_named(key: str, value: object, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=f"a: the adapter's {key} {NOT_MERGEABLE[key]}; this cannot be merged$"):
        open_adapter(adapter(tmp_path / "a", **{key: value}))


@pytest.mark.parametrize("start", ["olora", "pissa_niter_4"])
def test_an_initialisation_that_changed_the_base_is_named(start: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=f"was initialised with {start}, which changes the base weights"):
        open_adapter(adapter(tmp_path / "a", init_lora_weights=start))


def test_a_tensor_of_an_unknown_kind_is_named(tmp_path: Path) -> None:
    unknown = {"base_model.model.model.layers.0.self_attn.q_proj.lora_mystery": torch.ones(2)}
    with pytest.raises(RunError, match=r"tensor model\.layers\.0\.self_attn\.q_proj\.lora_mystery is of a kind that"):
        open_adapter(adapter(tmp_path / "a", {**FACTORS, **unknown}))


def test_several_adapters_are_named(tmp_path: Path) -> None:
    adapter(tmp_path / "both" / "first")
    adapter(tmp_path / "both" / "second")
    with pytest.raises(RunError, match=r"both: several adapters \(first, second\): name one of their folders"):
        open_adapter(tmp_path / "both")


def test_a_folder_without_an_adapter_or_its_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no adapter \(there is no adapter_config\.json\)$"):
        open_adapter(tmp_path)
    (adapter(tmp_path / "a") / "adapter_model.safetensors").unlink()
    with pytest.raises(RunError, match=r"there is no adapter_model\.safetensors$"):
        open_adapter(tmp_path / "a")


def test_a_soft_prompt_has_no_weights_to_merge(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2).save_pretrained(str(tmp_path / "a"))
    save_file({"prompt_embeddings": torch.ones(2, 4)}, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(RunError, match="a PROMPT_TUNING adapter has no weights to merge"):
        open_adapter(tmp_path / "a")
