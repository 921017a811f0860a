"""Sizes in words: whatever is there is never shown as nothing of a unit that is too large for it."""

import pytest

from qtune.sizes import GIB, KIB, MIB, gib_text, size_text


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0, "0 B"),
        (300, "300 B"),
        (KIB, "1.0 KiB"),
        (40 * KIB, "40.0 KiB"),
        (MIB / 10, "0.1 MiB"),
        (50 * MIB, "50.0 MiB"),
        (GIB / 10, "0.10 GiB"),
        (7.5 * GIB, "7.50 GiB"),
    ],
)
def test_a_size_has_the_unit_that_fits_it(size: float, shown: str) -> None:
    assert size_text(size) == shown


@pytest.mark.parametrize("size", [1, 999, KIB, 77 * KIB, MIB, 3 * MIB, 6 * MIB, 99 * MIB, GIB, 80 * GIB])
def test_nothing_that_is_there_is_shown_as_zero(size: int) -> None:
    for text in (size_text(size), gib_text(size)):
        assert float(text.split()[0]) > 0


def test_sizes_beside_each_other_stay_in_gib_where_they_can() -> None:
    assert (gib_text(50 * MIB), gib_text(8 * GIB), gib_text(0)) == ("0.05 GiB", "8.00 GiB", "0.00 GiB")
    assert gib_text(MIB) == "1.0 MiB"
