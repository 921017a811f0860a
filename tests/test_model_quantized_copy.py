"""A quantized copy of the base for the next start: the same model bit for bit, or none."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from export_models import tiny_base
from safetensors.torch import load_file, save_file
from test_model_load import CPU

from qtune import manifest
from qtune.model import as_made, contents, load, quantized_copy
from qtune.plan import Plan, make_plan
from qtune.recipe.parse import parse_recipe
from qtune.recipe.schema import EightBit, FourBit, Model, Quantization

KINDS = {
    "nf4": FourBit(minimum_share=0.0),
    "nf4 without double quantization": FourBit(double_quantization=False, minimum_share=0.0),
    "fp4": FourBit(kind="fp4", minimum_share=0.0),
    "int8": EightBit(kind="int8", minimum_share=0.0),
}


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(quantized_copy, "FROM_BYTES", 1)
    return tiny_base(tmp_path / "base")


def plan_for(quantization: Quantization, dtype: str = "float32") -> Plan:
    recipe = parse_recipe({"model": {"base": "x"}, "data": {"train": "y"}})
    given = quantization.model_copy(update={"compute_dtype": dtype})
    return make_plan(recipe.model_copy(update={"quantization": given}), CPU)


def loaded(base: Path, quantization: Quantization = KINDS["nf4"], dtype: str = "float32") -> Any:
    return load.load_base(Model(base=str(base)), quantization, plan_for(quantization, dtype))


def copies() -> list[Path]:
    return sorted(path.parent for path in quantized_copy.cache_folder().glob("quantized/*/manifest.json"))


def is_quantized_anew(base: Path, monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> bool:
    """Whether a start reads the base's own weights."""
    read: list[str] = []
    with monkeypatch.context() as patch:
        original = load.load_weights
        patch.setattr(load, "load_weights", lambda *a, **b: [read.append(a[0]), original(*a, **b)][1])
        loaded(base, *arguments)
    return bool(read)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_copy_is_the_model_that_was_quantized(
    base: Path, kind: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = loaded(base, KINDS[kind], dtype)
    with monkeypatch.context() as patch:
        patch.setattr(load, "load_weights", lambda *a, **b: pytest.fail("the base was quantized again"))
        second = loaded(base, KINDS[kind], dtype)
    before, after = first.state_dict(), second.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        same = torch.equal(value, after[name]) if isinstance(value, torch.Tensor) else value == after[name]
        assert same, name
        assert not isinstance(value, torch.Tensor) or value.dtype == after[name].dtype, name
    ids = torch.arange(3, 40)[None]
    assert torch.equal(first(ids).logits, second(ids).logits)
    assert second.config.name_or_path == first.config.name_or_path == str(base)
    assert {type(module) for module in second.modules()} == {type(module) for module in first.modules()}
    assert not any(parameter.requires_grad for parameter in second.parameters())


def test_the_copy_is_called_what_the_model_was_loaded_from_whatever_the_recipe_calls_it(base: Path) -> None:
    """An adapter names it, and peft looks there for the base."""
    names = [loaded(base / "config.json").config.name_or_path for _ in range(2)]
    assert names == [str(base)] * 2


def test_a_base_that_is_quantized_in_no_time_is_not_kept(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_copy, "FROM_BYTES", sum(file.stat().st_size for file in base.glob("*.safetensors")))
    loaded(base, FourBit(minimum_share=0.0, keep_copy=False))
    assert copies() == []
    loaded(base)
    assert len(copies()) == 1
    monkeypatch.setattr(quantized_copy, "FROM_BYTES", quantized_copy.FROM_BYTES + 1)
    assert is_quantized_anew(base, monkeypatch)


def test_a_copy_is_kept_where_there_is_room_and_said(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(quantized_copy, "free_bytes", lambda folder: 1)
        loaded(base)
    assert copies() == []
    assert "is not kept for the next start: 1 B are free" in capsys.readouterr().err
    loaded(base)
    assert str(copies()[0]) in capsys.readouterr().err.replace("\n", "")


def test_other_weights_another_configuration_and_another_quantization_are_quantized_anew(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded(base)
    assert not is_quantized_anew(base, monkeypatch)
    assert is_quantized_anew(base, monkeypatch, KINDS["fp4"])
    assert is_quantized_anew(base, monkeypatch, KINDS["nf4"], "bfloat16")
    config = base / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert config.read_text() != text
    assert is_quantized_anew(base, monkeypatch)
    config.write_text(text)
    weights = base / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    assert is_quantized_anew(base, monkeypatch)


def _flip(copy: Path) -> None:
    file = copy / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "a flipped bit": _flip,
    "a file that was cut": lambda copy: (copy / "model.safetensors").write_bytes(b"x"),
    "a file that is gone": lambda copy: (copy / "model.safetensors").unlink(),
    "another configuration": lambda copy: (copy / "config.json").write_text("{}"),
    "a record that is no JSON": lambda copy: (copy / "manifest.json").write_text("{"),
    "a record of nothing": lambda copy: (copy / "manifest.json").write_text('{"files": {}}'),
    "a record of another shape": lambda copy: (copy / "manifest.json").write_text("[]"),
    "a record that is gone": lambda copy: (copy / "manifest.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_copy_is_made_again_and_said(
    base: Path, damage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = loaded(base).state_dict()
    (copy,) = copies()
    DAMAGES[damage](copy)
    capsys.readouterr()
    again = loaded(base).state_dict()
    assert "it is made again" in capsys.readouterr().err
    assert all(torch.equal(again[name], value) for name, value in right.items())
    assert copies() == [copy]
    assert not is_quantized_anew(base, monkeypatch)


def test_a_cache_that_takes_nothing_does_not_stop_a_start(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("QTUNE_CACHE", str(tmp_path / "file"))
    assert loaded(base) is not None
    assert "is not kept for the next start" in capsys.readouterr().err


def test_of_several_processes_one_writes(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qtune.startup.launched import Launched

    monkeypatch.setattr(quantized_copy, "launched", lambda: Launched(1, 2, 1, 2))
    loaded(base)
    assert copies() == []


def test_what_a_copy_was_made_of_is_what_its_model_is_compared_with(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bit between the samples of the base: the copy is of what was there before, one that is made since is not."""
    monkeypatch.setattr(contents, "SMALL_BYTES", 0)
    monkeypatch.setattr(contents, "BLOCK_BYTES", 16)
    model, quantization = Model(base=str(base)), KINDS["nf4"]
    plan = plan_for(quantization)
    before = load.checksums_loaded(model, quantization, plan)
    assert before == contents.checksums_of(base)
    loaded(base)
    file = base / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[8 + int.from_bytes(content[:8], "little") + 100] ^= 1
    file.write_bytes(content)
    now = contents.checksums_of(base)
    assert now != before
    assert load.checksums_loaded(model, quantization, plan) == before
    assert load.checksums_loaded(model, quantization.model_copy(update={"keep_copy": False}), plan) == now
    damaged = copies()[0] / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert load.checksums_loaded(model, quantization, plan) == now
    loaded(base)
    assert load.checksums_loaded(model, quantization, plan) == now


def test_the_copy_of_another_base_in_the_place_of_this_is_not_loaded(base: Path, tmp_path: Path) -> None:
    """Of the same shapes: everything in it is whole, and it would load."""
    before = loaded(base).state_dict()
    (here,) = copies()
    other = tiny_base(tmp_path / "other")
    file = other / "model.safetensors"
    save_file({name: -tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    loaded(other)
    (there,) = set(copies()) - {here}
    shutil.rmtree(here)
    shutil.copytree(there, here)
    after = loaded(base).state_dict()
    for name, value in before.items():
        assert not isinstance(value, torch.Tensor) or torch.equal(value, after[name]), name


def test_a_copy_is_read_for_damage_once_a_process_however_often_it_is_used(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded(base)
    (copy,) = copies()
    read: list[Path] = []
    original = manifest.fault
    monkeypatch.setattr(manifest, "fault", lambda folder, **how: [read.append(folder), original(folder, **how)][1])
    os.utime(copy / "manifest.json", ns=(1, 1))
    for _ in range(2):
        loaded(base)
        assert load.checksums_loaded(Model(base=str(base)), KINDS["nf4"], plan_for(KINDS["nf4"])) is not None
    assert (copy / "manifest.json").stat().st_mtime_ns > 1  # and it was noted each time that it was used
    assert read == [copy]


def test_a_manifest_that_says_something_else_is_read_again_whatever_its_time(base: Path) -> None:
    loaded(base)
    (copy,) = copies()
    assert as_made.damage_of(copy, whole=True) is None
    file = copy / "manifest.json"
    time, text = file.stat().st_mtime_ns, file.read_text()
    place = text.index('"sha256": "') + len('"sha256": "')
    file.write_text(text[:place] + ("0" if text[place] != "0" else "1") + text[place + 1 :])
    os.utime(file, ns=(time, time))
    assert as_made.damage_of(copy, whole=True) is not None
