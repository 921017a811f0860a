"""Weights of a base that are no numbers: a damaged download, a faulty conversion; training would get the blame."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qtune.errors import ModelError, Problem


def require_finite_weights(network: PreTrainedModel, base: str) -> None:
    """Every weight of a loaded base is a number. One pass over what is stored: of 4-bit weights, over their scales.

    Raises:
        ModelError: with the names of tensors that hold NaN or infinity.
    """
    broken = [name for name, parameter in network.named_parameters() if not all(map(_is_finite, _stored(parameter)))]
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        message = (
            f"has weights that are no finite numbers, in {', '.join(broken[:3])}{more}; the files are damaged or were "
            "converted wrongly, so get them again"
        )
        raise ModelError(Problem(base, message))


def _stored(parameter: nn.Parameter) -> Iterator[Tensor]:
    """The floating-point numbers that a weight is kept as.

    In bitsandbytes' blocks the largest magnitude is the scale (absmax), so a NaN or an infinity of any weight is one of
    its block's; where scales are quantized too, it is one of theirs.
    """
    state: Any = getattr(parameter, "quant_state", None)
    scales: Any = getattr(parameter, "SCB", None)
    if state is not None:
        nested = getattr(state, "state2", None)
        yield from (state.absmax,) if nested is None else (nested.absmax, state.offset)
    elif scales is not None:
        yield scales
    elif parameter.is_floating_point():
        yield parameter.detach()


def _is_finite(tensor: Tensor | None) -> bool:
    if tensor is None or not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
        return True
    lowest, highest = torch.aminmax(tensor)  # one pass without a copy; a NaN is both
    return bool(torch.isfinite(lowest) & torch.isfinite(highest))
