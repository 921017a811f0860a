"""The processor's maker and model are those that Linux names."""

import pytest

from qtune.device import processor
from qtune.device.processor import has_avx512, processor_name, value_of


@pytest.mark.parametrize(
    ("cpuinfo", "maker"),
    [
        ("processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 26\n", "AuthenticAMD"),
        ("processor\t: 0\nvendor_id\t: GenuineIntel\n", "GenuineIntel"),
        ("processor\t: 0\nCPU implementer\t: 0x41\n", ""),
        ("", ""),
    ],
)
def test_the_maker_of_a_processor_is_read_as_linux_says_it(cpuinfo: str, maker: str) -> None:
    assert value_of(cpuinfo, "vendor_id") == maker


def test_a_processor_has_a_name_also_where_linux_says_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "_cpuinfo", lambda: "processor\t: 0\nmodel name\t: AMD EPYC 9R14\n")
    assert processor_name() == "AMD EPYC 9R14"
    monkeypatch.setattr(processor, "_cpuinfo", str)
    monkeypatch.setattr(processor.platform, "processor", str)
    monkeypatch.setattr(processor.platform, "machine", lambda: "aarch64")
    assert processor_name() == "aarch64"


def test_avx512_is_a_flag_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, has in (("avx2 avx512f avx512bw", True), ("avx avx2 fma", False), ("avx512_vpopcntdq", False)):
        monkeypatch.setattr(processor, "_cpuinfo", lambda flags=flags: f"vendor_id\t: A\nflags\t\t: {flags}\n")
        assert has_avx512() is has
    monkeypatch.setattr(processor, "_cpuinfo", str)
    assert not has_avx512()
