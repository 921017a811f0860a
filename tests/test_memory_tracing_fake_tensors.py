"""What operations make of tensors without storage is remembered only where it would be the same again."""

import pytest
import torch
from test_memory_trace import CARD, recipe_with, tiny
from test_memory_tracing_repeated_layers import ROUTED, WINDOWED, config_of
from torch._subclasses.fake_tensor import FakeTensor

from qtune.memory.predict import Longest, predict
from qtune.memory.tracing import fake_tensors as remembered
from qtune.memory.tracing import trace
from qtune.memory.tracing.fake_tensors import RememberingMode
from qtune.model.load import attention_rule
from qtune.plan import make_plan

EXPERTS = {**ROUTED, "num_experts": 4, "shared_expert_intermediate_size": 32}


class Counting(RememberingMode):
    """Counts the operations that are worked out."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def dispatch(self, *args, **kwargs):
        self.asked += 1
        return super().dispatch(*args, **kwargs)


@pytest.fixture
def forgotten(monkeypatch):
    monkeypatch.setattr(remembered, "_known", {})


@pytest.fixture
def mode(forgotten):
    mode = Counting()
    with mode:
        yield mode


def about(tensor: torch.Tensor) -> tuple:
    return tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device.type


def twice(mode: Counting, operation, *made) -> tuple[torch.Tensor, torch.Tensor]:
    """The same operation on two sets of equal tensors; the second time nothing is worked out."""
    first = operation(*(make() for make in made))
    arguments = [make() for make in made]
    before = mode.asked
    second = operation(*arguments)
    assert mode.asked == before
    assert about(second) == about(first)
    assert type(second) is FakeTensor
    return first, second


def matrix() -> torch.Tensor:
    return torch.empty(6, 8, dtype=torch.bfloat16)


def test_a_result_has_a_storage_of_its_own_each_time(mode):
    first, second = twice(mode, torch.add, matrix, matrix)
    assert first.untyped_storage()._cdata != second.untyped_storage()._cdata
    assert second.untyped_storage().nbytes() == 6 * 8 * 2


@pytest.mark.parametrize(
    "view",
    [lambda x: x.t(), lambda x: x[2:], lambda x: x.view(-1), lambda x: x.detach(), lambda x: x.view(torch.int16)],
    ids=["t", "slice", "view", "detach", "view of another type"],
)
def test_a_view_has_its_own_argument_s_storage(mode, view):
    view(matrix())
    argument = matrix()
    before = mode.asked
    seen = view(argument)
    assert mode.asked == before
    assert seen.untyped_storage()._cdata == argument.untyped_storage()._cdata
    assert about(seen) == about(view(torch.empty(6, 8, dtype=torch.bfloat16)))


def test_an_operation_in_place_returns_its_argument(mode):
    matrix().mul_(2)
    argument = matrix()
    before = mode.asked
    assert argument.mul_(2) is argument
    assert mode.asked == before


def test_several_results_come_back_in_order(mode):
    first = torch.ops.aten.native_dropout(matrix(), 0.5, True)
    argument = matrix()
    before = mode.asked
    second = torch.ops.aten.native_dropout(argument, 0.5, True)
    assert mode.asked == before
    assert [about(one) for one in first] == [about(one) for one in second]
    assert second[1].dtype == torch.bool


def test_numbers_types_and_strides_tell_operations_apart(mode):
    assert (matrix() + 1).dtype == torch.bfloat16
    assert (torch.empty(3, dtype=torch.long) / 2).dtype == torch.float32
    assert torch.sum(matrix(), 0).shape == (8,)
    assert torch.sum(matrix(), 1).shape == (6,)
    assert torch.empty(3, dtype=torch.long).mul(True).dtype == torch.long
    assert torch.empty(3, dtype=torch.long).mul(1.0).dtype == torch.float32
    assert matrix().t().contiguous().stride() == (6, 1)
    assert matrix().contiguous().stride() == (8, 1)


def test_the_default_type_tells_operations_apart(mode):
    def quotient() -> torch.dtype:
        return (torch.empty(3, dtype=torch.long) / torch.empty(3, dtype=torch.long)).dtype

    assert quotient() == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert quotient() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert quotient() == torch.float32


def test_an_operation_that_changes_its_argument_s_shape_is_worked_out_every_time(mode):
    for _ in range(3):
        argument = torch.empty(1, 5)
        argument.squeeze_()
        assert argument.shape == (5,)


def test_which_of_two_arguments_is_viewed_is_not_a_matter_of_shapes(mode):
    shared, other = matrix(), matrix()
    torch.ops.aten.copy_(shared, shared.view(6, 8))
    assert torch.ops.aten.copy_(other, shared) is other


def test_an_operation_over_lists_that_only_writes_is_not_carried_out(mode):
    values = [matrix(), matrix()]
    before = mode.asked
    torch._foreach_add_(values, 1)
    assert mode.asked == before
    assert [about(value) for value in torch._foreach_sqrt(values)] == [about(value) for value in values]


# A first layer, a last one and one between them: more would only be remembered once more.
CASES = {
    "LoRA": (tiny(layers=12), {}),
    "no checkpointing, adamw": (
        tiny(layers=3),
        {"training": {"gradient_checkpointing": False, "optimizer": "adamw"}},
    ),
    "host": (tiny(layers=3), {"memory": {"embeddings": "host", "activations": "host"}}),
    "p-tuning": (tiny(layers=3), {"adapter": {"kind": "p-tuning", "virtual_tokens": 4, "encoder_hidden_size": 32}}),
    "DoRA, int8": (
        tiny(layers=3),
        {"adapter": {"kind": "lora", "dora": True, "dropout": 0.1}, "quantization": {"kind": "int8"}},
    ),
    "experts": (config_of("qwen2_moe", 3, **EXPERTS), {}),
    "tied, windows": (
        config_of("gemma3_text", 7, **WINDOWED),
        {},
    ),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("case", CASES)
def test_a_step_is_the_same_at_every_tick_with_and_without_memory(case, forgotten, monkeypatch):
    config, tables = CASES[case]
    recipe = recipe_with(**tables)
    plan = make_plan(recipe, CARD, attention_rule(config)).with_micro_batch(2, "")

    def history():
        return predict(config, recipe, plan, Longest(96, scored=40, evaluated=64)).history

    learned = history()
    again = history()
    monkeypatch.setattr(trace, "_built", {})
    monkeypatch.setattr(remembered, "_key", lambda *_: None)
    monkeypatch.setattr(remembered, "_only_writes", lambda _: False)
    plain = history()
    for found in (learned, again):
        assert found.names == plain.names
        assert found.labels == plain.labels
        assert (found.bytes == plain.bytes).all()
    assert plain.total.max() > 0
