"""Every key of a TOML text is found on its line, however the text is written."""

import tomllib
from typing import Any

import pytest
import tomlkit
from hypothesis import given
from hypothesis import strategies as st

from qtune.recipe.lines import line_of, toml_lines


def paths_of(value: Any, path: tuple = ()) -> set[tuple]:
    """The path of every key and array element below a value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {found for key, one in inner for found in ({(*path, key)} | paths_of(one, (*path, key)))}


def test_keys_tables_and_elements_have_their_lines() -> None:
    text = """\
# a recipe
[model]
base = "x" # [not.a.table]

[data]
train = [
  "a.jsonl", # first
  "b.jsonl",
]
columns = { instruction = "query", output = "reply" }
[training]
epochs = 2
"""
    assert toml_lines(text) == {
        ("model",): 2,
        ("model", "base"): 3,
        ("data",): 5,
        ("data", "train"): 6,
        ("data", "train", 0): 7,
        ("data", "train", 1): 8,
        ("data", "columns"): 10,
        ("data", "columns", "instruction"): 10,
        ("data", "columns", "output"): 10,
        ("training",): 11,
        ("training", "epochs"): 12,
    }


def test_a_missing_key_is_reported_at_its_table() -> None:
    lines = toml_lines('\n[data]\nmax_length = 5\n[model]\nbase = "x"\n')
    assert line_of(lines, ("data", "train")) == 2
    assert line_of(lines, ("data", "max_length")) == 3
    assert line_of(lines, ("quantization", "kind")) == 1
    assert line_of(lines, ()) == 1


@pytest.mark.parametrize(
    ("text", "path", "line"),
    [
        ('a = """\nb = 1\n"""\nb = 2', ("b",), 4),
        ("a = '''\n[b]\n'''\n[b]", ("b",), 4),
        ('a = """x""""\nb = 1', ("b",), 2),
        ('a = "\\"]"\nb = 1', ("b",), 2),
        ("a = 'c:\\'\nb = 1", ("b",), 2),
        ('a = ""\nb = 1', ("b",), 2),
        ('"a.b" = 1\n"c\\u00e9 \\"d" = 2', ('cé "d',), 2),
        ("a.b = 1\n\na.c = 2", ("a", "c"), 3),
        ("\n[a.b]\nx = 1", ("a",), 2),
        ("[a.b]\nx = 1\n[a]\ny = 2", ("a",), 3),
        ("[[a]]\nx = 1\n[[a]]\nx = 2", ("a", 1, "x"), 4),
        ("[[a]]\n[a.b]\nx = 1\n[[a]]\n[a.b]\nx = 2", ("a", 1, "b", "x"), 6),
        ("a = [[1,\n2],\n[3]]", ("a", 0, 1), 2),
        ("a = [\n{ x = 1 },\n{ x = 2 }]", ("a", 1, "x"), 3),
        ("a = 1979-05-27 07:32:00 # time\nb = 1", ("b",), 2),
        ("a = 1\r\n[b]\r\nc = 2\r\n", ("b", "c"), 3),
        ('[ "x y" . z ]\nk = 1', ("x y", "z", "k"), 2),
        ("a={b.c=1,b.d=[2]}", ("a", "b", "d", 0), 1),
    ],
)
def test_every_way_of_writing_toml(text: str, path: tuple, line: int) -> None:
    assert path in paths_of(tomllib.loads(text))
    assert toml_lines(text)[path] == line


keys = st.one_of(
    st.text("abcz019_-", min_size=1, max_size=5),
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=5),
)
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\x7f"), max_size=12)
plain = st.one_of(st.integers(-9, 9), st.booleans(), st.floats(allow_nan=False), texts, st.dates())
values = st.recursive(
    plain,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=3)),
    max_leaves=8,
)


@given(st.dictionaries(keys, values, max_size=4))
def test_every_key_of_any_text_is_found_where_it_stands(tables: dict[str, Any]) -> None:
    text = tomlkit.dumps(tables)
    parsed = tomllib.loads(text)
    lines = toml_lines(text)
    assert set(lines) == paths_of(parsed)
    written = text.split("\n")
    for path, line in lines.items():
        if isinstance(path[-1], str) and path[-1].isascii() and path[-1].isalnum():
            assert path[-1] in written[line - 1]


@given(st.lists(st.tuples(st.text("abc", min_size=1, max_size=3), texts), unique_by=lambda pair: pair[0], max_size=6))
def test_multi_line_strings_never_shift_a_line(pairs: list[tuple[str, str]]) -> None:
    document = tomlkit.document()
    for key, value in pairs:
        document.add(key, tomlkit.string(value, multiline=True))
    text = tomlkit.dumps(document)
    if tomllib.loads(text) != dict(pairs):  # tomlkit drops a leading line end, as TOML does
        return
    lines = toml_lines(text)
    for key, _ in pairs:
        assert text.split("\n")[lines[key,] - 1].startswith(f"{key} = ")
