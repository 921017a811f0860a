"""Rates that cannot work are said, those that people use are not."""

import pytest
import torch
from torch import nn

from qtune.recipe.rates import FASTEST_LORA, _rounded_down, doubtful_rate
from qtune.recipe.schema import IA3, Adapter, Lora, PrefixTuning, PromptTuning, PTuning

PROMPT = PromptTuning(kind="prompt-tuning")


@pytest.mark.parametrize(
    ("adapter", "rate"),
    [
        (Lora(), 2e-4),
        (Lora(), 1e-3),  # the quickstart's
        (Lora(rank=64, alpha=16), 2e-4),  # QLoRA's
        (Lora(rank=8, alpha=16), 1e-5),
        (Lora(rank=256, alpha=512), 2e-4),  # learned, where it was tried
        (Lora(), 1e-2),  # too
        (Lora(rank=64, alpha=16, rslora=True), 2e-4),
        (PROMPT, 3e-2),
        (PROMPT, 1e-3),
        (PromptTuning(kind="prompt-tuning", residual=True), 3e-4),  # its vectors have a rate of their own
        (PTuning(kind="p-tuning", residual=True, vector_rate=30.0), 3e-3),
        (PTuning(kind="p-tuning", residual=True, vector_rate=30.0), 0.1),  # behind, but learned
        (PTuning(kind="p-tuning"), 1e-4),
        (PrefixTuning(kind="prefix-tuning"), 1e-2),
        (IA3(kind="ia3"), 5e-3),
    ],
)
def test_rates_that_people_use_are_not_spoken_of(adapter: Adapter, rate: float) -> None:
    assert doubtful_rate(adapter, rate) is None


def test_a_rate_at_which_a_prompt_does_not_move_is_said_with_its_source() -> None:
    assert doubtful_rate(PROMPT, 1e-4) == (
        "training.learning_rate = 0.0001: prompt tuning hardly moves below 0.001 (PEFT's comparison on MetaMathQA: "
        '5.7 % right at 1e-4, 34.3 % at 1e-3); "auto" is 0.03'
    )


@pytest.mark.parametrize(
    "adapter",
    [PTuning(kind="p-tuning"), IA3(kind="ia3"), PrefixTuning(kind="prefix-tuning")],
    ids=lambda adapter: adapter.kind,
)
@pytest.mark.parametrize(("rate", "end"), [(1e-6, "1e-05"), (1e-5, "1e-05"), (1.0, "1"), (30.0, "1")])
def test_a_rate_at_an_end_of_what_was_measured_is_said_with_what_was_measured(
    adapter: Adapter, rate: float, end: str
) -> None:
    said = doubtful_rate(adapter, rate)
    assert said is not None
    assert f"{adapter.kind} did badly at {end} (measured on the built-in model: a loss of " in said
    assert doubtful_rate(adapter, adapter.auto_learning_rate[0]) is None


RESIDUAL = [
    PTuning(kind="p-tuning", residual=True, vector_rate=30.0),
    PromptTuning(kind="prompt-tuning", residual=True, vector_rate=30.0),
]


@pytest.mark.parametrize("adapter", RESIDUAL, ids=lambda adapter: adapter.kind)
@pytest.mark.parametrize(("rate", "end"), [(1e-6, "1e-05"), (1e-5, "1e-05"), (1.0, "1"), (30.0, "1")])
def test_a_residual_prompt_s_rate_is_told_by_what_its_fastest_part_does(
    adapter: PTuning | PromptTuning, rate: float, end: str
) -> None:
    said = doubtful_rate(adapter, rate)
    assert said is not None
    assert f"{adapter.kind} with residual did badly at {end} (measured on the built-in model: a loss of " in said
    # Vectors that move ten times as fast are too fast at a tenth of the rate, and not too slow at the slowest one.
    swift = adapter.model_copy(update={"vector_rate": 300.0})
    assert doubtful_rate(swift, 0.1) is not None
    assert doubtful_rate(swift, 1e-5) is None
    # Slow vectors leave the encoder's rate to decide.
    slow = adapter.model_copy(update={"vector_rate": 1.0})
    assert doubtful_rate(slow, 1.0) is not None
    assert doubtful_rate(slow, 3e-3) is None


@pytest.mark.parametrize(("rank", "alpha", "rate"), [(16, 32, 1e-6), (16, 32, 1e-9), (64, 16, 2e-6), (8, 1, 2e-5)])
def test_a_rate_at_which_a_lora_does_not_move_is_said(rank: int, alpha: int, rate: float) -> None:
    said = doubtful_rate(Lora(rank=rank, alpha=alpha), rate)
    assert said is not None
    assert f"with rank {rank} and alpha {alpha} a LoRA hardly moves" in said
    assert doubtful_rate(Lora(rank=rank, alpha=alpha), 4 * max(rate, 1e-6) * 32 / alpha) is None


@pytest.mark.parametrize(("rank", "alpha", "rate"), [(256, 512, 4e-3), (16, 32, 5e-2), (16, 1024, 2e-3)])
def test_a_rate_at_which_a_lora_s_first_steps_are_too_large_is_said_with_one_that_is_not(
    rank: int, alpha: int, rate: float
) -> None:
    said = doubtful_rate(Lora(rank=rank, alpha=alpha), rate)
    assert said is not None
    largest = float(said.rpartition("at most ")[2].partition(",")[0])
    assert doubtful_rate(Lora(rank=rank, alpha=alpha), largest) is None


@pytest.mark.parametrize("digit", range(1, 10))
@pytest.mark.parametrize("power", range(-9, 3))
def test_a_rate_of_one_digit_is_advised_as_it_is(digit: int, power: int) -> None:
    value = float(f"{digit}e{power}")
    assert _rounded_down(value) == value
    assert _rounded_down(1.05 * value) == value


@pytest.mark.parametrize(("rank", "alpha"), [(16, 32), (256, 512), (64, 16)])
def test_a_lora_s_first_step_changes_its_layer_as_the_warning_says(rank: int, alpha: int) -> None:
    """peft's start (A uniform in +-1/sqrt(in), B zero), one step of AdamW, inputs of size 1."""
    torch.manual_seed(0)
    rate, width = FASTEST_LORA / alpha, 512
    a, b = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)
    nn.init.kaiming_uniform_(a.weight, a=5**0.5)
    nn.init.zeros_(b.weight)
    x = torch.randn(64, width)
    optimizer = torch.optim.AdamW([a.weight, b.weight], lr=rate, weight_decay=0.0)
    # One direction for every row, as the first steps of a run have it: to answer in another form.
    x = x + 2 * torch.randn(width)
    x = x / x.pow(2).mean().sqrt()
    (alpha / rank * b(a(x)) * torch.randn(width)).sum().backward()
    optimizer.step()
    change = (alpha / rank * b(a(x))).pow(2).mean().sqrt()
    assert float(change.detach()) == pytest.approx(0.5 * FASTEST_LORA, rel=0.35)
