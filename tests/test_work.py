"""What operations give a device to do: FLOPs and bytes as a count by hand has them, launches as a card's profiler."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_memory_trace import CARD, recipe_with, tiny
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from qtune.memory.predict import Longest, build, predict, training_step
from qtune.memory.tracing.trace import trace
from qtune.memory.tracing.work import Kernel, Work, from_rows, rows_of, work_of
from qtune.plan import make_plan


class Watching(TorchDispatchMode):
    """The kernels of every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.kernels += work_of(func, args, out)
        return out


def kernels_of(work: Callable[[], object]) -> list[Kernel]:
    with Watching() as watching:
        work()
    return watching.kernels


def only(work: Callable[[], object]) -> Kernel:
    (found,) = kernels_of(work)
    return found


A, B = torch.zeros(512, 384), torch.zeros(384, 1024)

# --- products -------------------------------------------------------------------------------------------------------


def test_a_product_reads_both_matrices_writes_the_third_and_multiplies_m_n_k_times() -> None:
    m, k, n = 512, 384, 1024
    found = only(lambda: A @ B)
    assert (found.kind, found.launches) == ("products", 1)
    assert found.flops == 2 * m * n * k
    assert found.bytes == 4 * (m * k + k * n + m * n)
    assert found.dtype is torch.float32


def test_a_batch_of_products_counts_each_of_them_and_what_is_added_is_read() -> None:
    a, b, c = torch.zeros(3, 300, 400), torch.zeros(3, 400, 500), torch.zeros(512, 1024)
    assert only(lambda: torch.bmm(a, b)).flops == 3 * 2 * 300 * 400 * 500
    added = only(lambda: torch.addmm(c, A, B))
    assert added.flops == 2 * 512 * 384 * 1024
    assert added.bytes == only(lambda: A @ B).bytes + 4 * 512 * 1024


def test_the_products_of_an_adapter_are_thin_whichever_side_is_small() -> None:
    x, low = torch.zeros(512, 384), torch.zeros(512, 16)
    down, up = torch.zeros(16, 384), torch.zeros(1024, 16)
    kinds = [kernel.kind for kernel in kernels_of(lambda: (functional.linear(x, down), functional.linear(low, up)))]
    assert kinds == ["thin products", "thin products"]


def test_training_a_linear_layer_takes_three_times_its_forward() -> None:
    x = torch.zeros(512, 384, requires_grad=True)
    weight = torch.zeros(1024, 384, requires_grad=True)
    forward = sum(kernel.flops for kernel in kernels_of(lambda: functional.linear(x, weight)))
    both = sum(kernel.flops for kernel in kernels_of(lambda: functional.linear(x, weight).sum().backward()))
    assert forward == 2 * 512 * 384 * 1024
    assert both == 3 * forward


def test_a_four_bit_product_reads_codes_and_constants_writes_the_weight_and_multiplies_with_it() -> None:
    tokens, n, k = 256, 128, 64
    names = ("gemm_4bit", "dequantize_4bit", "dequantize absmax", "dequantize_blockwise")
    kernels = layer_kernels(*names, lean=False)
    one = [kernel for kernel in kernels if kernel.op == "gemm_4bit" and kernel.flops == 2 * tokens * n * k]
    assert {kernel.bytes for kernel in one} == {2 * (tokens * k + n * k + tokens * n)}
    read_back = {kernel.bytes for kernel in kernels if kernel.op == "dequantize_4bit"}
    assert n * k // 2 + 4 * n * k // 64 + 2 * n * k in read_back


def test_the_lean_steps_product_dequantizes_in_one_pass_and_adds_to_the_update_that_is_there() -> None:
    tokens, n, k = 256, 128, 64
    packed = n * k // 2 + n * k // 64 + 4 * -(-n * k // 64 // 256)  # codes, an 8-bit absmax, one of 256 of them in fp32
    books = 4 * (256 + 16 + 1)  # two code books and an offset
    assert packed + books + 2 * n * k in {kernel.bytes for kernel in layer_kernels("dequantize_nested", lean=True)}
    square = {kernel for kernel in layer_kernels("addmm_", lean=True) if kernel.flops == 2 * tokens * k * k}  # q and o
    assert 2 * (tokens * k + k * k + 2 * tokens * k) in {kernel.bytes for kernel in square}


def layer_kernels(*ops: str, lean: bool) -> set[Kernel]:
    """Of a step on a card with 2 x 128 tokens."""
    recipe = recipe_with(training={"gradient_checkpointing": True, "lean_step": lean})
    found = predict(tiny(layers=1), recipe, make_plan(recipe, CARD), Longest(128, equal=True)).work
    return {kernel for _, kernel in found if kernel.op in ops}


# --- attention ------------------------------------------------------------------------------------------------------


def attention(**given: Any) -> list[Kernel]:
    query, key, value = (torch.zeros(2, 3, 128, 64, requires_grad=True) for _ in range(3))
    slope = torch.zeros(2, 3, 128, 64)

    def both() -> None:
        torch.autograd.grad(
            functional.scaled_dot_product_attention(query, key, value, **given), (query, key, value), slope
        )

    return [kernel for kernel in kernels_of(both) if kernel.kind == "attention"]


def test_attention_multiplies_twice_forward_and_five_times_backward() -> None:
    forward, backward = attention()
    assert forward.flops == 2 * (2 * 2 * 3 * 128 * 128 * 64)
    assert backward.flops == 5 * (2 * 2 * 3 * 128 * 128 * 64)
    each = 4 * 2 * 3 * 128 * 64
    assert forward.bytes == 4 * each + 4 * 2 * 3 * 128  # query, key, value, output; a sum for each row
    assert backward.bytes == 8 * each + 4 * 2 * 3 * 128  # those and the output's gradient; three gradients


def test_causal_attention_leaves_half_out_unless_a_mask_has_to_be_read() -> None:
    whole, causal = attention()[0], attention(is_causal=True)[0]
    masked = attention(attn_mask=torch.zeros(128, 128))[0]
    assert causal.flops == whole.flops // 2
    assert masked.flops == whole.flops


# --- everything else --------------------------------------------------------------------------------------------------


def test_looking_at_a_tensor_in_another_way_costs_nothing() -> None:
    x = torch.zeros(8, 16)
    views = (x.t, x.detach, lambda: x.view(4, 32), lambda: x[2:4], lambda: x.expand(3, 8, 16), lambda: x.unsqueeze(0))
    assert [kernels_of(view) for view in views] == [[]] * len(views)
    assert kernels_of(lambda: torch.empty(100)) == []


def test_elementwise_operations_read_every_input_and_write_the_output() -> None:
    x, y = torch.zeros(8, 16), torch.zeros(8, 16)
    size = 4 * 8 * 16
    assert only(lambda: x + y).bytes == 3 * size
    assert only(lambda: x.mul_(2)).bytes == 2 * size
    assert only(lambda: x.copy_(y)).bytes == 2 * size
    assert only(x.zero_).bytes == size
    assert only(lambda: x.to(torch.bfloat16)).bytes == size + size // 2
    assert only(x.sum).bytes == size + 4


def test_what_is_broadcast_is_read_once_and_has_its_place_worked_out() -> None:
    x, row = torch.zeros(8, 16), torch.zeros(16)
    found = only(lambda: x * row)
    assert found.bytes == 4 * (8 * 16 + 16 + 8 * 16)
    assert found.scattered == 3 * 8 * 16
    assert only(lambda: x * row.expand(8, 16)).bytes == found.bytes


def test_tensors_in_one_order_are_walked_through_even_when_it_is_a_transposed_one() -> None:
    x, y = torch.zeros(8, 16).t(), torch.zeros(8, 16).t()
    assert only(lambda: x + y).scattered == 0
    assert only(lambda: x + 1).scattered == 0
    other = torch.zeros(16, 8)
    assert only(lambda: x + other).scattered == 3 * 16 * 8


def test_a_table_is_read_where_it_is_looked_up() -> None:
    table, ids = torch.zeros(1000, 64), torch.zeros(5, dtype=torch.long)
    assert only(lambda: functional.embedding(ids, table)).bytes == 2 * 4 * 5 * 64


@pytest.mark.parametrize(("tensors", "elements", "launches"), [(3, 100, 1), (100, 100, 3), (2, 65536 * 400, 3)])
def test_a_list_of_tensors_is_walked_through_in_few_launches(tensors: int, elements: int, launches: int) -> None:
    """By hand: 48 tensors or 320 blocks of 65,536 elements at once (MultiTensorApply.cuh)."""
    listed = [torch.empty(elements, device="meta") for _ in range(tensors)]
    found = only(lambda: torch._foreach_add_(listed, 1.0))
    assert found.launches == launches
    assert found.bytes == 2 * 4 * tensors * elements


# --- a whole step -----------------------------------------------------------------------------------------------------


def step_work(layers: int = 2, *, every_layer: bool = False, **tables: Any) -> Work:
    recipe = recipe_with(**{"training": {"gradient_checkpointing": True}, **tables})
    plan = make_plan(recipe, CARD)
    step = training_step(recipe, plan, Longest(128, equal=True))
    return trace(
        tiny(layers=layers),
        lambda config: build(config, recipe, plan),
        step,
        card=(8, 9),
        every_layer=every_layer,
        plays_allocator=False,
    ).work


def flops(work: Work, **where: Any) -> int:
    return sum(
        count * kernel.flops
        for (place, kernel), count in work.items()
        if "products" in kernel.kind and all(getattr(place, name) == value for name, value in where.items())
    )


def test_the_products_of_a_step_are_those_of_a_count_by_hand() -> None:
    """Frozen weights: forward, again under checkpointing, and the gradient of their input. Adapters: also their own.

    The MLP computes gate and up again in its own backward, and down's way down; its way up it never needs again. Nobody
    needs the gradient of what the embeddings gave, which is that of the first layer's q, k and v.
    """
    tokens, rank = 2 * 128, 4
    shapes = [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)]  # q k v o gate up down
    base = 2 * tokens * sum(n * k for n, k in shapes)
    adapter = 2 * tokens * sum(rank * (n + k) for n, k in shapes)
    work = step_work(adapter={"kind": "lora", "rank": rank})
    assert flops(work, phase="forward", part="layers") == 2 * (base + adapter)
    again = 2 * tokens * (sum(n * k + rank * (n + k) for n, k in shapes[4:6]) + rank * 128)
    first = 2 * tokens * sum(n * k + rank * k for n, k in shapes[:3])
    assert flops(work, phase="backward", part="layers", recomputed=False) == 2 * (base + 2 * adapter + again) - first
    attention = 2 * tokens * sum(n * k + rank * (n + k) for n, k in shapes[:4])
    assert flops(work, phase="backward", recomputed=True) == 2 * attention


def test_with_pefts_layers_all_of_a_layer_but_its_last_product_is_computed_again() -> None:
    tokens, rank = 2 * 128, 4
    shapes = [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)]
    both = 2 * tokens * sum(n * k + rank * (n + k) for n, k in shapes)
    work = step_work(adapter={"kind": "lora", "rank": rank}, training={"lean_step": False})
    # Recomputing stops when the last tensor that the backward needs is there: the last adapter's way up is not.
    last_up = 2 * tokens * rank * 64
    assert flops(work, phase="backward", recomputed=True) == 2 * (both - last_up)


def test_nothing_is_recomputed_without_checkpointing() -> None:
    work = step_work(training={"gradient_checkpointing": False})
    assert flops(work, phase="backward", recomputed=True) == 0
    assert flops(work, phase="forward") == flops(step_work(), phase="forward")


def test_the_head_is_multiplied_with_twice_for_every_scored_position() -> None:
    assert flops(step_work(), phase="forward", part="loss") == 2 * 2 * (2 * 127) * 64 * 256


@pytest.mark.slow
def test_the_work_of_a_deep_model_is_that_of_tracing_every_layer() -> None:
    assert step_work(layers=12) == step_work(layers=12, every_layer=True)


def test_work_is_the_same_after_it_was_kept_in_a_file() -> None:
    work = step_work()
    assert from_rows(json.loads(json.dumps(rows_of(work)))) == work
