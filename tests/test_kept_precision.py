"""What a class keeps in fp32 is the same in the prediction, in the export and in transformers' own loading."""

from pathlib import Path

import pytest
import torch
from export_models import tiny_base
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from qtune.export.layout import empty_model, layout_of
from qtune.memory.tracing.bare_model import bare_model
from qtune.model.checkpoint import Checkpoint


@pytest.mark.parametrize("pattern", ["post_attention_layernorm", "layers.*.mlp.up_proj", "layers.1.*norm"])
def test_a_pattern_means_the_same_parameters_everywhere(
    pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_base(tmp_path)
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", {pattern})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    expected = {name for name, parameter in loaded.named_parameters() if parameter.dtype is torch.float32}
    assert expected
    traced = bare_model(AutoConfig.from_pretrained(tmp_path), torch.float16, None, "sdpa")
    assert {name for name, parameter in traced.named_parameters() if parameter.dtype is torch.float32} == expected
    layout = layout_of(empty_model(tmp_path), list(Checkpoint.open(tmp_path).tensors), replace_layers=False)
    assert layout.kept_in_fp32 == expected
