"""Who else holds the card's memory: other processes, as the driver's own tool lists them."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

from qtune.sizes import MIB

SECONDS = 10
"""nvidia-smi answers within a second or two; a driver that hangs must not hold up a report."""


@dataclass(frozen=True)
class Holder:
    """A process with memory on the card."""

    pid: int
    name: str
    bytes: int | None
    """None: the driver does not tell (Windows, where the system manages the card's memory)."""


def other_holders(card: str) -> list[Holder] | None:
    """The other processes that compute on a card, largest first; None where that cannot be asked or answered.

    card: its UUID, with or without the prefix "GPU-". In a container the driver may hide the processes of others, or
    give their numbers outside of it, which then have no name here.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    # Documented by `nvidia-smi --help-query-compute-apps`.
    query = ["--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader,nounits"]
    command = [tool, "-i", f"GPU-{card.removeprefix('GPU-')}", *query]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_holders(done.stdout, os.getpid())


def parse_holders(listed: str, own_pid: int) -> list[Holder]:
    """The lines "pid, process name, MiB" of nvidia-smi, without our own."""
    holders = []
    for row in csv.reader(listed.splitlines(), skipinitialspace=True):
        if len(row) < 3 or not row[0].strip().isdigit() or int(row[0]) == own_pid:
            continue
        pid, used = int(row[0]), row[-1].strip()
        # A name may have commas of its own; "[N/A]" and "[Insufficient Permissions]" are no sizes.
        name = _name(pid) or Path(",".join(row[1:-1]).strip()).name
        holders.append(Holder(pid, name, int(used) * MIB if used.isdigit() else None))
    return sorted(holders, key=lambda holder: -(holder.bytes or 0))


def _name(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return ""
