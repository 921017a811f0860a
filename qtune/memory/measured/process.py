"""The process's resident memory: now, and its peak since the last reset (Linux), as the kernel counts it."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def peak_bytes() -> int:
    """Peak resident set size since `reset_peak` (since the process began where the kernel cannot reset it)."""
    return _field("VmHWM") or lifetime_peak_bytes()


def reset_peak() -> bool:
    """Begin a new peak at the present size: writing 5 to /proc/self/clear_refs (proc(5)). False if not possible."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def lifetime_peak_bytes() -> int:
    """Peak since the process began; getrusage counts in KiB on Linux and in bytes on macOS."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _field(name: str) -> int:
    try:
        text = _STATUS.read_text()
    except OSError:
        return 0
    for line in text.splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0
