"""Merged values become 16-bit numbers without losing, all in one direction, what is below their last place."""

import pytest
import torch

from qtune.export.rounding import rounded_stochastically

DTYPES = [torch.float16, torch.bfloat16]


def values(size: int = 200_000) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(3)) * 0.05


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_value_goes_to_one_of_its_two_neighbours(dtype):
    given = values()
    found = rounded_stochastically(given, dtype, "a").float()
    nearest = given.to(dtype).float()
    up = torch.nextafter(given.to(dtype), torch.tensor(torch.inf, dtype=dtype)).float()
    down = torch.nextafter(given.to(dtype), torch.tensor(-torch.inf, dtype=dtype)).float()
    other = torch.where(nearest < given, up, down)
    assert bool(((found == nearest) | (found == other)).all())
    assert bool((found == other).any())


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_dtype_holds_exactly_stays(dtype):
    largest = torch.finfo(dtype).max
    powers = torch.tensor([0.0, -0.0, 1.0, -2.0, 0.5, 2.0**-14, 2.0**-20, largest, -largest])
    held = torch.cat([powers, values().to(dtype).float()])
    assert torch.equal(rounded_stochastically(held, dtype, "a").float(), held)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_small_update_of_weights_that_are_bfloat16_numbers_survives_in_the_mean(dtype):
    """Rounded to the nearest, an update of a tenth of a unit in the last place is lost as a whole."""
    held = values().to(torch.bfloat16).float()
    update = 0.1 * torch.finfo(dtype).eps / 2 * held.abs()  # a unit is between eps / 2 and eps of the value
    nearest = (held + update).to(dtype).float() - held
    found = rounded_stochastically(held + update, dtype, "a").float() - held
    assert float(nearest.sum()) == pytest.approx(0, abs=0.01 * float(update.sum()))
    assert float(found.double().sum() / update.double().sum()) == pytest.approx(1, abs=0.03)


def test_the_same_name_gives_the_same_bits_and_another_name_other_noise():
    given = values()
    first, again, other = (rounded_stochastically(given, torch.float16, name) for name in ("a", "a", "b"))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
