"""What the libraries of a step ask about the device, answered as a card answers while a trace runs on CPU tensors.

`QUESTIONS` has every question whose answer changes memory; a test holds that the functions of a step ask no others.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from bitsandbytes.autograd import _functions
from transformers.integrations import moe

from qtune.model import short_attention

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qtune.memory.tracing.cuda import Capability


@dataclass(frozen=True)
class DeviceQuestion:
    """A name that libraries look up when they want to know the device, and what stands there on a card."""

    owner: Any
    name: str
    on_card: Callable[[Capability], Any]
    why: str


QUESTIONS = (
    DeviceQuestion(
        torch,
        "is_autocast_enabled",
        lambda capability: _autocast_of_the_trace,
        "without a device it means CUDA's state (torch 2.13, torch/csrc/autograd/init.cpp); peft 0.21's quantized "
        "layers cast their input to fp32 where it is off",
    ),
    DeviceQuestion(
        _functions,
        "MatMul8bitFp",
        lambda capability: _functions.MatMul8bitLt,
        "bitsandbytes 0.50's `matmul` trains on a CPU with the dequantized weight, on a card with int8 products",
    ),
    DeviceQuestion(
        moe,
        "_can_use_grouped_mm",
        lambda capability: lambda rows, weight, ends: capability >= (8, 0),
        "transformers 5.23 multiplies the experts one by one before Ampere",
    ),
    DeviceQuestion(
        short_attention,
        "is_widened",
        lambda capability: lambda query, dtype: False,
        "attention of short rows is computed in float32 on a processor alone",
    ),
)


@contextlib.contextmanager
def answered_as_on_a_card(capability: Capability, questions: tuple[DeviceQuestion, ...] = QUESTIONS) -> Iterator[None]:
    """While the block runs, the questions are answered as a card of that capability answers them."""
    absent = object()
    with contextlib.ExitStack() as before:
        for question in questions:
            present = getattr(question.owner, question.name, absent)
            if present is absent:
                before.callback(delattr, question.owner, question.name)
            else:
                before.callback(setattr, question.owner, question.name, present)
            setattr(question.owner, question.name, question.on_card(capability))
        yield


_is_autocast_enabled = torch.is_autocast_enabled


def _autocast_of_the_trace(device_type: str = "cpu") -> bool:
    """Whether the step computes under autocast, which a trace has on the CPU whatever device is asked about."""
    return _is_autocast_enabled("cpu")
