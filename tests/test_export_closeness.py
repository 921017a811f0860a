"""Closeness is KL, agreement and gap as their definitions say, and the limits follow the roundings on the way."""

import math

import pytest
import torch

from qtune.export.closeness import ClosenessMeter, PerplexityMeter, limits, shortfalls
from qtune.export.verification import Closeness


def test_kl_is_the_definition_s_over_all_rows() -> None:
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.5, 0.25])
    meter = ClosenessMeter()
    meter.add(p.log().unsqueeze(0), q.log().unsqueeze(0))
    meter.add(p.log().unsqueeze(0), p.log().unsqueeze(0) + 3)
    found = meter.result()
    expected = 0.5 * math.log(2) - 0.25 * math.log(2)
    assert found.kl == pytest.approx(expected / 2, rel=1e-5)
    assert found.kl_largest == pytest.approx(expected, rel=1e-5)
    assert (found.tokens, found.top1, found.gap) == (2, 0.5, pytest.approx(3, rel=1e-5))


def test_new_tokens_are_counted_apart_and_never_agree() -> None:
    meter = ClosenessMeter()
    meter.add(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0, math.log(math.e + 1)]]))
    found = meter.result()
    assert found.new_tokens == pytest.approx(0.5)
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.top1 == 0


def test_perplexity_scores_the_next_token_where_labels_say_so() -> None:
    meter = PerplexityMeter()
    logits = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]]).log()
    meter.add(logits, torch.tensor([-100, 0, 1]))
    meter.add(logits, torch.tensor([0, -100, -100]))
    assert meter.result() == pytest.approx(1 / math.sqrt(0.9 * 0.8), rel=1e-5)


@pytest.mark.parametrize(
    ("stored", "effect", "kl"),
    [
        (torch.float16, 1.0, 1e-4),
        (torch.bfloat16, 1.0, 1e-2),
        (torch.float32, 1.0, 1e-5),
        (torch.float16, 5e-4, 5e-5),
        (torch.float16, 0.0, 2e-5),
    ],
)
def test_the_dtype_that_is_written_and_the_adapter_s_effect_set_the_limit(
    stored: torch.dtype, effect: float, kl: float
) -> None:
    assert limits(stored, effect).kl == pytest.approx(kl)


def test_what_is_beyond_a_limit_is_said_with_both_figures() -> None:
    allowed = limits(torch.float16, 1.0)
    assert shortfalls(Closeness(1000, 1e-5, 1e-3, 0.995, 0.1), allowed) == []
    assert shortfalls(Closeness(1000, 2e-4, 1e-3, 0.97, 0.1), allowed) == [
        "KL divergence 0.0002 nats per token, at most 0.0001 (float16 rounding, with a tenfold margin)",
        "the likeliest token agrees at 97.00% of positions, at least 99.0%",
    ]


def test_one_tie_does_not_fail_a_short_comparison() -> None:
    assert shortfalls(Closeness(50, 0.0, 0.0, 0.98, 0.0), limits(torch.float16, 1.0)) == []


def test_a_model_of_nan_never_passes() -> None:
    assert shortfalls(Closeness(10, math.nan, math.nan, 1.0, math.nan), limits(torch.float16, 1.0))
