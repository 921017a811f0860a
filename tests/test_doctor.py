"""`qtune doctor`: what is here, what is chosen and why; each obstacle is named with the way around it."""

import importlib.metadata
import json
import re
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from qtune import __version__, doctor
from qtune.device.cards import card_named
from qtune.device.present import Device, present_device
from qtune.device.rates import changed_since, data_sheet_rates, source_in_words
from qtune.diagnosis import Diagnosis, has_problems, to_json, version_finding
from qtune.doctor import (
    choice_findings,
    device_findings,
    disk_findings,
    environment_findings,
    examine,
    kernel_findings,
    product_findings,
    quantization_findings,
    rate_findings,
    unless_full,
)
from qtune.kernels.comparison import COMPARED
from qtune.screens.doctor import show
from qtune.timing.known import beside_here, keep_rates, known_rates, measured_otherwise

GIB = 2**30
Usage = namedtuple("Usage", ["total", "used", "free"])
AMPERE = Device("cuda", "NVIDIA GeForce RTX 3060", 12 * GIB, 11 * GIB, bf16=True, capability=(8, 6))
TURING = Device("cuda", "Tesla T4", 15 * GIB, 14 * GIB, bf16=False, capability=(7, 5))
OLD_CPU = Device("cpu", "CPU, 2 threads", 16 * GIB, 8 * GIB, bf16=False)
NEW_CPU = Device("cpu", "CPU, 32 threads", 64 * GIB, 60 * GIB, bf16=True)


def values(findings) -> dict[str, str]:
    return {finding.name: finding.value for finding in findings}


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        (AMPERE, "bfloat16", "NVIDIA GeForce RTX 3060 has bfloat16 products in hardware"),
        (TURING, "float16", "Tesla T4 has no bfloat16 products; float16 with loss scaling"),
        (OLD_CPU, "float32", "bfloat16 products were measured to be no faster on this processor"),
        (NEW_CPU, "bfloat16", "its products were measured to be faster than float32's on this processor"),
    ],
)
def test_the_compute_dtype_follows_the_device_and_has_a_reason(device, dtype, reason):
    value = values(choice_findings(device))["quantization.compute_dtype"]
    assert value == f"{dtype}: {reason}"


def test_every_choice_that_a_recipe_leaves_open_is_explained():
    assert set(values(choice_findings(AMPERE))) == {
        "quantization.compute_dtype",
        "adapter.dtype",
        "model.attention",
        "training.optimizer",
        "training.gradient_checkpointing",
        "training.lean_step",
    }


def test_a_card_is_shown_with_its_memory_and_capability():
    found = values(device_findings(AMPERE, "12.8", nvidia_is_here=True))
    assert found["cuda:0"] == "NVIDIA GeForce RTX 3060, 11.0 of 12.0 GiB free"
    assert found["CUDA"] == "12.8, compute capability 8.6"


@pytest.mark.parametrize(
    ("cuda", "reason"), [(None, "this torch is built without CUDA"), ("13.0", "torch's CUDA 13.0 does not start")]
)
def test_a_card_that_torch_cannot_use_is_a_problem_with_a_way_out(cuda, reason):
    _, finding = device_findings(OLD_CPU, cuda, nvidia_is_here=True)
    assert finding.verdict == "problem"
    assert reason in finding.value
    assert "pytorch.org" in finding.advice


def test_no_card_at_all_is_only_a_note():
    _, finding = device_findings(OLD_CPU, None, nvidia_is_here=False)
    assert (finding.verdict, finding.value) == ("note", "none")


def test_nf4_really_works_here_with_the_error_of_its_code_book():
    """Between -1 and its neighbour -0.6962 (QLoRA, appendix E) the worst value is off by half the gap."""
    (finding,) = quantization_findings(present_device())
    said = r"largest error ([\d.]+) of a block's largest weight, where 4 bits allow at most ([\d.]+)"
    found = re.fullmatch(f"quantizes and dequantizes as it should, {said}", finding.value)
    assert found is not None, finding.value
    error, most = map(float, found.groups())
    assert finding.verdict == "ok"
    assert error == pytest.approx((1 - 0.6962) / 2, abs=0.01)
    assert most == pytest.approx((1 - 0.6962) / 2, abs=0.01)


def test_bitsandbytes_that_fails_is_a_problem(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no kernel image is available\nmore")

    monkeypatch.setattr(doctor.bitsandbytes.functional, "quantize_4bit", broken)
    (finding,) = quantization_findings(OLD_CPU)
    assert (finding.verdict, finding.value) == ("problem", "no kernel image is available")


def test_bitsandbytes_that_fails_without_a_word_is_a_problem_too(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError

    monkeypatch.setattr(doctor.bitsandbytes.functional, "quantize_4bit", broken)
    (finding,) = quantization_findings(OLD_CPU)
    assert (finding.verdict, finding.value) == ("problem", "RuntimeError")


@pytest.mark.parametrize("wrong_width", [64, 96])
def test_bitsandbytes_that_computes_wrongly_is_a_problem_whatever_width_it_is_wrong_at(wrong_width, monkeypatch):
    right = doctor.bitsandbytes.functional.dequantize_4bit

    def wrong(codes, state):
        found = right(codes, state)
        return -found if state.shape[-1] == wrong_width else found

    monkeypatch.setattr(doctor.bitsandbytes.functional, "dequantize_4bit", wrong)
    first, *_ = quantization_findings(OLD_CPU)
    assert first.verdict == "problem"
    assert re.fullmatch(r"wrong by [\d.]+ of a block's largest weight, where 4 bits allow at most 0\.16", first.value)


def test_a_trap_of_bitsandbytes_is_a_problem_by_its_name(monkeypatch):
    monkeypatch.setattr(doctor, "wrong_kernels", lambda: ["inference packing: it repacks (bitsandbytes#2078)"])
    _, finding = quantization_findings(OLD_CPU)
    assert (finding.name, finding.verdict) == ("bitsandbytes", "problem")
    assert finding.value == "inference packing: it repacks (bitsandbytes#2078)"


def test_kernels_that_a_card_cannot_use_are_named_with_the_reason(monkeypatch):
    assert list(kernel_findings(Device("cpu", "CPU, 2 threads", 1, 1, True))) == []
    monkeypatch.setattr(doctor, "without_kernels", dict)
    [fine] = kernel_findings(AMPERE)
    assert (fine.verdict, fine.value) == ("ok", f"all {len(COMPARED)} of Triton's give what PyTorch's operations give")
    no_compiler = "Failed to find C compiler"
    monkeypatch.setattr(doctor, "without_kernels", lambda: dict.fromkeys(COMPARED, no_compiler))
    [alike] = kernel_findings(AMPERE)
    assert alike.verdict == "note"
    assert alike.value == f"PyTorch's operations stand in for all {len(COMPARED)}: {no_compiler}"
    assert "C compiler" in alike.advice
    first, second, third, *_ = COMPARED
    differ = "differs by 1.0e-02 in float16"
    monkeypatch.setattr(doctor, "without_kernels", lambda: {first: differ, second: no_compiler, third: differ})
    assert [one.value.partition(" for ")[2] for one in kernel_findings(AMPERE)] == [
        f"{first}, {third}: {differ}",
        f"{second}: {no_compiler}",
    ]


def test_the_speed_of_products_is_shown_forward_and_backward_for_each_dtype():
    found = {finding.name: finding.value for finding in product_findings(present_device())}
    assert set(found) == {"float32 products", "bfloat16 products"}
    speed = r"[\d,.]+ GFLOP/s"
    assert all(re.fullmatch(f"{speed} forward, {speed} backward", value) for value in found.values())


def measured(**given):
    beside = {"torch": "2.11.0", "bitsandbytes": "0.50.2", "processor": "AMD EPYC 7763"}
    return replace(
        data_sheet_rates(card_named("H100")),
        **{"kind": "measured", "source": "CPU, 2 threads: measured by qtune doctor", "beside": beside, **given},
    )


def test_rates_of_a_data_sheet_or_of_the_same_versions_are_as_good_as_new():
    here = {"torch": "2.11.0", "bitsandbytes": "0.50.2", "processor": "AMD EPYC 7763"}
    sheet = data_sheet_rates(card_named("H100"))
    for rates in (sheet, measured()):
        first, *_ = rate_findings(rates, here)
        assert first == Diagnosis("rates", "from", rates.source)
        assert source_in_words(rates, here) == rates.source


def test_rates_that_were_measured_under_other_versions_or_on_another_processor_say_so_wherever_they_are_used():
    here = {"torch": "2.13.0", "bitsandbytes": "0.50.2", "processor": "AMD EPYC 9R14"}
    changed = "since then torch was 2.11.0, is 2.13.0; processor was AMD EPYC 7763, is AMD EPYC 9R14"
    first, *_ = rate_findings(measured(), here)
    assert first.verdict == "note"
    assert first.value == f"CPU, 2 threads: measured by qtune doctor; {changed}"
    assert first.advice == "qtune doctor --measure measures again"
    assert source_in_words(measured(), here) == (
        f"CPU, 2 threads: measured by qtune doctor ({changed}; qtune doctor --measure measures again)"
    )


def test_rates_that_an_older_version_kept_without_versions_are_not_taken_for_new():
    first, *_ = rate_findings(measured(beside={}), {"torch": "2.13.0"})
    assert (first.verdict, first.advice) == ("note", "qtune doctor --measure measures again")


def test_rates_of_this_computer_are_measured_with_what_is_looked_for_later(tmp_path, monkeypatch):
    monkeypatch.setenv("QTUNE_CACHE", str(tmp_path))
    keep_rates(OLD_CPU, measured(beside=beside_here()))
    kept = known_rates(OLD_CPU)
    assert changed_since(kept, beside_here()) is None
    assert beside_here()["torch"] == torch.__version__


def test_what_was_measured_with_another_number_of_threads_is_named_and_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("QTUNE_CACHE", str(tmp_path))
    keep_rates(OLD_CPU, measured())
    assert measured_otherwise(OLD_CPU) == []
    assert known_rates(NEW_CPU) is None
    [note] = rate_findings(None, {}, measured_otherwise(NEW_CPU))
    assert note.value == "not predicted, for there is only CPU, 2 threads: measured by qtune doctor"
    assert note.advice == "qtune doctor --measure finds out how fast this device is"


@pytest.mark.parametrize(("own", "unit"), [(True, "GFLOP/s"), (False, "TFLOP/s")])
def test_speeds_of_products_have_one_unit_on_a_device(own, unit):
    shown = " ".join(one.value for one in rate_findings(measured(is_own_processor=own), {}))
    assert set(re.findall(r"\w+FLOP/s", shown)) == {unit}
    assert shown.count(unit) == 4


def test_a_library_within_its_bounds_is_fine_and_another_version_is_a_note():
    found = importlib.metadata.version("torch")
    assert version_finding(Requirement("torch>=2")) == Diagnosis("versions", "torch", found)
    outside = version_finding(Requirement("torch<2"))
    assert (outside.verdict, outside.value) == ("note", f"{found}, tested: <2")
    assert outside.advice == "pip install 'torch<2'"


def test_a_missing_library_is_a_problem():
    finding = version_finding(Requirement("no-such-library>=1"))
    assert (finding.verdict, finding.value) == ("problem", "not installed")


def test_free_space_is_that_of_the_disk_where_the_folder_would_be(tmp_path, monkeypatch):
    monkeypatch.setenv("QTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: Usage(0, 0, 30 * GIB if path == tmp_path else 0))
    found = values(disk_findings({"runs": tmp_path / "not" / "yet"}))
    assert found["runs"] == f"{tmp_path / 'not' / 'yet'}, 30.0 GiB free"
    assert found["builtin:smollm2-135m-instruct"] == "not fetched yet, 89 MiB to download"


def test_little_space_is_a_note(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: Usage(0, 0, 3 * GIB))
    finding = next(iter(disk_findings({"runs": tmp_path})))
    assert (finding.verdict, finding.value) == ("note", f"{tmp_path}, 3.0 GiB free")


def test_a_folder_that_cannot_be_written_is_a_problem(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    finding = next(iter(disk_findings({"runs": tmp_path})))
    assert (finding.verdict, finding.value) == ("problem", f"{tmp_path} cannot be written")


def test_an_offline_hub_and_a_missing_token_are_notes(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    found = {one.name: one for one in environment_findings({"HF_HUB_OFFLINE": "1"})}
    assert found["HF_HUB_OFFLINE"].verdict == "note"
    assert (found["token"].verdict, found["token"].value) == ("note", "none")
    online = {one.name: one for one in environment_findings({"HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_secret"})}
    assert "HF_HUB_OFFLINE" not in online
    assert (online["token"].verdict, online["token"].value) == ("ok", "present")


@pytest.mark.parametrize(("found", "verdict"), [("/usr/bin/ollama", "ok"), (None, "note")])
def test_a_program_that_is_not_there_has_no_tick(found, verdict, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: found)
    ollama = next(one for one in environment_findings({}) if one.name == "ollama")
    assert (ollama.verdict, ollama.value) == (verdict, found or "not installed")


def test_the_examination_of_this_computer_is_complete_and_json(tmp_path):
    findings = examine(tmp_path)
    assert {finding.topic for finding in findings} == {
        *("versions", "device", "choices", "rates", "disk", "hub", "export"),
    }
    assert json.loads(json.dumps(to_json(findings)))[0] == {
        "topic": "versions",
        "name": "qtune",
        "value": __version__,
        "verdict": "ok",
        "advice": "",
    }


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_card_of_this_computer_is_found():
    assert values(device_findings(present_device(), torch.version.cuda, nvidia_is_here=True))["cuda:0"].startswith(
        torch.cuda.get_device_name(0)
    )


def test_the_screen_marks_every_finding_and_counts_the_problems(capsys):
    findings = [
        Diagnosis("device", "cpu", "CPU"),
        Diagnosis("device", "card", "none", "note", "small models only"),
        Diagnosis("disk", "runs", "full", "problem", "make room"),
    ]
    show(findings)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "   device",
        "✓  cpu     CPU",
        "•  card    none (small models only)",
        "",
        "   disk",
        "✗  runs  full (make room)",
        "",
        "1 problem",
    ]
    assert has_problems(findings)
    assert not has_problems(findings[:2])


def test_paths_are_made_from_the_users_settings(monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", "/somewhere/hub")
    assert doctor._hub_cache() == Path("/somewhere/hub")


@pytest.mark.slow
def test_the_command_prints_json_and_ends_well():
    command_line = [sys.executable, "-m", "qtune", "doctor", "--json"]
    done = subprocess.run(command_line, capture_output=True, text=True, check=False)
    findings = json.loads(done.stdout)
    assert {"versions", "device", "disk"} <= {one["topic"] for one in findings}
    assert done.returncode == any(one["verdict"] == "problem" for one in findings)


def test_memory_that_runs_out_is_a_note_and_any_other_failure_is_not():
    def findings(error):
        yield Diagnosis("choices", "float32 products", "fast")
        raise error

    first, note = unless_full("choices", "products", findings(torch.OutOfMemoryError("CUDA out of memory")))
    assert (first.verdict, note.verdict, note.name) == ("ok", "note", "products")
    with pytest.raises(RuntimeError, match="another"):
        list(unless_full("choices", "products", findings(RuntimeError("another"))))


def test_a_full_card_is_no_broken_build_of_bitsandbytes(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("qtune.doctor._four_bit_error", full)
    [note] = unless_full("device", "NF4", quantization_findings(present_device()))
    assert note.verdict == "note"
