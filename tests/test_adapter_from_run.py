"""A run may start as an earlier one ended, on new rows: every kind of adapter, its prompt encoder included."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from export_models import tiny_run

from qtune.adapter.attach import attach_adapter
from qtune.adapter.from_run import earlier_adapter
from qtune.adapter.starts import Material, start
from qtune.adapter.state import STATE_FILE, trained_state
from qtune.device.present import present_device
from qtune.errors import RecipeError, RunError
from qtune.model.load import load_base, load_tokenizer
from qtune.plan import make_plan
from qtune.recipe.file import check_recipe
from qtune.recipe.parse import parse_recipe
from qtune.recipe.schema import Recipe
from qtune.run.folder import RunDir
from qtune.run.resolved import resolved_recipe

# peft 0.21.2 asks transformers 5.23 for the name that it is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

KINDS = [
    'kind = "lora"\nrank = 4',
    'kind = "p-tuning"\nvirtual_tokens = 3\nencoder_hidden_size = 32',
    'kind = "prompt-tuning"\nvirtual_tokens = 3',
    'kind = "p-tuning"\nvirtual_tokens = 3\nresidual = true\ninitialization = "vocabulary"',
    'kind = "prompt-tuning"\nvirtual_tokens = 3\nresidual = true\nvector_rate = 4.0',
    'kind = "prefix-tuning"\nvirtual_tokens = 3',
    'kind = "ia3"',
]


def going_on(run: RunDir, **changes: object) -> Recipe:
    recipe = resolved_recipe(run)
    adapter = recipe.adapter.model_copy(update={"start_from": str(run.path), **changes})
    return recipe.model_copy(update={"adapter": adapter})


def started(recipe: Recipe) -> dict[str, torch.Tensor]:
    plan = make_plan(recipe, present_device())
    model = attach_adapter(load_base(recipe.model, recipe.quantization, plan), recipe.adapter, plan)
    tokenizer = load_tokenizer(recipe.model)
    start(model, recipe, Material(tokenizer, Dataset.from_dict({}), 1))
    return trained_state(model)


@pytest.mark.parametrize("adapter", KINDS)
def test_every_kind_starts_with_the_earlier_run_s_values(adapter: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    run = tiny_run(tmp_path, adapter)
    saved = load_file(run.adapter / "trained_state.safetensors")
    now = started(going_on(run))
    assert now.keys() == saved.keys()
    assert all(torch.equal(now[name], tensor) for name, tensor in saved.items())


def test_an_adapter_of_another_shape_or_meaning_is_refused_with_both_values(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, KINDS[0])
    with pytest.raises(RunError) as caught:
        started(going_on(run, rank=8, alpha=64))
    assert str(caught.value) == (
        f"{run.path}: adapter.alpha = 32 there, 64 in the recipe\n{run.path}: adapter.rank = 4 there, 8 in the recipe"
    )


def test_another_kind_is_refused_by_its_name_alone(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, KINDS[0])
    recipe = going_on(run)
    other = parse_recipe({"model": {"base": recipe.model.base}, "data": {"train": "x"}, "adapter": {"kind": "ia3"}})
    adapter = other.adapter.model_copy(update={"start_from": str(run.path)})
    with pytest.raises(RunError) as caught:
        earlier_adapter(other.model_copy(update={"adapter": adapter}))
    assert str(caught.value) == f"{run.path}: adapter.kind = 'lora' there, 'ia3' in the recipe"


def test_a_base_is_the_same_however_its_folder_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run(tmp_path, KINDS[0])
    recipe = going_on(run)
    monkeypatch.chdir(tmp_path)
    model = recipe.model.model_copy(update={"base": "./base"})
    assert earlier_adapter(recipe.model_copy(update={"model": model})) == run.adapter


def test_a_run_without_its_trained_state_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, KINDS[0])
    (run.adapter / STATE_FILE).unlink()
    with pytest.raises(RunError, match="keeps no trained state to start from"):
        earlier_adapter(going_on(run))


def test_a_run_that_is_not_there_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    text = '[model]\nbase = "builtin:smollm2-135m-instruct"\n[adapter]\nstart_from = "runs/none"\n'
    text += '[data]\ntrain = "rows.jsonl"\n'
    with pytest.raises(RecipeError, match=r'recipe\.toml:4: adapter\.start_from = "runs/none": is not a finished run'):
        check_recipe(text, tmp_path / "recipe.toml")
