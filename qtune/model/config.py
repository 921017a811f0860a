"""A model's config.json, read and checked before anything is built from it.

transformers fills what is missing with the sizes of some other model, and notices what cannot be only deep inside a
layer. Here every problem is said at once, by its key.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from qtune.errors import ModelError, Problem, last_line
from qtune.spelling import did_you_mean

FILE = "config.json"

# Our name of a size -> the names that families have for it.
SIZES = {
    "hidden_size": ("n_embd", "n_embed", "d_model", "dim"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers", "decoder_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads"),
    "vocab_size": (),
}
OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "intermediate_size", "sliding_window")
# Far above what there is; what lies beyond would be built for hours before it fills memory.
LARGEST = {"num_hidden_layers": 10_000, "num_attention_heads": 65_536, "vocab_size": 16_777_216}
LARGEST_WIDTH = 4_194_304
LARGEST_NUMBER = 2**63
COMPUTED = (
    "_size", "_window", "_dim", "_rank", "_layers", "_heads", "_experts", "_per_tok", "_embeddings", "_positions",
    "_eps", "_epsilon", "_theta", "_base", "_scalar", "_scale", "_scaling", "_factor", "_multiplier", "_softcapping",
    "_range", "_limit",
)  # fmt: skip
"""How keys end with whose numbers modules are built or compute; what else is there, as a tokenizer's max_length of
10^30, nobody reads."""
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def read_config(
    base: str, *, revision: str | None = None, trust_remote_code: bool = False, local_files_only: bool = False
) -> PretrainedConfig:
    """The configuration of a model folder or hub id; needs no weights.

    Raises:
        ModelError: there is none, it is no configuration of a causal LM, or its numbers do not fit together.
        OSError, ValueError, KeyError: a hub id cannot be had.
    """
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": local_files_only}
    if revision is not None:
        options["revision"] = revision
    folder = Path(base)
    if folder.is_dir() or _is_path(base):
        place, raw = str(folder / FILE), _from_folder(folder)
    else:
        place, raw = f"{base}, {FILE}", PretrainedConfig.get_config_dict(base, **options)[0]
    _refuse(place, _faults(raw))
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(base, **options)
    except (StrictDataclassError, TypeError, AttributeError, ArithmeticError) as error:
        raise ModelError(Problem(place, _last_sentence(error))) from error
    return config


def _is_path(base: str) -> bool:
    """Whether a name that is no folder was meant as one: a hub id is `name` or `owner/name`."""
    return base.startswith(("/", ".", "~")) or base.count("/") > 1


def _from_folder(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ModelError(Problem(str(folder), "no such file or folder"))
    file = folder / FILE
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(Problem(str(folder), f"has no {FILE}, so it is no model folder")) from error
    except OSError as error:
        raise ModelError(Problem(str(file), f"cannot be read: {error.strerror}")) from error
    except UnicodeDecodeError as error:
        raise ModelError(Problem(str(file), f"is not UTF-8 text (byte {error.start})")) from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ModelError(Problem(str(file), f"is not JSON: {error.msg} ({where})")) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a nest of thousands of brackets
        raise ModelError(Problem(str(file), "is no configuration: numbers or brackets in it have no end")) from error
    if not isinstance(raw, dict):
        raise ModelError(Problem(str(file), f"must be an object with keys, not {_shown(raw)}"))
    return raw


def _refuse(place: str, faults: Iterator[str]) -> None:
    problems = [Problem(place, fault) for fault in faults]
    if problems:
        raise ModelError(problems)


def _faults(raw: Mapping[str, Any]) -> Iterator[str]:
    """What can be said of the file alone."""
    kind = raw.get("model_type")
    if kind is None:
        yield 'model_type: is missing; it names the architecture, as "llama"'
    elif not isinstance(kind, str):
        yield f'model_type = {_shown(kind)}: must be the name of an architecture, as "llama"'
    elif kind not in CONFIG_MAPPING:
        if "auto_map" not in raw:
            meant = did_you_mean(str(kind), CONFIG_MAPPING, "a newer one may have it")
            yield f"model_type = {_shown(kind)}: unknown to transformers {transformers.__version__}; {meant}"
    elif unfit := list(_not_causal(CONFIG_MAPPING[kind], raw)):
        yield from unfit
        return
    else:
        yield from _missing(raw, CONFIG_MAPPING[kind])
    yield from _impossible(raw)
    if isinstance(text := raw.get("text_config"), Mapping):
        yield from (f"text_config.{fault}" for fault in _impossible(text))
    yield from _foreign_quantization(raw.get("quantization_config"))
    for key in ("dtype", "torch_dtype"):
        name = raw.get(key)
        if name not in (None, "auto") and not isinstance(getattr(torch, str(name), None), torch.dtype):
            yield f'{key} = {_shown(name)}: is no type of PyTorch; "bfloat16", "float16" and "float32" are'


def _missing(raw: Mapping[str, Any], kind: Any) -> Iterator[str]:
    """Sizes without which transformers would take those of the architecture's first model.

    Configurations with a part for each kind of input (text, images) are written without what their family has by
    default, so nothing is missing there.
    """
    if kind.sub_configs:
        return
    for size, others in SIZES.items():
        own = kind.attribute_map.get(size, size)
        if not isinstance(getattr(kind, own, property()), property) and not {size, own, *others} & raw.keys():
            yield f"{own}: is missing; transformers would take {_shown(getattr(kind, own))}, of another model"


def _impossible(raw: Mapping[str, Any]) -> Iterator[str]:
    """Sizes that are none, and sizes that cannot be together."""
    whole: dict[str, int] = {}
    for size, others in (*SIZES.items(), *((name, ()) for name in OPTIONAL_SIZES)):
        for name in (size, *others):
            value = raw.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                whole[size] = value
                if value > LARGEST.get(size, LARGEST_WIDTH):
                    yield f"{name} = {_shown(value)}: no model has more than {LARGEST.get(size, LARGEST_WIDTH):,}"
            # Some families have one for each layer, and none where there is a default.
            elif name in raw and not (size not in ("hidden_size", "vocab_size") and isinstance(value, list)):
                if (value is None and size in OPTIONAL_SIZES) or (name == "sliding_window" and not _has_window(raw)):
                    continue
                yield f"{name} = {_shown(value)}: must be a whole number above 0"
    yield from _out_of_range(raw)
    heads, shared = whole.get("num_attention_heads"), whole.get("num_key_value_heads")
    if heads and shared and heads % shared:
        fitting = ", ".join(str(count) for count in range(1, heads + 1) if heads % count == 0)
        yield f"num_key_value_heads = {shared}: must divide num_attention_heads = {heads}: {fitting}"
    chosen = raw.get("num_experts_per_tok")
    for name in EXPERTS:
        experts = raw.get(name)
        if isinstance(chosen, int) and isinstance(experts, int) and 0 < experts < chosen:
            yield f"num_experts_per_tok = {chosen}: there are only {name} = {experts}"


def _has_window(raw: Mapping[str, Any]) -> bool:
    """Whether sliding_window is used: families that ask use_sliding_window first ignore it where that is false."""
    name = raw.get("model_type")
    kind = CONFIG_MAPPING[name] if isinstance(name, str) and name in CONFIG_MAPPING else None
    return bool(raw.get("use_sliding_window", getattr(kind, "use_sliding_window", True)))


def _out_of_range(raw: Mapping[str, Any]) -> Iterator[str]:
    """Values that modules take, and with which they compute no numbers, or end in the first step."""
    for name in ("output_attentions", "output_hidden_states", "return_dict"):
        if not isinstance(raw.get(name, False), (bool, type(None))):
            yield f"{name} = {_shown(raw[name])}: must be true or false"
    if raw.get("return_dict") is False:
        yield "return_dict = false: results are taken by their names; remove the key"
    if raw.get("output_attentions") is True:
        yield "output_attentions = true: attention is computed by kernels that do not have its shares; remove the key"
    for name, value in raw.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            continue
        is_computed = name.endswith(COMPUTED) or any(name in (size, *others) for size, others in SIZES.items())
        if is_computed and LARGEST_NUMBER <= abs(value) < float("inf"):
            yield f"{name} = {_shown(value)}: no number of a model is that large"
        if name.endswith(("_eps", "_epsilon")) and not 0 <= value < 1:
            yield f"{name} = {_shown(value)}: must be a small number that is not below 0"
        if name.endswith(("dropout", "_pdrop", "dropout_prob")) and not 0 <= value <= 1:
            yield f"{name} = {_shown(value)}: must be a share, from 0 to 1"


def _foreign_quantization(given: Any) -> Iterator[str]:
    """bitsandbytes alone is read: adapters, merging and prediction know how its weights are stored."""
    if not given:
        return
    if not isinstance(given, Mapping):
        yield f"quantization_config = {_shown(given)}: must be an object"
        return
    storage = given.get("bnb_4bit_quant_storage", "uint8")
    if given.get("load_in_4bit") and storage not in (None, "uint8"):
        yield (
            f"quantization_config.bnb_4bit_quant_storage = {_shown(storage)}: its codes are kept as numbers of another "
            "type, which cannot be checked; name the same model unquantized, or stored with uint8"
        )
    method = given.get("quant_method")
    if method is None and (given.get("load_in_4bit") or given.get("load_in_8bit")):
        return
    if method != "bitsandbytes":
        yield (
            f"quantization_config.quant_method = {_shown(method)}: qtune trains on weights that are unquantized or "
            "quantized by bitsandbytes; name the same model without this quantization"
        )


def _not_causal(kind: Any, raw: Mapping[str, Any]) -> Iterator[str]:
    """Architectures that transformers knows and qtune cannot train."""
    name = _shown(raw["model_type"])
    if raw.get("is_encoder_decoder", getattr(kind, "is_encoder_decoder", False)):
        yield f"model_type = {name}: has an encoder and a decoder; qtune trains causal language models"
    elif kind not in MODEL_FOR_CAUSAL_LM_MAPPING and "AutoModelForCausalLM" not in (raw.get("auto_map") or {}):
        yield f"model_type = {name}: is no causal language model in transformers {transformers.__version__}"
    # GPT-NeoX has the key and no use for it.
    elif not raw.get("is_decoder", getattr(kind, "is_decoder", True)) and not raw["model_type"].startswith("gpt_neox"):
        yield f"model_type = {name}: is an encoder, whose tokens see what follows them; is_decoder is false"


def _last_sentence(error: Exception) -> str:
    """transformers' own validation wraps what it has to say in where it says it."""
    said = last_line(error)
    for name in ("ValueError: ", "TypeError: "):
        said = said.removeprefix(name)
    return f"cannot be: {said}"


def _shown(value: Any) -> str:
    text = str(value)[:60] if isinstance(value, int) and value.bit_length() > 200 else json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
