"""Which processor this is, as Linux says it."""

import platform
from pathlib import Path


def vendor() -> str:
    """The maker of an x86 processor; "" where Linux says none, as on every other architecture."""
    return value_of(_cpuinfo(), "vendor_id")


def has_avx512() -> bool:
    """Whether an x86 processor multiplies 16 floats at a time."""
    return "avx512f" in value_of(_cpuinfo(), "flags").split()


def processor_name() -> str:
    """The model, or what the system calls its kind where it names none."""
    return value_of(_cpuinfo(), "model name") or platform.processor() or platform.machine()


def value_of(cpuinfo: str, name: str) -> str:
    """What the first processor of /proc/cpuinfo has under a name; "" where it has nothing."""
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == name), "")


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
