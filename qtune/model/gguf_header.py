"""The header of a GGUF file, checked before anybody believes it: every count, length, offset and size in it.

The readers of others take each number as it stands: a string of 2^60 bytes, an array of 10^12 entries or a model of
10^9 layers would keep them busy or fill memory. Nothing here is read beyond the header, and no longer than that is.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from qtune.errors import ModelError, Problem

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# Bounds far above what there is: the largest vocabularies have 300,000 tokens, the largest models some 2,000 tensors.
MOST_KEYS = 10_000
MOST_TENSORS = 100_000
MOST_ENTRIES = 10_000_000
LONGEST_STRING = 16 << 20
LONGEST_NAME = 1024
MOST_DIMENSIONS = 4
LARGEST_SIZE = 2**31

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "B", 10: "Q", 11: "q", 12: "d"}


class BrokenHeader(ValueError):  # noqa: N818  it says what the file is
    """What is wrong with a header, in words."""


@dataclass(frozen=True)
class GgufTensorInfo:
    """A tensor as the header describes it; `shape` begins with the dimension whose entries lie side by side."""

    name: str
    shape: tuple[int, ...]
    start: int
    """From the beginning of the tensors' data."""
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of itself. Of an array only its length is kept."""

    values: Mapping[str, Any]
    tensors: tuple[GgufTensorInfo, ...] = field(repr=False)


def require_gguf(file: Path) -> GgufHeader:
    """The header of a GGUF file that is whole and holds what it says.

    Raises:
        ModelError: it does not; or the file cannot be read.
    """
    try:
        with file.open("rb") as stream:
            reader = _Reader(stream, file.stat().st_size)
            return _header(reader)
    except OSError as error:
        raise ModelError(Problem(str(file), f"cannot be read: {error.strerror}")) from error
    except BrokenHeader as error:
        raise ModelError(Problem(str(file), f"is no whole GGUF file: {error}")) from error


class _Reader:
    """Reads a file forward, and never beyond its end or a bound."""

    def __init__(self, stream: BufferedReader, size: int) -> None:
        self.stream = stream
        self.size = size

    @property
    def at(self) -> int:
        return self.stream.tell()

    @property
    def left(self) -> int:
        return self.size - self.at

    def take(self, count: int, what: str) -> bytes:
        if count > self.left:
            raise BrokenHeader(f"{what} takes {count:,} bytes, and {max(0, self.left):,} are left")
        taken = self.stream.read(count)
        if len(taken) < count:
            raise BrokenHeader(f"it ends inside of {what}")
        return taken

    def skip(self, count: int, what: str) -> None:
        if count > self.left:
            raise BrokenHeader(f"{what} takes {count:,} bytes, and {max(0, self.left):,} are left")
        self.stream.seek(count, 1)

    def number(self, code: str, what: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))[0]

    def count(self, code: str, most: int, what: str) -> int:
        value = int(self.number(code, what))
        if value > most:
            raise BrokenHeader(f"{what} is {value:,}, and at most {most:,} can be")
        return value

    def text(self, what: str, longest: int = LONGEST_STRING) -> str:
        raw = self.take(self.count("Q", longest, f"the length of {what}"), what)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise BrokenHeader(f"{what} is not UTF-8 text") from error


def _header(reader: _Reader) -> GgufHeader:
    if (magic := reader.take(4, "the first word")) != MAGIC:
        raise BrokenHeader(f"it begins with {magic!r} instead of {MAGIC!r}")
    version = reader.number("I", "the version")
    if version not in VERSIONS:
        raise BrokenHeader(f"its version is {version}, not one of {', '.join(map(str, VERSIONS))}")
    tensor_count = reader.count("Q", MOST_TENSORS, "the number of tensors")
    key_count = reader.count("Q", MOST_KEYS, "the number of keys")
    values: dict[str, Any] = {}
    for _ in range(key_count):
        key = reader.text("a key", LONGEST_NAME)
        if key in values:
            raise BrokenHeader(f"the key {key!r} stands in it twice")
        values[key] = _value(reader, reader.number("I", f"the type of {key}"), key)
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 65536 or alignment & (alignment - 1):
        raise BrokenHeader(f"general.alignment is {alignment}, not a power of two up to 65,536")
    tensors = [_tensor(reader, alignment) for _ in range(tensor_count)]
    data_bytes = reader.size - (reader.at + -reader.at % alignment)
    _require_places(tensors, data_bytes)
    _require_sizes(values, tensors)
    return GgufHeader(values, tuple(tensors))


def _value(reader: _Reader, kind: int, key: str) -> Any:
    if kind == _STRING:
        return reader.text(key)
    if kind in _SCALARS:
        return reader.number(_SCALARS[kind], key)
    if kind != _ARRAY:
        raise BrokenHeader(f"{key} has the unknown type {kind}")
    inner = reader.number("I", f"the type of the entries of {key}")
    entries = reader.count("Q", MOST_ENTRIES, f"the number of entries of {key}")
    if inner == _STRING:
        for _ in range(entries):
            reader.skip(reader.count("Q", LONGEST_STRING, f"the length of an entry of {key}"), f"an entry of {key}")
    elif inner in _SCALARS:
        reader.skip(entries * struct.calcsize(f"<{_SCALARS[inner]}"), key)
    else:
        raise BrokenHeader(f"the entries of {key} have the unknown type {inner}")
    return range(entries)


def _tensor(reader: _Reader, alignment: int) -> GgufTensorInfo:
    name = reader.text("the name of a tensor", LONGEST_NAME)
    dimensions = reader.count("I", MOST_DIMENSIONS, f"the number of dimensions of {name}")
    shape = tuple(reader.count("Q", LARGEST_SIZE, f"a size of {name}") for _ in range(dimensions))
    kind = reader.number("I", f"the type of {name}")
    start = reader.number("Q", f"the place of {name}")
    try:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError) as error:
        raise BrokenHeader(f"{name} has the unknown type {kind}") from error
    if not shape or 0 in shape:
        raise BrokenHeader(f"{name} has nothing in it: its shape is {list(shape)}")
    if shape[0] % block:
        raise BrokenHeader(f"{name} has rows of {shape[0]:,}, which is no whole number of blocks of {block}")
    if start % alignment:
        raise BrokenHeader(f"{name} begins at byte {start:,}, which is no multiple of {alignment}")
    return GgufTensorInfo(name, shape, start, prod(shape) // block * block_bytes)


def _require_places(tensors: list[GgufTensorInfo], data_bytes: int) -> None:
    """Every tensor has a name and a place of its own, inside of the file."""
    names = {tensor.name for tensor in tensors}
    if len(names) < len(tensors):
        raise BrokenHeader("two of its tensors have one name")
    end, before = 0, ""
    for tensor in sorted(tensors, key=lambda tensor: tensor.start):
        if tensor.start < end:
            raise BrokenHeader(f"{tensor.name} overlaps {before}")
        end, before = tensor.start + tensor.nbytes, tensor.name
        if end > data_bytes:
            raise BrokenHeader(f"{tensor.name} ends at byte {end:,} of {max(0, data_bytes):,}")


def _require_sizes(values: Mapping[str, Any], tensors: list[GgufTensorInfo]) -> None:
    """The sizes that a model is built from are those of its tensors."""
    family = values.get("general.architecture")
    if not isinstance(family, str) or not family:
        raise BrokenHeader("general.architecture does not say what it is a model of")
    for key, value in values.items():
        if key.startswith(f"{family}.") and isinstance(value, int) and not 0 <= value < LARGEST_SIZE:
            raise BrokenHeader(f"{key} is {value:,}")
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    blocks = {int(found[1]) for name in shapes if (found := re.match(r"blk\.(\d{1,6})\.", name))}
    layers = values.get(f"{family}.block_count")
    if layers is not None and layers != len(blocks):
        raise BrokenHeader(f"{family}.block_count is {layers}, and there are tensors of {len(blocks)} blocks")
    hidden, embeddings = values.get(f"{family}.embedding_length"), shapes.get("token_embd.weight")
    if embeddings is not None and hidden != embeddings[0]:
        raise BrokenHeader(f"{family}.embedding_length is {hidden}, and token_embd.weight is {list(embeddings)}")
    for key in ("attention.head_count", "attention.head_count_kv"):
        heads = values.get(f"{family}.{key}", 1)
        if isinstance(heads, int) and isinstance(hidden, int) and not 0 < heads <= hidden:
            raise BrokenHeader(f"{family}.{key} is {heads}, of {hidden} columns")
    wide = max((size for shape in shapes.values() for size in shape), default=0)
    for key in ("feed_forward_length", "vocab_size", "attention.key_length", "attention.value_length"):
        size = values.get(f"{family}.{key}")
        if isinstance(size, int) and size > wide:
            raise BrokenHeader(f"{family}.{key} is {size:,}, and no tensor is that wide")
