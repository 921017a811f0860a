"""What is in a base model's files, in a few hundred bytes: enough to notice later that it is another one.

Weights are sampled: the header of each file whole, and blocks of each tensor. That finds other weights, a tensor that
was replaced, and a file that was cut, in a fraction of a second; a few numbers changed between two samples are found
where the weights are loaded, by a checksum of every byte, and by `whole`.
"""

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from qtune import console
from qtune.errors import ModelError, Problem, first_line
from qtune.model.folder import weight_files
from qtune.sizes import GIB, MIB

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BLOCK_BYTES = 4096
SMALL_BYTES = 64 * MIB
"""A file up to this size is read whole."""
PIECE_BYTES, READ_BYTES = 64 * MIB, MIB
MANY_TENSORS = 2000
"""Of a file with more tensors, one block of each is read, else three."""

CONFIGS = ("config.json", "generation_config.json")

UNIMPORTANT = ("_name_or_path", "transformers_version", "_commit_hash")
"""Keys of a configuration that change nothing."""


@dataclass(frozen=True)
class WeightFile:
    """One file of weights."""

    nbytes: int
    sampled: str
    """Of its header and of blocks of its tensors; of all of it where it is small."""
    whole: str | None = None
    """Of all of it, where that was asked for."""
    checksum: str | None = None
    """`checksums_of` it, where its weights were loaded; None of a small one, and in locks of older versions."""

    def may_be(self, other: "WeightFile") -> bool:
        """Whether nothing that is known of both speaks against their being the same bytes."""
        known = ((self.whole, other.whole), (self.checksum, other.checksum))
        return (self.nbytes, self.sampled) == (other.nbytes, other.sampled) and all(
            None in (one, another) or one == another for one, another in known
        )


@dataclass(frozen=True)
class TokenizerContents:
    """A tokenizer as it is used, wherever its files are."""

    tokens: int
    vocabulary: str
    """Of the tokens in the order of their numbers."""
    rules: str
    """Of everything else that its file says: how text is normalized, split and merged."""
    special: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Contents:
    """A base model's files. Configurations stand in full, so that it can be said what changed in them."""

    weights: dict[str, WeightFile]
    config: dict[str, Any]
    generation: dict[str, Any]
    tokenizer: TokenizerContents | None = None
    """None where nobody has asked it."""
    code: dict[str, str] = field(default_factory=dict)
    """Python files that come with the model."""

    @property
    def is_whole(self) -> bool:
        """Whether every byte of the weights was hashed."""
        return all(file.whole is not None for file in self.weights.values())


def contents_of(
    folder: Path,
    tokenizer: "PreTrainedTokenizerBase | None",
    *,
    whole: bool = False,
    checksums: Mapping[str, str] = MappingProxyType({}),
) -> Contents:
    """The contents of a model folder; `whole` reads every byte of the weights. checksums: by names of files, as far as
    they are known.

    Raises:
        ModelError: a file is not there or cannot be read.
    """
    try:
        return Contents(
            weights={
                file.name: _weight_file(file, checksums.get(file.name), whole=whole) for file in weight_files(folder)
            },
            config=_json(folder / CONFIGS[0]),
            generation=_json(folder / CONFIGS[1]),
            tokenizer=None if tokenizer is None else tokenizer_contents(tokenizer),
            code={file.name: _digest(file.read_bytes()) for file in sorted(folder.glob("*.py"))},
        )
    except OSError as error:
        raise ModelError(Problem(str(folder), f"cannot be read: {first_line(error)}")) from error


def tokenizer_contents(tokenizer: "PreTrainedTokenizerBase") -> TokenizerContents:
    """What decides which ids a text becomes; the chat template is asked elsewhere, which a recipe may replace."""
    by_number = sorted(tokenizer.get_vocab().items(), key=lambda one: (one[1], one[0]))
    text = "\n".join(f"{number} {token}" for token, number in by_number)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {}
    for state in ("padding", "truncation", "version"):  # what the last call left there
        rules.pop(state, None)
    if isinstance(rules.get("model"), dict):
        rules["model"].pop("vocab", None)
    special: dict[str, Any] = {name: str(value) for name, value in sorted(tokenizer.special_tokens_map.items())}
    special |= {
        name: value
        for name in ("add_bos_token", "add_eos_token", "clean_up_tokenization_spaces", "add_prefix_space")
        if isinstance(value := getattr(tokenizer, name, None), bool)
    }
    return TokenizerContents(
        len(by_number),
        _digest(text.encode("utf-8", errors="surrogatepass")),
        _digest(json.dumps(rules, sort_keys=True).encode()),
        special,
    )


def checksums_of(folder: Path) -> dict[str, str]:
    """A checksum of every byte of each file of weights, by its name; small files are sampled whole, and have none here.

    CRC-32 of pieces of `PIECE_BYTES`, several at a time, and then of those: it is against bits that a disk or a copy
    has turned, and takes a fraction of the time of a hash that withstands a person.

    Raises:
        ModelError: a file is not there or cannot be read.
    """
    files = [file for file in weight_files(folder) if file.stat().st_size > SMALL_BYTES]
    nbytes = sum(file.stat().st_size for file in files)
    shown = console.progress(f"reading {folder}: are its weights what they were?") if nbytes > GIB else nullcontext()
    try:
        with shown, ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
            return {file.name: _checksum(file, threads) for file in files}
    except OSError as error:
        raise ModelError(Problem(str(folder), f"cannot be read: {first_line(error)}")) from error


def _checksum(file: Path, threads: ThreadPoolExecutor) -> str:
    pieces = threads.map(lambda start: _piece(file, start), range(0, file.stat().st_size, PIECE_BYTES))
    return f"{zlib.crc32(b''.join(piece.to_bytes(4, 'little') for piece in pieces)):08x}"


def _piece(file: Path, start: int) -> int:
    """CRC-32 of one piece of a file, which is never in memory whole."""
    checksum = 0
    with file.open("rb") as stream:
        stream.seek(start)
        for _ in range(PIECE_BYTES // READ_BYTES):
            checksum = zlib.crc32(stream.read(READ_BYTES), checksum)
    return checksum


def _weight_file(file: Path, checksum: str | None, *, whole: bool) -> WeightFile:
    nbytes = file.stat().st_size
    everything = None
    if whole:
        with file.open("rb") as stream:
            everything = hashlib.file_digest(stream, "sha256").hexdigest()
    return WeightFile(nbytes, _sampled(file, nbytes), everything, checksum)


def _sampled(file: Path, nbytes: int) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as stream:
        if nbytes <= SMALL_BYTES:
            digest.update(stream.read())
            return digest.hexdigest()
        length = stream.read(8)
        header = stream.read(min(struct.unpack("<Q", length)[0], nbytes))
        digest.update(length + header)
        first = 8 + len(header)
        places = _places(header)
        for begin, end in places:
            last = max(begin, end - BLOCK_BYTES)
            starts = (begin,) if len(places) > MANY_TENSORS else (begin, begin + (last - begin) // 2, last)
            for start in dict.fromkeys(starts):
                stream.seek(first + start)
                digest.update(stream.read(min(BLOCK_BYTES, end - start)))
    return digest.hexdigest()


def _places(header: bytes) -> list[tuple[int, int]]:
    """Where each tensor begins and ends, in bytes after the header; none where it is no header."""
    try:
        described = json.loads(header)
        return sorted(
            (int(one["data_offsets"][0]), int(one["data_offsets"][1]))
            for name, one in described.items()
            if name != "__metadata__"
        )
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError, IndexError):
        return []


def _json(file: Path) -> dict[str, Any]:
    """A configuration as flat keys -> values; empty where there is none."""
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(Problem(str(file), f"is not JSON: {first_line(error)}")) from error
    return dict(_flat(values, "")) if isinstance(values, Mapping) else {"": values}


def _flat(values: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in sorted(values.items()):
        if key in UNIMPORTANT:
            continue
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
