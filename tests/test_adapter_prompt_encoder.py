"""A residual soft prompt begins as exactly the words that it was given, and what is saved of it is what it computes."""

import tomllib
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qtune.adapter.attach import attach_adapter
from qtune.adapter.prompt_encoder import measure_unit, residual_prompts
from qtune.adapter.starts import Material, row_ids, start_prompt
from qtune.adapter.state import STATE_FILE, load_trained_state, save_trained_state
from qtune.device.present import Device
from qtune.plan import make_plan
from qtune.recipe.faults import Faulty
from qtune.recipe.parse import parse_recipe
from qtune.recipe.schema import PromptTuning, PTuning

CPU = Device("cpu", "CPU", 8 * 2**30, 6 * 2**30, bf16=False)
ROWS = Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9], [10, 11, 12, 13]]})
KINDS = {
    "prompt tuning": PromptTuning(kind="prompt-tuning", virtual_tokens=6, residual=True, encoder_hidden_size=8),
    "p-tuning, mlp": PTuning(kind="p-tuning", virtual_tokens=6, residual=True),
    "p-tuning, lstm": PTuning(kind="p-tuning", virtual_tokens=6, residual=True, encoder="lstm", encoder_hidden_size=8),
}


def started(base: Path, adapter: PromptTuning | PTuning, seed: int = 0) -> PeftModel:
    plan = make_plan(parse_recipe({"model": {"base": "x"}, "data": {"train": "y"}}), CPU)
    torch.manual_seed(seed)
    model = attach_adapter(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter, plan)
    measure_unit(model)
    start_prompt(model, adapter, Material(AutoTokenizer.from_pretrained(base), ROWS, 2), seed)
    return model


def prompt_of(model: PeftModel) -> torch.Tensor:
    return model.get_prompt(1)[0]


@pytest.mark.parametrize("name", KINDS)
def test_it_begins_as_the_embeddings_of_its_text_at_its_scale(tiny_model: Path, name: str) -> None:
    given = {"initialization": "text", "text": "You are brief.", "vector_rate": 4.0, "vector_scale": 8.0}
    model = started(tiny_model, KINDS[name].model_copy(update=given))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids = (tokenizer("You are brief.", add_special_tokens=False)["input_ids"] * 6)[:6]
    words = model.get_base_model().get_input_embeddings()(torch.tensor(ids))
    torch.testing.assert_close(prompt_of(model), 8 * words, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", KINDS)
def test_every_part_of_it_has_a_gradient_after_its_first_step(tiny_model: Path, name: str) -> None:
    model = started(tiny_model, KINDS[name])
    optimizer = torch.optim.SGD(model.prompt_encoder.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        prompt_of(model).sin().sum().backward()
        optimizer.step()
    still = [key for key, weight in model.prompt_encoder.named_parameters() if not weight.grad.any()]
    assert still == []


@pytest.mark.parametrize("rate", [1.0, 5.0])
def test_an_adam_step_moves_its_vectors_by_their_rate_in_units_of_the_vocabulary(tiny_model: Path, rate: float) -> None:
    model = started(tiny_model, KINDS["prompt tuning"].model_copy(update={"vector_rate": rate}))
    encoder = model.prompt_encoder["default"]
    table = model.get_base_model().get_input_embeddings().weight
    before = prompt_of(model).detach().clone()
    optimizer = torch.optim.Adam([encoder.table], lr=1e-3)
    (prompt_of(model) * torch.randn(before.shape)).sum().backward()
    optimizer.step()
    moved = (prompt_of(model).detach() - before).abs()
    expected = 1e-3 * rate * float(table.pow(2).mean().sqrt())
    assert float(moved.mean()) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("name", KINDS)
def test_a_saved_prompt_is_the_same_on_a_base_whose_embeddings_measure_otherwise(
    tiny_model: Path, tmp_path: Path, name: str
) -> None:
    """As they do where they are kept in fewer bits: the unit is part of what was trained."""
    adapter = KINDS[name].model_copy(update={"initialization": "text", "text": "You are brief.", "vector_scale": 8.0})
    model = started(tiny_model, adapter)
    save_trained_state(model, tmp_path)
    again = started(tiny_model, adapter, seed=1)
    for encoder in residual_prompts(again):
        encoder.unit *= 1.05
    load_trained_state(again, tmp_path)
    torch.testing.assert_close(prompt_of(again), prompt_of(model), rtol=0, atol=0)
    # The state of an older version says no unit: then it is the measured one.
    state = load_file(tmp_path / STATE_FILE)
    save_file(state, tmp_path / STATE_FILE)
    older = started(tiny_model, adapter, seed=1)
    load_trained_state(older, tmp_path)
    torch.testing.assert_close(prompt_of(older), prompt_of(model), rtol=0, atol=0)


def test_rows_end_whole_before_the_row_that_is_asked() -> None:
    train = Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5], [6, 7, 8, 9]]})
    rows = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    ids = row_ids(train, 5, seed=1)
    assert any(ids[-len(row) :] == row for row in rows)
    assert len(ids) == 5
    assert len(row_ids(train, 30, seed=1)) == 30, "few rows are repeated"
    assert {tuple(row_ids(train, 5, seed)) for seed in range(9)} != {tuple(ids)}, "the seed draws them"


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ('kind = "p-tuning"\ninitialization = "rows"', "they would not start as words; set residual = true"),
        ('kind = "prompt-tuning"\nvector_rate = 2.0', "set residual = true or remove the key"),
        ('kind = "prompt-tuning"\nvector_scale = 8.0', "only vectors of a residual have a size; set residual = true"),
        ('kind = "prompt-tuning"\nencoder_hidden_size = 8', "only residual has a width; set residual = true"),
        ('kind = "p-tuning"\nresidual = true\ninitialization = "text"', "belong together; give both or neither"),
    ],
)
def test_keys_that_need_a_residual_say_so(adapter: str, said: str) -> None:
    tables = {"model": {"base": "x"}, "data": {"train": "y"}, "adapter": tomllib.loads(adapter)}
    with pytest.raises(Faulty) as caught:
        parse_recipe(tables)
    assert said in str(caught.value)
