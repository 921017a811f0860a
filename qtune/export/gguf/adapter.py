"""A LoRA adapter -> adapter.gguf, which llama.cpp's `--lora` puts on a GGUF file of the base model.

llama.cpp (src/llama-adapter.cpp) adds (alpha / rank) · B A to a tensor NAME, with A [rank, in] in NAME.lora_a and B
[out, rank] in NAME.lora_b; alpha is one number for the whole file, the rank is that of each pair.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader, GGUFWriter, Keys
from numpy.typing import NDArray
from transformers import PretrainedConfig

from qtune.errors import ExportError, ModelError, Problem
from qtune.export.adapter_weights import AdapterWeights, Update
from qtune.export.gguf.families import Family, family_of, gguf_name
from qtune.whole import whole

Factors = NDArray[np.float32]


@dataclass(frozen=True)
class GgufAdapter:
    """What the file holds: the factors by tensor name, in fp32, as they are small."""

    architecture: str
    alpha: float
    tensors: dict[str, Factors]


@dataclass(frozen=True)
class NoGgufAdapter:
    """Why an adapter cannot be a file of its own for llama.cpp."""

    reason: str


def gguf_adapter(weights: AdapterWeights, config: PretrainedConfig, place: str) -> GgufAdapter | NoGgufAdapter:
    """The adapter in llama.cpp's words. config: of the base model, whose GGUF file it will be put on.

    Raises:
        ModelError: the family has no GGUF here, or no place for a tensor.
    """
    family = family_of(config, place)
    for parameter, update in weights.updates.items():
        if (reason := _obstacle(parameter, update, config)) is not None:
            return NoGgufAdapter(f"{reason} ({parameter})")
    # One alpha for all: a pair that is scaled otherwise gets the difference into its B.
    first = next(iter(weights.updates.values()))
    assert first.factors is not None
    alpha = first.scaling * len(first.factors[0])
    tensors = dict(_factors(weights, config, family, alpha, place))
    return GgufAdapter(family.architecture.name.lower(), alpha, tensors)


def _obstacle(parameter: str, update: Update, config: PretrainedConfig) -> str | None:
    """What keeps an update from being a low-rank one alone."""
    if update.magnitude is not None:
        return "DoRA sets the length of each row after its update, and llama.cpp only adds updates"
    if update.column_scale is not None or update.row_scale is not None:
        return "IA3 scales what is there, and llama.cpp only adds low-rank updates"
    if update.principal:
        return "PiSSA takes the leading singular vectors out of the base, which a file beside the base cannot"
    is_low_rank = update.factors is not None and update.bias is None
    if not is_low_rank or update.replacement is not None or update.rows or update.appended is not None:
        return "parameters are trained as a whole, and llama.cpp only adds low-rank updates"
    if "embed_tokens" in parameter:
        return "the embedding is trained, which llama.cpp shares with the head or not as the base's file has it"
    if parameter.startswith("lm_head") and config.tie_word_embeddings:
        return "the head is trained and is the embedding in the base, so that its file has no tensor for it"
    return None


def _factors(
    weights: AdapterWeights, config: PretrainedConfig, family: Family, alpha: float, place: str
) -> Iterator[tuple[str, Factors]]:
    for parameter, update in weights.updates.items():
        name = gguf_name(family, config.num_hidden_layers, parameter)
        if name is None:
            raise ModelError(Problem(place, f"{parameter} has no place in a GGUF file"))
        assert update.factors is not None
        a, b = update.factors
        b = b * (update.scaling * len(a) / alpha)
        yield f"{name}.lora_a", _array(a)
        # The rows of B are those of the weight, and go the same way (rotated queries and keys, for example).
        yield f"{name}.lora_b", _array(family.change(parameter, b, config))


def _array(tensor: torch.Tensor) -> Factors:
    return tensor.to(torch.float32).contiguous().numpy()


def write_gguf_adapter(adapter: GgufAdapter, file: Path, name: str) -> Path:
    """Writes the file and reads it back. It appears when it is complete.

    Raises:
        ExportError: what is read back is not what was written.
    """
    with whole(file) as partial:
        writer = GGUFWriter(partial, adapter.architecture)
        writer.add_type("adapter")
        writer.add_name(name)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, adapter.alpha)
        for key, values in adapter.tensors.items():
            writer.add_tensor(key, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _require_same(adapter, partial, file)
    return file


def _require_same(adapter: GgufAdapter, written: Path, file: Path) -> None:
    found = {tensor.name: tensor.data for tensor in GGUFReader(written).tensors}
    wrong = [
        key
        for key, values in adapter.tensors.items()
        if key not in found or found[key].shape != values.shape or not np.array_equal(found[key], values)
    ]
    if wrong or len(found) != len(adapter.tensors):
        raise ExportError(f"{file}: is read back otherwise than it was written: {', '.join(wrong[:5])}")
