"""Which line of a TOML text each key stands on, so that an error can name it.

`tomllib` gives values without positions. This scanner reads text that `tomllib` has already accepted, so it only has
to find where keys and array elements begin, never to judge them. Grammar: TOML v1.0.0.
"""

import re
import tomllib
from bisect import bisect_left
from collections.abc import Mapping

from qtune.recipe.schema import KeyPath


def toml_lines(text: str) -> Mapping[KeyPath, int]:
    """The line (from 1) of every key, table header and array element in a valid TOML text.

    Keys are paths: `("training", "epochs")`; array elements add their index: `("data", "train", 0)`.
    """
    return _Scanner(text).scan()


def line_of(lines: Mapping[KeyPath, int], path: KeyPath) -> int:
    """The line of the longest part of `path` that the text has: a missing key is reported at its table. 1 if none."""
    for length in range(len(path), 0, -1):
        if path[:length] in lines:
            return lines[path[:length]]
    return 1


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.lines: dict[KeyPath, int] = {}
        self.table_counts: dict[KeyPath, int] = {}
        self.line_ends = [found.start() for found in re.finditer("\n", text)]

    def scan(self) -> dict[KeyPath, int]:
        table: KeyPath = ()
        while self._skip_blank():
            if self.text[self.at] == "[":
                table = self._header()
            else:
                self._pair(table)
        # [a.b] makes a table a without a header of its own; where it has one, that counts.
        for path, line in list(self.lines.items()):
            for length in range(1, len(path)):
                self.lines.setdefault(path[:length], line)
        return self.lines

    def _line(self) -> int:
        return bisect_left(self.line_ends, self.at) + 1

    def _skip_blank(self) -> bool:
        """Moves over white space and comments; False at the end of the text."""
        while self.at < len(self.text):
            if self.text[self.at] == "#":
                self._skip_to_line_end()
            elif self.text[self.at] in " \t\r\n,":
                self.at += 1
            else:
                return True
        return False

    def _skip_to_line_end(self) -> None:
        end = self.text.find("\n", self.at)
        self.at = len(self.text) if end < 0 else end

    def _header(self) -> KeyPath:
        line = self._line()
        is_array = self.text.startswith("[[", self.at)
        self.at += 2 if is_array else 1
        path = self._inside_arrays(self._key("]"))
        self.at += 2 if is_array else 1
        self.lines.setdefault(path, line)
        if is_array:
            index = self.table_counts.get(path, 0)
            self.table_counts[path] = index + 1
            path = (*path, index)
            self.lines[path] = line
        return path

    def _inside_arrays(self, keys: tuple[str, ...]) -> KeyPath:
        """`[a.b]` below `[[a]]` belongs to the last element of a."""
        path: KeyPath = ()
        for position, key in enumerate(keys):
            path = (*path, key)
            if position < len(keys) - 1 and path in self.table_counts:
                path = (*path, self.table_counts[path] - 1)
        return path

    def _key(self, end: str) -> tuple[str, ...]:
        """A bare, quoted or dotted key, up to (not over) `end`."""
        parts: list[str] = []
        while self.text[self.at] != end:
            character = self.text[self.at]
            if character in " \t.":
                self.at += 1
            elif character in "\"'":
                start = self.at
                self._string()
                parts.append(tomllib.loads(f"key = {self.text[start : self.at]}")["key"])
            else:
                start = self.at
                while self.text[self.at] not in f" \t.{end}":
                    self.at += 1
                parts.append(self.text[start : self.at])
        return tuple(parts)

    def _pair(self, table: KeyPath) -> None:
        line = self._line()
        path = table
        for part in self._key("="):
            path = (*path, part)
            self.lines.setdefault(path, line)
        self.at += 1
        self._value(path)

    def _value(self, path: KeyPath) -> None:
        self._skip_blank()
        character = self.text[self.at]
        if character in "\"'":
            self._string()
        elif character == "[":
            self.at += 1
            index = 0
            while self._skip_blank() and self.text[self.at] != "]":
                self.lines[*path, index] = self._line()
                self._value((*path, index))
                index += 1
            self.at += 1
        elif character == "{":
            self.at += 1
            while self._skip_blank() and self.text[self.at] != "}":
                self._pair(path)
            self.at += 1
        else:
            while self.at < len(self.text) and self.text[self.at] not in ",]}#\n":
                self.at += 1

    def _string(self) -> None:
        quote = self.text[self.at]
        fence = quote * 3 if self.text.startswith(quote * 3, self.at) else quote
        self.at += len(fence)
        while not self.text.startswith(fence, self.at):
            self.at += 2 if self.text[self.at] == "\\" and quote == '"' else 1
        self.at += len(fence)
        # A multi-line string may end in up to two quotes of its own.
        while len(fence) == 3 and self.at < len(self.text) and self.text[self.at] == quote:
            self.at += 1


_PLACE = re.compile(r"\(at (?:line (\d+), column \d+|end of document)\)")


def toml_fault(error: tomllib.TOMLDecodeError, text: str) -> tuple[int, str]:
    """(the line of what tomllib refuses in a text, counted from 1, and why); at its end that is the last line."""
    message = str(error)
    place = _PLACE.search(message)
    line = int(place[1]) if place and place[1] else text.count("\n") + 1
    return line, message[: place.start()].strip() if place else message
