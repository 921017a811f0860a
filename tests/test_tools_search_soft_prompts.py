"""Prompts that are searched together train as each alone would; rows of choices are not those of the end."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

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


@pytest.fixture(scope="module")
def search() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        sys.modules.pop("search_soft_prompts", None)
        import search_soft_prompts

        yield search_soft_prompts


@pytest.fixture(scope="module")
def worker(search: ModuleType, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "BASE", str(tiny_model))
        patch.setitem(search.QUANTIZATION, "compute_dtype", "float32")
        patch.setitem(search.QUANTIZATION, "minimum_share", 0.0)
        found, rows = search.tasks()["triage"], tmp_path_factory.mktemp("rows")
        search.write_rows({"triage": found}, rows, "validation")
        yield search.Worker(rows, "validation")


LORA = {"name": "LoRA", "adapter": {"kind": "lora", "rank": 4}, "training": {"learning_rate": 0.01}}


@pytest.mark.slow
@pytest.mark.parametrize(
    "pairs", [[(CONFIGS[0], 3), (CONFIGS[1], 4)], [(LORA, 3), (LORA, 4)]], ids=["prompts", "LoRAs"]
)
def test_runs_that_share_a_forward_have_the_losses_that_each_has_alone(search: ModuleType, worker, pairs) -> None:
    runs = [
        search.Run({**one, "training": one["training"] | {"steps": 5, "batch_size": 2}}, "triage", seed)
        for one, seed in pairs
    ]
    together = worker.train(runs, float("inf"))
    alone = [worker.train([run], float("inf"))[0] for run in runs]
    for shared, own in zip(together, alone, strict=True):
        assert shared["config"] == own["config"]
        assert shared["last_losses"] == pytest.approx(own["last_losses"], abs=2e-4)
        assert shared["loss"] == pytest.approx(own["loss"], abs=2e-4)
    assert together[0]["last_losses"] != together[1]["last_losses"]


@pytest.mark.parametrize("virtual", [0, 4])
def test_rows_of_like_length_share_a_forward_and_each_is_what_it_is_alone(
    search: ModuleType, worker, virtual: int
) -> None:
    draw = torch.Generator().manual_seed(5)
    prompts = torch.randn(2, virtual, worker.network.config.hidden_size, generator=draw) if virtual else None
    rows = [
        [{"input_ids": list(range(3, 3 + long)), "labels": [search.IGNORED, *range(4, 3 + long)]} for long in own]
        for own in ((40, 5, 24, 6), (7, 41, 6, 21))
    ]
    batch = worker.inputs(prompts, rows)
    shapes = []
    hook = worker.network.base_model.register_forward_pre_hook(
        lambda *given: shapes.append(tuple(given[-1]["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    try:
        found = worker.hidden(batch)
        alone = []
        for place, row in enumerate(row for part in rows for row in part):
            own = None if prompts is None else prompts[place // 4][None]
            alone.append(worker.hidden(worker.inputs(own, [[row]])))
    finally:
        hook.remove()
    assert shapes[:3] == [(2, virtual + 41), (2, virtual + 24), (4, virtual + 7)], "of each run as many"
    torch.testing.assert_close(found, torch.cat(alone), atol=1e-5, rtol=1e-4)


def test_a_lora_that_shares_the_base_computes_what_peft_computes(search: ModuleType, worker) -> None:
    run = search.Run({**LORA, "training": LORA["training"] | {"steps": 3, "batch_size": 2}}, "triage", 3)
    ids = torch.tensor([[5, 6, 7, 8]])
    one = worker.prompted(run)
    loras = search.SharedLoras.on(worker.network, [one])
    worker.steps([one], loras, float("inf"))
    with torch.no_grad():
        ours = worker.network(ids).logits
    loras.take_off()
    with torch.no_grad():
        bare = worker.network(ids).logits
    model = search.attach_adapter(worker.network, run.recipe(worker.rows).adapter, worker.plan)
    for name, layer in loras.layers.items():
        lora = model.get_base_model().get_submodule(name)
        lora.lora_A["default"].weight.data.copy_(layer.down[0])
        lora.lora_B["default"].weight.data.copy_(layer.up[0])
    with torch.no_grad():
        theirs = model(ids).logits
    model.unload()
    torch.testing.assert_close(theirs, ours)
    assert not torch.allclose(bare, ours, atol=1e-3), "three steps have changed it"


def test_no_row_that_choices_are_made_on_is_trained_on_or_asked_at_the_end(search: ModuleType) -> None:
    for task in search.tasks().values():
        parts = [{json.dumps(row) for row in rows} for rows in (task.train, task.validation, task.test)]
        assert [len(part) for part in parts[1:]] == [len(task.validation), len(task.test)], task.name
        assert len(set.union(*parts)) == sum(map(len, parts)), task.name


def test_a_topic_is_said_in_other_words_in_each_of_the_three_and_of_another_product(search: ModuleType) -> None:
    import make_triage_data as triage

    task = search.tasks()["triage"]
    said = [
        {
            next(words for own in triage.TOPICS.values() for words in own if words in row["messages"][0]["content"])
            for row in rows
        }
        for rows in (task.train, task.validation, task.test)
    ]
    products = [
        {row["messages"][1]["content"].split(" | ")[1] for row in rows}
        for rows in (task.train, task.validation, task.test)
    ]
    for parts in (said, products):
        assert len(set.union(*parts)) == sum(map(len, parts)), "none stands in two of them"
    assert min(map(len, said)) > 30, "many of them, so that no single one decides"


def test_what_is_asked_on_the_way_changes_nothing_of_the_run(
    search: ModuleType, worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    for config in (CONFIGS[1], LORA):
        run = search.Run({**config, "training": config["training"] | {"steps": 4, "batch_size": 2}}, "triage", 3)
        (unasked,) = worker.train([run], float("inf"))
        with monkeypatch.context() as patch:
            patch.setattr(worker, "every", 2)
            (asked,) = worker.train([run], float("inf"))
        assert [place for place, _, _ in asked.pop("curve")] == [2], "the last step has a line of its own"
        timing = ("train_seconds", "seconds")
        assert {key: asked[key] for key in asked if key not in timing} == {
            key: unasked[key] for key in unasked if key not in timing
        }


def test_a_mixture_of_rows_begins_as_the_vectors_that_it_stands_for(search: ModuleType, worker) -> None:
    config = {**CONFIGS[0], "training": CONFIGS[0]["training"] | {"steps": 3, "batch_size": 2}}
    plain, mixed = (
        worker.prompted(search.Run({**config, "name": name, "ideas": ideas}, "triage", 3))
        for name, ideas in (("plain", {}), ("mixed", {"mixture": 20}))
    )
    torch.testing.assert_close(mixed.prompt(), plain.prompt())
    assert mixed.count == 4 * 20, "the shares are what is trained"
    before = mixed.prompt().detach()
    worker.steps([mixed], None, float("inf"))
    after = mixed.prompt().detach()
    assert not torch.allclose(before, after, atol=1e-3)
    rows = mixed.model.prompt_encoder[mixed.model.active_adapter].rows
    weights = torch.linalg.lstsq(rows.T.double(), after.T.double()).solution
    torch.testing.assert_close(rows.T.double() @ weights, after.T.double(), atol=1e-4, rtol=1e-3)


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
            embeds = worker.inputs(one.prompt()[None], [[{"input_ids": ids, "labels": ids}]]).embeds
            ids = [*ids, int(worker.network(inputs_embeds=embeds).logits[0, -1].argmax())]
        own = {"input_ids": ids, "labels": [search.IGNORED] * first + ids[first:]}
        other = own | {"labels": [*own["labels"][:-1], (ids[-1] + 1) % 100]}
        assert worker.score_rows(one.prompt()[None], [[own, other]]).right.tolist() == [True, False]


def test_a_new_value_stands_in_no_training_row(search: ModuleType) -> None:
    task = search.tasks()["quickstart"]
    trained = {value for row in task.train for value in _words(row)}
    for rows, known in ((task.validation, 80), (task.test, 120)):
        assert all(_words(row) <= trained for row in rows[:known])
        assert not any(_words(row) <= trained for row in rows[known:])


def _words(row: dict) -> set[str]:
    """The values of a command that are words; days are the same few in all rows."""
    days = {"Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday", "today", "tomorrow"}
    command = json.loads(row["messages"][-1]["content"])
    values = {value for key, value in command.items() if isinstance(value, str) and key not in ("command", "time")}
    return values - days


def test_a_swapped_row_asks_for_the_words_that_its_answer_has(search: ModuleType) -> None:
    import soft_prompt_tasks

    plain, swapped = search.tasks()["quickstart"], search.tasks()["quickstart_swapped"]
    assert (swapped.train[: len(plain.train)], swapped.test) == (plain.train, plain.test)
    changed = 0
    for row, before in zip(swapped.train[len(plain.train) :], plain.train * soft_prompt_tasks.COPIES, strict=True):
        request, answer = (message["content"] for message in row["messages"])
        own, old = json.loads(answer), json.loads(before["messages"][1]["content"])
        assert (own["command"], list(own)) == (old["command"], list(old)), "the form of an answer stays"
        assert all(value in request for key, value in own.items() if isinstance(value, str) and key != "command")
        changed += own != old
    assert changed > len(plain.train)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ideas", "same"),
    [({}, True), ({"noise": 0.5}, False), ({"drop": 0.5}, False), ({"text_noise": 50.0}, False),
     ({"word_dropout": 0.5}, False), ({"label_smoothing": 0.2}, False), ({"focal": 2.0}, False), ({"cap": 0.1}, False),
     ({"encoder_decay": 50.0, "vector_decay": 50.0}, False), ({"betas": [0.1, 0.2]}, False)],
)  # fmt: skip
def test_an_idea_changes_its_own_run_and_none_beside_it(
    search: ModuleType, worker, ideas: dict[str, object], same: bool
) -> None:
    training = CONFIGS[0]["training"] | {"steps": 3, "batch_size": 2}
    runs = [
        search.Run({**CONFIGS[0], "name": name, "training": training, "ideas": own}, "triage", 3)
        for name, own in (("plain", {}), ("idea", ideas))
    ]
    prompted, alone = [worker.prompted(run) for run in runs], worker.prompted(runs[0])
    worker.steps(prompted, None, float("inf"))
    worker.steps([alone], None, float("inf"))
    plain, changed, own = (one.prompt().detach() for one in (*prompted, alone))
    torch.testing.assert_close(plain, own, atol=1e-4, rtol=1e-3)
    assert torch.equal(plain, changed) is same


def test_a_run_that_the_time_cuts_says_after_how_many_steps(search: ModuleType, worker) -> None:
    run = search.Run({**CONFIGS[0], "training": CONFIGS[0]["training"] | {"steps": 50, "batch_size": 1}}, "triage", 3)
    (line,) = worker.train([run], 0.0)
    assert line["cut_at"] == 1
    assert line["loss"] > 0


def test_urgent_runs_come_first_and_a_forward_has_no_more_rows_than_it_may(search: ModuleType) -> None:
    configs = [
        {
            "name": str(place),
            "priority": place % 3,
            "adapter": {"kind": "prompt-tuning", "virtual_tokens": 4 + place % 2},
        }
        | {"training": {"steps": 5, "batch_size": 4}}
        for place in range(30)
    ]
    groups = search.groups_of(search.runs_of(configs, [1, 2], ["triage"]), together=12)
    assert sorted(run.key for group in groups for run in group) == sorted(
        (str(place), "triage", seed) for place in range(30) for seed in (1, 2)
    )
    assert all(len(group) <= 3 and len({run.group for run in group}) == 1 for group in groups)
    urgency = [min(run.priority for run in group) for group in groups]
    assert urgency == sorted(urgency)


def test_rows_of_the_end_are_counted_apart_from_those_that_choices_are_made_on(
    search: ModuleType, tmp_path: Path
) -> None:
    found = {name: search.tasks()[name] for name in ("quickstart", "triage")}
    search.write_rows(found, tmp_path, "both")
    parts = json.loads((tmp_path / "parts.json").read_text())
    asked = [json.loads(line) for line in (tmp_path / "quickstart_held_out.jsonl").read_text().splitlines()]
    task = found["quickstart"]
    assert tuple(asked[slice(*parts["quickstart"][""])]) == task.validation
    assert tuple(asked[slice(*parts["quickstart"]["test_"])]) == task.test
    assert tuple(asked[slice(*parts["quickstart"]["test_new_"])]) == task.test[120:]
    assert tuple(asked[slice(*parts["quickstart"]["known_"])]) == task.validation[:80]
    assert set(parts["triage"]) == {"", "test_"}
