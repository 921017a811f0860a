"""Searches for what a soft prompt should be: every configuration of a list, on three tasks, with several seeds.

    python tools/search_soft_prompts.py GRID.json RUNS.jsonl --minutes 6 --processes 4 --seeds 1 2
    python tools/search_soft_prompts.py CHOSEN.json TEST.jsonl --rows test       # once, at the end

GRID.json: a list of {"name", "adapter": a recipe's table, "training": {"learning_rate", "steps", …}}. A line of RUNS is
one run: its configuration, task, seed, device, losses, exact match, seconds. A run that has its line is not done again.

The base is frozen, so that many prompts train in one batch: each run has its own rows, prompt, rate and gradient norm,
and a forward of the base serves all of a group. What a run sees is what `qtune run` shows it: the start by
`adapter/attach` and `adapter/starts`, the order of rows, the schedule, AdamW, clipping. The 4-bit weights are unpacked
once into the type that their products are computed in, which changes no number. A LoRA is a group of its own.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from soft_prompt_tasks import Task, tasks
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, set_seed

from qtune.adapter.attach import attach_adapter
from qtune.adapter.starts import Material, start
from qtune.data.batches import rows_of_step
from qtune.data.collate import PaddedCollator
from qtune.data.masks import IGNORED
from qtune.data.prepare import Prepared, prepare
from qtune.device.present import present_device
from qtune.model.load import load_base, load_tokenizer
from qtune.plan import make_plan
from qtune.recipe.parse import parse_recipe
from qtune.recipe.schema import Recipe
from qtune.training.schedule import schedule_of
from qtune.tuned.generate import find_ends
from qtune.tuned.precision import training_autocast

BASE = "builtin:smollm2-135m-instruct"
QUANTIZATION: dict[str, Any] = {"kind": "nf4"}
TRAINING = {"steps": 110, "batch_size": 8, "warmup": 0.1}
"""What a configuration does not say."""
KINDS = {"lora", "p-tuning", "prompt-tuning"}
"""A prefix is no row of embeddings, and IA3 changes the base that runs share."""
SCORED_AT_ONCE = 16
"""Held-out rows of each run."""


@dataclass(frozen=True)
class Run:
    """One configuration on one task with one seed."""

    config: dict[str, Any]
    task: str
    seed: int

    @property
    def key(self) -> tuple[str, str, int]:
        return self.config["name"], self.task, self.seed

    @property
    def group(self) -> tuple[Any, ...]:
        """Runs that may share a forward have this in common."""
        training = TRAINING | self.config["training"]
        adapter = self.config["adapter"]
        alone = self.config["name"] if adapter["kind"] == "lora" else ""
        return self.seed, self.task, training["steps"], training["batch_size"], adapter.get("virtual_tokens", 16), alone

    def recipe(self, rows: Path) -> Recipe:
        """What `qtune run` would be given."""
        files = {"train": f"{self.task}_train.jsonl", "validation": f"{self.task}_held_out.jsonl"}
        return parse_recipe(
            {
                "model": {"base": BASE},
                "quantization": QUANTIZATION,
                "adapter": self.config["adapter"],
                "data": {key: str(rows / file) for key, file in files.items()}
                | {"chat_template": "chatml", "max_length": 256},
                "training": TRAINING | self.config["training"] | {"seed": self.seed},
            }
        )


class Prompted:
    """One run while it trains: its prompt, its rows, its rate."""

    def __init__(self, run: Run, recipe: Recipe, worker: "Worker", prepared: Prepared) -> None:
        self.run, self.training = run, recipe.training
        self.lengths = prepared.lengths
        self.rate = make_plan(recipe, worker.device).learning_rate
        self.factor = schedule_of(self.training.schedule, self.training.warmup, int(self.training.steps or 0))
        self.losses: list[float] = []
        set_seed(run.seed)
        self.model = attach_adapter(worker.network, recipe.adapter, worker.plan)
        start(self.model, recipe, Material(worker.tokenizer, prepared.train, self.training.batch_size))
        self.virtual = recipe.adapter.prompt_length
        self.parameters = [weight for weight in self.model.parameters() if weight.requires_grad]

    def prompt(self) -> Tensor:
        """[virtual, hidden]."""
        name = self.model.active_adapter
        numbers = self.model.prompt_tokens[name].to(self.parameters[0].device)
        vectors: Tensor = self.model.prompt_encoder[name](numbers[None])[0]
        return vectors

    def rows(self, step: int) -> list[int]:
        return rows_of_step(self.lengths, self.training.batch_size, self.run.seed, step)


class Worker:
    """A process with the base in memory."""

    def __init__(self, rows: Path, held_out: str) -> None:
        self.rows, self.held_out = rows, held_out
        self.device = present_device()
        recipe = Run({"name": "", "adapter": {"kind": "lora"}, "training": {}}, "triage", 1).recipe(rows)
        self.plan = make_plan(recipe, self.device)
        self.tokenizer = load_tokenizer(recipe.model)
        self.network = unpacked(load_base(recipe.model, recipe.quantization, self.plan), self.plan.compute_dtype)
        self.network.requires_grad_(False)
        self.pad = find_ends(self.network, self.tokenizer).pad
        self.prepared: dict[str, Prepared] = {}

    def data(self, task: str, recipe: Recipe) -> Prepared:
        if task not in self.prepared:
            self.prepared[task] = prepare(
                recipe.data, self.tokenizer, self.rows, cache=self.rows / f"cache{os.getpid()}"
            )
        return self.prepared[task]

    def train(self, group: Sequence[Run], deadline: float) -> list[dict[str, Any]]:
        """One line for each run of the group; none where the time is over first."""
        began = time.monotonic()
        recipes = [run.recipe(self.rows) for run in group]
        prepared = self.data(group[0].task, recipes[0])
        prompted = [Prompted(run, recipe, self, prepared) for run, recipe in zip(group, recipes, strict=True)]
        optimizer = torch.optim.AdamW(
            [{"params": one.parameters, "weight_decay": one.training.weight_decay, "lr": one.rate} for one in prompted],
            fused=True,
        )
        train = prepared.train[:]
        columns = [{"input_ids": i, "labels": t} for i, t in zip(train["input_ids"], train["labels"], strict=True)]
        losses = []
        for step in range(int(recipes[0].training.steps or 0)):
            if time.monotonic() > deadline:
                return []
            for one, part in zip(prompted, optimizer.param_groups, strict=True):
                part["lr"] = one.rate * one.factor(step)
            rows = [[columns[row] for row in one.rows(step + 1)] for one in prompted]
            with training_autocast(self.plan):
                per_run = self.loss(prompted, rows)
            per_run.sum().backward()
            for one in prompted:
                nn.utils.clip_grad_norm_(one.parameters, one.training.max_gradient_norm)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(per_run.detach())
        trained = time.monotonic() - began
        history = torch.stack(losses).float().cpu()
        with torch.no_grad(), training_autocast(self.plan):
            scores = self.scores(prompted, prepared)
        lines = []
        for place, (run, one, score) in enumerate(zip(group, prompted, scores, strict=True)):
            of_run = history[:, place]
            lines.append(
                {"config": run.config["name"], "task": run.task, "seed": run.seed}
                | {key: run.config[key] for key in ("adapter", "training")}
                | {"rows": self.held_out, "device": self.device.name, "dtype": self.plan.compute_dtype}
                | {"parameters": sum(weight.numel() for weight in one.parameters)}
                | {"first_loss": round(float(of_run[0]), 4), "last_losses": round(float(of_run[-10:].mean()), 4)}
                | score
                | {"train_seconds": round(trained, 1), "seconds": round(time.monotonic() - began, 1)}
                | {"together": len(group)}
            )
        if group[0].config["adapter"]["kind"] == "lora":
            prompted[0].model.unload()
        return lines

    def inputs(
        self, prompted: Sequence[Prompted], rows: Sequence[list[dict[str, Any]]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(embeddings [all rows, virtual + length, hidden], mask, labels) with each run's prompt before its rows."""
        batch = PaddedCollator(self.pad)([row for part in rows for row in part])
        ids, mask, labels = (batch[name].to(self.network.device) for name in ("input_ids", "attention_mask", "labels"))
        text = self.network.get_input_embeddings()(ids)
        virtual = prompted[0].virtual
        if not virtual:
            return text, mask, labels
        prompts = torch.stack([one.prompt() for one in prompted])
        counts = torch.tensor([len(part) for part in rows], device=ids.device)
        prompts = prompts.repeat_interleave(counts, dim=0).to(text.dtype)
        front = (len(ids), virtual)
        return (
            torch.cat([prompts, text], dim=1),
            torch.cat([mask.new_ones(front), mask], dim=1),
            torch.cat([labels.new_full(front, IGNORED), labels], dim=1),
        )

    def loss(self, prompted: Sequence[Prompted], rows: Sequence[list[dict[str, Any]]]) -> Tensor:
        """Mean negative log-likelihood of a scored token, of each run [runs]."""
        of_rows = self.score_rows(prompted, rows)
        owner = torch.tensor([place for place, part in enumerate(rows) for _ in part], device=of_rows.nll.device)
        sums = of_rows.nll.new_zeros(len(rows)).index_add(0, owner, of_rows.nll)
        return sums / of_rows.nll.new_zeros(len(rows)).index_add(0, owner, of_rows.tokens)

    def score_rows(self, prompted: Sequence[Prompted], rows: Sequence[list[dict[str, Any]]]) -> "RowScores":
        """All rows, run by run."""
        embeds, mask, labels = self.inputs(prompted, rows)
        hidden = self.network.base_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
        targets = labels[:, 1:]
        row, place = (targets != IGNORED).nonzero(as_tuple=True)
        wanted = targets[row, place]
        logits = self.network.get_output_embeddings()(hidden[row, place]).float()
        nll = functional.cross_entropy(logits, wanted, reduction="none")
        zeros = nll.new_zeros(len(labels))
        misses = zeros.index_add(0, row, (logits.argmax(dim=-1) != wanted).to(nll.dtype))
        return RowScores(zeros.index_add(0, row, nll), zeros.index_add(0, row, torch.ones_like(nll)), misses == 0)

    # --- what is kept of a run ---

    def scores(self, prompted: Sequence[Prompted], prepared: Prepared) -> list[dict[str, Any]]:
        examples = [{key: row[key] for key in ("input_ids", "labels")} for row in prepared.examples["validation"]]
        for one in prompted:
            one.model.eval()
        pieces_of = [
            self.score_rows(prompted, [examples[first : first + SCORED_AT_ONCE]] * len(prompted)).of_runs(len(prompted))
            for first in range(0, len(examples), SCORED_AT_ONCE)
        ]
        nll, tokens, right = (torch.cat(parts, dim=1).cpu() for parts in zip(*pieces_of, strict=True))
        halves = {
            "": slice(None),
            "first_half_": slice(len(examples) // 2),
            "second_half_": slice(len(examples) // 2, None),
        }
        return [
            {f"{name}loss": mean(nll[run, part].sum() / tokens[run, part].sum()) for name, part in halves.items()}
            | {f"{name}exact_match": mean(right[run, part].float().mean()) for name, part in halves.items()}
            | {"right": "".join(str(int(answer)) for answer in right[run])}
            | {"longest_vector": longest(one, self.network)}
            for run, one in enumerate(prompted)
        ]


@dataclass(frozen=True)
class RowScores:
    """What a forward says of its rows, [rows] each."""

    nll: Tensor
    """Summed over the scored tokens."""
    tokens: Tensor
    """That are scored."""
    right: Tensor
    """Whether every scored token is the likeliest one behind those before it: then a greedy answer is the row's own."""

    def of_runs(self, runs: int) -> tuple[Tensor, Tensor, Tensor]:
        """[runs, rows] each, where all runs have been shown the same rows."""
        nll, tokens, right = (each.view(runs, -1) for each in (self.nll, self.tokens, self.right))
        return nll, tokens, right


def mean(value: Tensor) -> float:
    return round(float(value), 4)


def unpacked(network: PreTrainedModel, dtype: str) -> PreTrainedModel:
    """The same model with its 4-bit weights as the numbers that their products are computed with."""
    for module in list(network.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, bnb.nn.Linear4bit):
                weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
                plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
                plain.weight = nn.Parameter(weight.to(getattr(torch, dtype)), requires_grad=False)
                if layer.bias is not None:
                    plain.bias = layer.bias
                setattr(module, name, plain)
    return network


def longest(one: Prompted, network: PreTrainedModel) -> float | None:
    """The largest norm of a vector of the prompt, in norms of a mean row of the vocabulary."""
    if not one.virtual:
        return None
    words = network.get_input_embeddings().weight[::16].float().norm(dim=1).mean()
    return round(float(one.prompt().float().norm(dim=1).max() / words), 2)


# --- the whole search ---


def groups_of(runs: Sequence[Run], together: int) -> list[list[Run]]:
    """Runs that share a forward, at most `together` of them, all of the first seed before any of the second."""
    by_key: dict[tuple[Any, ...], list[Run]] = defaultdict(list)
    for run in runs:
        by_key[run.group].append(run)
    ordered = sorted(by_key.items(), key=lambda item: item[0][0])
    return [part for _, found in ordered for part in pieces(found, together)]


def pieces(runs: list[Run], size: int) -> Iterator[list[Run]]:
    count = -(-len(runs) // size)
    for place in range(count):  # of like size
        yield runs[place * len(runs) // count : (place + 1) * len(runs) // count]


def work(queue: Any, lock: Any, rows: Path, given: argparse.Namespace, deadline: float) -> None:
    """A process: takes groups until there are none, or no time for another one."""
    torch.set_num_threads(1)  # several processes whose threads wait for each other are slower than one
    worker, slowest = Worker(rows, given.rows), 0.0
    while True:
        with lock:
            group = queue.get() if not queue.empty() else None
        if group is None or time.monotonic() + slowest > deadline:
            return
        began = time.monotonic()
        try:
            lines = worker.train(group, deadline)
        except torch.OutOfMemoryError:
            if len(group) == 1:
                raise
            for part in (group[::2], group[1::2]):
                queue.put(part)
            lines = []
        slowest = max(slowest, time.monotonic() - began)
        with lock, given.output.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        name = f"{group[0].task}, seed {group[0].seed}, {len(group)} runs"
        print(f"{name}: {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)


def write_rows(found: dict[str, Task], folder: Path, held_out: str) -> None:
    for task in found.values():
        for split, rows in (("train", task.train), ("held_out", getattr(task, held_out))):
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{task.name}_{split}.jsonl").write_text(lines, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--minutes", type=float, default=600)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--together", type=int, default=12, help="runs that share a forward (default 12)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--tasks", nargs="+", default=["quickstart", "triage", "docstrings"])
    parser.add_argument("--only", default="", help="configurations whose name contains this")
    parser.add_argument("--steps", type=int, help="instead of the configurations' own, for a rehearsal")
    parser.add_argument("--rows", choices=["validation", "test"], default="validation")
    given = parser.parse_args()
    deadline = time.monotonic() + 60 * given.minutes
    configs = [config for config in json.loads(given.grid.read_text(encoding="utf-8")) if given.only in config["name"]]
    if others := sorted({config["adapter"]["kind"] for config in configs} - KINDS):
        parser.error(f"{', '.join(others)}: only {', '.join(sorted(KINDS))} can be searched")
    if given.steps:
        configs = [config | {"training": config["training"] | {"steps": given.steps}} for config in configs]
    done = set()
    if given.output.is_file():
        lines = [json.loads(line) for line in given.output.read_text(encoding="utf-8").splitlines()]
        done = {(line["config"], line["task"], line["seed"]) for line in lines}
    runs = [Run(config, task, seed) for seed in given.seeds for task in given.tasks for config in configs]
    groups = groups_of([run for run in runs if run.key not in done], given.together)
    known = tasks()
    found = {name: _with_instruction(known[name], groups) for name in given.tasks}
    print(f"{sum(map(len, groups))} runs in {len(groups)} groups", file=sys.stderr, flush=True)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        write_rows(found, Path(folder), given.rows)
        queue, lock = context.Queue(), context.Lock()
        for group in groups:
            queue.put(group)
        arguments = (queue, lock, Path(folder), given, deadline)
        processes = [context.Process(target=work, args=arguments) for _ in range(given.processes)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        queue.cancel_join_thread()


def _with_instruction(task: Task, groups: list[list[Run]]) -> Task:
    """A text start of "{task}" in the list means the task's own instruction."""
    for group in groups:
        for place, run in enumerate(group):
            if run.task == task.name and run.config["adapter"].get("text") == "{task}":
                adapter = run.config["adapter"] | {"text": task.instruction}
                group[place] = Run(run.config | {"adapter": adapter}, run.task, run.seed)
    return task


if __name__ == "__main__":
    main()
