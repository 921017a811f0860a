"""Processes that begin with the libraries imported: forks of one that has, for tests that are not about a start.

    python tests/warm.py 3 "import torch"       # serves the socket that is its descriptor 3

Importing torch, transformers, peft and TRL takes three seconds of a core and more, and is the same for every `qtune`
command. A process that has imported them and done nothing else is forked for each command instead. What a real start
has beside that (the interpreter's own options, variables that a library reads on being imported) only
`conftest.qtune_process` has; run, check, export, eval, chat, report, profile and doctor are begun so by a test each.
"""

import atexit
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

TESTS = Path(__file__).parent
COMMAND = "from qtune.cli import main\nmain()"
LAUNCHER = f"import warm\nfrom qtune.training import launch\nlaunch.subprocess = warm\n{COMMAND}"
"""The command, whose `--processes` are forks of it."""
LONGEST_REQUEST = 1 << 18
"""Bytes: a program, its arguments and its environment."""
LOOKS_SECONDS = 0.02
SHORT_ANSWER = 4
"""Tokens. Answers at each evaluation take a third of a tiny run, and a random model never ends one by itself."""


class Warm:
    """A Python program in a process of its own that was warm from the start; used as a `subprocess.Popen` is."""

    def __init__(
        self, server: socket.socket, program: str, arguments: list[str], environment: Mapping[str, str]
    ) -> None:
        self.args = arguments
        self.returncode: int | None = None
        self._streams = [_Read(), _Read()]
        request = json.dumps([program, arguments, dict(environment), str(Path.cwd())]).encode()
        assert len(request) <= LONGEST_REQUEST
        self._news, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            socket.send_fds(server, [request], [theirs.fileno(), *(stream.writing for stream in self._streams)])
        for stream in self._streams:
            stream.begin()
        self.pid = int(self._news.recv(16))

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.returncode is None:
            try:
                said = self._news.recv(16, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return None
            assert said, "the process that all are forks of has ended"
            self.returncode = int(said)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once there is one."""
        until = time.monotonic() + (float("inf") if timeout is None else timeout)
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            time.sleep(LOOKS_SECONDS)
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it has written to stdout and to stderr, once it has ended; asked once."""
        self.wait(timeout)
        self._news.close()
        stdout, stderr = (stream.text() for stream in self._streams)
        return stdout, stderr

    def send_signal(self, number: int) -> None:
        """Does nothing to one that has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends it, wherever it is."""
        self.send_signal(signal.SIGKILL)


class _Read:
    """A pipe that is read while the process writes."""

    def __init__(self) -> None:
        self._reading, self.writing = os.pipe()
        self._content = b""
        self._thread = threading.Thread(target=self._read, daemon=True)

    def begin(self) -> None:
        """The process has its own end."""
        os.close(self.writing)
        self._thread.start()

    def _read(self) -> None:
        with os.fdopen(self._reading, "rb") as stream:
            self._content = stream.read()

    def text(self) -> str:
        """All that was written, once nobody writes any more."""
        self._thread.join()
        return self._content.decode()


@dataclass
class Server:
    """Starts the warm process on the first request, ends it with this one.

    imports: a program; what it has imported is there from the start.
    """

    imports: str = "import_everything()"
    _socket: socket.socket | None = field(default=None, init=False)

    def start(self, program: str, *arguments: str | Path, environment: Mapping[str, str] | None = None) -> Warm:
        """Runs a program, given as text, with arguments, in an environment (this process's) and in this directory."""
        if self._socket is None:
            self._socket = self._started()
        return Warm(self._socket, program, [str(one) for one in arguments], environment or os.environ)

    def _started(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LONGEST_REQUEST)
        with theirs:
            number = theirs.fileno()
            command = [sys.executable, __file__, str(number), self.imports]
            process = subprocess.Popen(command, pass_fds=[number], cwd=TESTS.parent)

        def end() -> None:
            ours.close()
            process.wait()

        atexit.register(end)
        return ours


# --- in the warm process ---------------------------------------------------------------------------------------------


def serve(requests: socket.socket) -> None:
    """Forks a process for each request, says its number, and later how it has ended; until nobody can ask any more."""
    running: dict[int, socket.socket] = {}
    woken, waker = socket.socketpair()
    for end in (woken, waker):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the tests' to obey
    signal.set_wakeup_fd(waker.fileno())
    with selectors.DefaultSelector() as events:
        events.register(requests, selectors.EVENT_READ)
        events.register(woken, selectors.EVENT_READ)
        while True:
            ready = [key.fileobj for key, _ in events.select()]
            if woken in ready:
                woken.recv(4096)
                _tell_who_has_ended(running)
            if requests in ready:
                request, descriptors, _, _ = socket.recv_fds(requests, LONGEST_REQUEST, 3)
                if not request:
                    return
                news = socket.socket(fileno=descriptors[0])
                process = os.fork()
                if process == 0:
                    signal.set_wakeup_fd(-1)
                    for kept in (requests, woken, waker, news, *running.values()):
                        kept.close()
                    _run(*json.loads(request), descriptors[1:])
                news.send(str(process).encode())
                running[process] = news
                for descriptor in descriptors[1:]:
                    os.close(descriptor)


def _tell_who_has_ended(running: dict[int, socket.socket]) -> None:
    while running:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process == 0:
            return
        with running.pop(process) as news:
            try:
                news.send(str(os.waitstatus_to_exitcode(status)).encode())
            except BrokenPipeError:
                continue  # nobody has waited


def _run(program: str, arguments: list[str], environment: dict[str, str], folder: str, outputs: list[int]) -> None:
    """Becomes the process that was asked for; does not return."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, descriptor in enumerate((os.open(os.devnull, os.O_RDONLY), *outputs)):
        os.dup2(descriptor, number)
        os.close(descriptor)
    # What the interpreter made at its start belongs to what these descriptors were then.
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.chdir(folder)
    _become(program, arguments, environment)


def _become(program: str, arguments: list[str], environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[:] = ["qtune", *arguments]
    code = 1
    try:
        exec(compile(program, "program", "exec"), {"__name__": "__main__"})
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
        finally:
            os._exit(code)


class Popen:
    """In the place of `subprocess.Popen` in `training/launch.py`: a fork of the launcher, which has the libraries."""

    def __init__(
        self,
        command: list[str],
        *,
        env: Mapping[str, str],
        start_new_session: bool,
        preexec_fn: Callable[[], None] | None,
    ) -> None:
        assert command[:3] == [sys.executable, "-m", "qtune"]
        self.returncode: int | None = None
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self.pid = os.fork()
        if self.pid == 0:
            from qtune.startup.launched import launched

            if start_new_session:
                os.setsid()
            if preexec_fn is not None:
                preexec_fn()
            launched.cache_clear()  # the launcher was told of nobody
            _become(COMMAND, command[3:], env)

    def poll(self) -> int | None:
        """As `subprocess.Popen.poll`."""
        return self._ended(os.WNOHANG)

    def wait(self) -> int | None:
        """As `subprocess.Popen.wait`."""
        return self._ended(0)

    def _ended(self, options: int) -> int | None:
        if self.returncode is None:
            process, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if process else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """As `subprocess.Popen.send_signal`."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """As `subprocess.Popen.kill`."""
        self.send_signal(signal.SIGKILL)


def without_waiting(descriptor: int) -> None:
    """In the place of `os.fsync`: what it guards against is a loss of power, which no test brings about. What happens
    where it fails is tested with the real one (`test_whole.py`, `test_disk_everywhere.py`)."""


def import_everything() -> None:
    """All that any verb imports, as the command does it, and what each finds out about the processor.

    Answers at each evaluation are as short as `conftest.short_answers` has them.
    """
    from qtune.startup.imports import import_libraries, no_collection
    from qtune.startup.quiet import quiet_libraries

    quiet_libraries()
    with no_collection():
        import qtune.cli
        import qtune.export.export
        import qtune.memory.profile
        import qtune.report.page
        import qtune.training.sample_answers
        import qtune.training.train
        import qtune.tuned.chat
        import qtune.tuned.evaluate
    import_libraries()
    qtune.training.sample_answers.MOST_TOKENS = SHORT_ANSWER
    os.fsync = without_waiting
    _look_at_the_processor()


def _look_at_the_processor() -> None:
    """Measures what a command measures once in a process, which takes a second of a core.

    Only where it is the same in a fork: threads of OpenMP are not in it, and with a card autograd's are not.
    """
    import torch

    from qtune.adapter.lean_check import lean_problem
    from qtune.device.products import cpu_product_times

    if torch.get_num_threads() == 1 and not torch.cuda.device_count():
        cpu_product_times()
        for dtype in (torch.float32, torch.bfloat16):
            lean_problem("cpu", dtype)


if __name__ == "__main__":
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    exec(sys.argv[2])
    serve(socket.socket(fileno=int(sys.argv[1])))
