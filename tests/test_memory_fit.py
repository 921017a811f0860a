"""Fitting: the largest value that stays inside a budget, cards by name, and a recipe's text that keeps its comments."""

import pytest
from test_memory_trace import CARD, predict, recipe_with, tiny

from qtune.errors import InputError
from qtune.memory.budget import largest_that_fits
from qtune.memory.cards import card_named, size_in_bytes
from qtune.memory.fit import _bisected, fit
from qtune.memory.margin import Need
from qtune.memory.pictures import timeline_svg
from qtune.memory.predict import Longest, summarize
from qtune.memory.rewrite import rewritten
from qtune.plan import make_plan

GIB = 2**30


@pytest.mark.parametrize(("limit", "largest"), [(9, 1), (10, 1), (29, 1), (30, 2), (70, 4), (1000, 16)])
def test_the_largest_size_within_the_limit_is_found(limit, largest):
    assert largest_that_fits([1, 2, 4, 8, 16], lambda size: 10 + 20 * (size - 1), limit) == largest


def test_a_guess_that_is_wrong_is_corrected_by_its_own_cost():
    steep = {1: 10, 2: 11, 4: 40, 8: 90}
    gentle = {1: 10, 2: 40, 4: 41, 8: 42}
    assert largest_that_fits([1, 2, 4, 8], steep.__getitem__, 20) == 2
    assert largest_that_fits([1, 2, 4, 8], gentle.__getitem__, 45) == 8


def test_lengths_are_halved_to_the_last_multiple_that_fits():
    assert _bisected(64, 8192, lambda length: length, 1000) == 960
    assert _bisected(64, 8192, lambda length: length, 10_000) == 8192
    assert _bisected(64, 8192, lambda length: length, 63) == 0


@pytest.mark.parametrize(
    ("said", "gib"),
    [("RTX 3060", 12), ("RTX 3060 12GB", 12), ("rtx 3060 8gb", 8), ("NVIDIA GeForce RTX 4090", 24), ("A100 80 GB", 80)],
)
def test_cards_are_known_by_the_names_that_people_use(said, gib):
    assert card_named(said).gib == gib


def test_an_unknown_card_is_answered_with_the_nearest():
    with pytest.raises(InputError, match=r"--gpu: 'RTX 3096' is not in the table of cards; did you mean RTX 3090"):
        card_named("RTX 3096")


def test_a_card_computes_in_bfloat16_from_ampere_on():
    assert not card_named("RTX 2080 Ti").device().bf16
    assert card_named("RTX 3050").device().bf16


def test_sizes_are_binary():
    assert size_in_bytes("8GiB") == size_in_bytes("8 GB") == size_in_bytes("8192MiB") == 8 * GIB
    with pytest.raises(InputError, match="'much' is not a size"):
        size_in_bytes("much")


def test_what_lasts_does_not_fragment():
    steady, moving = Need(GIB, GIB), Need(GIB, 0)
    assert steady.driver_bytes == (512 + 33) * 2**20
    assert moving.driver_bytes - steady.driver_bytes == int(0.08 * GIB)
    assert steady.fits(steady.total_bytes)
    assert not steady.fits(steady.total_bytes - 1)


RECIPE = """\
# Why this recipe is as it is.
[data]
train = "rows.jsonl"
max_length = 1024    # most rows are shorter

[training]
batch_size = 8       # the effective one
optimizer = "adamw"
"""


def test_a_rewritten_recipe_keeps_comments_order_and_formatting():
    text = rewritten(RECIPE, {("data", "max_length"): 512, ("training", "micro_batch_size"): 2}, "to fit 8 GiB")
    assert text == RECIPE.replace("max_length = 1024", "max_length = 512") + "micro_batch_size = 2 # to fit 8 GiB\n"


def test_fit_takes_the_micro_batch_before_anything_that_costs_more(tmp_path, monkeypatch):
    monkeypatch.setenv("QTUNE_CACHE", str(tmp_path))
    config = tiny(layers=2)
    recipe = recipe_with(training={"batch_size": 4, "micro_batch_size": 4, "gradient_checkpointing": False})
    plan = make_plan(recipe, CARD)
    whole, single = (
        summarize(predict(config, recipe, plan.with_micro_batch(rows, ""), Longest(128))).need.total_bytes
        for rows in (4, 1)
    )
    enough = fit(config, recipe, CARD, whole)
    assert enough.fits
    assert enough.changes == {}
    smaller = fit(config, recipe, CARD, single)
    assert smaller.fits
    assert smaller.changes == {("training", "micro_batch_size"): 1}
    assert smaller.recipe.training.batch_size == 4
    nothing = fit(config, recipe, CARD, GIB // 4)
    assert not nothing.fits
    assert ("training", "gradient_checkpointing") in nothing.changes


def test_a_timeline_is_one_svg_that_names_every_category():
    recipe = recipe_with()
    found = summarize(predict(tiny(layers=2), recipe, make_plan(recipe, CARD)))
    drawing = timeline_svg(found, "a <step>")
    assert drawing.startswith("<svg ")
    assert drawing.endswith("</svg>\n")
    assert "a &lt;step&gt;" in drawing
    assert all(name in drawing for name in found.peak.alive)
