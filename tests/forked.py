"""The `qtune` command in processes that have its libraries already: one imports them and forks for each command.

For tests of what several processes do together. What a process does at its start (its card, its allocator, the order of
imports, the comparison of small layers) is not what these show. `--processes` forks as well.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SECONDS = 120
"""After which a process that should have ended is taken to hang."""

PARENT = """
import json, os, sys, types

from qtune.startup.quiet import quiet_libraries
quiet_libraries()
from qtune.startup.imports import import_libraries
import_libraries()
import qtune.preflight
import qtune.report.page
import qtune.training.launch
import qtune.training.meeting
import qtune.training.train
from qtune.cli import main
from qtune.device.present import present_device
from qtune.startup.launched import launched

present_device()  # measures the processor once
qtune.run.lock.versions()  # finds the packages once
qtune.preflight.examined = lambda device, recipe: device  # compares small layers, in every process anew


def command(words, first=""):
    launched.cache_clear()
    sys.argv = ["qtune", *words]
    code = 1
    try:
        exec(first, {})
        main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Popen:
    def __init__(self, words, env, **rest):
        self.returncode, self.pid = None, os.fork()
        if self.pid == 0:
            os.setsid()
            os.environ.update(env)
            command(words[3:])

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = None if pid == 0 else os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self):
        while self.poll() is None:
            pass


qtune.training.launch.subprocess = types.SimpleNamespace(Popen=Popen)
print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if "ended" in request:
        pid, status = os.waitpid(request["ended"], os.WNOHANG)
        print(json.dumps(None if pid == 0 else os.waitstatus_to_exitcode(status)), flush=True)
        continue
    child = os.fork()
    if child == 0:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        command(request["words"], request["first"])
    print(child, flush=True)
"""


@dataclass
class Forked:
    """A command that runs, or has run."""

    parent: "Parent"
    pid: int
    out: Path
    err: Path
    code: int | None = None

    @property
    def messages(self) -> str:
        """What it has said on stderr so far."""
        return self.err.read_text()

    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        if self.code is None:
            self.code = self.parent.ask({"ended": self.pid})
        return self.code is None

    def send(self, number: int) -> None:
        """A signal."""
        os.kill(self.pid, number)

    def ended(self) -> int:
        """Its exit code; it is killed where it hangs."""
        until = time.monotonic() + SECONDS
        while self.is_running():
            if time.monotonic() > until:
                self.send(signal.SIGKILL)
            time.sleep(0.02)
        assert self.code is not None
        return self.code


class Parent:
    """The process that forks."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def ask(self, request: object) -> int | None:
        """What it answers."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer: int | None = json.loads(self.process.stdout.readline())
        return answer

    def end(self) -> None:
        """No more commands: it ends by itself."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def start(self, *words: str | Path, environment: Mapping[str, str] | None = None, first: str = "") -> Forked:
        """`qtune` with these words. first: Python that runs before it."""
        self.count += 1
        out, err = (self.folder / f"{self.count}.{name}" for name in ("out", "err"))
        given = {"QTUNE_CACHE": os.environ["QTUNE_CACHE"], "XDG_CONFIG_HOME": os.environ["XDG_CONFIG_HOME"]}
        pid = self.ask(
            {
                "words": list(map(str, words)), "environment": {**given, **(environment or {})}, "first": first,
                "out": str(out), "err": str(err), "folder": str(self.folder),
            }
        )  # fmt: skip
        assert pid is not None
        return Forked(self, pid, out, err)

    def several(self, count: int, *words: str | Path, first: Mapping[int, str] | None = None) -> list[Forked]:
        """So many processes of one run, as a launcher starts them. first: Python that runs before in some of them."""
        place = meeting_place()
        return [
            self.start(*words, environment=place | told(rank, count), first=(first or {}).get(rank, ""))
            for rank in range(count)
        ]


def told(rank: int, count: int) -> dict[str, str]:
    """What a launcher tells a process of who it is."""
    return {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)}


def meeting_place() -> dict[str, str]:
    """What a launcher tells all processes of where they meet."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listening.getsockname()[1])}


@contextmanager
def parent(folder: Path) -> Iterator[Parent]:
    """A process that forks, for as long as the block runs."""
    made = Parent(folder)
    try:
        yield made
    finally:
        made.end()
