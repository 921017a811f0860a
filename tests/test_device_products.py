"""The compute dtype of a CPU follows from the time of its products, forward and backward, not from what it claims."""

import pytest
import torch

from qtune.device import products
from qtune.device.products import ProductTimes, bf16_pays_on_cpu, product_times


@pytest.mark.parametrize(
    ("exact", "low", "pays"),
    [
        ((4.0, 4.0), (1.0, 1.0), True),  # native bfloat16
        ((4.0, 4.0), (1.0, 60.0), False),  # quick forward alone, as emulated on AVX2
        ((4.0, 4.0), (40.0, 160.0), False),
        ((4.0, 4.0), (3.9, 3.9), False),  # no gain worth 16 bits of precision
    ],
)
def test_bfloat16_is_taken_where_both_ways_together_are_clearly_faster(exact, low, pays, monkeypatch):
    times = {"float32": ProductTimes(*exact), "bfloat16": ProductTimes(*low)}
    monkeypatch.setattr(products, "cpu_product_times", lambda: times)
    assert bf16_pays_on_cpu() is pays


def test_the_shortest_of_many_turns_counts_so_that_other_work_does_not_decide(monkeypatch):
    taken = iter([9.0, 9.0, 1.0, 9.0, 9.0, 2.0, *[9.0] * 1000])
    monkeypatch.setattr(products, "ENOUGH_SECONDS", 0.0)
    monkeypatch.setattr(products, "_seconds", lambda device, work: next(taken))
    found = product_times(torch.device("cpu"), ["float32"])["float32"]
    assert (found.forward, found.backward) == (1.0, 2.0)


def test_operations_are_two_for_each_multiplication_and_addition():
    assert ProductTimes(forward=1e-3, backward=2e-3).gflops == pytest.approx(
        (2 * 128 * 576 * 1536 / 1e6, 128 * 576 * 1536 / 1e6)
    )
    assert ProductTimes(1.0, 1.0, (10, 20, 30)).gflops == pytest.approx((12000 / 1e9, 12000 / 1e9))
    assert ProductTimes(1e-3, 2e-3).text(is_card=False) == "226 GFLOP/s forward, 113 GFLOP/s backward"
    assert ProductTimes(1e-3, 2e-3).text(is_card=True) == "0.226 TFLOP/s forward, 0.113 TFLOP/s backward"


def test_a_card_multiplies_what_keeps_it_busy(monkeypatch):
    seen = []
    monkeypatch.setattr(products, "_works", lambda device, dtype, shape: seen.append(shape) or (None, None))
    monkeypatch.setattr(products, "_seconds", lambda device, work: 1e-3)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**36, 2**36))
    found = product_times(torch.device("cuda"), ["bfloat16"])["bfloat16"]
    assert seen == [found.shape]
    assert found.gflops[0] > 100 * ProductTimes(1e-3, 1e-3).gflops[0]


@pytest.mark.parametrize("free", [2**36, 2**30, 2**28])
def test_products_of_a_card_take_turns_in_memory_and_at_most_half_of_what_is_free(free, monkeypatch):
    seen = []
    monkeypatch.setattr(products, "_works", lambda device, dtype, shape: seen.append((dtype, shape)) or (None, None))
    monkeypatch.setattr(products, "_seconds", lambda device, work: seen.append("timed") or 1.0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2**36))
    product_times(torch.device("cuda"), ["float32", "float16"])
    made = [place for place, one in enumerate(seen) if one != "timed"]
    assert made[0] == 0
    assert made[1] > 1, "the second is made when the first is timed and gone"
    tokens, width, intermediate = seen[0][1]
    assert 4 * (tokens * width + width * intermediate + tokens * intermediate) <= free / 2
