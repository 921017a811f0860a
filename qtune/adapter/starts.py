"""Starts of LoRA that need more than random numbers: the base's own weights (LoftQ) or the data (EVA)."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from datasets import Dataset
from huggingface_hub import snapshot_download
from peft import PeftModel, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import Tensor

from qtune import console
from qtune.data.collate import PaddedCollator
from qtune.errors import ModelError, Problem

EVA_ROWS = 256
"""Training rows that EVA looks at; the paper's figure 5 finds the components settled after a few batches."""


def start_from_activations(model: PeftModel, train: Dataset, pad_id: int, micro_batch_size: int) -> None:
    """EVA: A spans the directions in which a layer's inputs vary most. arXiv:2410.07170, section 3.

    Every layer keeps the rank of the recipe (rho = 1): ranks that move would change the memory that was predicted.
    """
    collate = PaddedCollator(pad_id)
    rows = min(EVA_ROWS, len(train))
    device = next(model.parameters()).device
    batches: list[dict[str, Any]] = []
    for start in range(0, rows, micro_batch_size):
        batch = collate([train[row] for row in range(start, min(rows, start + micro_batch_size))])
        batches.append({name: batch[name].to(device) for name in ("input_ids", "attention_mask")})
    console.say(f"EVA: looking at the activations of {rows} training rows")
    initialize_lora_eva_weights(model, batches, show_progress_bar=False)


@torch.no_grad()
def start_from_residual(model: PeftModel, base: str, revision: str | None) -> None:
    """LoftQ with one alternation: scale * B A is the best rank-r approximation of W - dequantized(NF4(W)).

    arXiv:2310.08659, algorithm 1 with T = 1. The 4-bit base stays as it is; only A and B are set. peft's own version
    needs CUDA and leaves the scale out (peft 0.21, loftq_utils.py).

    Raises:
        ModelError: the base's weights are not there as safetensors, or have other names than the loaded model's.
    """
    files = _weight_files(base, revision)
    layers = [
        (name, module)
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), bnb.nn.Linear4bit)
    ]
    with console.progress("LoftQ: decomposing the quantization error", len(layers)) as bar:
        for name, module in layers:
            packed = module.get_base_layer().weight
            original = _tensor(files, f"{name}.weight", base).to(packed.device, torch.float32)
            error = original - bnb.functional.dequantize_4bit(packed.data, packed.quant_state).float()
            for adapter, rank in module.r.items():
                left, values, right = torch.linalg.svd(error, full_matrices=False)
                root = (values[:rank] / module.scaling[adapter]).sqrt()
                module.lora_A[adapter].weight.copy_(root[:, None] * right[:rank])
                module.lora_B[adapter].weight.copy_(left[:, :rank] * root)
            bar.advance()


def _weight_files(base: str, revision: str | None) -> dict[str, Path]:
    """Tensor name -> safetensors file of a folder or a cached hub model."""
    folder = Path(base)
    if not folder.is_dir():
        folder = Path(snapshot_download(base, revision=revision, allow_patterns=["*.safetensors", "*.json"]))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {tensor: folder / file for tensor, file in names.items()}
    found: dict[str, Path] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            found.update(dict.fromkeys(tensors.keys(), file))
    return found


def _tensor(files: dict[str, Path], name: str, base: str) -> Tensor:
    for candidate in _spellings(name):
        if candidate in files:
            with safe_open(files[candidate], framework="pt") as tensors:
                return tensors.get_tensor(candidate)
    raise ModelError(Problem(base, f"LoftQ needs the unquantized {name}, which the checkpoint has not by that name"))


def _spellings(name: str) -> Iterator[str]:
    """Some checkpoints were saved from the bare backbone, whose names lack "model."."""
    yield name
    yield name.partition(".")[2]
