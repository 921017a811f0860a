"""What the stages must know of a kind of adapter stands in its table; a sixth kind needs that, and peft's words."""

import ast
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
import torch
from conftest import WriteRecipe
from export_models import tiny_base, tiny_tokenizer
from peft import PeftConfig, VeraConfig
from pydantic import Field, PositiveInt
from transformers import AutoConfig, AutoModelForCausalLM

import qtune
from qtune.adapter import attach
from qtune.adapter.attach import attach_adapter
from qtune.check import check
from qtune.device.present import Device
from qtune.errors import ModelError
from qtune.export.export import Options, export_run
from qtune.plan import make_plan
from qtune.recipe import parse
from qtune.recipe.file import load_recipe
from qtune.recipe.parse import parse_recipe
from qtune.recipe.schema import Adapter, AdapterTable, Lora, Recipe
from qtune.training import train
from qtune.tuned.evaluate import evaluate

CPU = Device("cpu", "CPU", 8 << 30, 6 << 30, bf16=False)


@pytest.fixture
def sixth_kind(monkeypatch: pytest.MonkeyPatch) -> str:
    """VeRA as a kind of ours: a table with its facts, and its translation. Returns the [adapter] table of a recipe."""

    class Vera(AdapterTable):
        """VeRA: trained scales of random matrices that all layers share (arXiv:2310.11454)."""

        in_words = "a VeRA adapter"
        export = "alone"
        auto_learning_rate = (4e-3, "scales have far to go")
        first_keys = ("kind", "rank")

        kind: Literal["vera"]
        """Scales of shared random matrices."""
        rank: PositiveInt = 4
        """Inner dimension of both matrices."""

    class WithVera(Recipe):
        """A recipe that knows it."""

        adapter: Adapter | Vera = Field(default_factory=Lora, discriminator="kind")

    def config(adapter: AdapterTable) -> PeftConfig:
        if isinstance(adapter, Vera):
            return VeraConfig(task_type="CAUSAL_LM", r=adapter.rank, target_modules=["q_proj", "o_proj"])
        return ours(adapter)

    ours: Any = attach.peft_config
    monkeypatch.setattr(parse, "Recipe", WithVera)
    monkeypatch.setattr(attach, "peft_config", config)
    return 'kind = "vera"\nrank = 2'


@pytest.mark.slow
def test_a_sixth_kind_is_checked_trained_evaluated_resumed_and_exported(
    sixth_kind: str, write_recipe: WriteRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(adapter=sixth_kind, quantization='kind = "none"', training="steps = 2\nbatch_size = 2")
    examined = check(load_recipe(recipe))
    assert not isinstance(examined.memory, str), examined.memory
    assert examined.plan.learning_rate == 4e-3
    run_dir = train.run(load_recipe(recipe))
    assert run_dir.is_finished
    assert evaluate(run_dir, rows=2).rows == 2
    folder = export_run(run_dir, Options())
    assert (folder / "README.md").read_text().count("# A VeRA adapter for ") == 1
    going_on = write_recipe("on", adapter=f'{sixth_kind}\nstart_from = "{run_dir.path}"', quantization='kind = "none"')
    assert train.run(load_recipe(going_on, ["training.steps=1"])).is_finished


def test_every_kind_states_every_fact() -> None:
    facts = ("in_words", "export", "auto_learning_rate", "peft_checkpoints", "predicts_first_token", "first_keys")
    for table in get_args(Adapter):
        for fact in facts:
            assert getattr(table, fact) is not None, (table, fact)
        assert set(table.first_keys) <= set(table.model_fields)


def test_no_stage_asks_for_a_kind_by_its_class_where_a_fact_would_do() -> None:
    """What only one kind has, as LoRA its initialization, is asked in `adapter/` and `recipe/`."""
    kinds = {table.__name__ for table in get_args(Adapter)} - {"Lora"}
    found = []
    package = Path(qtune.__file__).parent
    for file in package.rglob("*.py"):
        place = file.relative_to(package).as_posix()
        if place.startswith(("adapter/", "recipe/")):
            continue
        nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        found += [f"{place}:{node.lineno}" for node in nodes if isinstance(node, ast.Name) and node.id in kinds]
    assert found == []


@pytest.mark.parametrize(
    ("family", "head", "adapter"),
    [
        ("biogpt", "output_projection", {"kind": "lora"}),
        ("gpt_neox_japanese", "embed_out", {"kind": "lora"}),
        ("llama", "lm_head", {"kind": "ia3", "feedforward_modules": []}),
    ],
)
def test_an_adapter_on_the_head_is_refused_whatever_the_head_is_called(family: str, head: str, adapter: dict) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=64, **sizes))
    others = [name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)]
    other = next(name.rpartition(".")[2] for name in others if not name.endswith(head))
    tables = {"model": {"base": "x"}, "data": {"train": "y"}, "adapter": adapter | {"target_modules": [head, other]}}
    recipe = parse_recipe(tables)
    with pytest.raises(ModelError) as caught:
        attach_adapter(network, recipe.adapter, make_plan(recipe, CPU))
    assert str(caught.value) == (
        f"adapter.target_modules: {head} is the model's LM head, whose weight the loss reads directly, so an adapter "
        f"on it would not be trained; remove {head}"
    )


def test_the_head_may_stay_where_it_has_no_adapter(tmp_path: Path) -> None:
    tiny_tokenizer(tiny_base(tmp_path))
    network = AutoModelForCausalLM.from_pretrained(tmp_path)
    recipe = parse_recipe({"model": {"base": "x"}, "data": {"train": "y"}})
    assert attach_adapter(network, recipe.adapter, make_plan(recipe, CPU)).get_nb_trainable_parameters()[0] > 0
