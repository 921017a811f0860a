"""Whether a folder's weights are all that its model needs, and nothing else: asked of headers, without reading weights.

transformers fills what a checkpoint lacks with random numbers and drops what it does not know, each with a warning.
Here its own loading runs on tensors without storage, so that its rules of names and shapes are the ones that count,
and what it reports is an error.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.pytorch_utils import Conv1D

from qtune.errors import ModelError, Problem, first_line
from qtune.model.checkpoint import Checkpoint
from qtune.model.folder import INDEX, SINGLE, weight_files
from qtune.model.packed import is_statistic, statistics_of, unpacked_shape
from qtune.model.quantization import unquantized

SHOWN = 6
"""Names that are written out; of more the number is said."""


def require_complete(folder: Path, config: PretrainedConfig, checkpoint: Checkpoint | None = None) -> Checkpoint:
    """The tensors of a model folder, which are those that its model is made of, in its shapes.

    A tied parameter may lack where the one that it is tied to is stored, by the model's own word on what it ties.

    Raises:
        ModelError: weights are missing, unknown, of another shape, or cannot be put together; each is named with its
            file. A shard is missing or cannot be read.
    """
    checkpoint = checkpoint or Checkpoint.open(folder)
    model = _without_storage(folder, config)
    if model is None:
        return checkpoint  # loading it says why
    refuse(list(_misfits(model, checkpoint)))
    return checkpoint


def refuse(problems: list[Problem]) -> None:
    """Raises a ModelError with all of the problems, if there are any."""
    if problems:
        raise ModelError(problems)


def refuse_report(place: str, report: dict[str, Any]) -> None:
    """Judges what transformers says that it did on loading (`output_loading_info`).

    Raises:
        ModelError: it made up weights, dropped some, or found them in other shapes.
    """
    missing = set(report["missing_keys"])
    shapes = {name: (stored, wanted) for name, stored, wanted in report["mismatched_keys"]}
    problems = [
        *_missing_ones(place, missing),
        *_unknown_ones(place, set(report["unexpected_keys"])),
        *(_other_shape(place, name, *shapes[name]) for name in sorted(shapes)),
        *(Problem(place, f"cannot be put together: {said}") for said in report.get("error_msgs", ())),
    ]
    refuse(problems)


def _without_storage(folder: Path, config: PretrainedConfig) -> PreTrainedModel | None:
    """The model as it is stored: unquantized. None where it cannot be built on the meta device."""
    config = unquantized(config)
    trusted = type(config).__module__.startswith("transformers_modules")
    try:
        return built_on_meta(folder, config, trust_remote_code=trusted)
    except (*NOT_BUILT, RuntimeError, OSError):
        return None


NOT_BUILT = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError)
"""What modules raise over a configuration with which they cannot be."""


def built_on_meta(folder: Path, config: PretrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model of this configuration, in `folder`, on the meta device: its modules and shapes, no memory.

    Raises:
        ModelError: transformers can build none. What code raises that comes with a model, it raises itself.
    """
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except NOT_BUILT as error:
        if trust_remote_code:
            raise
        said = f"no model can be built from it: {type(error).__name__}: {first_line(error)}"
        raise ModelError(Problem(str(folder / "config.json"), said)) from error
    return model


def _misfits(model: PreTrainedModel, checkpoint: Checkpoint) -> Iterator[Problem]:
    """What loading the checkpoint would report, each with the file that it is about."""
    turned = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    tensors = _stand_ins(checkpoint, turned)
    buffers = {name for name, _ in model.named_buffers()}
    names = dict(model.named_parameters(remove_duplicate=False))
    mapping: Any = get_model_conversion_mapping(model)
    settings = LoadStateDictConfig(
        device_map={"": "meta"},
        ignore_mismatched_sizes=True,  # all of them are wanted, not the first
        weight_mapping=mapping,
    )
    report, _ = convert_and_load_state_dict_in_model(model, tensors, settings, None)
    # As `from_pretrained` goes on (transformers 5.23): a parameter that is tied to one that is there, is there.
    model.mark_tied_weights_as_initialized(report)
    model.tie_weights(missing_keys=report.missing_keys, recompute_mapping=False)
    made_up = set(report.missing_keys)
    model._adjust_missing_and_unexpected_keys(report)
    # A class may say that it can do without a name. That is good for buffers, which it computes, and never for
    # parameters, which would be random.
    missing = set(report.missing_keys) | {name for name in made_up if name in names and name not in buffers}
    yield from _missing_ones(_place(checkpoint), missing)
    for file, unknown in _by_file(checkpoint, set(report.unexpected_keys)).items():
        yield from _unknown_ones(file, unknown)
    for name, stored, wanted in sorted(report.mismatched_keys):
        yield _other_shape(_file_of(checkpoint, name), name, stored, wanted)
    for name, said in sorted(report.conversion_errors.items()):
        if "meta" in str(said):
            continue  # what cannot be tried without storage is tried when the weights are read
        yield Problem(_file_of(checkpoint, name), f"{name} cannot be put together: {first_line(Exception(said))}")


def _stand_ins(checkpoint: Checkpoint, turned: set[str]) -> dict[str, Tensor]:
    """Tensors without storage for the stored ones; what bitsandbytes has packed in its shape before that.

    turned: weights of GPT-2's Conv1D, [in, out], of which bitsandbytes stores [out, in].
    """
    found = {}
    for name, stored in checkpoint.tensors.items():
        if is_statistic(name, checkpoint.tensors):
            continue
        shape = unpacked_shape(name, checkpoint)
        if name in turned and statistics_of(name, checkpoint.tensors):
            shape = shape[::-1]
        found[name] = torch.empty(shape, dtype=stored.dtype, device="meta")
    return found


def _place(checkpoint: Checkpoint) -> str:
    """The file that says which weights there are."""
    index = checkpoint.folder / INDEX
    if index.exists():
        return str(index)
    files = weight_files(checkpoint.folder)
    return str(files[0] if len(files) == 1 else checkpoint.folder / SINGLE)


def _file_of(checkpoint: Checkpoint, parameter: str) -> str:
    """The file of a tensor by its parameter's name, where the two are called alike; else the one that lists them."""
    for name in (parameter, parameter.partition(".")[2], f"model.{parameter}"):
        if name in checkpoint.tensors:
            return str(checkpoint.tensors[name].file)
    return _place(checkpoint)


def _by_file(checkpoint: Checkpoint, names: set[str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name in names:
        found.setdefault(_file_of(checkpoint, name), set()).add(name)
    return dict(sorted(found.items()))


def _missing_ones(place: str, names: set[str]) -> Iterator[Problem]:
    if names:
        weights = "a weight" if len(names) == 1 else f"{len(names)} weights"
        message = f"has no {_listed(names)}: {weights} of the model would be random; fetch the model again"
        yield Problem(place, message)


def _unknown_ones(place: str, names: set[str]) -> Iterator[Problem]:
    if names:
        message = f"holds {_listed(names)}, which the model that config.json describes has not; is it of another model?"
        yield Problem(place, message)


def _other_shape(place: str, name: str, stored: Any, wanted: Any) -> Problem:
    return Problem(place, f"{name} is {list(stored)}, config.json makes it {list(wanted)}")


def _listed(names: set[str]) -> str:
    ordered = sorted(
        names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
    )
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(ordered[:SHOWN]) + rest
