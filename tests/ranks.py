"""Several processes of one run, as a launcher starts them; warm from the start (`warm.py`).

What each process finds out about its own processor, which is not what these tests are about, is known before.
"""

import os
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

from conftest import WARM
from warm import COMMAND, LAUNCHER, Warm

SECONDS = 120
"""After which a process that should have ended is taken to hang."""

KNOWN = """
import qtune.device.present as present, qtune.preflight as preflight
from qtune.startup.launched import launched
present.bf16_pays_on_cpu = lambda: False
preflight.examined = lambda device, recipe: device
launched.cache_clear()
"""


class Started:
    """A command that runs, or has run."""

    def __init__(self, process: Warm) -> None:
        self.process = process
        self.results = self.messages = ""
        """What it has written, once it has ended."""

    @property
    def pid(self) -> int:
        """Its number."""
        return self.process.pid

    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self.process.poll() is None

    def send(self, number: int) -> None:
        """A signal."""
        self.process.send_signal(number)

    def ended(self) -> int:
        """Its exit code; it is killed where it hangs."""
        try:
            self.process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
        code = self.process.wait()
        if not self.results and not self.messages:
            self.results, self.messages = self.process.communicate()
        return code


def start(*words: str | Path, told: Mapping[str, str] | None = None, first: str = "") -> Started:
    """`qtune` with these words. told: variables beside this process's. first: Python that runs before it."""
    return Started(WARM.start(f"{KNOWN}{first}\n{COMMAND}", *words, environment={**os.environ, **(told or {})}))


def launch(*words: str | Path) -> Started:
    """The same; the processes of `--processes` are its forks."""
    return Started(WARM.start(f"{KNOWN}{LAUNCHER}", *words))


def who(rank: int, count: int) -> dict[str, str]:
    """What a launcher tells a process of who it is."""
    return {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)}


def meeting_place() -> dict[str, str]:
    """What a launcher tells all processes of where they meet."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listening.getsockname()[1])}


def start_several(count: int, *words: str | Path, first: Mapping[int, str] | None = None) -> list[Started]:
    """So many processes of one run. first: Python that runs before in some of them."""
    place = meeting_place()
    return [start(*words, told=place | who(rank, count), first=(first or {}).get(rank, "")) for rank in range(count)]
