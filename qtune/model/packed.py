"""A weight that a checkpoint holds quantized by bitsandbytes: the tensors beside it, without which it is only codes.

A tensor is quantized if and only if it has them. `llm_int8_skip_modules` of config.json says the same of most
checkpoints, and nothing of those that were put together by hand.
"""

import json
from collections.abc import Container

from torch import Tensor

from qtune.errors import ModelError, Problem, first_line
from qtune.model.checkpoint import Checkpoint

# What bitsandbytes 0.50 stores: in 4 bits under the weight's name and one of these, in 8 bits beside it in its module.
ABSMAX, ROW_SCALES = "absmax", "SCB"
QUANT_STATES = ("quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4")
FOUR_BIT = (ABSMAX, "quant_map", "nested_absmax", "nested_quant_map", *QUANT_STATES)
EIGHT_BIT = (ROW_SCALES, "weight_format")


def is_statistic(name: str, names: Container[str]) -> bool:
    """Whether a tensor of a checkpoint is what bitsandbytes keeps beside a weight."""
    for parts, weight in ((FOUR_BIT, ""), (EIGHT_BIT, ".weight")):
        for part in parts:
            if name.endswith(f".{part}") and name.removesuffix(f".{part}") + weight in names:
                return True
    return False


def statistics_of(name: str, names: Container[str]) -> dict[str, str]:
    """What stands beside a quantized weight, by the part of its name after the weight's; empty for any other tensor."""
    if f"{name}.{ABSMAX}" in names:
        return {part: f"{name}.{part}" for part in FOUR_BIT if f"{name}.{part}" in names}
    module = name.removesuffix(".weight")
    if module != name and f"{module}.{ROW_SCALES}" in names:
        return {ROW_SCALES: f"{module}.{ROW_SCALES}"}
    return {}


def read_statistics(name: str, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """`statistics_of` a weight, read.

    Raises:
        ModelError: some of their numbers are infinite or none.
    """
    found = statistics_of(name, checkpoint.tensors)
    return {part: checkpoint.read_finite(beside) for part, beside in found.items()}


def unpacked_shape(name: str, checkpoint: Checkpoint) -> tuple[int, ...]:
    """A tensor's shape; that of a 4-bit weight is in the JSON that bitsandbytes keeps beside it.

    Raises:
        ModelError: it is not there.
    """
    stored = checkpoint.tensors[name]
    states = [f"{name}.{state}" for state in QUANT_STATES if f"{name}.{state}" in checkpoint.tensors]
    if not states:
        return stored.shape
    try:
        described = json.loads(checkpoint.read(states[0]).numpy().tobytes())
        return tuple(int(size) for size in described["shape"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            Problem(str(stored.file), f"{states[0]} does not say how {name} is packed: {first_line(error)}")
        ) from error
