"""resolved.toml holds every value that a run used, with its origin, and is a recipe that means the same run."""

import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qtune.data.sources import find_sources
from qtune.device.present import Device
from qtune.plan import make_plan
from qtune.recipe.file import Resolved, check_recipe, leaves
from qtune.recipe.parse import parse_recipe
from qtune.recipe.schema import Recipe
from qtune.run.folder import RunDir
from qtune.run.resolved import as_written, read_resolved, resolved_recipe, resolved_text, settled_values

CARD = Device("cuda", "RTX 2080", 8 * 2**30, 7 * 2**30, bf16=False, capability=(7, 5))
OTHER_CARD = Device("cuda", "RTX 4090", 24 * 2**30, 23 * 2**30, bf16=True, capability=(8, 9))
BASE = '[model]\nbase = "org/model"\n[data]\ntrain = "rows.jsonl"\n'

RECIPES = {
    "smallest": BASE,
    "steps": BASE + "[training]\nsteps = 5\ncheckpoint_every = 2\neval_every = 'never'\n",
    "lists": BASE + '[adapter]\ntarget_modules = ["q_proj", "v_proj"]\n[training]\ntrackers = ["tensorboard"]\n',
    "int8": BASE + '[quantization]\nkind = "int8"\nminimum_share = 0.5\n',
    "unquantized": BASE + '[quantization]\nkind = "none"\n',
    "p-tuning": BASE + '[adapter]\nkind = "p-tuning"\nencoder = "lstm"\nencoder_layers = 1\n',
    "text prompt": BASE
    + '[adapter]\nkind = "prompt-tuning"\ninitialization = "text"\ntext = "Say \\"no\\" # or\\n\\tyes\\u007f."\n',
    "sources": '[model]\nbase = "org/model"\n[data]\ntrain = [\n"rows.jsonl",\n'
    '{ path = "rows.jsonl", weight = 0.5, format = "alpaca", '
    'columns = { instruction = "a question", output = "b" } },\n'
    '{ hub = "owner/name", split = "train[:10]" },\n"*.jsonl",\n"hub:a/b"]\ncolumns = { prompt = "q" }\n'
    'system_prompt = "Be brief."\nallow = ["too-long"]\nvalidation = 0\ntest = "rows.jsonl"\n',
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    return tmp_path


def resolved_in(folder: Path, text: str, *changes: str) -> Resolved:
    return check_recipe(text, folder / "recipe.toml", changes)


@pytest.mark.parametrize("name", RECIPES)
def test_it_is_a_recipe_whose_plan_is_the_runs_on_any_device(folder: Path, name: str) -> None:
    resolved = resolved_in(folder, RECIPES[name])
    plan = make_plan(resolved.recipe, CARD)
    elsewhere = folder / "runs" / "x" / "resolved.toml"
    again = check_recipe(resolved_text(resolved, plan), elsewhere)

    there = make_plan(again.recipe, OTHER_CARD)
    assert there.reasons == {}
    for value in ("compute_dtype", "adapter_dtype", "attention", "optimizer", "learning_rate", "micro_batch_size"):
        assert getattr(there, value) == getattr(plan, value), value
    # What was not "auto" is as it was, but that relative paths have become absolute.
    expected = {path: value for path, value, _ in settled_values(resolved, plan)}
    for path, value in leaves(again.recipe):
        if path not in (("data", "train"), ("data", "test")) and value not in (None, {}):
            assert value == expected.get(path, value), path
    assert again.recipe.training.steps == resolved.recipe.training.steps


def test_data_is_found_from_anywhere(folder: Path) -> None:
    resolved = resolved_in(folder, RECIPES["sources"])
    data = tomllib.loads(resolved_text(resolved, make_plan(resolved.recipe, CARD)))["data"]
    assert data["train"] == [
        f"{folder}/rows.jsonl",
        {
            "path": f"{folder}/rows.jsonl",
            "weight": 0.5,
            "format": "alpaca",
            "columns": {"instruction": "a question", "output": "b"},
        },
        {"hub": "owner/name", "split": "train[:10]", "weight": 1.0, "format": "auto"},
        f"{folder}/*.jsonl",
        "hub:a/b",
    ]
    assert data["test"] == f"{folder}/rows.jsonl"


def test_every_line_says_where_its_value_came_from(folder: Path) -> None:
    resolved = resolved_in(folder, BASE + "[training]\nepochs = 2\n", "adapter.rank=4")
    text = resolved_text(resolved.allowing(["too-long"]), make_plan(resolved.recipe, CARD))
    for line in (
        'base = "org/model"  # recipe: recipe.toml:2',
        'compute_dtype = "float16"  # rule: RTX 2080 has no bfloat16 products; float16 with loss scaling',
        "rank = 4  # --set",
        "alpha = 32  # default",
        "epochs = 2.0  # recipe: recipe.toml:6",
        'allow = ["too-long"]  # --allow',
        "gradient_checkpointing = true  # rule: activations are what fills a card",
    ):
        assert line in text.splitlines()
    values = [line for line in text.splitlines() if re.match(r"\w+ = ", line)]
    assert all(re.search(r"  # (recipe: |--set|--allow|default|rule: )", line) for line in values)
    assert "auto" not in {
        line.partition(" = ")[2].partition("  #")[0].strip('"')
        for line in values
        if "budget" not in line and "format" not in line
    }


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20))
def test_any_text_survives(folder: Path, text: str) -> None:
    resolved = resolved_in(folder, BASE)
    data = resolved.recipe.data.model_copy(update={"system_prompt": text})
    changed = Resolved(
        resolved.recipe.model_copy(update={"data": data}), resolved.origins, resolved.file, resolved.text
    )
    written = resolved_text(changed, make_plan(changed.recipe, CARD))
    assert tomllib.loads(written)["data"]["system_prompt"] == text


@pytest.mark.parametrize(
    "written",
    [
        '"rows.jsonl"',
        '"./rows.jsonl"',
        '"../rows.jsonl"',
        '[{ path = "inner/rows.jsonl", weight = 2.0 }, "rows.jsonl"]',
    ],
)
def test_rows_are_called_as_in_the_recipe_that_the_run_began_with(tmp_path: Path, written: str) -> None:
    folder = tmp_path / "recipes"
    for name in ("rows.jsonl", "../rows.jsonl", "inner/rows.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    text = f'[model]\nbase = "org/base"\n[data]\ntrain = {written}\n'
    resolved = check_recipe(text, folder / "mine.toml")
    run_dir = RunDir.create(tmp_path / "runs", "mine", text)
    run_dir.write_text(run_dir.resolved_file, resolved_text(resolved, make_plan(resolved.recipe, CARD)))
    recipe, there = as_written(run_dir, resolved_recipe(run_dir))

    def found(recipe: Recipe, folder: Path) -> list[tuple[str, str]]:
        sources = find_sources(recipe.data.train, recipe.data, folder)
        return [(source.files[0].name, source.fingerprint) for source in sources]

    assert found(recipe, there) == found(resolved.recipe, folder)
    again = read_resolved(run_dir)
    assert found(again.recipe, again.folder) == found(resolved.recipe, folder)
    # What is written of it for a part that goes on is as it was.
    assert (
        resolved_recipe(run_dir).data.train
        == parse_recipe(tomllib.loads(resolved_text(again, make_plan(again.recipe, CARD)))).data.train
    )


def test_rows_that_were_named_by_their_whole_path_or_by_set_keep_it(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    text = f'[model]\nbase = "org/base"\n[data]\ntrain = "{tmp_path}/rows.jsonl"\n'
    resolved = check_recipe(text, tmp_path / "mine.toml")
    run_dir = RunDir.create(tmp_path / "runs", "mine", text)
    run_dir.write_text(run_dir.resolved_file, resolved_text(resolved, make_plan(resolved.recipe, CARD)))
    recipe = resolved_recipe(run_dir)
    assert as_written(run_dir, recipe) == (recipe, run_dir.path)
    run_dir.recipe_file.write_text(text.replace(f"{tmp_path}/rows", "others"))
    assert as_written(run_dir, recipe) == (recipe, run_dir.path)


@pytest.mark.parametrize(
    ("written", "changes", "expected"),
    [
        ('train = "{elsewhere}/a.jsonl"\nvalidation = "a.jsonl"', (), ("{elsewhere}/a.jsonl", "a.jsonl")),
        ('train = "a.jsonl"\nvalidation = "{elsewhere}/a.jsonl"', (), ("a.jsonl", "{elsewhere}/a.jsonl")),
        ('train = ["{elsewhere}/a.jsonl", "a.jsonl"]', (), (("{elsewhere}/a.jsonl", "a.jsonl"), 0.05)),
        (
            'train = "a.jsonl"\nvalidation = "b.jsonl"',
            ("data.train={elsewhere}/a.jsonl",),
            ("{elsewhere}/a.jsonl", "b.jsonl"),
        ),
        ('train = "{other}/a.jsonl"\nvalidation = "../other/a.jsonl"', (), ("{other}/a.jsonl", "../other/a.jsonl")),
    ],
)
def test_each_path_is_called_as_it_was_written_where_several_end_alike(
    tmp_path: Path, written: str, changes: tuple[str, ...], expected: tuple[object, object]
) -> None:
    home, elsewhere, other = tmp_path / "home", tmp_path / "elsewhere", tmp_path / "other"
    for file in (home / "a.jsonl", home / "b.jsonl", elsewhere / "a.jsonl", other / "a.jsonl"):
        file.parent.mkdir(exist_ok=True)
        file.touch()

    def filled(value: object) -> object:
        if isinstance(value, tuple):
            return tuple(map(filled, value))
        return value.format(elsewhere=elsewhere, other=other) if isinstance(value, str) else value

    text = f'[model]\nbase = "org/base"\n[data]\n{filled(written)}\n'
    resolved = check_recipe(text, home / "mine.toml", [str(filled(change)) for change in changes])
    run_dir = RunDir.create(tmp_path / "runs", "mine", text)
    run_dir.write_text(run_dir.resolved_file, resolved_text(resolved, make_plan(resolved.recipe, CARD)))
    recipe, folder = as_written(run_dir, resolved_recipe(run_dir))
    assert (recipe.data.train, recipe.data.validation) == filled(expected)
    assert folder == home
