"""Prompts that are searched together train as each alone would; rows of choices are not those of the end."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

TOOLS = Path(__file__).resolve().parent.parent / "tools"
CONFIGS = [
    {"name": "bare", "adapter": {"kind": "prompt-tuning", "virtual_tokens": 4}, "training": {"learning_rate": 0.03}},
    {
        "name": "residual",
        "adapter": {"kind": "p-tuning", "virtual_tokens": 4, "residual": True, "initialization": "rows"},
        "training": {"learning_rate": 0.01},
    },
]


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    sys.modules.pop("search_soft_prompts", None)
    import search_soft_prompts

    return search_soft_prompts


@pytest.fixture
def worker(search: ModuleType, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(search, "BASE", str(tiny_model))
    monkeypatch.setitem(search.QUANTIZATION, "compute_dtype", "float32")
    monkeypatch.setitem(search.QUANTIZATION, "minimum_share", 0.0)
    found = search.tasks()["triage"]
    search.write_rows({"triage": found}, tmp_path, "validation")
    return search.Worker(tmp_path, "validation")


@pytest.mark.slow
def test_runs_that_share_a_forward_have_the_losses_that_each_has_alone(search: ModuleType, worker) -> None:
    runs = [
        search.Run({**one, "training": one["training"] | {"steps": 5, "batch_size": 2}}, "triage", 3) for one in CONFIGS
    ]
    together = worker.train(runs, float("inf"))
    alone = [worker.train([run], float("inf"))[0] for run in runs]
    for shared, own in zip(together, alone, strict=True):
        assert shared["config"] == own["config"]
        assert shared["last_losses"] == pytest.approx(own["last_losses"], abs=2e-4)
        assert shared["loss"] == pytest.approx(own["loss"], abs=2e-4)
    assert together[0]["last_losses"] != together[1]["last_losses"]


def test_no_row_that_choices_are_made_on_is_trained_on_or_asked_at_the_end(search: ModuleType) -> None:
    for task in search.tasks().values():
        parts = [{json.dumps(row) for row in rows} for rows in (task.train, task.validation, task.test)]
        assert [len(part) for part in parts] == [len(task.train), len(task.validation), len(task.test)], task.name
        assert len(set.union(*parts)) == sum(map(len, parts)), task.name


def test_an_answer_counts_as_right_where_each_of_its_tokens_is_what_greedy_decoding_would_write(
    search: ModuleType, worker
) -> None:
    run = search.Run({**CONFIGS[0], "training": {"learning_rate": 0.3, "steps": 1, "batch_size": 1}}, "triage", 3)
    recipe = run.recipe(worker.rows)
    prepared = worker.data("triage", recipe)
    one = search.Prompted(run, recipe, worker, prepared)
    row = {key: prepared.train[0][key] for key in ("input_ids", "labels")}
    first = next(place for place, label in enumerate(row["labels"]) if label >= 0)
    ids = row["input_ids"][:first]
    with torch.no_grad():
        for _ in range(4):
            embeds, _, _ = worker.inputs([one], [[{"input_ids": ids, "labels": ids}]])
            ids = [*ids, int(worker.network(inputs_embeds=embeds).logits[0, -1].argmax())]
        own = {"input_ids": ids, "labels": [search.IGNORED] * first + ids[first:]}
        other = own | {"labels": [*own["labels"][:-1], (ids[-1] + 1) % 100]}
        assert worker.score_rows([one], [[own, other]]).right.tolist() == [True, False]
