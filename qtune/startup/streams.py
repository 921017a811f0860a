"""stdout and stderr that may end before the work does: a closed pipe or terminal, a full disk, another encoding.

Messages on stderr are for somebody who may have gone: where they cannot be written, the work goes on. Results on stdout
are what a verb is called for: where nobody reads on (`| head`), it ends quietly, as other programs do.
"""

import errno
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO, cast

BROKEN_PIPE_CODE = 141
"""What shells say of a process that SIGPIPE has ended: 128 + 13."""


class OutputEndedError(Exception):
    """Nothing more can be written to stdout."""

    def __init__(self, error: OSError) -> None:
        self.reader_left = error.errno == errno.EPIPE
        reason = error.strerror or str(error)
        super().__init__(f"the output cannot be written: {reason}; what the verb keeps in files is there")


class _Ending:
    """A text stream whose failures are either passed over or told as `OutputEndedError`."""

    def __init__(self, stream: TextIO, *, is_result: bool) -> None:
        self._stream = stream
        self._is_result = is_result
        self._has_ended = False

    def write(self, text: str) -> int:
        """Writes, unless the stream has ended."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flushes, unless the stream has ended."""
        self._try(self._stream.flush)

    def _try(self, action: Any) -> None:
        if self._has_ended:
            return
        try:
            action()
        except RuntimeError:  # a signal's handler writes while the same stream is being written
            if self._is_result:
                raise
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            self._has_ended = True
            # Python flushes once more at its end, and would complain of what cannot be written then.
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if self._is_result:
                raise OutputEndedError(error if isinstance(error, OSError) else OSError(str(error))) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def guard_streams() -> None:
    """Takes the two streams of this process into care; characters that their encoding lacks are shown as escapes."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, _Ending):
            continue
        if stream is None:  # the shell has closed it: `qtune … 2>&-`
            stream = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  for as long as the process lives
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, cast("TextIO", _Ending(stream, is_result=name == "stdout")))
