"""JSON: the values of a document that is too large to hold, one at a time, each with its line."""

import codecs
import json
import math
import re
from typing import Any, BinaryIO

PIECE_BYTES = 1 << 20
_SPACE = re.compile(r"[ \t\r\n]*")
_SPACE_AND_COMMAS = re.compile(r"[ \t\r\n,]*")


class BrokenJson(ValueError):  # noqa: N818  it says what the text is
    """What is wrong with a JSON text."""


class JsonValues:
    """Reads a stream in pieces and holds no more than the value at hand; `line` is that of the current position."""

    def __init__(self, stream: BinaryIO, longest_bytes: int) -> None:
        self.stream = stream
        self.longest_bytes = longest_bytes
        self.line = 1
        self._text = ""
        self._at = 0
        self._ended = False
        # Bytes that are not UTF-8 stay visible, so that the value that holds them can be named.
        self._decode = codecs.getincrementaldecoder("utf-8-sig")(errors="surrogateescape").decode
        self._decoder = json.JSONDecoder(
            parse_constant=refuse_constant, object_pairs_hook=without_repeated_keys, parse_float=finite
        )

    def next_character(self, *, over_commas: bool = False) -> str:
        """Moves over white space (and commas) to the next character; "" at the end."""
        blank = _SPACE_AND_COMMAS if over_commas else _SPACE
        while True:
            match = blank.match(self._text, self._at)
            assert match is not None
            self._move(match.end())
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read(PIECE_BYTES):
                return ""

    def step(self) -> None:
        """Moves over one character."""
        self._at += 1

    def value(self) -> Any:
        """The value at the current position.

        Raises:
            BrokenJson: there is none; nothing after it can be read.
        """
        size = PIECE_BYTES
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                unfinished = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - 16
                if unfinished and len(self._text) - self._at < self.longest_bytes and self._read(size):
                    size *= 2
                    continue
                raise self._broken(error) from error
            except RecursionError as error:
                raise BrokenJson("nested too deeply") from error
            except BrokenJson:
                raise
            except ValueError as error:  # Python reads no number of more than 4,300 digits
                raise BrokenJson("a number has too many digits") from error
            if end == len(self._text) and self._read(PIECE_BYTES):
                continue  # a number may go on in the next piece
            if has_broken_bytes(self._text[self._at : end]):
                raise BrokenJson("not UTF-8 text; save the file as UTF-8")
            self._move(end)
            return value

    def _broken(self, error: json.JSONDecodeError) -> BrokenJson:
        if has_broken_bytes(self._text[self._at : error.pos + 1]):
            return BrokenJson("not UTF-8 text; save the file as UTF-8")
        line = self.line + self._text.count("\n", self._at, error.pos)
        return BrokenJson(f"{error.msg.removesuffix(' starting at')} on line {line}")

    def _move(self, position: int) -> None:
        self.line += self._text.count("\n", self._at, position)
        self._at = position

    def _read(self, size: int) -> bool:
        """Reads on and drops what was used; False when nothing is left."""
        if self._ended:
            return False
        data = self.stream.read(size)
        self._ended = not data
        self._text = self._text[self._at :] + self._decode(data, final=self._ended)
        self._at = 0
        return True


def has_broken_bytes(text: str) -> bool:
    """Whether decoding with surrogateescape met bytes that are not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are all different; Python would keep the last of equal ones and forget the others."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise BrokenJson(f"the key {json.dumps(repeated)} stands twice in one object")
    return value


def strict_json(text: str) -> Any:
    """The value of a JSON text that says one thing: no key twice, no NaN, no number beyond a float.

    Raises:
        BrokenJson: it says more or less than that.
        ValueError, RecursionError: it is no JSON.
    """
    return json.loads(text, parse_constant=refuse_constant, object_pairs_hook=without_repeated_keys, parse_float=finite)


def finite(text: str) -> float:
    """A number as a float; Python would read 1e999 as infinity, which no JSON can say."""
    value = float(text)
    if math.isinf(value):
        raise BrokenJson(f"the number {text} is larger than any float")
    return value


def refuse_constant(name: str) -> object:
    """NaN and Infinity, which Python would read."""
    raise BrokenJson(f"{name} is not JSON")
