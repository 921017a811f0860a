"""The timeline of a step: its areas told apart without colour, its labels in place."""

import itertools
import re
import xml.etree.ElementTree as ElementTree

import pytest
from conftest import run_qtune
from test_memory_trace import CARD, recipe_with, tiny

from qtune.memory.predict import LEAST, POINTS, Prediction, predict, summarize
from qtune.memory.tracing import categories
from qtune.plan import make_plan
from qtune.report import drawing, timeline
from qtune.report.drawing import Area, Box, Drawing, Look, Words, svg
from qtune.report.timeline import LOOKS, Timeline, timeline_drawing

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def prediction() -> Prediction:
    recipe = recipe_with(training={"gradient_checkpointing": True, "batch_size": 2, "micro_batch_size": 2})
    return summarize(predict(tiny(layers=2), recipe, make_plan(recipe, CARD)))


@pytest.fixture(scope="module")
def picture(prediction: Prediction) -> Drawing:
    return timeline_drawing(Timeline.of(prediction), "a <step>")


def test_in_a_page_a_drawing_has_the_pages_paper_and_ink_and_alone_its_own() -> None:
    """In the dark it stood there as a white block."""
    drawn = timeline_drawing(big(), "a large model")
    alone, inside = svg(drawn), svg(drawn, alone=False)
    assert "var(" not in alone
    outside_of_hatches = re.sub(r"<defs>.*?</defs>", "", inside, flags=re.DOTALL)
    for colour in (drawing.INK, drawing.DIM, drawing.FAINT, drawing.PAPER):
        assert colour in alone
        assert colour not in outside_of_hatches
    assert set(re.findall(r"var\((--\w+)\)", inside)) == {"--ink", "--dim", "--faint", "--paper"}


def test_phases_come_in_the_order_of_a_run_and_none_is_too_narrow_for_its_name(prediction: Prediction) -> None:
    firsts = [first for first, _ in prediction.phases]
    assert [phase for _, phase in prediction.phases] == ["forward", "backward", "optimizer", "eval"]
    assert all(stop - start >= LEAST for start, stop in itertools.pairwise([*firsts, POINTS]))
    for values in prediction.timeline.values():
        assert len(values) == POINTS


def test_the_highest_point_of_each_phase_is_that_phases_peak(prediction: Prediction) -> None:
    totals = [sum(column) for column in zip(*prediction.timeline.values(), strict=True)]
    firsts = [first for first, _ in prediction.phases]
    for (first, phase), stop in zip(prediction.phases, [*firsts[1:], POINTS], strict=True):
        assert max(totals[first:stop]) == prediction.by_phase[phase].bytes, phase


def test_no_two_categories_look_alike_in_black_and_white() -> None:
    assert set(LOOKS) == set(categories.ORDER)
    for one, other in itertools.combinations(LOOKS.values(), 2):
        assert one.hatch != other.hatch or abs(one.luminance - other.luminance) >= 0.25


def test_neighbours_in_the_stack_differ_in_hatch() -> None:
    weights = [name for name in categories.ORDER if name.startswith("base weights")]
    for one, other in itertools.pairwise(categories.ORDER[len(weights) - 1 :]):
        assert LOOKS[one].hatch != LOOKS[other].hatch, (one, other)


def test_every_category_that_lives_is_an_area_with_its_name_in_the_column(prediction, picture) -> None:
    living = [name for name, values in prediction.timeline.items() if any(values)]
    areas = [shape for shape in picture.shapes if isinstance(shape, Area)]
    assert [area.look for area in areas] == [LOOKS[name] for name in living]
    framed = [shape.look for shape in picture.shapes if isinstance(shape, Box) and shape.framed]
    assert framed == [LOOKS[name] for name in reversed(living)]
    texts = [shape.text for shape in picture.shapes if isinstance(shape, Words)]
    assert set(living) <= set(texts)


def test_the_column_adds_up_to_the_peak(prediction, picture) -> None:
    texts = [shape.text for shape in picture.shapes if isinstance(shape, Words)]
    assert texts[-1] == timeline.size_text(prediction.peak.bytes)
    assert f"peak {texts[-1]}" in texts


def big() -> Timeline:
    """Curves with large areas, thin ones and short ones."""
    rise = [100 * point << 20 for point in range(120)]
    curves = {
        "base weights 4-bit": [4 << 30] * 240,
        "quantization constants": [30 << 20] * 240,
        "embeddings": [2 << 30] * 240,
        "activations": rise + rise[::-1],
        "logits and loss": [0] * 115 + [3 << 30] * 10 + [0] * 115,
    }
    at_peak = {name: values[119] for name, values in curves.items()}
    return Timeline(curves, [(0, "forward"), (120, "backward"), (180, "optimizer"), (210, "eval")], at_peak, "forward")


def rectangle(words: Words) -> tuple[float, float, float, float]:
    left = words.x - {"start": 0.0, "middle": words.width / 2, "end": words.width}[words.anchor]
    return left, words.y - words.size * 0.8, left + words.width, words.y + words.size * 0.2


@pytest.mark.parametrize("made", ["traced", "big"])
def test_no_words_lie_on_others_or_outside(picture, made) -> None:
    drawn = picture if made == "traced" else timeline_drawing(big(), "a large model")
    words = [shape for shape in drawn.shapes if isinstance(shape, Words)]
    for shape in words:
        left, top, right, bottom = rectangle(shape)
        assert left >= 0, shape
        assert top >= 0, shape
        assert right <= drawn.width, shape
        assert bottom <= drawn.height, shape
    for one, other in itertools.combinations(words, 2):
        a, b = rectangle(one), rectangle(other)
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert apart, (one.text, other.text)


def test_a_label_stands_in_its_own_area_and_a_thin_area_has_none() -> None:
    drawn = timeline_drawing(big(), "a large model")
    labels = {shape.text for shape in drawn.shapes if isinstance(shape, Words) and shape.size == timeline.LABEL}
    assert {"base weights 4-bit", "embeddings", "activations"} <= labels
    assert "quantization constants" not in labels


@pytest.mark.parametrize(("peak", "unit"), [(3 << 30, "GiB"), (3 << 20, "MiB")])
def test_the_axis_is_in_a_unit_that_suits_the_peak(peak: int, unit: str) -> None:
    small = Timeline({"activations": [0, peak, 0]}, [(0, "forward")], {"activations": peak}, "forward")
    texts = [shape.text for shape in timeline_drawing(small, "").shapes if isinstance(shape, Words)]
    assert {f"1 {unit}", f"2 {unit}", f"3 {unit}", f"peak 3.{'00' if unit == 'GiB' else '0'} {unit}"} <= set(texts)


def test_an_svg_is_one_element_without_scripts_whose_text_is_escaped(picture) -> None:
    text = svg(picture)
    root = ElementTree.fromstring(text)
    assert root.tag == f"{SVG}svg"
    assert "a &lt;step&gt;" in text
    assert {element.tag.removeprefix(SVG) for element in root.iter()} == {
        "svg", "title", "defs", "pattern", "path", "rect", "polygon", "line", "text",
    }  # fmt: skip


def test_every_pattern_that_is_used_is_defined_and_means_one_look(picture) -> None:
    root = ElementTree.fromstring(svg(picture))
    defined = [pattern.get("id") for pattern in root.iter(f"{SVG}pattern")]
    used = {part.split(")")[0] for part in svg(picture).split("url(#")[1:]}
    assert set(defined) == used
    assert len(defined) == len(used)
    other = svg(Drawing(10, 10, "", [Box(0, 0, 1, 1, look) for look in reversed(LOOKS.values())]))
    for pattern in root.iter(f"{SVG}pattern"):
        same = ElementTree.fromstring(other).find(f".//*[@id='{pattern.get('id')}']")
        assert ElementTree.tostring(same) == ElementTree.tostring(pattern)


def test_a_hatch_is_drawn_in_what_stands_out_from_its_fill() -> None:
    assert (Look("#000000", "x").ink, Look("#ffffff", "x").ink) == (drawing.PAPER, drawing.INK)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("step.png", "--timeline: step.png: a picture's name ends in .svg"),
        ("step", "--timeline: step: a picture's name ends in .svg"),
        ("none/step.svg", "--timeline: none/step.svg: there is no folder none"),
    ],
)
def test_a_picture_that_cannot_be_written_is_one_error_before_anything_is_traced(name: str, said: str) -> None:
    done = run_qtune("profile", "no-such-recipe.toml", "--timeline", name)
    assert (done.returncode, done.stderr.strip()) == (2, f"error: {said}")
