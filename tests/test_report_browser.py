"""The report in a real browser: whatever a run has come to, nothing of its page is cut, broken or out of place."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser, browser
from test_report_page import ATTACK, MEASURED, finish, make_run, tell, train_record
from test_verdicts_scores import free_text

from qtune.records import write_record
from qtune.report.page import write_report
from qtune.run.folder import RunDir
from qtune.run.memory import RunMemory, write_memory
from qtune.run.metrics import EvalRecord

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed: apt-get install chromium"),
]

WIDTHS = (400, 800, 1400)
LONG = "a_name_without_any_place_to_break_it_" * 6


def interrupted(folder: Path) -> RunDir:
    run_dir = make_run(folder)
    tell(run_dir, *map(train_record, range(1, 5)))
    return run_dir


def finished(folder: Path) -> RunDir:
    """With evaluation, export and memory; its rows hold markup."""
    run_dir = make_run(folder, odd=ATTACK)
    finish(run_dir)
    return run_dir


def resumed(folder: Path) -> RunDir:
    """Measured on a processor in two parts, so that its table of phases says what is of which."""
    run_dir = finished(folder)
    peaks = {"visits": 9, "seconds": 1234.5, "tensor_peak_bytes": 12 << 30, "resident_peak_bytes": 13 << 30}
    measured = MEASURED | {"phases": dict.fromkeys(("load", "forward", "idle", "eval"), peaks)}
    write_memory(run_dir, RunMemory(measured=measured, earlier=(measured,)))
    return run_dir


def without_validation(folder: Path) -> RunDir:
    run_dir = interrupted(folder)
    resolved = run_dir.resolved_file.read_text()
    run_dir.resolved_file.write_text(resolved.replace("validation = 0.2", "validation = 0.0"))
    run_dir.adapter.mkdir()
    (run_dir.adapter / "adapter_config.json").write_text("{}")
    (run_dir.adapter / "adapter_model.safetensors").write_bytes(bytes(300))
    return run_dir


def failed(folder: Path) -> RunDir:
    """Diverged, with figures before it that are no numbers either."""
    run_dir = make_run(folder)
    tell(run_dir, train_record(1), train_record(2, gradient_norm=math.inf), train_record(3, loss=math.nan))
    tell(run_dir, EvalRecord(step=3, steps=10, epoch=1.0, loss=math.nan, accuracy=math.nan, seconds=3.0))
    return run_dir


def p_tuning(folder: Path) -> RunDir:
    run_dir = make_run(folder, adapter='kind = "p-tuning"\nvirtual_tokens = 7')
    tell(run_dir, *(train_record(step, loss=3.05 - 0.004 * step) for step in range(1, 11)))
    return run_dir


def one_step(folder: Path) -> RunDir:
    run_dir = make_run(folder)
    tell(run_dir, train_record(1))
    return run_dir


def ten_thousand_steps(folder: Path) -> RunDir:
    run_dir = make_run(folder)
    for_good = (train_record(step, loss=1 + 1 / step, tokens_per_second=123_456.0) for step in range(1, 10_001))
    lines = [json.loads(json.dumps(vars(record) | {"kind": "train", "steps": 10_000})) for record in for_good]
    run_dir.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run_dir


def long_names(folder: Path) -> RunDir:
    place = folder / LONG[:200]
    place.mkdir()
    run_dir = make_run(place, odd=LONG * 20)
    finish(run_dir)
    evaluation = json.loads(run_dir.eval_file.read_text())
    evaluation.pop("crc32", None)  # of what it was
    evaluation["comparisons"] += [
        {"place": LONG, "request": LONG, "expected": "short", "base": LONG * 9, "tuned": "An ordinary sentence. " * 40}
    ]
    run_dir.eval_file.write_text(json.dumps(evaluation))
    longer = RunDir(run_dir.path.with_name(LONG[:200]))
    run_dir.path.rename(longer.path)
    return longer


def free_text_evaluated(folder: Path) -> RunDir:
    """With an evaluation of free text, every line of which has its interval."""
    run_dir = without_validation(folder)
    write_record(run_dir.eval_file, free_text())
    return run_dir


STATES: dict[str, Callable[[Path], RunDir]] = {
    state.__name__: state
    for state in (
        make_run, interrupted, finished, resumed, without_validation, failed, p_tuning, one_step, ten_thousand_steps,
        long_names, free_text_evaluated,
    )
}  # fmt: skip


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The page of a run in each state."""
    return {name: write_report(make(tmp_path_factory.mktemp("state"))) for name, make in STATES.items()}


OUTSIDE = """
(() => {
  const scrolls = element => element.closest('.wide, pre');
  const found = [];
  for (const element of document.body.querySelectorAll('*')) {
    if (scrolls(element) && !element.matches('.wide, pre')) continue;
    const box = element.getBoundingClientRect();
    if (box.width && (box.right > innerWidth + 1 || box.left < -1))
      found.push(`${element.tagName}.${element.className}: ${box.left} to ${box.right}`);
    if (element instanceof HTMLElement && !element.matches('.wide, pre') && element.clientWidth &&
        element.scrollWidth > element.clientWidth + 1)
      found.push(`${element.tagName}.${element.className}: ${element.scrollWidth} in ${element.clientWidth}`);
  }
  for (const text of document.querySelectorAll('.charts svg text')) {
    const box = text.getBoundingClientRect(), around = text.ownerSVGElement.getBoundingClientRect();
    if (box.left < around.left - 1 || box.right > around.right + 1) found.push(`cut: ${text.textContent}`);
  }
  return [document.documentElement.scrollWidth, found];
})()
"""

BROKEN_WORDS = """
(() => {
  const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode;
    if (node.parentElement.closest('pre, svg, style')) continue;
    for (const match of node.data.matchAll(/(?<![^\\s])[A-Za-z]{2,16}(?![^\\s.,:;])/g)) {
      const range = document.createRange();
      range.setStart(node, match.index); range.setEnd(node, match.index + match[0].length);
      const lines = new Set([...range.getClientRects()].map(box => Math.round(box.top)));
      if (lines.size > 1) found.push(match[0]);
    }
  }
  return found;
})()
"""


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_the_window_and_no_text_is_cut(
    tab: Browser, reports: dict[str, Path], state: str, width: int
) -> None:
    tab.open(reports[state], width)
    assert tab.value(OUTSIDE) == [width, []]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(("width", "media"), [*((width, "screen") for width in WIDTHS), (700, "print")])
def test_words_do_not_break(tab: Browser, reports: dict[str, Path], state: str, width: int, media: str) -> None:
    tab.open(reports[state], width, media=media)
    tab.value("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert tab.value(BROKEN_WORDS) == []


@pytest.mark.parametrize("width", WIDTHS)
def test_charts_beside_each_other_stand_on_one_level_with_or_without_a_legend(
    tab: Browser, reports: dict[str, Path], width: int
) -> None:
    tab.open(reports["finished"], width)
    places = tab.value(
        "[...document.querySelectorAll('.charts figure')].map(one => [one.getBoundingClientRect().top,"
        " one.querySelector(':scope > svg').getBoundingClientRect().top].map(Math.round))"
    )
    assert len(places) == 6
    levels: dict[int, set[int]] = {}
    for figure, picture in places:
        levels.setdefault(figure, set()).add(picture)
    assert all(len(pictures) == 1 for pictures in levels.values())


WIDE = "[...document.querySelectorAll('.wide')].filter(one => one.getBoundingClientRect().height)"
EDGES = f"""
{WIDE}.map(one => {{
  const box = one.getBoundingClientRect();
  return [box.left + 1, box.right - 2, box.top + 2, one.scrollWidth > one.clientWidth + 1, one.scrollLeft > 1];
}})
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_an_edge_behind_which_a_part_of_a_table_is_hidden_has_a_sign_as_long_as_it_is(
    tab: Browser, reports: dict[str, Path], scheme: str
) -> None:
    found = set()
    for width in (300, 1400):
        tab.open(reports["finished"], width, scheme=scheme)
        paper = tab.color(2, 2)
        for at_end in (False, True):
            if at_end:
                tab.value(f"{WIDE}.forEach(one => one.scrollLeft = 1e6)")
            for left, right, top, scrolls, is_scrolled in tab.value(EDGES):
                signs = tab.color(left, top) != paper, tab.color(right, top) != paper
                assert signs == (is_scrolled, scrolls and not is_scrolled)
                found.add(signs)
    assert found == {(False, False), (False, True), (True, False)}


def test_what_a_processor_took_in_several_parts_fits_a_page_of_800_pixels(
    tab: Browser, reports: dict[str, Path]
) -> None:
    tab.open(reports["resumed"], 800)
    assert tab.value(f"{WIDE}.filter(one => one.scrollWidth > one.clientWidth + 1).map(one => one.textContent)") == []


@pytest.mark.parametrize("state", ["finished", "long_names", "free_text_evaluated"])
def test_answers_and_values_fit_a_narrow_page_and_their_cells_say_what_they_are(
    tab: Browser, reports: dict[str, Path], state: str
) -> None:
    tab.open(reports[state], 400)
    tab.value("document.querySelectorAll('details').forEach(one => one.open = true)")
    hidden = tab.value(
        "[...document.querySelectorAll('.answers, .values')].map(one => one.parentElement)"
        ".filter(one => one.scrollWidth > one.clientWidth + 1).map(one => one.textContent.slice(0, 40))"
    )
    assert hidden == []
    named = tab.value(
        "[...document.querySelectorAll('.answers:not(.steps) tr:first-child td')].map(one =>"
        " getComputedStyle(one, '::before').content)"
    )
    assert [json.loads(one) for one in named[2:5]] == ["expected", "base", "tuned"]


def test_the_answers_are_what_one_sees_first(tab: Browser, reports: dict[str, Path]) -> None:
    tab.open(reports["finished"], 800)
    tops = tab.value("['.verdict', '.facts', 'h2'].map(one => document.querySelector(one).getBoundingClientRect().top)")
    assert tops == sorted(tops)
    bottom = tab.value("document.querySelector('.verdicts').getBoundingClientRect().bottom")
    assert bottom < 600


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_its_ground(tab: Browser, reports: dict[str, Path], scheme: str) -> None:
    """WCAG 2.2, 1.4.3: a contrast of 4.5 to 1."""
    tab.open(reports["finished"], 800, scheme=scheme)
    weak = tab.value("""
        (() => {
          const light = color => { const [r, g, b] = color.match(/[\\d.]+/g).map(Number).map(one => one / 255)
              .map(one => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
          const ground = element => { while (element) { const color = getComputedStyle(element).backgroundColor;
              if (color !== 'rgba(0, 0, 0, 0)') return color; element = element.parentElement; } };
          const found = [];
          for (const element of document.body.querySelectorAll('p, span, li, dt, dd, td, th, h1, h2, h3, mark, pre')) {
            const [one, other] = [light(getComputedStyle(element).color), light(ground(element))].sort((a, b) => b - a);
            if ((one + 0.05) / (other + 0.05) < 4.5) found.push(element.className + element.textContent.slice(0, 30));
          }
          return found;
        })()
    """)
    assert weak == []


def test_on_paper_what_is_folded_is_open_and_titles_stay_with_their_charts(
    tab: Browser, reports: dict[str, Path]
) -> None:
    tab.open(reports["long_names"], 700, media="print")
    folded = tab.value(
        "[...document.querySelectorAll('details')].map(one => [one.open, one.getBoundingClientRect().height,"
        " one.querySelector('summary').getBoundingClientRect().height])"
    )
    assert folded
    for is_open, height, head in folded:
        assert not is_open
        assert height > 2 * head
    assert tab.value(OUTSIDE)[0] == 700
    kept = tab.value("[...document.querySelectorAll('.charts figure')].map(one => getComputedStyle(one).breakInside)")
    assert set(kept) == {"avoid"}
    headings = tab.value("[...document.querySelectorAll('h2, h3')].map(one => getComputedStyle(one).breakAfter)")
    assert set(headings) == {"avoid"}
    cut = tab.value(
        "[...document.querySelectorAll('.wide, pre')].filter(one => one.scrollWidth > one.clientWidth + 1 ||"
        " one.scrollHeight > one.clientHeight + 1).map(one => one.textContent.slice(0, 40))"
    )
    assert cut == []
