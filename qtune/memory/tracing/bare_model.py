"""A model without weights: its real classes from config.json, quantized and adapted by the real code, then faked.

Everything is built on the meta device, as `from_pretrained` itself does before it reads weights; `give_storage` then
replaces each meta tensor by a fake CPU one. (peft and bitsandbytes move and cast parameters in ways that fake tensors
refuse and meta tensors allow. Fake CUDA tensors need a CUDA build, which a prediction must not.)
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import bitsandbytes
import torch
from bitsandbytes.functional import QuantState
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import local_torch_dtype
from transformers.quantizers.auto import AutoHfQuantizer

from qtune.errors import ModelError, Problem, first_line
from qtune.model.kept_precision import kept_in_fp32
from qtune.model.layer_stream import stream_of
from qtune.model.stored_rows import stored_rows

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

    from qtune.memory.tracing.fake_tensors import RememberingMode


class Params4bit(FakeTensor):
    """A fake packed weight. peft and transformers recognize bitsandbytes' parameter by the name of its class."""


NESTED_BLOCK = 256
"""bitsandbytes quantizes absmax values in blocks of 256 (QLoRA, arXiv:2305.14314, section 3)."""


def bare_model(
    config: PretrainedConfig, dtype: torch.dtype, quantization: BitsAndBytesConfig | None, attention: str
) -> PreTrainedModel:
    """The causal LM of `config` on the meta device, its linear layers replaced as transformers would on loading.

    A checkpoint that is quantized already (`config.quantization_config`) keeps its own quantization.

    Raises:
        ModelError: transformers has no causal LM for this configuration, or its numbers do not fit together.
    """
    config = copy.deepcopy(config)
    stored = getattr(config, "quantization_config", None)
    name = getattr(config, "_name_or_path", "") or config.model_type
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=dtype,
                attn_implementation=attention,
                # Said in any case: transformers asks a person where nothing is said.
                trust_remote_code=is_trusted(config),
            )
        keep_in_fp32(model, dtype)
        if (chosen := stored or quantization) is not None:
            quantizer = AutoHfQuantizer.from_config(chosen, pre_quantized=bool(stored))
            with local_torch_dtype(dtype):  # as loading does: a bias takes the default type of that moment
                quantizer.preprocess_model(model, dtype=dtype, device_map=None)
            pack(model, dtype)
            quantizer.postprocess_model(model)
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError, AssertionError) as error:
        reason = f"nothing is called {error}" if isinstance(error, KeyError) else first_line(error)
        raise ModelError(Problem(name, f"no model can be built from its config.json: {reason}")) from error
    model.requires_grad_(False)
    return model


def is_trusted(config: PretrainedConfig) -> bool:
    """Whether code that came with the model has run to read its configuration, which the recipe has allowed."""
    return type(config).__module__.startswith("transformers_modules")


def keep_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Casts what a class wants in fp32 whatever it is loaded in."""
    is_kept = kept_in_fp32(model, dtype)
    for prefix, module in model.named_modules():
        for slots in (module._parameters, module._buffers):
            for name, tensor in slots.items():
                if tensor is not None and tensor.is_floating_point() and is_kept(f"{prefix}.{name}"):
                    tensor.data = tensor.data.float()


def pack(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Give every bitsandbytes layer on the meta device the tensors that quantizing its weight would leave.

    dtype: type of the weights before quantization, to which they are dequantized.
    """
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            _pack_four_bit(module, dtype)
            # bitsandbytes 0.50 would repack it for a processor with AVX-512 in its first forward in eval mode.
            module.support_avx512bf16_for_cpu = False
        elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
            shape = module.weight.shape
            module.weight = bitsandbytes.nn.Int8Params(
                torch.empty(shape, dtype=torch.int8, device="meta"),
                requires_grad=False,
                SCB=torch.empty(shape[0], device="meta"),
            )


def _pack_four_bit(module: Any, dtype: torch.dtype) -> None:
    weight = module.weight
    shape = torch.Size((module.out_features, module.in_features))
    codes, absmax = torch.ops.bitsandbytes.quantize_4bit(
        torch.empty(shape, dtype=dtype, device="meta"), weight.blocksize, weight.quant_type, weight.quant_storage
    )
    nested = offset = None
    if weight.compress_statistics:
        blocks = absmax.numel()
        nested = QuantState(
            absmax=torch.empty(-(-blocks // NESTED_BLOCK), device="meta"),
            code=torch.empty(256, device="meta"),
            blocksize=NESTED_BLOCK,
            dtype=torch.float32,
        )
        absmax, offset = torch.empty(blocks, dtype=torch.uint8, device="meta"), torch.empty((), device="meta")
    state = QuantState(
        absmax=absmax,
        shape=shape,
        code=torch.empty(16, device="meta"),
        blocksize=weight.blocksize,
        quant_type=weight.quant_type,
        dtype=dtype,
        offset=offset,
        state2=nested,
    )
    module.weight = bitsandbytes.nn.Params4bit(
        codes,
        requires_grad=False,
        quant_state=state,
        blocksize=weight.blocksize,
        compress_statistics=weight.compress_statistics,
        quant_type=weight.quant_type,
        quant_storage=weight.quant_storage,
        module=module,
        bnb_quantized=True,
    )
    module.quant_state = state


def give_storage(model: torch.nn.Module, mode: RememberingMode) -> None:
    """Replace every meta tensor of a model by a fake one on the CPU device; tied tensors stay tied."""
    given: dict[int, Any] = {}
    kept: list[torch.Tensor] = []  # an id means its tensor only while that is alive

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in given:
            kept.append(tensor)
            plain: Any = mode.new(tensor.shape, tensor.dtype, tensor.stride())
            if isinstance(tensor, torch.nn.Parameter):
                with mode:
                    plain = torch.nn.Parameter(plain, requires_grad=tensor.requires_grad)
            _carry_constants(tensor, plain, fake)
            given[id(tensor)] = plain
        return given[id(tensor)]

    for module in model.modules():
        for slots in (module._parameters, module._buffers):
            for name, tensor in slots.items():
                if tensor is not None and tensor.device.type == "meta":
                    slots[name] = fake(tensor)  # type: ignore[assignment]
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.quant_state = module.weight.quant_state
        if (rows := stored_rows(module)) is not None and rows.tensors()[0].device.type == "meta":
            rows.through(fake)  # once for tied weights, which share it
    if (stream := stream_of(model)) is not None:
        stream.through(fake)
    prompt_tokens: dict[str, torch.Tensor] = getattr(model, "prompt_tokens", {})
    for name, tokens in prompt_tokens.items():
        prompt_tokens[name] = fake(tokens)


def _carry_constants(old: Any, new: Any, fake: Any) -> None:
    """bitsandbytes hangs what it needs on the weight: here as plain attributes of a fake parameter."""
    state = getattr(old, "quant_state", None)
    if state is not None:
        new.quant_state = _fake_state(state, fake)
        new.__class__ = Params4bit
        new.bnb_quantized, new.compress_statistics, new.quant_type = True, old.compress_statistics, old.quant_type
    if isinstance(old, bitsandbytes.nn.Int8Params):
        new.SCB, new.CB, new.has_fp16_weights = fake(old.SCB), new.detach(), False


def _fake_state(state: QuantState, fake: Any) -> QuantState:
    return QuantState(
        absmax=fake(state.absmax),
        shape=state.shape,
        code=fake(state.code),
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=state.dtype,
        offset=None if state.offset is None else fake(state.offset),
        state2=None if state.state2 is None else _fake_state(state.state2, fake),
    )
