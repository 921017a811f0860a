"""Sizes that come with qtune answer at once without a network; they are those that the models' authors published."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qtune.device.cards import described
from qtune.memory.profile import profile
from qtune.model import geometry
from qtune.model.geometry import geometries, load_geometry, shipped_geometry
from qtune.recipe.file import load_recipe
from qtune.recipe.schema import Model
from qtune.recipe.shipped import shipped_recipes

ROOT = Path(__file__).parents[1]
NAMED = [(file.models[0], file) for file in geometries()]


@pytest.mark.parametrize(("name", "shipped"), NAMED, ids=[name for name, _ in NAMED])
def test_a_model_of_these_sizes_has_as_many_parameters_as_its_weights(name, shipped):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shipped.config())
    assert sum(one.numel() for one in model.parameters()) == shipped.parameters


def test_every_shipped_recipe_and_every_row_of_the_table_has_its_sizes():
    for file in shipped_recipes().values():
        model = load_recipe(file, need_rows=False).recipe.model
        assert model.base.startswith("builtin:") or shipped_geometry(model) is not None, file
    table = (ROOT / "README.md").read_text().partition("memory table: begin")[2].partition("memory table: end")[0]
    rows = re.findall(r"^\| ([A-Z][\w.]+ [^|]*?) \|", table, re.MULTILINE)
    assert len(rows) > 5
    known = [name.rpartition("/")[2].replace("-", " ").lower() for one in geometries() for name in one.models]
    for name in rows:
        assert name.lower() in known, name


@pytest.mark.slow
def test_a_recipe_is_profiled_without_a_network_and_it_is_said(monkeypatch, capsys):
    def refused(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.create_connection", refused)
    geometry._say.cache_clear()
    resolved = load_recipe(shipped_recipes()["llama_lora"], need_rows=False)
    found = profile(resolved, described(24), length=64)
    assert found.forecast.prediction.peak.bytes > 2**30
    said = capsys.readouterr().err
    assert said.startswith("meta-llama/Llama-3.2-3B-Instruct: its sizes are those that come with qtune")
    assert said.count("\n") == 1


def test_a_models_own_configuration_and_another_revision_go_before(monkeypatch):
    model = Model(base="meta-llama/Llama-3.2-1B")
    assert shipped_geometry(model) is not None
    assert shipped_geometry(Model(base="META-LLAMA/llama-3.2-1b")) is not None  # as the hub reads names
    assert shipped_geometry(Model(base="meta-llama/Llama-3.2-1B", revision="abc")) is None
    monkeypatch.setattr(geometry, "is_kept", lambda *_: True)
    monkeypatch.setattr(geometry, "load_config", lambda _: "its own")
    assert load_geometry(model) == "its own"
