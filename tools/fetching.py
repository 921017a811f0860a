"""pip's output on stdin -> what a user wants to know of it, on stderr; all of it goes to the file that is named.

On a terminal one line says what is fetched, how much that is until now, and for how long; elsewhere each large file has
a line. pip's errors are shown as they are; its warnings, about places that it did not look at, stay in the file.
"""

import queue
import re
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

LARGE_MB = 10.0
"""A smaller file is fetched before its line is read."""
FILE = re.compile(r"\s+(Downloading|Using cached) (\S+)(?<!\.metadata) \(([\d.]+) (kB|MB|GB|bytes)\)")
UNITS = {"bytes": 1e-6, "kB": 1e-3, "MB": 1.0, "GB": 1e3}


class Fetched:
    """What was fetched until now."""

    def __init__(self) -> None:
        self.files, self.megabytes, self.doing = 0, 0.0, "looking for the packages"

    def __str__(self) -> str:
        return f"{self.files} files, {self.megabytes:,.0f} MB"

    def take(self, line: str) -> str | None:
        """A line of pip's; what is said of it where nothing can be drawn anew."""
        if line.startswith("ERROR"):
            return line.rstrip()
        if (found := FILE.match(line)) is not None:
            name, size = "-".join(found[2].split("-")[:2]), float(found[3]) * UNITS[found[4]]
            is_cached = found[1] == "Using cached"
            if not is_cached:
                self.files, self.megabytes = self.files + 1, self.megabytes + size
            self.doing = f"{name} ({size:,.0f} MB{', in the cache' if is_cached else ''})"
            return self.doing if size >= LARGE_MB else None
        if line.startswith("Collecting "):
            self.doing = line.split()[1]
        if line.startswith("Installing collected packages: "):
            self.doing = f"installing {line.count(',') + 1} packages"
            return f"fetched {self}; {self.doing} …"
        return None


def ticking(lines: Iterable[str], seconds: float) -> Iterator[str | None]:
    """The lines, and None where none came for so long."""
    waiting: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        for line in lines:
            waiting.put(line)
        waiting.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = waiting.get(timeout=seconds)
        except queue.Empty:
            yield None
            continue
        if line is None:
            return
        yield line


def tell(lines: Iterable[str], log: TextIO, screen: TextIO) -> None:
    """Reads pip's lines to their end."""
    fetched, start, draws = Fetched(), time.monotonic(), screen.isatty()
    for line in ticking(lines, 1.0):
        said = None
        if line is not None:
            log.write(line)
            log.flush()
            said = fetched.take(line)
        if draws:
            if said is not None and line is not None and line.startswith("ERROR"):
                screen.write(f"\r\033[K{said}\n")
            screen.write(f"\r\033[K{fetched}, {time.monotonic() - start:.0f} s: {fetched.doing}"[:100])
        elif said is not None:
            screen.write(f"{said}\n")
        screen.flush()
    if draws:
        screen.write("\r\033[K")
    screen.write(f"fetched {fetched}, in {time.monotonic() - start:.0f} s with installing\n")


if __name__ == "__main__":
    with Path(sys.argv[1]).open("w", encoding="utf-8") as log:
        tell(sys.stdin, log, sys.stderr)
