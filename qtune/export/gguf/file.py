"""An exported model folder -> one GGUF file for llama.cpp and Ollama, written one tensor at a time."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, quant_shape_to_byte_shape, quants
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from qtune.data.template import Renderer, default_template
from qtune.errors import ExportError, ModelError, Problem
from qtune.export.gguf.families import Family, add_metadata, extra_tensors, family_of, gguf_name
from qtune.export.gguf.vocabulary import Vocabulary, add_vocabulary, vocabulary_of
from qtune.export.soft_prompt import CONFIG_KEY
from qtune.model.checkpoint import Checkpoint
from qtune.whole import whole

GgufType = Literal["f16", "bf16", "q8_0"]

STORED = {
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
Q8_0_BLOCK = 32


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file: where it comes from, and how it is stored."""

    name: str
    source: str
    parameter: str
    shape: tuple[int, ...]
    stored: GGMLQuantizationType

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """Its shape in bytes, as the writer counts them."""
        return tuple(quant_shape_to_byte_shape(self.shape, self.stored))

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return int(np.prod(self.byte_shape))


def refuse_unconvertible(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, place: str) -> None:
    """Asks for a GGUF before a weight is read.

    Raises:
        ModelError: the model's family, variant or tokenizer has no GGUF here.
    """
    family_of(config, place)
    vocabulary_of(tokenizer, config.vocab_size, place)


def gguf_tensors(folder: Path, config: PretrainedConfig, family: Family, kind: GgufType) -> list[GgufTensor]:
    """The tensors of the file, in the order of the checkpoint.

    Norms and biases stay fp32, as llama.cpp keeps them; so do rows that no block of Q8_0 divides, in fp16.

    Raises:
        ModelError: the checkpoint has a tensor that the family has no place for.
    """
    tensors, lost = [], []
    for source, stored in Checkpoint.open(folder).tensors.items():
        name = gguf_name(family, config.num_hidden_layers, source)
        if name is None:
            lost.append(source)
            continue
        tensors.append(GgufTensor(name, source, source, stored.shape, _stored_as(stored.shape, kind)))
    if lost:
        raise ModelError(Problem(str(folder), f"tensors without a place in a GGUF: {', '.join(lost[:5])}"))
    return tensors


def write_gguf(folder: Path, file: Path, kind: GgufType, advance: Callable[[int], None]) -> Path:
    """Writes the model of an exported folder; memory stays at one tensor. The file appears when it is complete.

    Raises:
        ModelError: a family, a tokenizer or a tensor would come out wrong. ExportError: a value does not fit the type.
    """
    config = AutoConfig.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    family = family_of(config, str(folder))
    tensors = gguf_tensors(folder, config, family, kind)
    vocabulary = gguf_vocabulary(folder, config, tokenizer)
    with whole(file) as partial:
        writer = GGUFWriter(partial, family.architecture.name.lower())
        writer.add_type("model")
        writer.add_name(folder.name)
        add_metadata(writer, family, config)
        writer.add_file_type(int(STORED[kind][1]))
        writer.add_quantization_version(2)
        end = Renderer.of(tokenizer, default_template(tokenizer)).end_of_turn
        add_vocabulary(writer, vocabulary, tokenizer, None if end is None else tokenizer.get_vocab()[end])
        _write_tensors(writer, folder, family, config, tensors, advance)
        writer.close()
    return file


def gguf_vocabulary(folder: Path, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """The vocabulary that a folder's GGUF gets.

    With a baked soft prompt no beginning of text is put before a prompt: it would stand before the virtual tokens, and
    the template has its own behind them.

    Raises:
        ModelError: llama.cpp would not follow the tokenizer.
    """
    vocabulary = vocabulary_of(tokenizer, config.vocab_size, str(folder))
    return replace(vocabulary, adds_bos=False) if getattr(config, CONFIG_KEY, None) is not None else vocabulary


def _write_tensors(
    writer: GGUFWriter,
    folder: Path,
    family: Family,
    config: PretrainedConfig,
    tensors: list[GgufTensor],
    advance: Callable[[int], None],
) -> None:
    extra = extra_tensors(config)
    for name, tensor in extra.items():
        writer.add_tensor_info(name, tuple(tensor.shape), np.dtype(np.float32), tensor.nbytes)
    for planned in tensors:
        writer.add_tensor_info(
            planned.name, planned.byte_shape, np.dtype(np.uint8), planned.nbytes, raw_dtype=planned.stored
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in extra.values():
        writer.write_tensor_data(tensor.numpy())
    checkpoint = Checkpoint.open(folder)
    for planned in tensors:
        changed = family.change(planned.parameter, checkpoint.read(planned.source), config)
        writer.write_tensor_data(encoded(planned, changed))
        advance(planned.nbytes)


def encoded(planned: GgufTensor, tensor: Tensor) -> NDArray[np.uint8]:
    """The bytes of a tensor in its stored type."""
    values = tensor.to(torch.float32).contiguous().numpy()
    if planned.stored == GGMLQuantizationType.F16 and np.abs(values).max(initial=0) > np.finfo(np.float16).max:
        raise ExportError(f"{planned.name}: its largest value does not fit float16; export with --gguf bf16")
    data: NDArray[np.uint8] = quants.quantize(values, planned.stored)
    return data.reshape(-1).view(np.uint8).reshape(planned.byte_shape)


def _stored_as(shape: tuple[int, ...], kind: GgufType) -> GGMLQuantizationType:
    if len(shape) < 2:
        return GGMLQuantizationType.F32
    stored = STORED[kind][0]
    if stored == GGMLQuantizationType.Q8_0 and shape[-1] % Q8_0_BLOCK:
        return GGMLQuantizationType.F16
    return stored
