# ruff: noqa: E501  one damage is one line
"""GGUF and safetensors files that are not what they say: one error that names the file, before anything is built."""

import json
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import FUZZ_SEED, FUZZED
from safetensors.torch import load_file, save_file
from test_model_builtin import write_gguf

from qtune.errors import ModelError
from qtune.model.checkpoint import Checkpoint, tensors_of
from qtune.model.folder import require_weights, weight_map
from qtune.model.gguf_header import require_gguf
from qtune.model.load import load_config
from qtune.model.safetensors_file import require_whole
from qtune.recipe.schema import Model


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(file)
    return file.read_bytes()


def text(words: str) -> bytes:
    return struct.pack("<Q", len(words.encode())) + words.encode()


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...] = (32, 4), kind: int = 0, start: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, start)


FAMILY = key("general.architecture", 8, text("llama"))


def made(
    keys: tuple[bytes, ...] = (FAMILY,), tensors: tuple[bytes, ...] = (), *, magic: bytes = b"GGUF", version: int = 3,
    counts: tuple[int, int] | None = None, data_bytes: int = 4096,
) -> bytes:  # fmt: skip
    """A GGUF file of these keys and tensors; `counts` are those that it states."""
    told = counts or (len(tensors), len(keys))
    head = magic + struct.pack("<IQQ", version, *told) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32 + data_bytes)


def layers(count: int) -> bytes:
    return key("llama.block_count", 4, struct.pack("<I", count))


EMBEDDINGS = tensor("token_embd.weight", (64, 8))
BROKEN_GGUF: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "the first word takes 4 bytes, and 0 are left"),
    "another magic": (made(magic=b"GGML"), "begins with b'GGML'"),
    "another byte order": (made(version=3 << 24), "its version is 50331648"),
    "version 1": (made(version=1), "its version is 1"),
    "a cut": (made()[:30], "a key"),
    "more keys than fit": (made(counts=(0, 10**6)), "the number of keys is 1,000,000"),
    "many keys": (made(counts=(0, 9999)), "the key '' stands in it twice"),
    "tensors without end": (made(counts=(2**60, 1)), "the number of tensors is 1,152,921,504,606,846,976"),
    "a key of 2^60 bytes": (made((struct.pack("<Q", 2**60),)), "the length of a key is"),
    "a text of 2^60 bytes": (made((key("a", 8, struct.pack("<Q", 2**60)),)), "the length of a is"),
    "a text beyond the end": (made((key("a", 8, struct.pack("<Q", 10**6)),)), "a takes 1,000,000 bytes, and"),
    "an array without end": (made((key("a", 9, struct.pack("<IQ", 4, 2**40)),)), "the number of entries of a is"),
    "an array beyond the end": (made((key("a", 9, struct.pack("<IQ", 4, 10**6)),)), "a takes 4,000,000 bytes, and"),
    "an array of arrays": (made((key("a", 9, struct.pack("<IQ", 9, 4)),)), "the entries of a have the unknown type 9"),
    "an unknown type": (made((key("a", 77, b""),)), "a has the unknown type 77"),
    "a key twice": (made((FAMILY, FAMILY)), "the key 'general.architecture' stands in it twice"),
    "no family": (made((key("a", 4, bytes(4)),)), "general.architecture does not say"),
    "a family that is a number": (made((key("general.architecture", 4, bytes(4)),)), "general.architecture does not say"),
    "no UTF-8": (made((key("a", 8, struct.pack("<Q", 1) + b"\xff"),)), "a is not UTF-8"),
    "an odd alignment": (made((FAMILY, key("general.alignment", 4, struct.pack("<I", 3)))), "general.alignment is 3"),
    "no alignment": (made((FAMILY, key("general.alignment", 4, bytes(4)))), "general.alignment is 0"),
    "many dimensions": (made(tensors=(tensor("a", (1,) * 9),)), "the number of dimensions of a is 9"),
    "no dimensions": (made(tensors=(tensor("a", ()),)), "a has nothing in it"),
    "an empty dimension": (made(tensors=(tensor("a", (32, 0)),)), "a has nothing in it"),
    "a size of 2^63": (made(tensors=(tensor("a", (2**63, 2)),)), "a size of a is"),
    "an unknown code": (made(tensors=(tensor("a", kind=99),)), "a has the unknown type 99"),
    "half a block": (made(tensors=(tensor("a", (33, 1), kind=2),)), "no whole number of blocks of 32"),
    "a tensor beyond the end": (made(tensors=(tensor("a", (4096, 4096)),)), "a ends at byte 67,108,864 of 4,096"),
    "a place beyond the end": (made(tensors=(tensor("a", start=2**62),)), "a ends at byte"),
    "a place between": (made(tensors=(tensor("a", start=7),)), "a begins at byte 7"),
    "two in one place": (made(tensors=(tensor("a"), tensor("b", start=32))), "b overlaps a"),
    "two of one name": (made(tensors=(tensor("a"), tensor("a", start=512))), "two of its tensors have one name"),
    "layers without end": (made((FAMILY, layers(10**9)), (EMBEDDINGS,)), "llama.block_count is 1000000000"),
    "a width without end": (
        made((FAMILY, layers(0), key("llama.embedding_length", 4, struct.pack("<I", 10**9))), (EMBEDDINGS,)),
        "llama.embedding_length is 1000000000",
    ),
    "heads without end": (
        made((FAMILY, layers(0), key("llama.embedding_length", 4, struct.pack("<I", 64)),
              key("llama.attention.head_count", 4, struct.pack("<I", 10**6))), (EMBEDDINGS,)),
        "llama.attention.head_count is 1000000",
    ),
    "a negative size": (made((FAMILY, key("llama.context_length", 5, struct.pack("<i", -1)))), "context_length is -1"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "reason"), BROKEN_GGUF.values(), ids=BROKEN_GGUF)
def test_a_gguf_file_that_is_not_what_it_says_is_one_error(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=rf"a\.gguf: is no whole GGUF file: .*{reason}"):
        load_config(Model(base=str(tmp_path / "a.gguf")))


def test_a_gguf_file_that_is_whole_is_read(tmp_path: Path, gguf_bytes: bytes) -> None:
    (tmp_path / "a.gguf").write_bytes(gguf_bytes)
    header = require_gguf(tmp_path / "a.gguf")
    assert header.values["general.architecture"] == "llama"
    assert {one.name for one in header.tensors} >= {"token_embd.weight"}


def damaged(content: bytes, seed: int, count: int, head: int) -> Iterator[bytes]:
    """The file with bytes changed, cut, doubled or replaced by large numbers, mostly in its first `head` bytes."""
    generator = random.Random(seed)
    for _ in range(count):
        found = bytearray(content)
        for _ in range(generator.randint(1, 4)):
            at = generator.randrange(min(head, len(found)) if generator.random() < 0.9 else len(found))
            change = generator.randrange(5)
            if change == 0:
                found[at] ^= 1 << generator.randrange(8)
            elif change == 1:
                found[at : at + 8] = struct.pack(
                    "<Q", generator.choice([0, 1, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1])
                )
            elif change == 2:
                del found[at:]
            elif change == 3:
                found[at:at] = found[at : at + generator.randint(1, 64)]
            else:
                found[at : at + 4] = generator.randbytes(4)
            if len(found) < 2:
                break
        yield bytes(found)


@pytest.mark.slow
def test_no_random_damage_to_a_gguf_header_ends_in_anything_but_a_header_or_what_is_wrong(
    tmp_path: Path, gguf_bytes: bytes
) -> None:
    file, ended = tmp_path / "a.gguf", [0, 0]
    for content in damaged(gguf_bytes, FUZZ_SEED, 3000 * FUZZED, len(gguf_bytes) // 2):
        file.write_bytes(content)
        try:
            require_gguf(file)
            ended[0] += 1
        except ModelError:
            ended[1] += 1
    assert all(ended)


@pytest.mark.slow
def test_no_random_damage_to_a_gguf_base_ends_in_anything_but_a_model_or_what_is_wrong(
    tmp_path: Path, gguf_bytes: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QTUNE_CACHE", str(tmp_path / "cache"))
    refused = 0
    for number, content in enumerate(damaged(gguf_bytes, 16, 60, len(gguf_bytes) // 2)):
        file = tmp_path / f"{number}.gguf"
        file.write_bytes(content)
        try:
            load_config(Model(base=str(file)))
        except ModelError:
            refused += 1
    assert refused


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16), "c": torch.zeros(0)}, file)
    return file


def rewritten(file: Path, change: Callable[[dict], object]) -> None:
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


BROKEN_HEADERS: dict[str, tuple[Callable[[dict], object], str]] = {
    "more than the file has": (lambda header: header["a"].update(shape=[2, 3000], data_offsets=[0, 24000]), "a ends at|a overlaps|b overlaps"),
    "an overlap": (lambda header: header["b"].update(data_offsets=[16, 24]), "overlaps"),
    "a gap": (lambda header: header.pop("a"), "belong to no tensor"),
    "an unknown type": (lambda header: header["a"].update(dtype="F99"), "a is described as"),
    "another shape": (lambda header: header["a"].update(shape=[2, 4]), "a is described as"),
    "a negative size": (lambda header: header["a"].update(shape=[-2, -3]), "a is described as"),
    "a size of 2^70": (lambda header: header["a"].update(shape=[2**70]), "a is described as"),
    "no places": (lambda header: header["a"].pop("data_offsets"), "a is described as"),
    "a text": (lambda header: header.update(a="x"), "a is described as"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "reason"), BROKEN_HEADERS.values(), ids=BROKEN_HEADERS)
def test_a_header_of_safetensors_that_does_not_fit_its_file_is_one_error(
    weights: Path, change: Callable[[dict], object], reason: str
) -> None:
    require_whole(weights)
    rewritten(weights, change)
    for ask in (
        require_whole,
        tensors_of,
        lambda file: require_weights(str(file.parent)),
        lambda file: Checkpoint.open(file.parent),
    ):
        with pytest.raises(ModelError, match=rf"model\.safetensors: is damaged: .*({reason})"):
            ask(weights)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x02", struct.pack("<Q", 2**60), struct.pack("<Q", 100) + b"{}", struct.pack("<Q", 2) + b"[]",
     struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc", struct.pack("<Q", 60_000) + b"[" * 60_000, b"version https://git"],
    ids=["nothing", "a byte", "2^60 bytes", "a cut", "a list", "no text", "a nest", "another file"],
)  # fmt: skip
def test_what_is_no_safetensors_file_is_said_to_be_none(weights: Path, content: bytes) -> None:
    weights.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors: is"):
        require_whole(weights)


def test_a_truncated_shard_is_named_before_weights_are_read(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:-3])
    with pytest.raises(ModelError, match=r"model\.safetensors: is damaged: b ends at byte 32 of 29; it was not copied"):
        require_weights(str(weights.parent))


@pytest.mark.slow
def test_what_the_check_of_a_header_lets_pass_the_library_reads(
    weights: Path,
) -> None:
    whole, seen = weights.read_bytes(), [0, 0]
    for content in damaged(whole, FUZZ_SEED, 2000 * FUZZED, 200):
        weights.write_bytes(content)
        try:
            require_whole(weights)
        except ModelError:
            seen[0] += 1
            continue
        seen[1] += 1
        load_file(weights)
    assert all(seen)


@pytest.mark.parametrize(
    "index",
    ["", "[]", "{}", '{"weight_map": 7}', '{"weight_map": {"a": 7}}', '{"weight_map": {"a": "../x.safetensors"}}',
     '{"weight_map": {"a": "/etc/passwd"}}', '{"weight_map": {"a": "x.bin"}}', "[" * 100_000, '{"a": ' + "9" * 5000 + "}"],
    ids=lambda text: text[:30],
)  # fmt: skip
def test_a_damaged_index_is_one_error(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json: (is damaged|names)"):
        weight_map(tmp_path)


@pytest.mark.parametrize(
    "size", ["num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads", "intermediate_size"]
)
def test_a_configuration_of_a_model_that_nobody_can_build_is_refused(
    tmp_path: Path, tiny_model: Path, size: str
) -> None:
    raw = json.loads((tiny_model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, size: 10**9}))
    with pytest.raises(ModelError, match=rf"config\.json: {size} = 1000000000: no model has more than"):
        load_config(Model(base=str(tmp_path)))


@pytest.mark.parametrize("content", ["[" * 100_000, '{"hidden_size": ' + "9" * 5000 + "}"], ids=["a nest", "a number"])
def test_a_configuration_without_an_end_is_one_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json: is no configuration"):
        load_config(Model(base=str(tmp_path)))
