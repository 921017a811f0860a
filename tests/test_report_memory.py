"""The report's part on memory: predicted beside measured, one step drawn, what was saved; and where that comes from."""

import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import run_qtune
from test_memory_trace import CARD, recipe_with, tiny
from test_report_page import MEASURED, Page

from qtune.device.cards import SIZES, fitting_cards
from qtune.memory import cached as cache
from qtune.memory.forecast import Forecast
from qtune.memory.longest import Rows
from qtune.memory.measured.failure_text import failure_text
from qtune.memory.predict import Longest, Prediction, predict, summarize
from qtune.memory.profile import is_traced, trace_run
from qtune.plan import make_plan
from qtune.recipe.file import load_recipe
from qtune.records import record_of
from qtune.report.html import joined
from qtune.report.memory import _savings, memory
from qtune.report.page import trace_memory, write_report
from qtune.run.folder import RunDir
from qtune.run.lock import LockedDevice, read_lock, write_lock
from qtune.run.memory import RunMemory, read_memory
from qtune.sizes import GIB, saving_text, size_text
from qtune.training import train


@pytest.fixture(scope="module")
def prediction() -> Prediction:
    recipe = recipe_with()
    return summarize(predict(tiny(layers=2), recipe, make_plan(recipe, CARD)))


@pytest.fixture(scope="module")
def traced(prediction: Prediction) -> dict[str, Any]:
    """memory.json's prediction for a batch of 2 x 97 tokens."""
    batch = {"rows": 2, "length": 97, "is_measured": True}
    found = {"device": "a card", "batch": batch, "needed_bytes": prediction.need.total_bytes, **asdict(prediction)}
    return json.loads(json.dumps(found))


def measured_on(device: str, **phases: dict[str, float]) -> dict[str, Any]:
    return {"device": device, "method": "told", "peak_bytes": 0, "static": {}, "phases": phases, "largest_batch": {}}


def drawn(found: dict[str, Any]) -> Page:
    return Page(memory(record_of(RunMemory, found), "runs/mine"))


def cells_after(page: Page, name: str, count: int) -> list[str]:
    cells = page.texts["td"]
    return cells[cells.index(name) + 1 : cells.index(name) + 1 + count]


def test_sizes_are_readable() -> None:
    assert [size_text(count) for count in (3 << 30, 50 << 20, 3072)] == ["3.00 GiB", "50.0 MiB", "3.0 KiB"]


def test_each_phase_has_predicted_measured_and_error(traced) -> None:
    expected = traced["by_phase"]["forward"]["bytes"]
    seen = round(expected / 1.25)
    phase = {"seconds": 1.5, "allocated_peak_bytes": seen, "reserved_peak_bytes": 2 * seen}
    page = drawn({"measured": measured_on("a card", forward=phase), "traced": traced})
    assert cells_after(page, "forward", 5) == [
        "1.5",
        size_text(expected),
        size_text(seen),
        "+25.0%",
        size_text(2 * seen),
    ]
    assert page.texts["th"][:6] == [
        "phase", "seconds", "allocated, predicted", "allocated, measured", "error", "reserved, peak",
    ]  # fmt: skip
    assert (
        "Predicted: the same step on tensors without storage, for the largest batch that was measured, 2 x 97"
        in page.text
    )


def part(*, seconds: float, peak: int, device: str = "a card", **idle: float) -> dict[str, Any]:
    beside = {"idle": {"seconds": idle["idle"], "allocated_peak_bytes": 1}} if idle else {}
    forward = {"seconds": seconds, "allocated_peak_bytes": peak, "reserved_peak_bytes": 2 * peak}
    return measured_on(device, forward=forward, **beside)


def test_of_a_resumed_run_time_is_that_of_all_parts_and_peaks_are_the_highest(traced) -> None:
    expected = traced["by_phase"]["forward"]["bytes"]
    last, first = part(seconds=1.5, peak=expected), part(seconds=20.0, peak=3 * expected, idle=4.0)
    elsewhere = part(seconds=100.0, peak=9 * expected, device="another card")
    page = Page(memory(RunMemory(measured=last, traced=traced, earlier=(first, elsewhere)), "runs/mine", resumed=2))
    size, most = size_text(expected), size_text(3 * expected)
    assert page.texts["th"][:7] == [
        "phase", "seconds, all parts", "allocated, predicted", "allocated, measured, last part", "error",
        "allocated, highest of all parts", "reserved, peak",
    ]  # fmt: skip
    assert cells_after(page, "forward", 6) == ["121.5", size, size, "+0.0%", most, size_text(6 * expected)]
    assert cells_after(page, "between steps", 1) == ["4.0"]
    assert "The run was trained in 3 parts. Seconds are added up over all parts, with those of steps that " in page.text
    assert "Between steps: rows are read, records written, sample answers given" in page.text


def test_a_part_that_has_left_no_figures_is_said(traced) -> None:
    record = RunMemory(measured=part(seconds=1.5, peak=100), traced=traced)
    said = Page(memory(record, "runs/mine", resumed=1)).text
    assert "The run was trained in 2 parts, and 1 of them has left figures. What stands here is of it." in said
    assert "parts" not in Page(memory(record, "runs/mine")).text
    unmeasured = RunMemory(predicted=None)
    assert "parts" not in Page(memory(unmeasured, "runs/mine", resumed=1)).text


def test_on_a_cpu_tensors_are_compared_and_what_was_not_measured_is_left_out(traced) -> None:
    page = drawn({"measured": MEASURED, "traced": traced})
    assert {"tensors, predicted", "tensors, measured"} <= set(page.texts["th"])
    assert not {"reserved, peak", "process, peak", "fits cards of"} & set(page.texts["th"])
    assert cells_after(page, "eval", 4)[2:] == ["–", ""]


def test_what_is_alive_at_the_peak_stands_side_by_side(traced) -> None:
    page = drawn({"measured": MEASURED, "traced": traced})
    peak = traced["peak"]
    where = f"{peak['phase']} in {peak['module']}" if peak["module"] else peak["phase"]
    assert (
        f"The highest moment: 3.00 GiB measured (forward in loss), {size_text(peak['bytes'])} predicted ({where})"
        in (page.texts["h3"])
    )
    alive = dict.fromkeys([*peak["alive"], *MEASURED["at_peak"]["alive"]])
    for name in alive:
        one, other = (moment["alive"].get(name) for moment in (MEASURED["at_peak"], peak))
        assert cells_after(page, name, 2) == [size_text(one) if one else "–", size_text(other) if other else "–"]


def test_a_step_is_drawn_inside_the_page(traced) -> None:
    text = memory(RunMemory(measured=MEASURED, traced=traced), "runs/mine")
    page = Page(text)
    living = [name for name, values in traced["timeline"].items() if any(values)]
    assert len(page.texts["polygon"]) == len(living) > 5
    assert {"forward", "backward", "optimizer", "eval"} <= set(page.texts["text"])
    assert "xmlns" not in text


def test_what_was_predicted_before_a_run_is_shown_as_that(prediction) -> None:
    recipe = recipe_with()
    forecast = Forecast(make_plan(recipe, CARD), Rows(Longest(128), "told"), prediction, 24 * GIB)
    page = drawn({"measured": measured_on("a card"), "predicted": json.loads(json.dumps(forecast.to_json()))})
    assert "Predicted before the run for the largest batch that could come, 2 x 128 tokens" in page.text
    assert "qtune report runs/mine predicts for the batch that was measured" in page.text
    assert len(page.texts["polygon"]) > 5


def test_a_run_without_a_prediction_says_how_to_get_one() -> None:
    page = drawn({"measured": MEASURED})
    assert "Nothing is predicted here yet: qtune report runs/mine traces the step that was measured." in page.text
    assert "svg" in page.names  # the bars
    assert "polygon" not in page.names
    assert not {"error", "tensors, predicted", "allocated, predicted"} & set(page.texts["th"])
    forward = {"seconds": 1.5, "allocated_peak_bytes": GIB, "reserved_peak_bytes": 2 * GIB}
    page = drawn({"measured": measured_on("a card", forward=forward)})
    assert page.texts["th"][:4] == ["phase", "seconds", "allocated, measured", "reserved, peak"]
    assert cells_after(page, "forward", 3) == ["1.5", size_text(GIB), size_text(2 * GIB)]


def way(name: str, peak: int, needed: int = 0) -> dict[str, Any]:
    return {"name": name, "how": "traced: as said", "peak_bytes": peak, "needed_bytes": needed or peak}


def test_savings_are_shares_of_full_fine_tuning_and_name_cards_on_a_card_only(traced) -> None:
    peak = traced["peak"]["bytes"]
    ways = [way("full", 8 * peak, 21 * GIB), way("plain script", 2 * peak, 90 * GIB)]
    page = drawn({"measured": measured_on("a card"), "traced": traced, "ways": ways})
    assert cells_after(page, "full", 5) == [size_text(8 * peak), "100%", "88%", "24 GB and more", "as said"]
    assert cells_after(page, "plain script", 5) == [size_text(2 * peak), "25%", "50%", "none up to 80 GB", "as said"]
    assert cells_after(page, "this run", 5) == [size_text(peak), "12%", "", "6 GB and more", ""]
    on_cpu = drawn({"measured": MEASURED, "traced": traced, "ways": ways})
    assert cells_after(on_cpu, "full", 4) == [size_text(8 * peak), "100%", "88%", "as said"]


def test_a_card_fits_when_what_is_needed_is_at_most_its_memory() -> None:
    assert fitting_cards(8 * GIB, SIZES) == "8 GB and more"
    assert fitting_cards(8 * GIB + 1, SIZES) == "10 GB and more"
    assert fitting_cards(80 * GIB + 1, SIZES) == "none up to 80 GB"


def test_techniques_come_in_the_order_of_what_they_save_and_one_may_cost(traced) -> None:
    peak = traced["peak"]["bytes"]
    attribution = [way("costly", peak - (5 << 20)), way("much", peak + (2 << 30)), way("little", peak + (1 << 20))]
    page = drawn({"measured": MEASURED, "traced": traced, "attribution": attribution})
    assert cells_after(page, "much", 3) == ["2.00 GiB", size_text(peak + (2 << 30)), "as said"]
    assert cells_after(page, "costly", 1) == ["costs 5.0 MiB"]
    cells = page.texts["td"]
    assert cells.index("much") < cells.index("little") < cells.index("costly")
    assert (saving_text(3, 1), saving_text(1, 3)) == ("2 B", "costs 2 B")


def test_memory_that_ran_out_is_told_as_the_command_told_it() -> None:
    failure = {
        "phase": "backward", "step": 3, "batch": None, "said": "no <b>room</b>", "alive": {}, "counted": "not known",
        "predicted": None, "available_bytes": GIB, "device": "a card", "free_bytes": 0, "total_bytes": GIB,
        "own_bytes": GIB, "others": [], "offers": [], "least_bytes": 0, "untraced": "", "saved": None, "run": "mine",
    }  # fmt: skip
    page = drawn({"measured": MEASURED, "failure": failure})
    assert page.texts["pre"] == [failure_text(failure)]
    assert "memory ran out in the backward pass of step 3: no <b>room</b>" in page.texts["pre"][0]


@pytest.fixture(scope="module")
def a_run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> RunDir:
    """Two steps of the tiny model on the CPU, with rows of like length: the second has the optimizer's state too."""
    folder = tmp_path_factory.mktemp("run")
    rows = [
        {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"It is {n}, I say."}]}
        for n in range(10, 34)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = folder / "mine.toml"
    recipe.write_text(
        f'[model]\nbase = "{tiny_model}"\n[quantization]\nminimum_share = 0.0\n[data]\ntrain = "rows.jsonl"\n'
        "max_length = 128\nvalidation = 0.2\n[training]\nsteps = 2\nbatch_size = 2\nmicro_batch_size = 2\n"
        "[memory]\nkeep_dequantized = false\n"  # "auto" asks how much memory is free
        f'[output]\ndirectory = "{folder / "runs"}"\n'
    )
    return train.run(load_recipe(recipe))


def copy_of(run_dir: RunDir, folder: Path, name: str = "run") -> RunDir:
    shutil.copytree(run_dir.path, folder / name)
    return RunDir.open(folder / name)


@pytest.mark.slow
def test_a_run_on_a_cpu_is_traced_when_its_report_is_asked_for_and_only_once(a_run, tmp_path, monkeypatch) -> None:
    assert set(json.loads(a_run.memory_file.read_text())) == {"measured", "run_id", "crc32"}
    run_dir = copy_of(a_run, tmp_path)
    assert not is_traced(run_dir)
    trace_memory(run_dir)
    known = json.loads(run_dir.memory_file.read_text())
    assert known["measured"] == json.loads(a_run.memory_file.read_text())["measured"]
    for phase in ("forward", "backward", "optimizer"):
        seen = known["measured"]["phases"][phase]["tensor_peak_bytes"]
        assert known["traced"]["by_phase"][phase]["bytes"] == pytest.approx(seen, rel=0.05), phase
    assert "attribution" not in known  # what each technique saves is traced where it is asked for
    names = [way["name"] for way in known["ways"]]
    assert len(names) == len(set(names)) == 5
    assert any(name.startswith("TRL") for name in names)
    assert is_traced(run_dir)
    monkeypatch.setattr("qtune.memory.profile.trace_run", lambda *_, **__: pytest.fail("it is known"))
    trace_memory(run_dir)
    text = Page(write_report(run_dir).read_text(encoding="utf-8")).text
    assert "for the largest batch that was measured, 2 x" in text
    assert "full fine-tuning, fp32" in Page(run_dir.report.read_text(encoding="utf-8")).texts["td"]


def test_a_way_that_takes_less_than_the_run_is_no_negative_saving_and_is_explained() -> None:
    ways = [
        {"name": name, "peak_bytes": gib * 2**30, "needed_bytes": gib * 2**30, "how": "traced: so"}
        for name, gib in (("full fine-tuning", 9), ("TRL 1", 1))
    ]
    traced = {"peak": {"bytes": 2 * 2**30}, "needed_bytes": 2 * 2**30}
    shown = str(joined(_savings(ways, traced, ("false", "true"), is_card=False)))
    assert "78%" in shown
    assert "takes less" in shown
    assert "-100%" not in shown
    assert "TRL 1: computes every layer twice and reads frozen weights back for every product" in shown
    assert "for there is room" not in str(joined(_savings(ways, traced, (None, None), is_card=False)))


@pytest.mark.slow
def test_what_each_technique_saves_is_in_the_report_once_a_profile_has_explained_it(a_run, tmp_path) -> None:
    run_dir = copy_of(a_run, tmp_path)
    trace_run(run_dir, savings=False, explain=True)
    techniques = {one["name"] for one in json.loads(run_dir.memory_file.read_text())["attribution"]}
    assert techniques == {"nf4 weights", "double quantization", "lean step", "layers that keep all", "tiled loss"}
    assert "double quantization" in Page(write_report(run_dir).read_text(encoding="utf-8")).texts["td"]


@pytest.mark.slow
def test_what_was_traced_once_comes_from_the_cache(a_run, tmp_path, monkeypatch) -> None:
    first = trace_run(copy_of(a_run, tmp_path), explain=True)
    monkeypatch.setattr(cache, "predict", lambda *_: pytest.fail("traced again"))
    monkeypatch.setattr("qtune.memory.savings.trace", lambda *_, **__: pytest.fail("traced again"))
    assert trace_run(RunDir.open(tmp_path / "run"), explain=True) == first


@pytest.mark.slow
def test_a_profile_of_a_run_redraws_its_report_and_can_draw_its_timeline(a_run, tmp_path) -> None:
    run_dir, picture = copy_of(a_run, tmp_path), tmp_path / "step.svg"
    write_report(run_dir)
    assert "Nothing is predicted here yet" in run_dir.report.read_text(encoding="utf-8")
    done = run_qtune("profile", run_dir.path, "--no-savings", "--timeline", picture)
    assert done.returncode == 0, done.stderr
    assert re.match(r"✓  fits\?  Fits: the process took .* at the peak", done.stdout)
    assert re.search(r"^took \d+:\d\d for \d+ of \d+ steps$", done.stdout, re.MULTILINE)
    assert "<polygon" in run_dir.report.read_text(encoding="utf-8")
    assert picture.read_text(encoding="utf-8").startswith("<svg ")


@pytest.mark.slow
def test_a_profile_can_be_had_as_json_of_a_run_and_of_a_recipe(a_run, tmp_path) -> None:
    run_dir = copy_of(a_run, tmp_path)
    done = run_qtune("profile", run_dir.path, "--no-savings", "--json")
    assert done.returncode == 0, done.stderr
    found, kept = json.loads(done.stdout), read_memory(run_dir)
    assert kept is not None
    assert (found["run"], found["fits"], found["standing"]) == (str(run_dir.path), "Fits", "good")
    assert found["memory"]["measured"]["peak_bytes"] == kept.measured["peak_bytes"]
    assert found["memory"]["traced"]["needed_bytes"] == kept.traced["needed_bytes"]
    assert "timeline" not in found["memory"]["traced"]
    of_recipe = run_qtune("profile", run_dir.recipe_file, "--json", "--vram=1GiB", "--length=64")
    assert of_recipe.returncode == 0, of_recipe.stderr
    found = json.loads(of_recipe.stdout)
    assert found["memory"]["needed_bytes"] > 0
    assert "this recipe" in {way["name"] for way in found["ways"]}
    assert (found["attribution"], found["ways_to_fit"] is None) == ([], found["memory"]["fits"])


def test_a_run_is_not_planned_anew(a_run) -> None:
    done = run_qtune("profile", a_run.path, "--gpu=T4", "--length=9", "--set=training.steps=1")
    assert done.returncode == 2
    assert "--set, --gpu, --length: a run is compared with its own step" in " ".join(done.stderr.split())


def test_a_run_on_a_card_is_traced_for_that_card_wherever_it_is_read(a_run, tmp_path) -> None:
    run_dir = copy_of(a_run, tmp_path)
    lock = read_lock(run_dir)
    assert lock is not None
    assert lock.device.kind == "cpu"
    write_lock(run_dir, replace(lock, device=LockedDevice("a card", "cuda", 8 * GIB, True, (8, 6))))
    here = trace_run(copy_of(a_run, tmp_path, "here"), savings=False).prediction
    there = trace_run(run_dir, savings=False).prediction
    assert here is not None
    assert there is not None
    assert there.by_phase != here.by_phase
    assert json.loads(run_dir.memory_file.read_text())["traced"]["device"] == "a card"


def test_a_base_model_that_is_gone_is_said_and_the_report_is_written_all_the_same(a_run, tmp_path, capsys) -> None:
    run_dir = copy_of(a_run, tmp_path)
    text = run_dir.resolved_file.read_text()
    base = next(line for line in text.splitlines() if line.startswith("base = "))
    run_dir.write_text(run_dir.resolved_file, text.replace(base, f'base = "{tmp_path / "gone"}"'))
    trace_memory(run_dir)
    assert "memory is not predicted: " in capsys.readouterr().err
    assert "Nothing is predicted here yet" in write_report(run_dir).read_text(encoding="utf-8")


def test_a_run_that_has_only_begun_has_nothing_to_trace(tmp_path) -> None:
    run_dir = RunDir.create(tmp_path, "begun", "")
    assert is_traced(run_dir)
    trace_memory(run_dir)
    assert not run_dir.memory_file.exists()
