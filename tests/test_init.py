"""`qtune init`: recipes that run as they are written, in the schema's own words, and a schema for editors."""

import json
import random
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
import tomlkit
from conftest import run_qtune, run_warm_qtune
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from qtune import init as stage
from qtune.cli import app
from qtune.data.first_look import ENOUGH, FirstLook
from qtune.data.prepare import survey
from qtune.errors import RecipeError
from qtune.init import ADAPTERS, copied_recipe, look_at, recipe_schema, said_of_rows, shipped_summaries, write_recipe
from qtune.model.builtin import BUILTIN_MODELS
from qtune.model.config import read_config
from qtune.model.load import load_tokenizer
from qtune.model.quantization import require_kind
from qtune.model.reach import reach_of
from qtune.preflight import examine
from qtune.recipe.faults import Faulty
from qtune.recipe.file import Resolved, check_recipe, load_recipe
from qtune.recipe.parse import parse_recipe
from qtune.recipe.rates import doubtful_rate
from qtune.recipe.schema import Data, EightBit, FourBit, Lora, Model, Recipe, Training
from qtune.recipe.shipped import shipped_recipes
from qtune.recipe.steps import few_steps, few_steps_of_a_prompt

ROW = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}\n'
MODEL = "meta-llama/Llama-3.2-3B-Instruct"
TAPLO = shutil.which("taplo", path=f"{Path(sys.executable).parent}:/usr/bin:/usr/local/bin")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to be in, with rows to train on."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(ROW)
    return tmp_path


def new_recipe(base: str, data: str, adapter: str, file: Path) -> str:
    """As the command writes it: the rows are looked at first."""
    return stage.new_recipe(base, data, adapter, file, look_at(data))


def load_text(text: str) -> Recipe:
    """The recipe in a text, without the files that it names."""
    return parse_recipe(tomllib.loads(text))


def init(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_warm_qtune("init", *arguments)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_what_is_written_is_a_recipe_for_every_kind_of_adapter(here, adapter):
    file = here / "recipe.toml"
    write_recipe(new_recipe(MODEL, "rows.jsonl", adapter, file), file, force=False)
    recipe = load_recipe(file).recipe
    assert (recipe.model.base, recipe.data.train, recipe.adapter.kind) == (MODEL, "rows.jsonl", adapter)
    assert recipe.training.learning_rate == recipe.adapter.usual_rate[0]
    for key, value in recipe.adapter.first_values.items():
        assert getattr(recipe.adapter, key) == value


def test_a_soft_prompt_begins_as_it_was_measured_to_learn_best(here):
    """The quickstart's, but for its text: another task's is not known."""
    ours = check_recipe(new_recipe(MODEL, "rows.jsonl", "p-tuning", here / "recipe.toml"), here / "recipe.toml").recipe
    measured = load_recipe(shipped_recipes()["quickstart_p_tuning"]).recipe
    same = {"initialization": "rows", "text": None}
    assert ours.adapter == measured.adapter.model_copy(update=same)
    assert ours.training.learning_rate == measured.training.learning_rate
    assert ours.training.warmup == measured.training.warmup


@pytest.mark.parametrize("adapter", ["p-tuning", "prompt-tuning", "prefix-tuning"])
def test_whatever_stands_before_the_rows_begins_at_some_of_them_and_slowly(here, adapter):
    ours = check_recipe(new_recipe(MODEL, "rows.jsonl", adapter, here / "recipe.toml"), here / "recipe.toml").recipe
    assert (ours.adapter.initialization, ours.training.warmup) == ("rows", 0.1)


def test_the_commands_in_a_recipes_comment_name_it_as_it_was_named(here):
    (here / "sub dir").mkdir()
    text = new_recipe(MODEL, "rows.jsonl", "lora", Path("sub dir/r.toml"))
    assert "`qtune check 'sub dir/r.toml'`, train with `qtune run 'sub dir/r.toml'`" in text


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_what_is_written_fits_on_one_screen(here, adapter):
    lines = new_recipe(MODEL, "rows.jsonl", adapter, here / "recipe.toml").splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 120


def test_every_key_has_the_schemas_own_words_above_it(here):
    lines = new_recipe(MODEL, "rows.jsonl", "lora", here / "recipe.toml").splitlines()
    assert lines[lines.index("rank = 16") - 1] == f"# {Lora.model_fields['rank'].description}"
    keys = [number for number, line in enumerate(lines) if " = " in line and not line.startswith("#")]
    assert len(keys) > 10
    assert all(lines[number - 1].startswith("# ") for number in keys)


def test_the_tables_come_in_the_order_of_the_run(here):
    text = new_recipe(MODEL, "rows.jsonl", "lora", here / "recipe.toml")
    assert list(tomllib.loads(text)) == ["model", "quantization", "adapter", "data", "training", "memory", "output"]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_formatter_leaves_what_is_written_alone(here, adapter):
    file = here / "recipe.toml"
    text = new_recipe(MODEL, "rows.jsonl", adapter, file)
    assert tomlkit.dumps(tomlkit.parse(text)) == text
    if TAPLO is None:
        pytest.skip("taplo is not installed")
    file.write_text(text)
    subprocess.run([TAPLO, "fmt", file], capture_output=True, check=True)
    assert file.read_text() == text


def test_data_are_named_from_the_recipes_folder_when_they_lie_together(here):
    (here / "recipes").mkdir()
    file = here / "recipes" / "mine.toml"
    write_recipe(new_recipe(MODEL, "rows.jsonl", "lora", file), file, force=False)
    assert load_recipe(file).recipe.data.train == "../rows.jsonl"


def test_data_from_elsewhere_keep_their_whole_path(here, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "rows.jsonl"
    elsewhere.write_text(ROW)
    text = new_recipe(MODEL, str(elsewhere), "lora", here / "recipe.toml")
    assert tomllib.loads(text)["data"]["train"] == str(elsewhere)


def test_a_hub_dataset_is_no_path(here):
    text = new_recipe(MODEL, "hub:tatsu-lab/alpaca", "lora", here / "deep" / "recipe.toml")
    assert tomllib.loads(text)["data"]["train"] == "hub:tatsu-lab/alpaca"


def test_a_name_with_quotes_and_backslashes_survives(here):
    name = 'odd "name"\\rows.jsonl'
    (here / name).write_text(ROW)
    assert tomllib.loads(new_recipe(MODEL, name, "lora", here / "recipe.toml"))["data"]["train"] == name


def test_what_is_wrong_is_told_by_the_option_that_gave_it(here):
    with pytest.raises(RecipeError) as told:
        new_recipe("no/such/folder", "nothing.jsonl", "lora", Path("recipe.toml"))
    assert str(told.value).splitlines() == [
        '--base: "no/such/folder": neither a folder that exists nor a hub id (owner/name)',
        '--data: "nothing.jsonl": no such file or folder in .',
    ]
    with pytest.raises(RecipeError) as told:
        new_recipe("builtin:smollm2", "rwos.jsonl", "p-tune", Path("recipe.toml"))
    assert str(told.value).splitlines() == [
        "--adapter: p-tune: no such kind; did you mean 'p-tuning'?",
        "--base: builtin:smollm2: no such built-in model; did you mean 'builtin:smollm2-135m-instruct'?",
        "--data: \"rwos.jsonl\": no such file or folder in .; did you mean 'rows.jsonl'?",
    ]
    with pytest.raises(RecipeError) as told:
        copied_recipe("quickstat", Path("recipe.toml"), base="builtin:smollm2", data="nothing.jsonl")
    assert [problem.place for problem in told.value.problems] == ["--from", "--base", "--data"]
    with pytest.raises(RecipeError, match=r"^--adapter: p-tune: no such kind; did you mean 'p-tuning'\?$"):
        new_recipe(MODEL, "rows.jsonl", "p-tune", Path("recipe.toml"))
    with pytest.raises(RecipeError, match=r"^--adapter: QLoRA: no such kind; here that is lora, on a base in 4 bits "):
        new_recipe(MODEL, "rows.jsonl", "QLoRA", Path("recipe.toml"))
    with pytest.raises(RecipeError, match=r"^--from: quickstat: no such recipe; did you mean 'quickstart'\?$"):
        copied_recipe("quickstat", Path("recipe.toml"))


def test_a_recipe_that_is_there_is_replaced_only_by_force(here):
    file = here / "recipe.toml"
    file.write_text("mine")
    with pytest.raises(RecipeError, match="is there already"):
        write_recipe("theirs", file, force=False)
    assert file.read_text() == "mine"
    write_recipe("theirs", file, force=True)
    assert file.read_text() == "theirs"


def trained_on(resolved: Resolved) -> list[Path]:
    train = resolved.recipe.data.train
    return [(resolved.folder / source).resolve() for source in ((train,) if isinstance(train, str) else train)]


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_copy_says_what_the_original_says_with_paths_that_are_right_for_it(here, name):
    file = here / "copy.toml"
    write_recipe(copied_recipe(name, file), file, force=False)
    original, copy = load_recipe(shipped_recipes()[name]), load_recipe(file)
    assert trained_on(copy) == trained_on(original)
    same = {"data": copy.recipe.data.model_copy(update={"train": "", "test": None})}
    assert copy.recipe.model_copy(update=same) == original.recipe.model_copy(
        update={"data": original.recipe.data.model_copy(update={"train": "", "test": None})}
    )
    assert copy.text.count("#") == original.text.count("#")


@pytest.mark.parametrize("name", ["quickstart", "quickstart_prompt_tuning"])
def test_a_copy_with_other_data_keeps_no_rows_of_the_original(here, name):
    """Of one file, and of a list of them."""
    file = here / "copy.toml"
    write_recipe(copied_recipe(name, file, base=MODEL, data="rows.jsonl"), file, force=False)
    recipe = load_recipe(file).recipe
    assert (recipe.model.base, recipe.data.train, recipe.data.test) == (MODEL, "rows.jsonl", None)
    assert recipe.data.validation == 0.05


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if "tuning" in name])
def test_a_soft_prompt_that_is_copied_for_other_rows_says_nothing_of_those_it_was_written_for(here, name):
    done = init("--from", name, "--data", "rows.jsonl")
    text = Path("recipe.toml").read_text()
    adapter = load_recipe(Path("recipe.toml")).recipe.adapter
    assert (adapter.initialization, adapter.text, adapter.residual) == ("rows", None, True)
    assert "JSON" not in text.partition("[adapter]")[2].partition("[data]")[0]
    assert "word that says" not in text
    # With its own rows it keeps its text.
    kept = load_recipe(shipped_recipes()[name]).recipe.adapter
    assert done.returncode == 0
    init("--from", name, "--output", "same.toml")
    assert load_recipe(Path("same.toml")).recipe.adapter == kept


def test_steps_that_are_many_passes_over_other_rows_are_said(here):
    Path("rows.jsonl").write_text(rows_of(20))
    done = init("--from", "quickstart_p_tuning", "--data", "rows.jsonl")
    assert (
        "rows.jsonl: training.steps = 500 are 105 passes over so few rows; training.epochs in its place" in done.stderr
    )
    Path("rows.jsonl").write_text(rows_of(600))
    assert "passes over" not in init("--from", "quickstart_p_tuning", "--data", "rows.jsonl", "--force").stderr


def test_each_shipped_recipe_is_listed_with_its_first_comment_line():
    summaries = dict(shipped_summaries())
    assert summaries.keys() == shipped_recipes().keys()
    first = shipped_recipes()["quickstart"].read_text().splitlines()[0]
    assert f"# {summaries['quickstart']}" == first


@pytest.fixture(scope="module")
def schema():
    Draft202012Validator.check_schema(recipe_schema())
    return Draft202012Validator(recipe_schema())


@pytest.mark.parametrize("name", shipped_recipes())
def test_the_schema_accepts_every_shipped_recipe(schema, name):
    schema.validate(tomllib.loads(shipped_recipes()[name].read_text()))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_schema_accepts_what_init_writes(schema, here, adapter):
    schema.validate(tomllib.loads(new_recipe(MODEL, "rows.jsonl", adapter, here / "recipe.toml")))


MINIMAL = 'model.base = "a/b"\ndata.train = "rows.jsonl"\n'


@pytest.mark.parametrize(
    "good",
    [
        "",
        "adapter.rank = 4",
        'data.validation = "more.jsonl"',
        "data.validation = 0",
        'data.test = ["a.jsonl", { path = "b.jsonl", weight = 0.5 }, { hub = "a/b", split = "test" }]',
        'adapter = { kind = "prompt-tuning", initialization = "text", text = "Answer." }',
        'quantization.kind = "int8"',
        "training.eval_every = 10",
        'training.trackers = ["tensorboard"]',
    ],
)
def test_the_schema_accepts_every_way_to_say_a_thing(schema, good):
    tables = tomllib.loads(MINIMAL + good)
    schema.validate(tables)
    assert isinstance(parse_recipe(tables), Recipe)


@pytest.mark.parametrize(
    "broken",
    [
        "adapter.rnak = 16",
        "adapter.rank = 0",
        'adapter.rank = "16"',
        'adapter = { kind = "p-tuning", rank = 16 }',
        'adapter.kind = "lorra"',
        'memory.budget = "8 gigabytes"',
        "data.validation = 1.5",
        "data.max_length = -1",
        'training.optimizer = "sgd"',
        "training.batch_size = 1.5",
        "quantization.double_quantization = 1",
        'data.test = { path = "b.jsonl" }',
        "extra = 1",
        "output.nmae = 'x'",
    ],
)
def test_the_schema_refuses_what_a_recipe_refuses(schema, broken):
    tables = tomllib.loads(MINIMAL + broken)
    assert not schema.is_valid(tables)
    with pytest.raises(Faulty):
        parse_recipe(tables)


def test_the_schema_explains_every_key_and_knows_no_null():
    schema = recipe_schema()
    tables = {name: table for name, table in schema["$defs"].items() if "properties" in table}
    assert {"Model", "Lora", "PTuning", "Data", "Training"} <= tables.keys()
    for name, table in tables.items():
        assert table["additionalProperties"] is False, name
        assert all(key.get("description") for key in table["properties"].values()), name
    assert '"null"' not in json.dumps(schema)
    assert tables["Lora"]["properties"]["rank"]["description"] == Lora.model_fields["rank"].description


@pytest.mark.slow
def test_the_command_writes_a_recipe_and_says_where(tmp_path):
    rows, file = tmp_path / "rows.jsonl", tmp_path / "mine.toml"
    rows.write_text(rows_of(600))
    done = init("--base", MODEL, "--data", str(rows), "--output", str(file))
    assert (done.returncode, done.stdout) == (0, f"{file}\n")
    taken_for, *commands = done.stderr.splitlines()
    said = "600 rows of question and answer; the answer is learned, what stands before it is context"
    assert taken_for == f"{rows}: {said}"
    assert [shlex.split(line, comments=True) for line in commands] == [
        ["qtune", "check", str(file)],
        ["qtune", "run", str(file)],
    ]
    assert load_recipe(file).recipe.data.train == "rows.jsonl"
    again = init("--base", MODEL, "--data", str(rows), "--output", str(file))
    assert again.returncode == 2
    assert again.stderr.startswith(f"error: {file}: is there already;")


def rows_of(count: int) -> str:
    rows = [{"question": f"What is {number}?", "answer": f"It is {number}."} for number in range(count)]
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def advised_by_readme(count: int) -> dict[str, set[int]]:
    """What the README's table says of so many rows: the values of each key that it names, "3 to 5" as a range."""
    text = (Path(__file__).parents[1] / "README.md").read_text()
    table = re.findall(
        r"^\| ([^|]+) \| ([^|]+) \|$", text.partition("| rows | begin with |")[2].partition("\n\n")[0], re.MULTILINE
    )
    for rows, advice in table:
        if rows == "more" or (rows[0].isdigit() and count <= int(rows.split()[-1].replace(",", ""))):
            found = re.findall(r"`(epochs|batch_size) = (\d+)`(?: (to|or) (\d+))?", advice)
            return {
                key: set(range(int(low), int(high) + 1)) if word == "to" else {int(low), int(high or low)}
                for key, low, word, high in found
            }
    raise AssertionError(table)


@pytest.mark.parametrize("count", [50, 150, 400, 600, 5_000, 15_000])
def test_passes_and_rows_of_a_step_are_those_that_the_readme_advises(here, count):
    Path("rows.jsonl").write_text(rows_of(count))
    training = load_text(new_recipe(MODEL, "rows.jsonl", "lora", Path("recipe.toml"))).training
    advised = advised_by_readme(count)
    assert training.epochs in advised["epochs"]
    assert training.batch_size in advised.get("batch_size", {training.batch_size})


SHORT = ROW.replace("Hello.", "Hello. " * 20)


def row_of(size: int) -> str:
    return ROW.replace("Hello.", "Hello. " * (size // 7))


@pytest.mark.parametrize(("count", "size"), [(60, 150_000), (200, 3_000_000)])
def test_a_stray_row_does_not_decide_the_length_for_all_and_is_named(here, count, size):
    Path("rows.jsonl").write_text(SHORT * count + row_of(size))
    done = init("--base", MODEL, "--data", "rows.jsonl")
    assert load_recipe(Path("recipe.toml")).recipe.data.max_length == 2048
    assert f"1 of {count + 1} rows is longer than data.max_length = 2048, the longest rows.jsonl:{count + 1} (" in (
        done.stderr
    )


@pytest.mark.parametrize("long_rows", [10, 60])
def test_rows_that_are_long_as_a_kind_decide_the_length(here, long_rows):
    Path("rows.jsonl").write_text(SHORT * 60 + row_of(20_000) * long_rows)
    look = look_at("rows.jsonl")
    assert load_text(stage.new_recipe(MODEL, "rows.jsonl", "lora", Path("a.toml"), look)).data.max_length == 32_768


@pytest.mark.parametrize(
    ("config", "adapter", "most"),
    [
        ({"max_position_embeddings": 8192}, "lora", 8192),
        ({"max_position_embeddings": 8192}, "prompt-tuning", 8192 - 16),
        ({"n_positions": 1024}, "lora", 1024),
        ({"text_config": {"max_position_embeddings": 4096}}, "lora", 4096),
        ({"max_position_embeddings": 4096, "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 4096}},
         "lora", 16_384),
        ({}, "lora", stage.UNKNOWN_REACH),
    ],
)  # fmt: skip
def test_no_recipe_asks_for_more_tokens_than_the_model_has_positions(here, config, adapter, most):
    (here / "model").mkdir()
    (here / "model" / "config.json").write_text(json.dumps(config))
    look = FirstLook({}, 3, 0, None, (3_000_000,) * 3)
    data = load_text(stage.new_recipe(str(here / "model"), "rows.jsonl", adapter, Path("a.toml"), look)).data
    assert data.max_length == most


def test_the_built_in_models_positions_are_those_of_its_configuration():
    shipped = Path(stage.__file__).parent / "model" / "geometries" / "smollm2-135m.json"
    assert BUILTIN_MODELS["smollm2-135m-instruct"].positions == reach_of(json.loads(shipped.read_text())["config"])


def test_a_run_of_few_steps_is_said_of_rows_that_can_be_used_and_not_of_lines(here):
    """420 lines are steps enough, 20 rows are not."""
    Path("rows.jsonl").write_text(rows_of(20) + '{"question": "x"}\n' * 400)
    done = init("--from", "llama_lora", "--data", "rows.jsonl")
    assert "steps are few (19 rows, " in done.stderr


@pytest.mark.parametrize("words", [1, 40, 400, 4000])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_no_recipe_that_is_written_is_warned_of_for_what_init_has_chosen(here, adapter, words):
    counts = {
        1,
        2,
        8,
        19,
        20,
        49,
        50,
        142,
        499,
        500,
        501,
        2_000,
        10_000,
        10_527,
        *random.Random(words).sample(range(8, 20_000), 12),
    }
    tokens = len(f"{'sesquipedalian 1234 ' * words}".encode())
    for count in counts:
        look = FirstLook({}, min(count, ENOUGH), 0, None, (tokens,) * min(count, ENOUGH))
        recipe = load_text(stage.new_recipe(MODEL, "rows.jsonl", adapter, Path("recipe.toml"), look))
        held_out = round(recipe.data.validation * count) or (1 if recipe.data.validation else 0)
        trained = count - held_out
        assert trained >= 1
        assert few_steps(recipe.training, trained) is None
        assert few_steps_of_a_prompt(recipe.adapter, recipe.training, trained) is None
        assert doubtful_rate(recipe.adapter, recipe.training.learning_rate) is None
        # A token is one byte at least.
        assert recipe.data.max_length >= tokens + 100


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_check_has_nothing_to_say_of_a_recipe_as_it_was_written(here, tiny_model, adapter):
    for count in (8, 60):
        Path("rows.jsonl").write_text(rows_of(count))
        file = here / f"{adapter}-{count}.toml"
        file.write_text(new_recipe(str(tiny_model), "rows.jsonl", adapter, file))
        examined = examine(load_recipe(file, ["quantization.minimum_share=0.0"]))
        assert examined.warnings == []
        assert {finding.kind for finding in examined.inspection.findings} <= {"few-rows"}


def test_documents_are_counted_by_the_pieces_that_they_are_cut_into(here):
    Path("book.txt").write_text("So it goes on and on. " * 60_000)  # one document
    recipe = load_text(new_recipe(MODEL, "book.txt", "lora", Path("recipe.toml")))
    assert (recipe.data.max_length, recipe.training.epochs, recipe.training.batch_size) == (2048, 4, 4)


def test_an_export_is_not_quantized_once_more(here, tiny_model):
    folder = here / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "verify.json").write_text("{}")
    file = here / "recipe.toml"
    text = new_recipe(str(folder), "rows.jsonl", "lora", file)
    assert load_text(text).quantization.kind == "none"
    assert "NF4" not in text.split("\n")[0]
    file.write_text(text)
    assert not [said for said in examine(load_recipe(file)).warnings if "export" in said or "steps" in said]


@pytest.mark.parametrize(
    ("stored", "how", "quantization"),
    [
        ({"load_in_8bit": True}, "in int8", EightBit(kind="int8")),
        ({"load_in_4bit": True}, "in FP4", FourBit(kind="fp4", double_quantization=False)),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "in NF4", FourBit(double_quantization=False)),
    ],
)
def test_a_base_that_is_stored_quantized_is_held_as_it_is_stored(here, tiny_model, stored, how, quantization):
    config = json.loads((tiny_model / "config.json").read_text())
    (here / "config.json").write_text(json.dumps({**config, "quantization_config": stored}))
    text = new_recipe(str(here), "rows.jsonl", "lora", here / "recipe.toml")
    assert load_text(text).quantization == quantization
    assert text.split("\n")[0].endswith(f"whose weights stay {how}.")
    require_kind(read_config(str(here)), quantization)


HOLDS_NONE = "holds no row; a row is a line of JSONL, or one below CSV's names"


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.jsonl", ""), ("a.jsonl", "\n \n\n"), ("a.csv", "question,answer\n"), ("a.json", "[]"), ("a.txt", "")],
)
def test_a_file_without_rows_is_refused_and_no_recipe_is_written(here, name, text):
    Path(name).write_text(text)
    done = init("--base", MODEL, "--data", name)
    assert (done.returncode, done.stderr) == (2, f"error: --data: {name}: {HOLDS_NONE}\n")
    assert not Path("recipe.toml").exists()


def test_a_folder_without_rows_and_one_of_several_kinds_are_refused(here):
    (here / "empty").mkdir()
    (here / "mixed").mkdir()
    for name in ("a.jsonl", "b.csv"):
        (here / "mixed" / name).write_text(ROW)
    with pytest.raises(RecipeError, match=r"^--data: empty: a folder without data files; known kinds: "):
        look_at("empty")
    with pytest.raises(RecipeError, match=r"^--data: mixed: holds files of several kinds \(\.csv, \.jsonl\)"):
        look_at("mixed")


def from_no_row(data: str) -> str:
    return (
        "recipe.toml: there was no row that its epochs, rows of a step and lengths could follow from; once "
        f"{data} is mended, call init again, with --force"
    )


def test_nothing_in_a_recipe_follows_from_rows_of_which_none_can_be_used(here):
    Path("plants.csv").write_bytes(b"question,answer\n" + "Wächst er?,Ja.\n".encode("latin-1") * 150)
    done = init("--base", MODEL, "--data", "plants.csv")
    assert from_no_row("plants.csv") in done.stderr
    assert "qtune run" not in done.stderr
    recipe, default = load_recipe(Path("recipe.toml")).recipe, Data(train="plants.csv")
    assert recipe.training.epochs == Training().epochs
    assert recipe.data.validation == default.validation


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (rows_of(60), []),
        (rows_of(1), ["rows.jsonl: 1 row is few: below some 50 a model learns them by heart"]),
        (rows_of(9), ["rows.jsonl: 9 rows are few: below some 50 a model learns them by heart"]),
        (
            '{"question": "x"}\n',
            [
                "rows.jsonl: its only row cannot be used: rows.jsonl:1: columns question fit no known shape; "
                "'question' is there and 'answer' is missing",
                from_no_row("rows.jsonl"),
            ],
        ),
        (
            rows_of(60) + '{"question": "x"}\nnot JSON\n',
            [
                "rows.jsonl: 2 of 62 rows cannot be used: rows.jsonl:61: no 'answer' in a question-answer row; found "
                "question; qtune check recipe.toml names them all"
            ],
        ),
        (
            3 * '{"question": 7, "answer": "x"}\n',
            [
                "rows.jsonl: none of 3 rows can be used: rows.jsonl:1: question = 7: not a text; "
                "qtune check recipe.toml names them all",
                from_no_row("rows.jsonl"),
            ],
        ),
    ],
)
def test_rows_that_cannot_be_used_and_rows_that_are_few_are_a_sentence_each(here, text, said):
    Path("rows.jsonl").write_text(text)
    assert said_of_rows(look_at("rows.jsonl"), "rows.jsonl", Path("recipe.toml")) == said


SYSTEM_ROW = '{"messages": [{"role": "system", "content": "Be brief."}, ' + ROW.partition("[")[2]
ASKED_TWICE = json.dumps({"messages": [*json.loads(ROW)["messages"], *json.loads(ROW)["messages"]]}) + "\n"
UNWEIGHTED = ASKED_TWICE.replace('"Hello."', '"Hello.", "weight": 0', 1)
SHAREGPT = '{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}\n'
CONTEXT = "is learned, what stands before it is context"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (ROW, f"1 row of messages by user and assistant; the answer {CONTEXT}"),
        (SYSTEM_ROW * 2, f"2 rows of messages by system, user and assistant; the answer {CONTEXT}"),
        (
            ROW + ASKED_TWICE,
            f"2 rows of messages by user and assistant, 1 to 2 answers in each; every answer {CONTEXT}",
        ),
        (
            UNWEIGHTED,
            "1 row of messages by user and assistant, 2 answers in each; every answer but those with weight = 0 "
            f"{CONTEXT}",
        ),
        (SHAREGPT * 3, f"3 rows of conversations by user and assistant; the answer {CONTEXT}"),
        ('{"prompt": "Hi", "completion": "Hello."}\n' * 2, f"2 rows of prompt and completion; the answer {CONTEXT}"),
        (
            ROW * 2 + '{"question": "Hi", "answer": "Hello."}\nnot JSON\n',
            "3 rows (2 of messages, 1 of question and answer) by user and assistant; the answer " + CONTEXT,
        ),
        ('{"text": "Once."}\n' * 2, "2 rows of text; every token is learned"),
        (
            ROW + '{"text": "Once."}\n',
            f"2 rows (1 of messages, 1 of text) by user and assistant; the answer {CONTEXT}; of text every token is",
        ),
        ("not JSON\n", ""),
    ],
)
def test_what_rows_are_taken_for_and_what_is_learned_of_them_is_said(here: Path, text: str, said: str) -> None:
    Path("rows.jsonl").write_text(text)
    done = CliRunner().invoke(app, ["init", "--base", MODEL, "--data", "rows.jsonl"])
    assert done.exit_code == 0, done.output
    lines = [line for line in done.stderr.splitlines() if "learned" in line]
    assert lines == ([f"rows.jsonl: {said}"] if said else [])


def test_that_only_the_last_answer_is_learned_is_said(here: Path) -> None:
    Path("rows.jsonl").write_text(ASKED_TWICE)
    Path("recipe.toml").write_text(
        f'[model]\nbase = "{MODEL}"\n[data]\ntrain = "rows.jsonl"\nloss_on = "last-answer"\n'
    )
    (said,) = stage.said_of_shape(look_at("rows.jsonl"), "rows.jsonl", Path("recipe.toml"))
    assert "2 answers in each; the last answer of each is learned" in said


def test_what_is_said_of_rows_is_what_preparing_them_finds(here, tiny_model):
    Path("rows.jsonl").write_text(rows_of(20) + '{"question": "x"}\n' + "not JSON\n" + '{"messages": []}\n' + ROW)
    look = look_at("rows.jsonl")
    data = load_text(stage.new_recipe(str(tiny_model), "rows.jsonl", "lora", Path("recipe.toml"), look)).data
    stored = survey(data, load_tokenizer(Model(base=str(tiny_model))), here).sources[0].stored
    assert (look.rows, look.bad_count, look.first_bad.place) == (stored.rows, stored.bad_count, stored.bad[0].place)
    assert look.first_bad.message == stored.bad[0].message


def test_a_copy_whose_steps_would_be_few_says_so(here):
    Path("rows.jsonl").write_text(rows_of(150))
    done = init("--from", "llama_lora", "--data", "rows.jsonl")
    assert "steps are few (142 rows, " in done.stderr


def test_a_recipe_s_folder_is_made_and_finds_the_rows_and_a_taken_name_is_said_before_them(here: Path) -> None:
    result = CliRunner().invoke(app, ["init", "--base", MODEL, "--data", "rows.jsonl", "-o", "nowhere/deep/r.toml"])
    assert result.exit_code == 0, result.output
    assert 'train = "../../rows.jsonl"' in (here / "nowhere/deep/r.toml").read_text()
    (here / "taken.toml").touch()
    result = CliRunner().invoke(app, ["init", "--base", MODEL, "--data", "no.jsonl", "-o", "taken.toml"])
    assert "is there already" in str(result.exception), "before the rows, which are not there"


@pytest.mark.parametrize("adapter", sorted(ADAPTERS))
def test_every_key_of_a_new_recipe_is_explained(here: Path, adapter: str) -> None:
    lines = new_recipe(MODEL, "rows.jsonl", adapter, here / "new.toml").splitlines()
    keys = [(before, line) for before, line in pairwise(lines) if " = " in line and not line.startswith("#")]
    assert [line for before, line in keys if not before.startswith("# ") and " # " not in line] == []


OWN_COLUMNS = {
    "own.jsonl": '{"id": 7, "symptom": "My fern has curled leaves.", "advice": "That is thrips."}\n' * 600,
    "own.csv": "id,symptom,advice\n" + "7,My fern has curled leaves.,That is thrips.\n" * 600,
}


@pytest.mark.parametrize("name", OWN_COLUMNS)
@pytest.mark.parametrize("copied", [False, True])
def test_own_columns_are_renamed_in_the_recipe_and_it_is_said_what_they_are_taken_for(
    tmp_path, monkeypatch, name, copied
):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(OWN_COLUMNS[name])
    done = init(*(("--from", "quickstart") if copied else ("--base", MODEL)), "--data", name)
    assert done.returncode == 0
    assert done.stderr.partition("  qtune check ")[0] == (
        f"{name}: 600 rows of question and answer; the answer {CONTEXT}\n"
        f"{name}: 'symptom' is taken for 'question' and 'advice' is taken for 'answer'; if that is wrong, change "
        "data.columns in recipe.toml\n"
    )
    assert load_recipe(Path("recipe.toml")).recipe.data.columns == {"question": "symptom", "answer": "advice"}


WITHOUT_A_VALUE = {
    "own.jsonl": '{"id": 7, "symptom": null, "advice": "That is thrips."}\n',
    "own.csv": "id,symptom,advice\n7,,That is thrips.\n",
}


@pytest.mark.parametrize("name", OWN_COLUMNS)
def test_an_empty_first_cell_hides_no_column(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(WITHOUT_A_VALUE[name] + OWN_COLUMNS[name].removeprefix("id,symptom,advice\n"))
    look = look_at(name)
    assert look.columns == {"question": "symptom", "answer": "advice"}
    assert (look.rows, look.bad_count) == (601, 1)
    assert look.first_bad is not None
    assert "symptom" in look.first_bad.message
    assert look.first_bad.place in (f"{name}:1", f"{name}:2")


@pytest.mark.parametrize("row", [ROW, '{"chosen": "a b", "rejected": "c d"}\n', '{"number": 7}\n', "not JSON\n"])
def test_rows_of_a_known_shape_or_of_none_leave_the_columns_alone(tmp_path, monkeypatch, row):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(600 * row)
    assert "columns" not in new_recipe(MODEL, "rows.jsonl", "lora", Path("recipe.toml"))


def test_the_command_prints_the_schema_and_the_list():
    assert json.loads(run_qtune("init", "--schema").stdout) == recipe_schema()
    listed = init("--list").stdout
    assert all(name in listed for name in shipped_recipes())


def test_the_command_without_a_model_says_what_is_needed():
    done = init("--data", "rows.jsonl")
    assert done.returncode == 2
    assert "--base" in done.stderr
    assert done.stdout == ""


def test_the_command_does_not_ignore_an_adapter_that_a_copy_cannot_have():
    done = init("--from", "quickstart", "--adapter", "ia3")
    assert done.returncode == 2
    assert "--adapter is for a new recipe" in done.stderr


@pytest.mark.skipif(TAPLO is None, reason="taplo is not installed")
@pytest.mark.parametrize(("change", "code"), [("rank = 16", 0), ("rnak = 16", 1), ('rank = "16"', 1)])
def test_an_editors_checker_reads_the_schema_that_a_recipe_names(tmp_path, change, code):
    (tmp_path / "recipe.schema.json").write_text(json.dumps(recipe_schema()))
    file = tmp_path / "recipe.toml"
    file.write_text(f'#:schema ./recipe.schema.json\n[model]\nbase = "a/b"\n[adapter]\n{change}\n[data]\ntrain = "x"\n')
    done = subprocess.run([TAPLO, "check", file], capture_output=True, check=False, cwd=tmp_path)
    assert done.returncode == code


def test_init_needs_none_of_the_heavy_libraries():
    program = (
        "import sys; import qtune.cli, qtune.init\n"
        "print({'torch', 'transformers', 'peft', 'trl', 'bitsandbytes', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


NO_GGUF = "is a file, and no GGUF file; a base is a model folder, a hub id, a .gguf file or a built-in model"


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("smollm2-135m-instruct", "is no hub id (owner/name); did you mean 'builtin:smollm2-135m-instruct'?"),
        ("SmolLM2", "is no hub id (owner/name); did you mean 'builtin:smollm2-135m-instruct'?"),
        ("builtin:smolm2-135m-instruct", "no such built-in model; did you mean 'builtin:smollm2-135m-instruct'?"),
        ("empty", "has no config.json, so it is no model folder"),
        ("rows.jsonl", NO_GGUF),
        ("rows.gguf", NO_GGUF),
    ],
)
def test_a_base_is_checked_where_it_is_named(here, base, message):
    (here / "empty").mkdir()
    (here / "rows.jsonl").touch()
    (here / "rows.gguf").write_text(ROW)
    for make in (
        lambda: new_recipe(base, "rows.jsonl", "lora", here / "recipe.toml"),
        lambda: copied_recipe("quickstart", here / "recipe.toml", base=base),
    ):
        with pytest.raises(RecipeError) as caught:
            make()
        assert str(caught.value) == f"--base: {base}: {message}"


def test_an_adapter_and_a_run_are_no_bases(here):
    (here / "rows.jsonl").touch()
    (here / "adapter").mkdir()
    (here / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "org/model"}')
    with pytest.raises(RecipeError, match="--base: adapter: is a peft adapter of org/model, not a model"):
        new_recipe("adapter", "rows.jsonl", "lora", here / "recipe.toml")
