"""What libraries ask about the device inside a step: every question is known, and answered as a card would."""

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
import transformers
from test_memory_trace import recipe_with, tiny

from qtune.device.cards import card_named
from qtune.memory.predict import Longest, predict
from qtune.memory.tracing import device_state
from qtune.memory.tracing.device_state import QUESTIONS, answered_as_on_a_card
from qtune.plan import make_plan

SITE = Path(transformers.__file__).parents[1]
LIBRARIES = ("peft", "bitsandbytes", "transformers", "accelerate")
ASKING = re.compile(
    r"is_autocast_enabled|get_autocast|torch\.(cuda|xpu|mps|npu|accelerator|backends)\b|\.is_cuda\b|device\.type"
    r"|device_type\b|infer_device|is_bf16_supported|current_stream|get_device_capability|is_torch_(xpu|npu|mps|cuda)"
    r"|_is_torch_(xpu|npu|mps)_available|support_avx512"
)

KNOWN = {
    # Answered: device_state.QUESTIONS, or where the model is built.
    "peft/tuners/lora/bnb.py Linear4bit.forward": "torch.is_autocast_enabled",
    "peft/tuners/lora/bnb.py Linear8bitLt.forward": "torch.is_autocast_enabled",
    "peft/tuners/ia3/bnb.py Linear4bit.forward": "torch.is_autocast_enabled",
    "peft/tuners/ia3/bnb.py Linear8bitLt.forward": "torch.is_autocast_enabled",
    "bitsandbytes/autograd/_functions.py matmul": "the product on a card, MatMul8bitLt",
    "bitsandbytes/nn/modules.py Linear4bit.forward": "bare_model.pack: never repacked for a processor",
    "transformers/integrations/moe.py _can_use_grouped_mm": "by the card's capability",
    # The same bytes on a card and on a CPU.
    "bitsandbytes/autograd/_functions.py matmul_4bit": "only of a weight that was repacked for a processor",
    "bitsandbytes/functional.py is_on_gpu": "what it finds wrong is not on any card",
    "bitsandbytes/optim/optimizer.py Optimizer8bit.get_state_buffer": "the same buffer; paged ones are told by size",
    "bitsandbytes/optim/optimizer.py Optimizer8bit.to_gpu": "states are there already",
    "bitsandbytes/utils.py sync_gpu": "waits",
    "peft/tuners/lora/layer.py Linear.get_delta_weight": "only where an adapter is merged",
    "peft/tuners/lora/variants.py DoraLinearVariant.init": "before the step; weights are on one device",
    "peft/utils/integrations.py dequantize_module_weight": "moves a weight to where it is",
    "transformers/cache_utils.py Cache.__init__": "only of an offloaded cache",
    "transformers/cache_utils.py Cache.update": "only of an offloaded cache",
    "transformers/integrations/moe.py grouped_mm_experts_forward": "counts in int32 or fp32, four bytes both",
    "transformers/integrations/sdpa_attention.py sdpa_attention_forward": "other makers' devices",
    "transformers/integrations/sdpa_attention.py use_gqa_in_sdpa": "other makers' devices",
    "transformers/utils/import_utils.py is_cuda_stream_capturing": "no run captures a CUDA graph",
    "transformers/utils/import_utils.py is_xpu_stream_capturing": "other makers' devices",
}
"""Functions of a step that ask, and why the answer is right."""


@contextmanager
def called() -> Iterator[set[CodeType]]:
    """Functions of the libraries that are called in the block."""
    found: set[CodeType] = set()

    def seen(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            found.add(frame.f_code)

    sys.setprofile(seen)
    try:
        yield found
    finally:
        sys.setprofile(None)


def asking(codes: set[CodeType]) -> dict[str, list[str]]:
    """Of these functions those that ask for a device's state, and in which lines."""
    found: dict[str, list[str]] = {}
    for code in codes:
        file = Path(code.co_filename)
        inside = file.is_relative_to(SITE) and file.relative_to(SITE).parts[0] in LIBRARIES
        if not inside or "<" in code.co_qualname.replace("<locals>", "") or code.co_flags & inspect.CO_NEWLOCALS == 0:
            continue
        lines = [line.partition("#")[0].strip() for line in inspect.getsource(code).splitlines()]
        if hits := [line for line in lines if ASKING.search(line)]:
            found[f"{file.relative_to(SITE)} {code.co_qualname}"] = hits
    return found


STEPS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": {"kind": "lora", "rank": 4, "dropout": 0.1}},
    "dora": {"adapter": {"kind": "lora", "rank": 4, "dora": True}, "training": {"optimizer": "paged-adamw-8bit"}},
    "int8": {"quantization": {"kind": "int8"}},
    "ia3": {"adapter": {"kind": "ia3"}},
    "ia3, int8": {"adapter": {"kind": "ia3"}, "quantization": {"kind": "int8"}},
    "p-tuning": {"adapter": {"kind": "p-tuning"}, "training": {"gradient_checkpointing": False}},
    "prefix-tuning": {"adapter": {"kind": "prefix-tuning"}},
    "16 bits": {"quantization": {"kind": "none"}, "training": {"optimizer": "adamw-8bit"}},
}


@pytest.fixture
def in_the_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], set[CodeType]]:
    """Functions called while operations are counted, the building of the model left out."""
    from qtune.memory.tracing import trace

    def traced(tables: dict[str, Any]) -> set[CodeType]:
        codes: set[CodeType] = set()
        original = trace._Tracer.body

        def body(self: Any, step: Any) -> Any:
            with called() as found:
                result = original(self, step)
            codes.update(found)
            return result

        with monkeypatch.context() as patch:
            patch.setattr(trace._Tracer, "body", body)
            recipe = recipe_with(**tables)
            predict(tiny(layers=2), recipe, make_plan(recipe, card_named("H100").device()), Longest(64))
        return codes

    return traced


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_no_function_of_a_step_asks_for_a_device_that_is_not_accounted_for(name: str, in_the_step) -> None:
    found = asking(in_the_step(STEPS[name]))
    assert not {where: lines for where, lines in found.items() if where not in KNOWN}


def test_answers_are_those_of_the_card_and_what_was_there_comes_back() -> None:
    before = [getattr(question.owner, question.name) for question in QUESTIONS]
    with answered_as_on_a_card((7, 5)):
        assert not torch.is_autocast_enabled()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.is_autocast_enabled()
            assert torch.is_autocast_enabled("cuda")
        assert not device_state.moe._can_use_grouped_mm(None, None, None)
    with answered_as_on_a_card((8, 0)):
        assert device_state.moe._can_use_grouped_mm(None, None, None)
    assert [getattr(question.owner, question.name) for question in QUESTIONS] == before


def test_before_ampere_shared_keys_are_attended_to_plainly() -> None:
    """Flash attention wants Ampere, and the memory-efficient kernel as many keys as queries."""
    recipe = recipe_with(training={"gradient_checkpointing": False})
    peaks = {}
    for card in ("T4", "RTX 3060"):
        plan = make_plan(recipe, card_named(card).device()).with_micro_batch(1, "")
        peaks[card] = predict(tiny(layers=1), recipe, plan, Longest(128, equal=True)).history.peak("forward").bytes
    heads, length = 4, 128
    assert peaks["T4"] - peaks["RTX 3060"] >= heads * length * length * 4  # one matrix of weights in fp32
