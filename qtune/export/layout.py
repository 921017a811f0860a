"""A checkpoint's names -> the model's parameters: which are quantized when loaded, which share their memory."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer

from qtune.errors import ModelError, Problem
from qtune.model.as_made import require_as_made
from qtune.model.checkpoint import Checkpoint
from qtune.model.completeness import built_on_meta, require_complete
from qtune.model.kept_precision import kept_in_fp32
from qtune.model.packed import statistics_of
from qtune.model.quantization import is_stored_quantized


@dataclass(frozen=True)
class Layout:
    """What the model class says about a checkpoint's tensors; found on the meta device, without weights."""

    parameters: dict[str, str]
    """Checkpoint name -> parameter of the model; tensors that the model does not use are missing."""
    converted: frozenset[str]
    """Parameters that loading puts together from several tensors or cuts out of one."""
    quantized: frozenset[str]
    """Parameters that are in 4 or 8 bits when they are loaded: with a quantization, or as they are stored."""
    transposed: frozenset[str]
    """Weights of GPT-2's Conv1D: stored [in, out], quantized as [out, in]."""
    tied: dict[str, str]
    """Parameter -> the parameter whose memory it shares when the model is loaded."""
    kept_in_fp32: frozenset[str]
    """Parameters that transformers keeps in fp32 whatever dtype is asked for."""
    input_embedding: str
    output_embedding: str | None

    def stored_as(self, parameter: str) -> str | None:
        """The checkpoint's name for a parameter, if it has one of its own."""
        return next((name for name, target in self.parameters.items() if target == parameter), None)


def empty_model(base: Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a folder on the meta device (`model.completeness.built_on_meta`)."""
    config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    return built_on_meta(base, config, trust_remote_code=trust_remote_code)


def layout_of(model: PreTrainedModel, names: list[str], *, replace_layers: bool = True) -> Layout:
    """Maps the tensor names of a checkpoint onto a model from `empty_model`, with transformers' own loading rules.

    The linear layers of `model` become bitsandbytes layers on the way, for transformers decides on modules, not on
    names, which of them it quantizes. Of a checkpoint that is quantized already, those are that have statistics.
    Without `replace_layers` it stays as it is, and nothing counts as quantized.
    """
    parameters, converted = _parameters(model, names)
    transposed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    is_kept = kept_in_fp32(model, torch.float16)
    embeddings = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    head = model.get_output_embeddings()
    tied = dict(model.all_tied_weights_keys)
    quantized: set[str] = set()
    if replace_layers and is_stored_quantized(model.config):
        stored = set(names)
        quantized = {parameter for name, parameter in parameters.items() if statistics_of(name, stored)}
    elif replace_layers:
        quantized = with_4_bit_layers(model)
    return Layout(
        parameters=parameters,
        converted=frozenset(converted),
        quantized=frozenset(quantized),
        transposed=frozenset(transposed),
        tied=tied,
        kept_in_fp32=frozenset(filter(is_kept, parameters.values())),
        input_embedding=embeddings[id(model.get_input_embeddings())],
        output_embedding=None if head is None else embeddings[id(head)],
    )


def _parameters(model: PreTrainedModel, names: list[str]) -> tuple[dict[str, str], set[str]]:
    """Checkpoint name -> parameter name, and the parameters that are not one tensor of the checkpoint.

    The steps are those of `transformers.core_model_loading.convert_and_load_state_dict_in_model` (5.23).
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    targets = model.state_dict()
    parameters: dict[str, str] = {}
    converted: set[str] = set()
    for name in names:
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, targets)
        if target not in targets and name in targets:
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, targets)
        if target in targets:
            parameters[name] = target
            if pattern is not None:
                converted.add(target)
    return parameters, converted


def with_4_bit_layers(model: PreTrainedModel) -> set[str]:
    """Replaces the layers that bitsandbytes quantizes by default; returns the names of their weights."""
    quantizer = AutoHfQuantizer.from_config(BitsAndBytesConfig(load_in_4bit=True), pre_quantized=False)
    quantizer.preprocess_model(model, device_map=None)
    return {name for name, _ in model.named_parameters() if quantizer.param_needs_quantization(model, name)}


def open_base(base: Path, *, trust_remote_code: bool = False) -> tuple[Checkpoint, PreTrainedModel]:
    """A base model's stored tensors, and its modules on the meta device.

    Raises:
        ModelError: it cannot be read, is not whole, is not what qtune wrote there, or is stored quantized by anything
            but bitsandbytes.
    """
    require_as_made(base, whole=True)
    network = empty_model(base, trust_remote_code=trust_remote_code)
    quantization = getattr(network.config, "quantization_config", None)
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    method = getattr(method, "quant_method", method)
    if method is not None and str(method) not in ("bitsandbytes", "QuantizationMethod.BITS_AND_BYTES"):
        message = f"is stored as {method}, which cannot be merged; export the adapter alone (--adapter-only)"
        raise ModelError(Problem(str(base), message))
    return require_complete(base, network.config), network
