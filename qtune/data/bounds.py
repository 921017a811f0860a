"""Bounds of a chat template, which is a program by somebody else: processor time, memory, recursion, long numbers.

Everything that jinja does in Python's own steps ends by a timer, and what asks for memory by a limit of the process.
What would spin inside of one operation, where no timer is heard, is refused by the operators and filters themselves.
Both work in any process whose main thread renders: this one, and those that tokenize beside it.
"""

import resource
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils

SECONDS = 5.0
"""Of the processor, for one rendering. The largest rows that are read, of 64 MiB, take below one."""
MEMORY_BYTES = 1 << 30
"""Beyond what the process has, while it renders."""
LONGEST_TEMPLATE = 1 << 20
"""Characters. The longest published ones have about 30,000."""
LONGEST_NUMBER_BITS = 4096


class TemplateOutOfBoundsError(Exception):
    """The template takes more than any chat template does: which, in words."""


@contextmanager
def bounded_rendering(seconds: float = SECONDS, memory_bytes: int = MEMORY_BYTES) -> Iterator[None]:
    """Ends what is done inside where it takes too long or too much.

    Raises:
        TemplateOutOfBoundsError: it did.
    """
    try:
        with _limited_memory(memory_bytes), _timer(seconds):
            yield
    except MemoryError as error:
        raise TemplateOutOfBoundsError(f"takes more than {memory_bytes >> 20} MiB of memory") from error


@contextmanager
def _timer(seconds: float) -> Iterator[None]:
    """A signal after so much processor time of this process; a signal is only heard in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def expire(number: int, frame: FrameType | None) -> None:
        raise TemplateOutOfBoundsError(f"takes longer than {seconds:g} seconds")

    before = signal.signal(signal.SIGPROF, expire)
    # Again and again: an exception that is raised inside of a destructor is lost.
    signal.setitimer(signal.ITIMER_PROF, seconds, 0.1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextmanager
def _limited_memory(memory_bytes: int) -> Iterator[None]:
    """The process gets no more address space than this; where the system does not tell how much it has, as ever."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_bytes().split()[0])
        most = pages * resource.getpagesize() + memory_bytes
        if soft in (resource.RLIM_INFINITY, -1) or most < soft:
            resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """jinja's sandbox, in which products, powers, roundings and numbers read from text stay short.

    Python computes 9 ** 9 ** 9 in one operation that no signal interrupts.
    """

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.filters["round"] = _short_rounding(self.filters["round"])
        self.filters["int"] = _short_number(self.filters["int"])

    def from_string(self, source: Any, *args: Any, **kwargs: Any) -> Any:
        """The template of a text, unless it is too long for one."""
        if len(source) > LONGEST_TEMPLATE:
            raise SecurityError(f"the template has more than {LONGEST_TEMPLATE:,} characters")
        return super().from_string(source, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """The result of `*` or `**`, unless it would be a number of thousands of digits."""
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if abs(bits) > LONGEST_NUMBER_BITS:
                raise SecurityError("the template computes numbers of thousands of digits")
        return super().call_binop(context, operator, left, right)


def _short_rounding(original: Callable[..., Any]) -> Callable[..., Any]:
    def rounded(value: Any, precision: int = 0, method: Any = "common") -> Any:
        if not -LONGEST_NUMBER_BITS < precision < LONGEST_NUMBER_BITS:
            raise SecurityError("the template rounds to thousands of digits")
        return original(value, precision, method)

    return rounded


def _short_number(original: Callable[..., Any]) -> Callable[..., Any]:
    def number(value: Any, default: int = 0, base: int = 10) -> Any:
        if isinstance(value, str) and len(value) > LONGEST_NUMBER_BITS:
            return default
        return original(value, default, base)

    return number


# transformers 5.23 compiles templates in an environment of its own making, by this name.
compiling: Any = chat_template_utils
compiling.ImmutableSandboxedEnvironment = BoundedEnvironment
