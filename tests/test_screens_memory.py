"""Memory on the screen: a bar read without colour, tables that fit 80 columns, cards only where a card is meant."""

import re
from dataclasses import replace
from io import StringIO
from types import SimpleNamespace

import pytest
from rich.console import Console
from test_memory_trace import CARD, CPU, recipe_with, tiny

from qtune.device.cards import SIZES
from qtune.device.present import Device
from qtune.memory.forecast import Forecast
from qtune.memory.longest import Rows
from qtune.memory.predict import Longest, predict, summarize
from qtune.memory.profile import Measured, Profile
from qtune.memory.savings import Variant
from qtune.memory.tracing import categories
from qtune.plan import make_plan
from qtune.screens.answer import draw_answer
from qtune.screens.memory import BAR, LETTERS, draw_forecast, draw_measured, draw_savings, stacked_bar


def test_every_category_has_a_letter_of_its_own() -> None:
    assert set(LETTERS) == set(categories.ORDER)
    assert len({letter.lower() for letter in LETTERS.values()}) == len(LETTERS)


def test_the_bar_gives_each_category_its_share_of_letters() -> None:
    bar = stacked_bar({"base weights 4-bit": 300, "embeddings": 150, "adapter": 1, "activations": 149}).plain
    assert bar == f"[{'4' * (BAR // 2)}{'E' * (BAR // 4)}{'V' * (BAR // 4)}]"
    assert stacked_bar({"something new": 1}).plain == f"[{'.' * BAR}]"
    assert stacked_bar({}).plain == "[]"


def screen(device: Device, *, terminal: bool) -> str:
    recipe = recipe_with()
    plan = make_plan(recipe, device)
    found = summarize(predict(tiny(layers=1), recipe, plan))
    names = ("full fine-tuning, fp32", "full fine-tuning, bf16", "prompt-tuning, bf16 base", "QLoRA as in 2023")
    ways = [Variant(name, "as said", found) for name in (*names, "this recipe")]
    forecast = Forecast(plan, Rows(Longest(128), "told"), found, 24 << 30)
    profile = Profile(recipe, forecast, ways, [Variant("nf4 weights", "the base in bf16", found)])
    stream = StringIO()
    console = Console(file=stream, width=80, force_terminal=terminal, no_color=True, highlight=False, markup=False)
    console.print(draw_answer(profile, None), draw_forecast(profile), *draw_savings(profile, SIZES), sep="\n")
    return stream.getvalue()


@pytest.fixture(scope="module")
def on_a_card() -> str:
    return screen(CARD, terminal=False)


def test_a_profile_fits_80_columns_and_no_name_or_figure_is_broken(on_a_card) -> None:
    lines = on_a_card.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(re.match(r"prompt-tuning, bf16 base +\S+ \w+ +100% +0% +6 GB and more", line) for line in lines)
    assert any(line.startswith("4 base weights 4-bit ") for line in lines)
    assert re.search(r"^\[[A-Za-z0-9]+\]$", on_a_card, re.MULTILINE)


def test_the_answer_comes_first_and_every_name_below_it_is_explained(on_a_card) -> None:
    lines = [line.rstrip() for line in on_a_card.splitlines()]
    assert re.fullmatch(r"does it fit\?  Fits: \d\.\d\d GiB needed, of 24\.00 GiB", lines[1])
    assert lines[2].startswith("how long?     not known; name the card with --gpu")
    assert any(re.match(r"in what way\?  \d rows of at most 128 tokens at once", line) for line in lines)
    assert all(0 < len(category.about) <= 34 for category in categories.CATEGORIES)
    assert any(re.match(r"4 base weights 4-bit .* the frozen model$", line) for line in lines)


def test_the_answer_says_how_long_the_run_takes_or_a_step_where_its_rows_are_not_known() -> None:
    recipe = recipe_with()
    plan = make_plan(recipe, CARD)
    found = summarize(predict(tiny(layers=1), recipe, plan))
    profile = Profile(recipe, Forecast(plan, Rows(Longest(128), "told"), found, 1 << 20), [], [])
    step = SimpleNamespace(seconds=0.5)
    known = SimpleNamespace(
        kind="data sheet", run_seconds=190.0, steps=400, step_seconds=0.45, longest_step=step, evaluation_seconds=10.0
    )

    def shown(time) -> str:
        stream = StringIO()
        Console(file=stream, width=120).print(draw_answer(profile, time))
        return stream.getvalue()

    more = "loading, sample answers and checkpoints come on top; predicted from a data sheet"
    assert f"3:10 for the run: 400 steps of 0.45 s and 10.0 s of evaluations; {more}" in " ".join(shown(known).split())
    known.evaluation_seconds = 0.0
    assert f"3:10 for the run: 400 steps of 0.45 s; {more}" in " ".join(shown(known).split())
    known.evaluation_seconds = None
    assert "400 steps of 0.45 s; loading, evaluations, sample answers and" in " ".join(shown(known).split())
    known.run_seconds = None
    assert "0.50 s a step of the longest rows; predicted from a data sheet" in shown(known)
    assert "Does not fit: " in shown(known)


def test_the_answer_says_what_auto_has_chosen_by_memory_and_nothing_that_the_recipe_names() -> None:
    recipe = recipe_with(training={"batch_size": 8})
    first = make_plan(recipe, CARD)
    found = summarize(predict(tiny(layers=2), recipe, first))

    def chosen(plan) -> list[str]:
        stream = StringIO()
        forecast = Forecast(plan, Rows(Longest(128), "told"), found, 24 << 30)
        Console(file=stream, width=300).print(draw_answer(Profile(recipe, forecast, [], []), None))
        said = re.search(r"auto chose\?  (.*?)known from", stream.getvalue(), re.DOTALL)
        return [] if said is None else [line.strip() for line in said[1].splitlines()]

    settled = first.with_micro_batch(2, "the largest that fits").with_checkpointing(1, "enough for a step to fit")
    assert chosen(
        settled.with_embeddings_on_host("one row would need more").with_dequantized_kept(False, "no room")
    ) == [
        'memory.embeddings = "host": embeddings and head wait in the computer\'s memory',
        "training.gradient_checkpointing = 1: the first 1 of 2 layers are computed twice and keep little, the others "
        "keep everything",
        "training.micro_batch_size = 2: 2 rows of a step at once",
    ]
    kept = (
        first.with_micro_batch(8).with_checkpointing(False, "not needed").with_dequantized_kept(True, "there is room")
    )
    assert [line.partition(":")[0] for line in chosen(kept)] == ["memory.keep_dequantized = true"]
    assert chosen(replace(settled, reasons={})) == []


def test_the_screen_is_the_same_without_a_terminal_and_without_colour(on_a_card) -> None:
    drawn = screen(CARD, terminal=True)
    codes = set(re.findall(r"\x1b\[([0-9;]*)m", drawn))
    assert codes <= {"0", "1", "2"}  # bold and dim, no colour
    plain = re.sub(r"\x1b\[[0-9;]*m", "", drawn)
    took = re.compile(r"in \d+\.\d s")
    shown = [[took.sub("in a while", line).rstrip() for line in text.splitlines()] for text in (plain, on_a_card)]
    assert shown[0] == shown[1]


def test_the_time_of_a_trace_is_all_that_one_waited_or_is_said_to_be_an_earlier_ones() -> None:
    recipe = recipe_with()
    plan = make_plan(recipe, CARD)
    found = replace(summarize(predict(tiny(layers=1), recipe, plan)), seconds=10.6)
    forecast = Forecast(plan, Rows(Longest(128), "told"), found, 24 << 30)

    def shown(seconds: float) -> str:
        stream = StringIO()
        Console(file=stream, width=120).print(draw_forecast(Profile(recipe, forecast, [], [], seconds)))
        return stream.getvalue()

    assert "traced without a GPU in 171.2 s" in shown(171.2)
    assert "traced before, in 10.6 s, without a GPU" in shown(0.3)


def test_what_was_measured_is_of_the_last_part_of_a_resumed_run_and_idle_is_explained() -> None:
    peaks = {"visits": 1, "seconds": 1.0, "tensor_peak_bytes": 1 << 20, "resident_peak_bytes": 1 << 30}
    phases = {"forward": peaks, "idle": peaks}
    measured = {"device": "cpu", "method": "told", "peak_bytes": 1 << 20, "static": {}, "phases": phases}
    for parts, said in (
        (1, "measured on cpu: told\n"),
        (2, "measured on cpu: told; of the last of 2 parts of the run\n"),
    ):
        shown = StringIO()
        Console(file=shown, width=100).print(draw_measured(Measured(measured, None, [], [], None, parts)))
        assert shown.getvalue().startswith(said)
        assert "between steps " in shown.getvalue()
        assert "idle" not in shown.getvalue()


def test_a_processors_memory_is_not_measured_in_cards(on_a_card) -> None:
    assert "needed free on the card" in on_a_card
    on_cpu = screen(CPU, terminal=False)
    assert not re.search(r"fits cards|on the card|cuBLAS|needed", on_cpu)
    assert "this is the memory of a run on the processor; for a card add --gpu or --vram\n" in on_cpu
