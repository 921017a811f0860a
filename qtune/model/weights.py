"""Weights into memory, and the word of whoever loaded them: nothing made up, nothing dropped, every number finite."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, core_model_loading

from qtune.errors import ModelError, Problem
from qtune.model.as_made import require_as_made
from qtune.model.checkpoint import Checkpoint, is_finite, not_finite
from qtune.model.completeness import refuse_report, require_complete


def load_weights(base: str, config: PretrainedConfig, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained`, which keeps to what is stored.

    base: a folder, whose headers are asked first, or a hub id. Raises what transformers raises, and

    Raises:
        ModelError: weights are missing, unknown, of another shape or not finite; each is named. Or qtune has written
            them, and a byte has changed since.
    """
    folder = Path(base)
    if folder.is_dir():
        require_as_made(folder, whole=True)
    checkpoint = require_complete(folder, config) if folder.is_dir() else None
    with _watching() as odd:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            base, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
    network: PreTrainedModel = loaded[0]
    refuse_report(base, loaded[1])
    if odd:
        raise ModelError(list(_not_finite(base, checkpoint, dtype)))
    return network


@contextmanager
def _watching() -> Iterator[list[tuple[int, ...]]]:
    """Each tensor is looked at as it is read, before it is quantized; the shapes of those with odd numbers.

    transformers 5.23 has no word about single tensors: `_materialize_copy` is where all of them pass.
    """
    original, odd = core_model_loading._materialize_copy, []

    def watched(tensor: Any, device: Any = None, dtype: Any = None) -> Tensor:
        read: Tensor = original(tensor, device, dtype)
        if not is_finite(read):
            odd.append(tuple(read.shape))
        return read

    core_model_loading._materialize_copy = watched
    try:
        yield odd
    finally:
        core_model_loading._materialize_copy = original


def _not_finite(base: str, checkpoint: Checkpoint | None, dtype: torch.dtype) -> Iterator[Problem]:
    """Which tensors it were; read again, for loading does not tell their names."""
    if checkpoint is None:
        yield Problem(base, "some of its weights are not finite numbers; fetch the model again")
        return
    largest, of = 0.0, ""
    found = False
    for name, stored in checkpoint.tensors.items():
        tensor = checkpoint.read(name)
        if (problem := not_finite(name, tensor, stored.file)) is not None:
            found = True
            yield problem
        elif tensor.is_floating_point() and tensor.numel() and float(tensor.float().abs().max()) > largest:
            largest, of = float(tensor.float().abs().max()), name
    if not found:
        limit = torch.finfo(dtype).max
        kind = str(dtype).removeprefix("torch.")
        message = f"{of} reaches {largest:.4g}, and {kind} ends at {limit:.4g}; use another quantization.compute_dtype"
        yield Problem(base, message)
