"""Lines of a recipe that lack their quotes, or write a value as another language does."""

import tomllib

import pytest

from qtune.recipe.unquoted import LONGEST_LINE, line_meant, number_meant

MEANT = {
    ("model", "base = org/model"): 'base = "org/model"',
    ("model", "base = org/model  # a comment"): 'base = "org/model"',
    ("model", "base = C:\\models\\llama"): 'base = "C:\\\\models\\\\llama"',
    ("model", "base = http://host/a?b=c#d"): 'base = "http://host/a?b=c#d"',
    ("model", "  base   =   org/model,"): 'base = "org/model"',
    ("memory", "budget = 8GiB"): 'budget = "8GiB"',
    ("data", "train = data/#1.jsonl"): 'train = "data/#1.jsonl"',
    ("data", "system_prompt = You are brief, and kind."): 'system_prompt = "You are brief, and kind."',
    ("training", "learning_rate = .5e-3"): "learning_rate = 0.5e-3",
    ("training", "learning_rate = 1.e-4"): "learning_rate = 1.0e-4",
    ("training", "weight_decay = 5."): "weight_decay = 5.0",
    ("training", "steps = 010"): "steps = 10",
    ("adapter", "rank = 16,"): "rank = 16",
    ("adapter", "rank = 16;"): "rank = 16",
    ("adapter", "dora = True"): "dora = true",
    ("adapter", "dora = NO"): "dora = false",
    ("adapter", "dora = on,"): "dora = true",
    ("adapter", "target_modules = [q_proj, v_proj]"): 'target_modules = ["q_proj", "v_proj"]',
    ("adapter", "target_modules = [q_proj, v_proj,],"): 'target_modules = ["q_proj", "v_proj"]',
    ("adapter", "target_modules = q_proj, v_proj"): 'target_modules = ["q_proj", "v_proj"]',
    ("adapter", "target_modules = [q_proj, 3]"): 'target_modules = ["q_proj", 3]',
}
UNTOLD = [
    'base = org/model"',
    "base = “org/model”",
    'base = say "a # b"',
    'base = "x" y',
    "base = all]",
    "base = (a, b)",
    "base == 3",
    "base = None",
    "base = null",
    "base =",
    "base = # nothing",
    "base: x",
    "b@se = x",
    "rank = 1,000",
    "rank = 1,5e-4",
    "rank = [1,000, 2]",
    "rank = [a,,b]",
    'rank = ["a", b]',
    "rank = {path = a}",
    "base = " + "x" * LONGEST_LINE,
    "base = \x7f\x00",
]
"""Whatever is written there, what is meant is not told."""


@pytest.mark.parametrize(("table", "line"), MEANT)
def test_the_line_that_is_meant_is_told_and_is_toml(table: str, line: str) -> None:
    text = f"# a recipe\n[{table}]\n{line}\nother = 1\n"
    assert line_meant(text, 3) == MEANT[table, line]
    tomllib.loads(text.replace(line, MEANT[table, line]))


@pytest.mark.parametrize("line", UNTOLD)
def test_where_it_cannot_be_told_what_is_meant_nothing_is(line: str) -> None:
    assert line_meant(f"[model]\n{line}\n", 2) is None


@pytest.mark.parametrize(
    "text",
    [
        '[data]\ntrain = ["a.jsonl",\nmax_length = 8GiB\n',
        '[data]\nsystem_prompt = """\nAnswer so:\nname = Bob\n',
        '[data]\nsystem_prompt = """\npath = C:\\dir\n"""\n',
        "[data]\nsystem_prompt = '''\nname = Bob\n",
        "[data]\nmax_length = 3\nmax_length = 4GiB\n",
    ],
)
def test_a_line_is_not_blamed_for_what_stands_before_it(text: str) -> None:
    assert [line_meant(text, line + 1) for line in range(text.count("\n") + 1)].count(None) == text.count("\n") + 1


def test_of_two_such_lines_the_first_is_told_first() -> None:
    text = "[model]\nbase = a\n[memory]\nbudget = 8GiB\n"
    assert line_meant(text, 2) == 'base = "a"'
    assert line_meant(text.replace("= a", '= "a"'), 4) == 'budget = "8GiB"'


@pytest.mark.parametrize("text", ["", "many", "nan", "-inf", "1,5", "0x", "٣", "1e", "--1"])
def test_what_is_no_number_of_tomls_has_none(text: str) -> None:
    assert number_meant(text) is None


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("1e-4", "1e-4"),
        (".5", "0.5"),
        ("-.5", "-0.5"),
        ("+5.", "5.0"),
        ("00", "0"),
        ("007.5", "7.5"),
        ("1_000", "1_000"),
    ],
)
def test_a_number_is_written_as_toml_does(text: str, meant: str) -> None:
    assert number_meant(text) == meant
    assert tomllib.loads(f"value = {meant}")["value"] == float(text)
