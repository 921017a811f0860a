"""The base model and its tokenizer: found, and loaded as the plan says."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_utils,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from qtune import console
from qtune.cache import cache_folder
from qtune.device.present import Device, is_out_of_memory
from qtune.disk import refusal_of
from qtune.errors import ModelError, OutOfMemory, Problem, QtuneError, first_line
from qtune.model.checkpoint import Checkpoint, is_finite
from qtune.model.config import read_config
from qtune.model.contents import checksums_of
from qtune.model.folder import refuse_damaged_json, refuse_other_folders, refuse_pointers, require_side_files
from qtune.model.generation import require_generation_config
from qtune.model.host import frozen_tables, store_embeddings
from qtune.model.hub import hub_refusal, is_local_only, require_reachable
from qtune.model.kept_precision import kept_in_fp32
from qtune.model.layer_stream import stream_layers
from qtune.model.local import base_folder, base_on_disk, local_base
from qtune.model.quantization import is_stored_quantized, quantization_config, quantized_too_little
from qtune.model.quantized_copy import QuantizedCopy, copy_of
from qtune.model.trust import trusted_revision
from qtune.model.weights import load_weights
from qtune.plan import SDPA, Plan
from qtune.recipe.schema import FourBit, Model, Quantization
from qtune.sizes import gib_text
from qtune.startup.safe_bitsandbytes import require_right_kernels


def load_config(model: Model) -> PretrainedConfig:
    """The model's configuration; needs no weights.

    Raises:
        ModelError: it cannot be found or read, or nothing that qtune trains can be built from it.
    """
    base = base_folder(model)
    refuse_other_folders(base)
    require_reachable(model, "config.json")
    folder = Path(base) if Path(base).is_dir() else base_on_disk(model)
    if folder is not None:  # of a hub model that is not here yet, nothing can be asked
        require_side_files(folder)
        require_generation_config(folder)
    try:
        return read_config(base, **_where(model))
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(model, error) from error


def attention_rule(config: PretrainedConfig) -> tuple[str, str]:
    """What `model.attention = "auto"` means for this model, and why: sdpa where the model's class can be given it."""
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if kind is None or kind._supports_sdpa:  # code that comes with a model says itself what it supports
        return SDPA
    return "eager", f"{kind.__name__} cannot be given sdpa"


def require_attention(attention: str) -> None:
    """FlashAttention is a package of its own.

    Raises:
        ModelError: it is asked for and not installed.
    """
    if attention == "flash_attention_2" and find_spec("flash_attn") is None:
        message = '"flash_attention_2" needs the package flash-attn, which is not installed; pip install flash-attn, '
        raise ModelError(Problem("model.attention", message + 'or use "sdpa"'))


def require_kernels(quantization: Quantization, plan: Plan) -> None:
    """What a plan computes with has to be here, and right: asked before a run, and by each verb that loads a model.

    Raises:
        ModelError: the attention is not installed, or bitsandbytes computes wrong on this processor.
    """
    require_attention(plan.attention)
    if plan.device.kind == "cpu" and isinstance(quantization, FourBit):
        require_right_kernels()


TOKENIZER_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError)
"""What transformers raises over a tokenizer's files that are damaged; what its tokenizers raise is a bare Exception."""


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a pad token in any case: labels are built before padding, so any token will do.

    Raises:
        ModelError: it cannot be found or read.
    """
    base = base_folder(model)
    refuse_other_folders(base)
    require_reachable(model, "tokenizer_config.json")
    if Path(base).is_dir():
        require_side_files(Path(base))
    if os.path.lexists(Path(base) / "config.json"):
        load_config(model)  # the tokenizer's loader asks it too, and has no words for what is wrong with it
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, **_where(model))
    except Exception as error:
        if isinstance(error, QtuneError) or not (isinstance(error, TOKENIZER_ERRORS) or type(error) is Exception):
            raise
        refuse_damaged_json(Path(base))
        if "instantiate the backend tokenizer" in str(error):  # followed by a list of what it could be made of
            message = "has no tokenizer: there is no tokenizer.json, and no file that one could be made of"
            raise ModelError(Problem(base, message)) from error
        raise _unreadable(model, error) from error
    if not isinstance(tokenizer.model_max_length, (int, float)):
        message = f"model_max_length = {str(tokenizer.model_max_length)[:40]!r}: is no number of tokens"
        raise ModelError(Problem(str(Path(base) / "tokenizer_config.json"), message))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


LOADING_ERRORS = (
    OSError, ValueError, KeyError, ImportError, RuntimeError, AssertionError, SafetensorError, MemoryError,
)  # fmt: skip
"""What transformers, safetensors and bitsandbytes raise over weights that are not there, damaged or too large."""


def load_plain(model: Model, device: Device, dtype: torch.dtype) -> PreTrainedModel:
    """A model as its author stored it, unquantized, on a device.

    Raises:
        OutOfMemory: it does not fit the device. ModelError: it cannot be found or read.
    """
    _refuse_too_large(model, device, dtype)
    try:
        with console.progress(f"loading {model.base}"):
            network = load_weights(
                base_folder(model), load_config(model), dtype, device_map={"": device.torch_name}, **_where(model)
            )
    except LOADING_ERRORS as error:
        raise _not_loaded(model, error, device) from error
    return network.eval()


def _refuse_too_large(model: Model, device: Device, dtype: torch.dtype) -> None:
    """Before minutes of loading: a folder's weights in `dtype` against what is free on a card."""
    folder = Path(base_folder(model))
    if device.kind != "cuda" or not folder.is_dir() or not any(folder.glob("*.safetensors")):
        return
    needed = sum(  # what is packed stays so
        dtype.itemsize * prod(one.shape) if one.dtype.is_floating_point else one.nbytes
        for one in Checkpoint.open(folder).tensors.values()
    )
    if needed > device.free_bytes:
        free = f"{device.name} has {gib_text(device.free_bytes)} free"
        raise OutOfMemory(
            f"{model.base} takes {gib_text(needed)} as it is stored, and {free}; the run that it was exported from "
            "answers the same on its base in 4 bits: qtune chat RUN"
        )


def load_base(model: Model, quantization: Quantization, plan: Plan) -> PreTrainedModel:
    """The frozen base model on the plan's device, its embeddings and head in host memory where the plan says so.

    A checkpoint that is already quantized is loaded as it is. Nothing is cast up afterwards: peft's k-bit preparation
    would turn embeddings, norms and head into fp32.

    Raises:
        OutOfMemory: it does not fit the device.
        ModelError: it cannot be found or read, less of it than `minimum_share` can be quantized, or `require_kernels`
            refuses.
    """
    with console.progress(f"loading {model.base}"):
        return _loaded(model, quantization, plan)


def _loaded(model: Model, quantization: Quantization, plan: Plan) -> PreTrainedModel:
    require_kernels(quantization, plan)
    dtype = getattr(torch, plan.compute_dtype)
    config = load_config(model)
    stored = is_stored_quantized(config)
    ours = None if stored else quantization_config(quantization, dtype)
    places = {"": plan.device.torch_name}
    if plan.layers != "device":
        places = {"": "cpu"}  # quantized there: the card may be smaller than the layers
    elif plan.embeddings != "device" and plan.device.kind == "cuda" and not (stored or model.trust_remote_code):
        places |= dict.fromkeys(embedding_names(config), "cpu")
        if ours is not None:
            # transformers' consent to weights on the host. They are not quantized anyway, and keep their type.
            ours.llm_int8_enable_fp32_cpu_offload = True
    options = {"dtype": dtype, "attn_implementation": plan.attention}
    source, copied = base_folder(model), _copy_of(model, quantization, plan, config)
    try:
        with _without_hooks() if len(places) > 1 else nullcontext():
            network = copied.load(places, **options) if copied is not None else None
            if network is None:
                # Even a None would hide the quantization that a checkpoint brings along.
                options |= {"quantization_config": ours} if ours else {}
                network = load_weights(source, config, device_map=places, **options, **_where(model))
                if copied is not None:
                    copied.keep(network)
    except LOADING_ERRORS as error:
        raise _not_loaded(model, error, plan.device) from error
    network.requires_grad_(False)
    if stored:
        _as_planned(model.base, network, dtype)
    elif problem := quantized_too_little(model.base, network, quantization):
        raise ModelError(problem)
    store_embeddings(network, plan.embeddings, plan.device.torch_name)
    if plan.layers != "device":
        _stream(model, network, plan)
    return network


def _as_planned(base: str, network: PreTrainedModel, dtype: torch.dtype) -> None:
    """Of a checkpoint that is quantized already, gives what is not quantized the type of the plan.

    transformers 5.23 leaves it in the type that it is stored in, whatever `dtype` says. A weight in 4 bits comes with
    the type that it had before, in which a gradient and the lean step would read it back; a product takes the layer's.

    Raises:
        ModelError: a number is beyond the plan's type.
    """
    is_kept = kept_in_fp32(network, dtype)
    for name, parameter in network.named_parameters():
        if parameter.is_floating_point() and not isinstance(parameter, bitsandbytes.nn.Params4bit):
            parameter.data = parameter.data.to(torch.float32 if is_kept(name) else dtype)
            if not is_finite(parameter):
                kind = str(dtype).removeprefix("torch.")
                message = f"{name} holds numbers beyond {kind}; use another quantization.compute_dtype"
                raise ModelError(Problem(base, message))
    for module in network.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit) and module.compute_dtype is not None:
            module.weight.quant_state.dtype = module.compute_dtype


def checksums_loaded(model: Model, quantization: Quantization, plan: Plan) -> dict[str, str]:
    """`contents.checksums_of` the files that `load_base` reads; of those that the quantized copy was made of, where it
    reads that.

    Raises:
        ModelError: the base cannot be had.
    """
    folder = base_on_disk(model) or local_base(model)
    copied = _copy_of(model, quantization, plan, load_config(model))
    known = None if copied is None else copied.checksums()
    return checksums_of(folder) if known is None else known


def _copy_of(model: Model, quantization: Quantization, plan: Plan, config: PretrainedConfig) -> QuantizedCopy | None:
    if is_stored_quantized(config) or model.trust_remote_code:
        return None
    return copy_of(base_folder(model), base_on_disk(model), quantization, plan, config)


def _stream(model: Model, network: PreTrainedModel, plan: Plan) -> None:
    try:
        if plan.layers == "sharded":
            from qtune.model.sharded_layers import ShardedStream  # FSDP takes a while to import, and few need it

            stream_layers(network, plan.layers, plan.device.torch_name, stream_type=ShardedStream)
        else:
            stream_layers(network, plan.layers, plan.device.torch_name)
    except OSError as error:
        reason = f"the layers cannot be written to {cache_folder()}: {refusal_of(error) or first_line(error)}"
        raise ModelError(Problem("memory.layers", reason)) from error
    except (RuntimeError, MemoryError) as error:
        raise _not_loaded(model, error, plan.device) from error


def embedding_names(config: PretrainedConfig) -> list[str]:
    """Names of the modules that `store_embeddings` takes, in the model of this configuration."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    taken = frozen_tables(model)
    return [name for name, module in model.named_modules() if module in taken]


@contextmanager
def _without_hooks() -> Iterator[None]:
    """Weights are loaded to two places, and used in our own way from there.

    transformers (5.23, modeling_utils.py, `from_pretrained`) gives such a model accelerate's hooks, which would carry
    the weights over whole before each use. There is no option against it.
    """
    loading: Any = modeling_utils
    original = loading.accelerate_dispatch
    loading.accelerate_dispatch = lambda *args, **kwargs: None
    try:
        yield
    finally:
        loading.accelerate_dispatch = original


def _where(model: Model) -> dict[str, Any]:
    """Which revision, and whether its code may run: where the recipe says so and this computer's user has agreed."""
    revision = model.revision
    if model.trust_remote_code:
        revision = trusted_revision(base_folder(model), revision)
    options: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
    if revision:
        options["revision"] = revision
    if is_local_only(model.base):
        options["local_files_only"] = True
    return options


def _not_loaded(model: Model, error: Exception, device: Device) -> OutOfMemory | ModelError:
    if is_out_of_memory(error):
        return OutOfMemory(f"{model.base} does not fit {device.name}, which had {gib_text(device.free_bytes)} free")
    return _unreadable(model, error)


def _unreadable(model: Model, error: Exception) -> ModelError:
    folder = Path(base_folder(model))
    if folder.is_dir():
        refuse_pointers(folder)
    if (refusal := hub_refusal(model, error)) is not None:
        return refusal
    if "trust_remote_code" in str(error):
        advice = "brings Python code of its own; read it, and if you trust it set model.trust_remote_code = true"
        return ModelError(Problem(model.base, advice))
    return ModelError(Problem(model.base, f"cannot be loaded: {first_line(error)}"))
