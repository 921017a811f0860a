"""Numbers, texts and files that no recipe has: each is refused in one line, at once, and before anything is built."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
from conftest import FUZZ_SEED, FUZZED
from pydantic import BaseModel
from typer.testing import CliRunner

from qtune import cli
from qtune.at_once import require_name
from qtune.device.present import Device
from qtune.errors import QtuneError, RecipeError
from qtune.plan import make_plan
from qtune.recipe.faults import MOST_SHOWN
from qtune.recipe.file import LONGEST_RECIPE, check_recipe, load_recipe
from qtune.recipe.parse import parse_recipe
from qtune.recipe.schema import LONGEST_NAME, Recipe, Table
from qtune.run.folder import require_writable
from qtune.sizes import size_in_bytes

GOOD = '[model]\nbase = "org/model"\n[data]\ntrain = "rows.jsonl"\n'
HUGE = "9" * 36


@pytest.fixture
def said(tmp_path: Path):
    """The lines of what is said against a text, written as a file, and `--set` changes; none where it is taken."""
    (tmp_path / "rows.jsonl").write_text("{}\n")

    def said(text: str | bytes, *changes: str) -> list[str]:
        file = tmp_path / "recipe.toml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        try:
            load_recipe(file, changes)
        except RecipeError as error:
            return str(error).replace(f"{tmp_path}/", "").split("\n")
        return []

    return said


ABSURD_NUMBERS = [
    ("training", "batch_size", "1000000000"),
    ("training", "micro_batch_size", "1000000000"),
    ("training", "steps", "1000000000000000000"),
    ("training", "epochs", "1e300"),
    ("training", "epochs", "1e-300"),
    ("training", "learning_rate", "1e308"),
    ("training", "weight_decay", "1e308"),
    ("training", "max_gradient_norm", "1e-300"),
    ("training", "max_gradient_norm", "1e308"),
    ("training", "warmup", "1.0"),
    ("training", "seed", "4294967296"),
    ("training", "log_every", "1000000000000000000"),
    ("training", "eval_every", "1000000000000000000"),
    ("training", "checkpoint_every", "1000000000000000000"),
    ("training", "checkpoint_minutes", "1e300"),
    ("training", "keep_checkpoints", "1000000000"),
    ("data", "max_length", "1000000000000"),
    ("data", "validation", "1.0"),
    ("adapter", "rank", "1000000000"),
    ("adapter", "alpha", "1000000000"),
    ("adapter", "dropout", "1.0"),
    ("quantization", "minimum_share", "1.5"),
    ("memory", "budget", f'"{HUGE}GiB"'),
    ("memory", "budget", '"0.001MiB"'),
    ("memory", "loss_tile", '"99999999999GiB"'),
]


@pytest.mark.parametrize("kind", ["prompt-tuning", "p-tuning"])
@pytest.mark.parametrize("key", ["vector_rate", "vector_scale"])
@pytest.mark.parametrize("value", ["1e-39", "1e30"])
def test_a_factor_of_vectors_that_float32_cannot_hold_is_refused(said, kind: str, key: str, value: str) -> None:
    (problem,) = said(f'{GOOD}[adapter]\nkind = "{kind}"\nresidual = true\n{key} = {value}\n')
    assert problem.startswith(f"recipe.toml:8: adapter.{key} = ")
    assert "must be" in problem


@pytest.mark.parametrize(("table", "key", "value"), ABSURD_NUMBERS, ids=lambda part: str(part)[:20])
def test_a_number_beyond_all_use_is_refused_with_its_bound(said, table: str, key: str, value: str) -> None:
    text = GOOD + (f"{key} = {value}\n" if table == "data" else f"[{table}]\n{key} = {value}\n")
    (problem,) = said(text)
    assert problem.startswith(f"recipe.toml:{5 if table == 'data' else 6}: {table}.{key} = ")
    assert "must be" in problem


def numeric_keys(table: type[BaseModel] = Table) -> Iterator[tuple[str, Any]]:
    for child in table.__subclasses__():
        for name, field in child.model_fields.items():
            for hint in (field.annotation, *get_args(field.annotation)):
                plain = get_args(hint)[0] if get_origin(hint) is Annotated else hint
                if plain in (int, float):
                    yield f"{child.__name__}.{name}", [field.metadata, hint]
        yield from numeric_keys(child)


@pytest.mark.parametrize(
    ("name", "hints"), list(numeric_keys()), ids=lambda part: part if isinstance(part, str) else ""
)
def test_every_number_of_the_schema_has_a_bound_on_both_sides(name: str, hints: list[Any]) -> None:
    assert any(word in repr(hints) for word in ("Ge(", "Gt(", "ge=", "gt=")), name
    assert any(word in repr(hints) for word in ("Le(", "Lt(", "le=", "lt=")), name


@pytest.mark.parametrize(
    "value", ["nan", "inf", "-inf", "-1", "0", "true", '"7"', "[7]", "{ a = 7 }", "1979-05-27", HUGE]
)
@pytest.mark.parametrize("key", ["batch_size", "steps", "epochs", "learning_rate", "keep_checkpoints", "eval_every"])
def test_what_is_no_number_of_that_kind_is_one_error(said, key: str, value: str) -> None:
    (problem,) = said(f"{GOOD}[training]\n{key} = {value}\n")
    assert problem.startswith(f"recipe.toml:6: training.{key}")
    assert "must be" in problem


def test_all_absurd_numbers_of_a_recipe_are_said_at_once(said) -> None:
    text = GOOD + "max_length = 1000000000000\n[training]\nbatch_size = 1000000000\nsteps = 0\n[adapter]\nrank = -1\n"
    assert [line.partition(" = ")[0] for line in said(text)] == [
        "recipe.toml:5: data.max_length",
        "recipe.toml:7: training.batch_size",
        "recipe.toml:8: training.steps",
        "recipe.toml:10: adapter.rank",
    ]


ODD_TEXTS = [
    ("control characters", '[model]\nbase = "a\\u0000b"\n[data]\ntrain = "a\\nb"\n[output]\nname = "\\u001b"\n', 3),
    ("direction marks", GOOD + '[output]\ndirectory = "a\\u202eb"\n', 1),
    ("a name that leads out", GOOD + '[output]\nname = ".."\n', 1),
    ("a name with a slash", GOOD + '[output]\nname = "a/b"\n', 1),
    ("a name with a line end", GOOD + '[output]\nname = "a\\n"\n', 1),
    ("an empty name", GOOD + '[output]\nname = ""\ndirectory = ""\n', 2),
    ("a long name", GOOD + f'[output]\nname = "{"é" * (LONGEST_NAME // 2 + 1)}"\n', 1),
    ("long paths", f'[model]\nbase = "/{"a" * 300}"\n[data]\ntrain = "{"b" * 300}"\n', 2),
    ("longer paths", f'[model]\nbase = "./{"a/" * 5000}"\n[data]\ntrain = "{"b" * 5000}"\n', 2),
    ("homes of nobody", '[model]\nbase = "~none/m"\n[data]\ntrain = "~none/r"\nchat_template = "~none/t"\n', 3),
    ("nothing", "", 2),
    ("many lists", GOOD + "x = " + "[" * 100_000 + "]" * 100_000, 1),
    ("many tables", GOOD + "x = " + "{a=" * 400 + "1" + "}" * 400, 1),
    ("many dots", GOOD + ".".join("a" * 60_000) + " = 1\n", 1),
    ("many dots in a header", GOOD + "[" + ".".join("a" * 60_000) + "]\n", 1),
    ("many quoted dots", GOOD + ".".join(['"a"'] * 20_000) + " = 1\n", 1),
    ("a number of many digits", GOOD + "[training]\nsteps = " + "9" * 100_000, 1),
    ("a long hexadecimal number", GOOD + "[training]\nseed = 0x" + "f" * 20_000, 1),
    ("megabytes", GOOD + "#" * 10_000_000, 1),
    ("not a text", b"\xff\xfe[\x00m\x00", 1),
    ("half a character", GOOD + 'x = "\\ud800"\n', 1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "count"), ODD_TEXTS, ids=[name for name, *_ in ODD_TEXTS])
def test_odd_texts_are_refused_line_by_line(said, name: str, text: str | bytes, count: int) -> None:
    problems = said(text)
    assert len(problems) == count
    assert all(len(problem) < 600 for problem in problems)


def test_a_file_that_is_full_of_unknown_keys_is_not_answered_with_a_line_for_each(said) -> None:
    problems = said(GOOD + "".join(f"key{number} = 1\n" for number in range(10_000)))
    assert len(problems) == MOST_SHOWN + 1
    assert problems[0] == f"recipe.toml: has {10_000 - MOST_SHOWN} mistakes more"


ODD_CHANGES = [
    "output.directory=\udcff",
    f"training.steps={'9' * 5000}",
    f"training.steps={'[' * 100_000}",
    f"{'a.' * 50_000}b=1",
    "training.steps=1\nx=2",
    "data.train=\0",
    "model=1",
    "=",
    "a.=1",
    f"data.train=[{'1,' * 500}]",
    "training.steps=0xg",
]


@pytest.mark.parametrize("change", ODD_CHANGES, ids=lambda change: ascii(change)[:24])
def test_odd_changes_are_refused_like_odd_files(said, change: str) -> None:
    problems = said(GOOD, change)
    assert problems
    assert all(problem.startswith(("--set", "recipe.toml: has")) and len(problem) < 600 for problem in problems)


def test_a_recipe_that_never_ends_is_read_up_to_its_longest() -> None:
    with pytest.raises(RecipeError, match="is larger than"):
        load_recipe(Path("/dev/zero"))
    assert LONGEST_RECIPE < 10**6


def test_the_largest_batch_is_planned_without_counting_up_to_it() -> None:
    tables = {"model": {"base": "a/b"}, "data": {"train": "r", "max_length": 1}, "training": {"batch_size": 1_048_573}}
    plan = make_plan(parse_recipe(tables), Device("cpu", "a CPU", 2**34, 2**34, bf16=False))
    assert plan.micro_batch_size == 1  # a prime number has no other micro-batch of at most 4,096 rows


def test_a_weight_decay_that_turns_weights_around_is_refused(said) -> None:
    (problem,) = said(GOOD + "[training]\nlearning_rate = 0.5\nweight_decay = 2\n")
    assert problem == (
        "recipe.toml:7: training.weight_decay = 2: each step takes learning_rate x weight_decay = 1 of a weight away, "
        "which must be below 1"
    )


@pytest.mark.parametrize("name", ["a\nb", "x" * 240, "a\x1b[31mb"])
def test_a_recipe_whose_file_name_is_no_folders_is_told_to_name_its_run(name: str) -> None:
    with pytest.raises(QtuneError, match=r"--set output\.name=NAME"):
        require_name(name)


def test_where_a_file_or_a_link_to_nowhere_lies_no_run_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link", "file/below"):
        with pytest.raises(QtuneError, match=r"output.directory: .* cannot be written.*; name another folder"):
            require_writable(tmp_path / name)


def fuzzed_recipes(seed: int, count: int) -> Iterator[str]:
    """Recipes with a few random changes: values of every kind under every key, and damaged characters."""
    generator = random.Random(seed)
    words = ['""', '"auto"', '"\\u0000"', f'"{"x" * 5000}"', '"8GiB"', '"none"', '"../.."', '"\\u202e"', "1979-05-27"]
    numbers = ["0", "-1", "1", "7", HUGE, "1e999", "nan", "-inf", "true", "1_0", f"0x{'f' * 40}"]
    values = [*words, *numbers, "[]", "[[]]", "{}", '["a", 1]']
    keys = [(name, key) for name, field in Recipe.model_fields.items() for key in _keys_of(field.annotation)]
    for _ in range(count):
        tables: dict[str, list[str]] = {"model": ['base = "org/model"'], "data": ['train = "rows.jsonl"']}
        for table, key in generator.sample(keys, generator.randint(1, 6)):
            tables.setdefault(table, []).append(f"{key} = {generator.choice(values)}")
        text = "".join(f"[{table}]\n" + "\n".join(lines) + "\n" for table, lines in tables.items())
        for _ in range(generator.choice((0, 0, 1, 3))):
            at = generator.randrange(len(text))
            text = (
                text[:at] + generator.choice(["", '"', "[", "]", "=", "\n", "\0", "é", ".", "{", "#"]) + text[at + 1 :]
            )
        yield text


def _keys_of(annotation: Any) -> list[str]:
    tables = [annotation, *get_args(annotation)]
    return sorted({key for table in tables if hasattr(table, "model_fields") for key in table.model_fields})


@pytest.mark.slow
def test_no_random_recipe_ends_in_anything_but_a_recipe_or_its_mistakes(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    refused = 0
    for text in fuzzed_recipes(FUZZ_SEED, 3000 * FUZZED):
        try:
            check_recipe(text, tmp_path / "recipe.toml")
        except RecipeError:
            refused += 1
    assert 0 < refused < 3000 * FUZZED


ABSURD_OPTIONS = [
    ["chat", "run", "--temperature", "nan"],
    ["chat", "run", "--temperature", "1e300"],
    ["chat", "run", "--top-p", "nan"],
    ["chat", "run", "--seed", "-1"],
    ["chat", "run", "--seed", "1" + "0" * 40],
    ["chat", "run", "--max-new-tokens", "1" + "0" * 20],
    ["eval", "run", "--rows", "1" + "0" * 20],
    ["eval", "run", "--show", "1" + "0" * 20],
    ["check", "recipe", "--rows", "1" + "0" * 20],
    ["profile", "recipe", "--length", "1" + "0" * 20],
]


@pytest.mark.parametrize("arguments", ABSURD_OPTIONS, ids=lambda arguments: " ".join(arguments)[:40])
def test_the_numbers_of_the_command_line_are_bounded_too(arguments: list[str]) -> None:
    ended = CliRunner().invoke(cli.app, arguments)
    assert ended.exit_code == 2
    place = f"qtune {arguments[0]} {arguments[2]} "
    assert ended.output.startswith(f"error: {place}"), ended.output


@pytest.mark.parametrize("size", ["9" * 400, "9" * 30, "0", "1e9", "٣GiB"])
def test_a_size_that_no_memory_has_is_refused(size: str) -> None:
    with pytest.raises(QtuneError, match="write it as 8GiB or 512MiB"):
        size_in_bytes(size, "--vram")
