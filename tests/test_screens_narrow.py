"""What stands in tables, and tables in a terminal that is too narrow: on their side or in lines, no word broken."""

import io
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console, RenderableType

from qtune.console import on_its_side, table
from qtune.device.cards import described
from qtune.device.present import Device
from qtune.plan import why_others_take_less
from qtune.run.listing import ListedRun
from qtune.screens.listing import draw_runs
from qtune.screens.memory import _of_it, _why_others_take_less
from qtune.sizes import GIB

HEAD = [
    "run",
    "adapter",
    "trained",
    "runs",
    "loss, nats",
    "loss against the first",
    "ROUGE-L",
    "forgotten, nats",
    "time",
]
ROWS = [
    ["base", "", "", "", "4.157", "", "12.0 %", "0 of 3.808", ""],
    ["recipe", "lora", "4.884 M", "1", "1.159 (0.786 to 1.575)", "", "46.1 (37.4 to 55.7)", "-0.058", "1:13"],
    [
        "other",
        "p-tuning",
        "4.884 M",
        "1",
        "3.792 (3.381 to 4.258)",
        "+2.633 (+2.278 to +3.006)",
        "11.5",
        "-0.01",
        "0:17",
    ],
]
SMOL = "builtin:smollm2-135m-instruct"
STOPPED = "stopped, 9 of 500 steps, 5 saved"
RUNS = [
    ListedRun("tickets", "finished, 30 steps", SMOL, "lora", 4.069, 1.456, 1.1589, 2**28, 0.0, None),
    ListedRun("soft", STOPPED, "org/base", "prompt-tuning", 4.0, 3.9, None, 2**20, 3600.0, "qtune x"),
]


def lines_of(drawn: RenderableType, width: int) -> list[str]:
    screen = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    screen.print(drawn)
    assert isinstance(screen.file, io.StringIO)
    return [line.rstrip() for line in screen.file.getvalue().splitlines()]


def test_a_comparison_stands_on_its_side_where_its_line_is_too_long() -> None:
    wide, narrow = (lines_of(on_its_side("rows", HEAD, ROWS, right=range(2, len(HEAD))), width) for width in (170, 80))
    assert wide[1].split()[:2] == ["run", "adapter"]
    assert narrow[1].split() == ["run", "base", "recipe", "other"]
    for cell in (*HEAD, *(cell for row in ROWS for cell in row)):
        assert any(cell in line for line in wide)
        assert all(any(word in line.split() for line in narrow) for word in cell.split())
    assert max(map(len, narrow)) <= 80


@pytest.mark.parametrize("width", [60, 80, 140])
def test_runs_that_have_no_room_beside_each_other_go_on_below(width: int) -> None:
    """No word is broken, and every run stands in one place with all of its figures."""
    rows = [ROWS[0], *([f"recipe-{number}, seeds 1, 2 and 3", *row[1:]] for number in range(6) for row in ROWS[1:])]
    lines = lines_of(on_its_side("rows", HEAD, rows, right=range(2, len(HEAD))), width)
    assert max(map(len, lines)) <= width
    assert all(any(word in line.split() for line in lines) for row in rows for cell in row for word in cell.split())
    heads = [line for line in lines if line.split()[:1] == ["run"]]
    assert 1 < len(heads) <= math.ceil(len(rows) / {60: 2, 80: 4, 140: 8}[width])
    assert [line.split()[:1] for line in lines].count(["time"]) == len(heads)
    assert sum(len(line.split()) - 1 for line in lines if line.split()[:1] == ["runs"]) == len(rows) - 1
    assert [line for line in lines if "rows" in line] == ["rows"]


@pytest.mark.parametrize("width", [60, 80])
def test_runs_that_are_too_wide_for_a_table_are_a_few_lines_each(width: int) -> None:
    lines = lines_of(draw_runs(RUNS, Path("runs"), 3600.0), width)
    assert lines == [
        "Runs in runs",
        "tickets: finished, 30 steps",
        "  lora on builtin:smollm2-135m-instruct",
        "  training loss 4.07 -> 1.46, best validation 1.1589",
        "  0.25 GiB, 1 h old",
        "soft: stopped, 9 of 500 steps, 5 saved",
        "  prompt-tuning on org/base",
        "  training loss 4.00 -> 3.90",
        "  1.0 MiB, now",
        "go on with soft: qtune x",
    ]
    one_base = [replace(run, base="org/base") for run in RUNS]
    told = lines_of(draw_runs(one_base, Path("runs"), 3600.0), width)
    assert told[:3] == ["Runs in runs, all on org/base", "tickets: finished, 30 steps", "  lora"]
    assert lines_of(draw_runs(RUNS, Path("runs"), 3600.0), 170)[1].split()[:3] == ["run", "state", "base"]


def test_an_export_as_a_base_is_called_by_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for base, shown in {
        f"{tmp_path}/runs/a/model": "runs/a/model",
        "/elsewhere/runs/a/model": "a/model",
        "/models/Llama-3.2-1B": "Llama-3.2-1B",
        "org/base": "org/base",
    }.items():
        run = ListedRun("x", "finished", base, "lora", None, None, None, 0, 0.0, None)
        assert lines_of(draw_runs([run], Path("runs"), 0.0), 170)[2].split()[2] == shown


@pytest.mark.parametrize(
    ("gib", "name"), [(8, "a card with 8 GiB"), (700 / 1024, "a card with 700 MiB"), (1.5, "a card with 1.5 GiB")]
)
def test_a_card_of_a_size_is_called_by_it_once(gib: float, name: str) -> None:
    card = described(gib)
    assert card.name == name
    assert _of_it(card, card.total_bytes, 2) == ""
    assert _of_it(Device("cuda", "RTX 3060", 12 * GIB, 12 * GIB, True, (8, 6)), 11 * GIB, 2) == ", 11.00 GiB"


def test_a_way_that_takes_less_than_the_recipe_is_explained() -> None:
    def way(name: str, peak: int) -> SimpleNamespace:
        return SimpleNamespace(name=name, prediction=SimpleNamespace(peak=SimpleNamespace(bytes=peak)))

    def profile(is_checkpointed: bool, kept: bool | int = False) -> SimpleNamespace:
        plan = SimpleNamespace(gradient_checkpointing=is_checkpointed, keep_dequantized=kept)
        forecast = SimpleNamespace(plan=plan, prediction=way("", 2 * GIB).prediction)
        return SimpleNamespace(forecast=forecast, baselines=[way("full fine-tuning", 9 * GIB), way("TRL 1", GIB)])

    said = _why_others_take_less(profile(False))  # type: ignore[arg-type]
    assert said is not None
    assert said.startswith("TRL 1: computes every layer twice")
    assert "training.gradient_checkpointing = true" in said
    assert _why_others_take_less(profile(True)) is None  # type: ignore[arg-type]
    # A name may have a comma of its own.
    assert str(why_others_take_less(["lora, bf16", "TRL 1"], False, False)).startswith(
        "lora, bf16; TRL 1: each computes"
    )
    both = _why_others_take_less(profile(False, True))  # type: ignore[arg-type]
    assert both is not None
    assert "those of all layers stay dequantized" in both
    assert both.endswith("training.gradient_checkpointing = true and memory.keep_dequantized = false do the same")
    kept = _why_others_take_less(profile(True, 4))  # type: ignore[arg-type]
    assert kept is not None
    assert kept.startswith("TRL 1: reads frozen weights back for every product, which takes less memory")
    assert "those of some layers stay dequantized" in kept


@pytest.mark.parametrize("width", [60, 80])
def test_the_names_of_keys_stay_whole_however_long_what_is_said_of_them(width: int) -> None:
    keys = ["quantization.double_quantization", "training.gradient_checkpointing", "model.base"]
    rows = [
        (key, SMOL, "rule: the card has 12 GiB, of which a step with it takes 3.2 GiB and without 9.9") for key in keys
    ]
    lines = lines_of(table("recipe.toml", ("key", "value", "from"), rows), width)
    assert all(any(line.split()[:1] == [key] for line in lines) for key in keys), lines
    assert max(map(len, lines)) <= width


def test_a_name_that_no_terminal_has_room_for_is_folded_and_not_cut() -> None:
    long = "/a/folder/of/somebody/with/names/that/are/long/enough/to/fill/a/line.jsonl"
    folded = lines_of(table("Data", ("source", "rows"), [(long, "many " * 9)]), 40)[2:]
    assert "".join(line[:20].split()[0] for line in folded) == long
