"""The recipes that come with qtune: each is complete, true for its data, planned on any device, and fits one screen."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tomlkit
from chat_families import FAMILIES, tokenizer_of

from qtune.data.findings import gate
from qtune.data.inspection import inspect
from qtune.data.prepare import prepare
from qtune.device.present import Device
from qtune.model.builtin import builtin_folder
from qtune.model.load import load_tokenizer
from qtune.plan import make_plan
from qtune.recipe.file import load_recipe
from qtune.recipe.schema import Lora, Model, PromptTuning, PTuning, Recipe
from qtune.recipe.shipped import shipped_recipes
from qtune.recipe.steps import few_steps_of_a_prompt
from qtune.run.resolved import resolved_text

GIB = 1 << 30
CPU = Device("cpu", "CPU, 2 threads", 16 * GIB, 12 * GIB, bf16=False)
CARD = Device("cuda", "NVIDIA GeForce RTX 3060 Ti", 8 * GIB, 7 * GIB, bf16=True, capability=(8, 6))
OLD_CARD = Device("cuda", "NVIDIA GeForce RTX 2060", 6 * GIB, 5 * GIB, bf16=False, capability=(7, 5))
RECIPES = shipped_recipes()
TAPLO = shutil.which("taplo", path=f"{Path(sys.executable).parent}:/usr/bin:/usr/local/bin")

every_recipe = pytest.mark.parametrize("file", RECIPES.values(), ids=RECIPES.keys())


def test_the_promised_recipes_are_there():
    kinds = {name: load_recipe(file).recipe.adapter for name, file in RECIPES.items()}
    expected = {
        "quickstart": Lora,
        "quickstart_p_tuning": PTuning,
        "quickstart_prompt_tuning": PromptTuning,
        "llama_lora": Lora,
        "llama_p_tuning": PTuning,
        "qwen_lora": Lora,
        "mistral_lora": Lora,
        "gemma_lora": Lora,
        "card_8gb": Lora,
    }
    assert {name: type(adapter) for name, adapter in kinds.items()} == expected


@every_recipe
def test_a_recipe_begins_with_what_it_is_and_fits_one_screen(file):
    lines = file.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    assert lines[0].endswith((".", ":"))
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 120


@every_recipe
def test_the_tables_come_in_the_order_of_the_run(file):
    order = ["model", "quantization", "adapter", "data", "training", "memory", "output"]
    tables = list(tomlkit.parse(file.read_text(encoding="utf-8")))
    assert tables == [name for name in order if name in tables]
    assert {"model", "quantization", "adapter", "data", "training"} <= set(tables)


@every_recipe
def test_a_formatter_leaves_a_recipe_alone(file, tmp_path):
    text = file.read_text(encoding="utf-8")
    assert tomlkit.dumps(tomlkit.parse(text)) == text
    if TAPLO is None:
        pytest.skip("taplo is not installed")
    copy = tmp_path / file.name
    copy.write_text(text, encoding="utf-8")
    # Whether comments of neighbouring lines are aligned is the reader's taste; everything else is not.
    subprocess.run([TAPLO, "fmt", "-o", "align_comments=false", copy], capture_output=True, check=True)
    assert copy.read_text(encoding="utf-8") == text


def training_files(recipe: Recipe) -> tuple[str, ...]:
    """Names beside the recipe."""
    train = recipe.data.train
    return (train,) if isinstance(train, str) else tuple(train)


@every_recipe
def test_data_files_are_there_and_small_enough_to_ship(file):
    resolved = load_recipe(file)
    for name in (*training_files(resolved.recipe), resolved.recipe.data.test):
        if name is not None:
            assert 10_000 < (resolved.folder / name).stat().st_size < 300_000


@every_recipe
@pytest.mark.parametrize("device", [CPU, CARD, OLD_CARD], ids=lambda device: device.name)
def test_a_recipe_is_planned_on_every_device(file, device, tmp_path):
    resolved = load_recipe(file)
    plan = make_plan(resolved.recipe, device)
    assert plan.micro_batch_size * plan.accumulation_steps == resolved.recipe.training.batch_size
    assert plan.compute_dtype == {CPU: "float32", CARD: "bfloat16", OLD_CARD: "float16"}[device]
    written = tmp_path / "resolved.toml"
    written.write_text(resolved_text(resolved, plan), encoding="utf-8")
    again = load_recipe(written).recipe
    assert again.adapter.model_copy(update={"dtype": "auto"}) == resolved.recipe.adapter
    assert "auto" not in (again.quantization.compute_dtype, again.training.optimizer, again.training.micro_batch_size)


@every_recipe
def test_a_learning_rate_is_within_an_order_of_magnitude_of_its_kinds(file):
    recipe = load_recipe(file).recipe
    usual, _ = recipe.adapter.usual_rate
    assert isinstance(recipe.training.learning_rate, float)
    assert usual / 10 <= recipe.training.learning_rate <= usual * 10


@pytest.mark.parametrize("name", ["quickstart_p_tuning", "quickstart_prompt_tuning"])
def test_a_residual_prompt_without_a_rate_takes_the_one_that_was_measured(name):
    recipe = load_recipe(RECIPES[name]).recipe
    assert recipe.adapter.residual
    left_out = load_recipe(RECIPES[name], ['training.learning_rate="auto"']).recipe
    assert make_plan(left_out, CARD).learning_rate == recipe.training.learning_rate


@every_recipe
def test_no_soft_prompt_is_shipped_with_steps_that_its_run_would_warn_of(file):
    recipe = load_recipe(file).recipe
    rows = sum(len((file.parent / name).read_text().splitlines()) for name in training_files(recipe))
    assert few_steps_of_a_prompt(recipe.adapter, recipe.training, int(0.95 * rows)) is None


def test_the_recipe_for_8_gb_saves_where_it_can():
    recipe = load_recipe(RECIPES["card_8gb"]).recipe
    plan = make_plan(recipe, CARD)
    assert (plan.micro_batch_size, plan.gradient_checkpointing, plan.optimizer) == (1, True, "paged-adamw-8bit")
    assert recipe.memory.budget == "7GiB"
    assert isinstance(recipe.adapter, Lora)
    assert recipe.adapter.rank <= 16


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(Model(base=str(builtin_folder("smollm2-135m-instruct"))))


@pytest.mark.slow
@every_recipe
def test_every_row_is_used_and_fits_the_recipes_length(file, tokenizer, tmp_path):
    """With the built-in tokenizer, whose 49152 tokens are fewer, and so its rows longer, than most models'."""
    resolved = load_recipe(file)
    prepared = prepare(resolved.recipe.data, tokenizer, resolved.folder, cache=tmp_path)
    assert prepared.bad_rows == []
    assert sum(source.stored.dropped_count for source in prepared.sources) == 0
    assert len(prepared.train) > 500
    assert prepared.validation is not None
    assert prepared.lengths.max() <= 0.9 * resolved.recipe.data.max_length


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("llama_lora", "llama3_1"),
        ("llama_p_tuning", "llama3_1"),
        ("qwen_lora", "qwen2_5"),
        ("mistral_lora", "mistral_v3"),
        ("card_8gb", "mistral_v3"),
        ("gemma_lora", "gemma3"),
    ],
)
def test_the_gate_lets_a_recipe_pass_with_the_template_of_its_models_family(name, family, tmp_path):
    # These tokenizers know few words, so their rows are longer than the real ones'.
    resolved = load_recipe(RECIPES[name], ["data.max_length=20000"])
    small = tokenizer_of(FAMILIES[family])
    prepared = prepare(resolved.recipe.data, small, resolved.folder, cache=tmp_path)
    gate(inspect(prepared, resolved.recipe.data, len(small)).findings, ())
    example = prepared.examples["train"][0]
    scored = small.decode([token for token in example["labels"] if token != -100])
    assert json.loads(example["conversation"])["messages"][-1]["content"] in scored


def test_the_docstring_rows_are_said_where_they_come_from():
    folder = RECIPES["llama_lora"].parent / "data"
    about = (folder / "README.md").read_text(encoding="utf-8")
    assert all(f"`{rows.name}`" in about for rows in folder.glob("*.jsonl"))
    count = len((folder / "docstrings.jsonl").read_text(encoding="utf-8").splitlines())
    assert f"| `docstrings.jsonl` | {count} questions" in about
    assert "Python Software Foundation" in about
