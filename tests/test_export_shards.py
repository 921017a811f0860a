"""Shards written in a stream are files that the safetensors library reads, with an index that transformers follows."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qtune.errors import ExportError, ModelError
from qtune.export.shards import Planned, plan_shards, write_shards
from qtune.model.checkpoint import Checkpoint

TENSORS = {
    "a": torch.randn(5, 3, dtype=torch.float32).half(),
    "b": torch.randn(7),
    "c": torch.arange(3),
    "d": torch.randn(4, 4).bfloat16(),
    "e": torch.tensor([True, False, True]),
    "f": torch.empty(0, 4),
    "g": torch.tensor(2.5, dtype=torch.float64),
}


def written(folder: Path, shard_bytes: int) -> list[Path]:
    planned = [Planned(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()]
    return write_shards(folder, plan_shards(planned, shard_bytes), lambda planned: TENSORS[planned.name])


def test_one_shard_is_read_back_by_safetensors_bit_for_bit(tmp_path: Path) -> None:
    assert [file.name for file in written(tmp_path, 10**6)] == ["model.safetensors"]
    read = load_file(tmp_path / "model.safetensors")
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in TENSORS.items())


def test_several_shards_have_an_index_of_every_tensor(tmp_path: Path) -> None:
    files = written(tmp_path, 40)
    assert files[-1].name == "model.safetensors.index.json"
    index = json.loads(files[-1].read_text())
    assert index["weight_map"].keys() == TENSORS.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], TENSORS[name])


def test_no_shard_is_larger_than_asked_unless_it_is_one_tensor() -> None:
    sizes = [30, 30, 30, 200, 10]
    shards = plan_shards([Planned(str(number), torch.uint8, (size,)) for number, size in enumerate(sizes)], 64)
    assert [[tensor.nbytes for tensor in shard] for shard in shards] == [[30, 30], [30], [200], [10]]


def test_a_tensor_of_another_shape_than_planned_stops_the_writing(tmp_path: Path) -> None:
    planned = [[Planned("a", torch.float32, (2, 2))]]
    with pytest.raises(ExportError, match=r"^a: expected torch.float32 \[2, 2\], got torch.float32 \[3\]$"):
        write_shards(tmp_path, planned, lambda _: torch.zeros(3))


def test_a_checkpoint_is_read_by_name(tmp_path: Path) -> None:
    written(tmp_path, 40)
    checkpoint = Checkpoint.open(tmp_path)
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in TENSORS.items())
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in TENSORS.values())


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    shard = written(tmp_path, 40)[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ModelError, match=rf"^{shard}: is damaged: .*not copied to its end"):
        Checkpoint.open(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    shard = written(tmp_path, 40)[1]
    shard.unlink()
    with pytest.raises(ModelError, match=rf"shards named in model.safetensors.index.json are missing: {shard.name}"):
        Checkpoint.open(tmp_path)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match=r"pickle files \(.bin\); convert them to safetensors"):
        Checkpoint.open(tmp_path)


def test_an_empty_folder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a model folder"):
        Checkpoint.open(tmp_path)
