"""Searches for what a soft prompt should be: every configuration of a list, on three tasks, with several seeds.

    python tools/search_soft_prompts.py GRID.json RUNS.jsonl --minutes 6 --processes 4 --seeds 1 2
    python tools/search_soft_prompts.py CHOSEN.json TEST.jsonl --rows both       # once, at the end

GRID.json: a list of {"name", "adapter": a recipe's table, "training": {"learning_rate", "steps", …}}, and where wanted
"ideas" (`soft_prompt_ideas.py`), "tasks" and "seeds" instead of the command's, and "priority": 0 is done first, 9 where
there is time. A line of RUNS is one run: its configuration, task, seed, device, losses, exact match, seconds; "mean_"
is what the mean of the vectors of the last quarter of the steps has. A run that has its line is not done again, but one
that the time cut ("cut_at") is.

The base is frozen, so that many adapters train in one batch: each run has its own rows, prompt, rate and gradient norm,
and a forward of the base serves all of a group; LoRAs share one where only their seed and task differ. What a run sees
is what `qtune run` shows it: the start by `adapter/attach` and `adapter/starts`, the order of rows, the schedule,
AdamW, clipping, norms, rotations and attention. The 4-bit weights are unpacked once into the type that their products
are computed in, which changes no number.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from soft_prompt_ideas import Decay, Ideas, Mixture
from soft_prompt_tasks import Task, tasks
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, set_seed

from qtune.adapter.attach import attach_adapter
from qtune.adapter.prompt_encoder import ResidualPrompt
from qtune.adapter.starts import Material, start
from qtune.data.batches import rows_of_step
from qtune.data.collate import PaddedCollator
from qtune.data.masks import IGNORED
from qtune.data.prepare import Prepared, prepare
from qtune.device.present import present_device
from qtune.model.fast_blocks import install_fast_blocks
from qtune.model.load import load_base, load_tokenizer
from qtune.plan import make_plan
from qtune.recipe.parse import parse_recipe
from qtune.recipe.schema import Recipe
from qtune.training.schedule import schedule_of
from qtune.tuned.generate import find_ends
from qtune.tuned.precision import training_autocast

BASE = "builtin:smollm2-135m-instruct"
QUANTIZATION: dict[str, Any] = {"kind": "nf4", "keep_copy": False}
TRAINING = {"steps": 110, "batch_size": 8, "warmup": 0.1}
"""What a configuration does not say."""
KINDS = {"lora", "p-tuning", "prompt-tuning"}
"""A prefix is no row of embeddings, and IA3 changes the base that runs share."""
SPLITS = {"validation": ("validation",), "test": ("test",), "both": ("validation", "test")}
"""What may be asked. Of "both", what is chosen is chosen by the validation rows; the keys of the others begin with
"test_"."""
LONG_ROWS = {"docstrings"}
"""Tasks with rows so much longer than the others' that they share no forward."""
SCORED_AT_ONCE = 256
"""Held-out rows of all runs of a group together."""
LOGITS_AT_ONCE = 4096
"""Tokens whose logits are in memory at once where no gradient is wanted."""
LIKE_LENGTH = 0.75
"""The least share of the longest row's tokens in a forward that each of its rows has. Docstrings in one have 3.3 times
their tokens, with padding."""
AVERAGED = 0.25
"""Share of the steps, the last ones, whose vectors are averaged."""
SECONDS_TO_SCORE = 15
"""What is left of the time for that at the end."""


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
        long = self.task if self.task in LONG_ROWS else ""
        return training["steps"], training["batch_size"], adapter.get("virtual_tokens", 16), alone, long

    @property
    def priority(self) -> int:
        return int(self.config.get("priority", 5))

    @property
    def ideas(self) -> Ideas:
        return Ideas.of(self.config.get("ideas", {}))

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
    """One run while it trains: its prompt, its rate, what it draws at random."""

    def __init__(self, run: Run, recipe: Recipe, worker: "Worker", prepared: Prepared) -> None:
        self.run, self.training, self.ideas = run, recipe.training, run.ideas
        self.rate = make_plan(recipe, worker.device).learning_rate
        self.schedule = schedule_of(self.training.schedule, self.training.warmup, int(self.training.steps or 0))
        set_seed(run.seed)
        self.model = attach_adapter(worker.network, recipe.adapter, worker.plan)
        start(self.model, recipe, Material(worker.tokenizer, prepared.train, self.training.batch_size))
        self.virtual, self.word = recipe.adapter.prompt_length, worker.word
        if self.ideas.mixture:
            self.mix(worker)
        self.parameters = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.count = sum(weight.numel() for weight in self.parameters)
        self.lora = {} if self.virtual else taken_off(self.model)
        device = worker.network.device
        self.draws = torch.Generator(device).manual_seed(run.seed)
        self.draws_of_rows = torch.Generator().manual_seed(run.seed)
        self.decay = Decay(self.ideas, *self.parts())
        self.vectors: Tensor | None = None
        """The prompt of the last step, [virtual, hidden]."""
        self.sum: Tensor | None = None
        self.summed = 0

    def mix(self, worker: "Worker") -> None:
        """What has been started gives way to sums of rows that begin as the same vectors."""
        words = worker.network.get_input_embeddings().weight[: worker.vocabulary]
        draw = torch.Generator().manual_seed(self.run.seed)
        encoder = Mixture(self.prompt(), words, self.ideas.mixture, draw)
        self.model.prompt_encoder[self.model.active_adapter] = encoder.to(words.device)

    def parts(self) -> tuple[Tensor | None, list[Tensor]]:
        """(the table that begins as the words, the other weights)."""
        if not self.virtual:
            return None, []
        encoder = self.model.prompt_encoder[self.model.active_adapter]
        if isinstance(encoder, Mixture):
            return encoder.shares, []
        table = encoder.table if isinstance(encoder, ResidualPrompt) else encoder.embedding.weight
        return table, [weight for weight in self.parameters if weight is not table]

    def weight_decay(self) -> float:
        """AdamW's own, unless a part has its own."""
        own = self.ideas.encoder_decay is None and self.ideas.vector_decay is None
        return self.training.weight_decay if own else 0.0

    def rate_of(self, step: int) -> float:
        return self.rate * max(self.schedule(step), self.ideas.last_rate)

    def prompt(self) -> Tensor:
        """[virtual, hidden]."""
        name = self.model.active_adapter
        encoder = self.model.prompt_encoder[name]
        numbers = self.model.prompt_tokens[name].to(next(encoder.parameters()).device)
        vectors: Tensor = encoder(numbers[None])[0]
        return self.ideas.capped(vectors, self.word)

    def prompt_in_training(self) -> Tensor:
        """[virtual, hidden]."""
        vectors = self.prompt()
        self.vectors = vectors.detach()
        return self.ideas.noisy(vectors, self.draws)

    def keep_for_mean(self) -> None:
        """Of the vectors that the last step began with."""
        if self.vectors is not None:
            self.sum = self.vectors.float() if self.sum is None else self.sum + self.vectors.float()
            self.summed += 1

    def mean(self) -> Tensor:
        """Of the vectors kept, [virtual, hidden]."""
        assert self.sum is not None
        return self.sum / self.summed


class Worker:
    """A process with the base in memory."""

    def __init__(self, rows: Path, held_out: str, every: int | None = None) -> None:
        """every: the held-out rows are asked after so many steps, too."""
        self.rows, self.held_out, self.every = rows, held_out, every
        self.device = present_device()
        recipe = Run({"name": "", "adapter": {"kind": "lora"}, "training": {}}, "triage", 1).recipe(rows)
        self.plan = make_plan(recipe, self.device)
        self.tokenizer = load_tokenizer(recipe.model)
        self.network = unpacked(load_base(recipe.model, recipe.quantization, self.plan), self.plan.compute_dtype)
        self.network.requires_grad_(False)
        install_fast_blocks(self.network)
        self.pad = find_ends(self.network, self.tokenizer).pad
        self.word = float(self.network.get_input_embeddings().weight[::16].float().norm(dim=1).mean())
        self.vocabulary = len(self.tokenizer)
        self.parts: dict[str, dict[str, list[int]]] = json.loads((rows / "parts.json").read_text(encoding="utf-8"))
        self.prepared: dict[str, Prepared] = {}
        self.columns: dict[str, list[dict[str, Any]]] = {}

    def data(self, task: str, recipe: Recipe) -> Prepared:
        if task not in self.prepared:
            self.prepared[task] = prepare(recipe.data, self.tokenizer, self.rows, cache=cache_of(self.rows))
            train = self.prepared[task].train[:]
            self.columns[task] = [
                {"input_ids": ids, "labels": labels}
                for ids, labels in zip(train["input_ids"], train["labels"], strict=True)
            ]
        return self.prepared[task]

    def train(self, group: Sequence[Run], deadline: float) -> list[dict[str, Any]]:
        """One line for each run of the group."""
        began = time.monotonic()
        prompted = [self.prompted(run) for run in group]
        loras = SharedLoras.on(self.network, prompted)
        try:
            history, curves, cut = self.steps(prompted, loras, deadline)
            trained = time.monotonic() - began
            scores = self.scores(prompted, loras)
        finally:
            if loras is not None:
                loras.take_off()
        kept = ("adapter", "training", "ideas")
        lines = []
        for place, (run, one, score) in enumerate(zip(group, prompted, scores, strict=True)):
            of_run = history[:, place]
            lines.append(
                {"config": run.config["name"], "task": run.task, "seed": run.seed}
                | {key: run.config[key] for key in kept if key in run.config}
                | ({} if cut is None else {"cut_at": cut})
                | {"rows": self.held_out, "device": self.device.name, "dtype": self.plan.compute_dtype}
                | {"torch": torch.__version__, "parameters": one.count}
                | {"first_loss": round(float(of_run[0]), 4), "last_losses": round(float(of_run[-20:].mean()), 4)}
                | score
                | ({"curve": curves[place]} if curves[place] else {})
                | {"train_seconds": round(trained, 1), "seconds": round(time.monotonic() - began, 1)}
                | {"together": len(group)}
            )
        return lines

    def prompted(self, run: Run) -> Prompted:
        recipe = run.recipe(self.rows)
        return Prompted(run, recipe, self, self.data(run.task, recipe))

    def steps(
        self, prompted: Sequence[Prompted], loras: "SharedLoras | None", deadline: float
    ) -> tuple[Tensor, list[list[list[float]]], int | None]:
        """(loss of every step [steps, runs]; each run's [step, loss, exact match] of the held-out rows on the way; the
        number of steps where the time was over before the last one)."""
        trained = [one.parameters for one in prompted] if loras is None else [loras.parameters]
        optimizer = torch.optim.AdamW(
            [
                {"params": own, "weight_decay": one.weight_decay(), "lr": one.rate, "betas": one.ideas.betas}
                for one, own in zip(prompted, trained, strict=False)
            ],
            fused=True,
        )
        steps, batch_size = int(prompted[0].training.steps or 0), prompted[0].training.batch_size
        losses: list[Tensor] = []
        curves: list[list[list[float]]] = [[] for _ in prompted]
        for step in range(steps):
            if time.monotonic() > deadline and step:
                break
            for one, part in zip(prompted, optimizer.param_groups, strict=False):
                part["lr"] = one.rate_of(step)
            numbers = {
                (task, seed): rows_of_step(self.prepared[task].lengths, batch_size, seed, step + 1)
                for task, seed in {(one.run.task, one.run.seed) for one in prompted}
            }
            rows = [
                [self.columns[one.run.task][row] for row in numbers[one.run.task, one.run.seed]] for one in prompted
            ]
            with training_autocast(self.plan):
                per_run = self.training_loss(prompted, rows)
            per_run.sum().backward()
            if loras is None:
                for one in prompted:
                    nn.utils.clip_grad_norm_(one.parameters, one.training.max_gradient_norm)
            else:
                loras.clip_gradients(prompted[0].training.max_gradient_norm)
            optimizer.step()
            optimizer.zero_grad()
            for one in prompted:
                one.decay.step(one.rate_of(step))
                if step >= (1 - AVERAGED) * steps:
                    one.keep_for_mean()
            losses.append(per_run.detach())
            if self.every and (step + 1) % self.every == 0 and step + 1 < steps:
                for curve, score in zip(curves, self.scores(prompted, loras), strict=True):
                    curve.append([step + 1, score["loss"], score["exact_match"]])
        return torch.stack(losses).float().cpu(), curves, len(losses) if len(losses) < steps else None

    def training_loss(self, prompted: Sequence[Prompted], rows: Sequence[Sequence[dict[str, Any]]]) -> Tensor:
        """Of each run [runs], by its rows, which are as many for each."""
        changed = [
            one.ideas.with_wrong_words(own, one.draws_of_rows, self.vocabulary)
            for one, own in zip(prompted, rows, strict=True)
        ]
        prompts = torch.stack([one.prompt_in_training() for one in prompted]) if prompted[0].virtual else None
        batch = self.inputs(prompts, changed)
        if any(one.ideas.text_noise for one in prompted):
            virtual, count = prompted[0].virtual, len(rows[0])
            parts = [
                torch.cat(
                    [embeds[:, :virtual], one.ideas.noisy_text(embeds[:, virtual:], mask[:, virtual:], one.draws)],
                    dim=1,
                )
                for one, embeds, mask in zip(prompted, batch.embeds.split(count), batch.mask.split(count), strict=True)
            ]
            batch = replace(batch, embeds=torch.cat(parts))
        if any(one.ideas.drop for one in prompted):
            seen = torch.cat([one.ideas.seen(len(rows[0]), one.virtual, one.draws_of_rows) for one in prompted])
            mask = batch.mask.clone()
            mask[:, : prompted[0].virtual] = seen.to(mask.device)
            batch = replace(batch, mask=mask)
        logits = self.network.get_output_embeddings()(self.hidden(batch)).float()
        wanted = batch.wanted.to(logits.device)
        nll = functional.cross_entropy(logits, wanted, reduction="none")
        counts = torch.bincount(batch.row // len(rows[0]), minlength=len(prompted)).tolist()
        parts = [
            one.ideas.loss_of(scores, targets) if one.ideas.label_smoothing or one.ideas.focal else plain
            for one, plain, scores, targets in zip(
                prompted, nll.split(counts), logits.split(counts), wanted.split(counts), strict=True
            )
        ]
        return torch.stack([part.mean() for part in parts])

    def inputs(self, prompts: Tensor | None, rows: Sequence[Sequence[dict[str, Any]]]) -> "Inputs":
        """Each run's prompt [runs, virtual, hidden], where there is one, before its rows."""
        batch = PaddedCollator(self.pad)([row for part in rows for row in part])
        device = self.network.device
        text = self.network.get_input_embeddings()(batch["input_ids"].to(device))
        mask, labels = batch["attention_mask"], batch["labels"]
        if prompts is not None:
            counts = torch.tensor([len(part) for part in rows], device=device)
            prompts = prompts.to(text.dtype).repeat_interleave(counts, dim=0, output_size=len(text))
            text = torch.cat([prompts, text], dim=1)
            front = (len(text), prompts.shape[1])
            mask = torch.cat([mask.new_ones(front), mask], dim=1)
            labels = torch.cat([labels.new_full(front, IGNORED), labels], dim=1)
        # Found on the CPU: a card would have to be waited for.
        targets = labels[:, 1:]
        row, place = (targets != IGNORED).nonzero(as_tuple=True)
        return Inputs(text, mask.to(device), len(rows), mask.sum(dim=1), row, place, targets[row, place])

    def hidden(self, batch: "Inputs") -> Tensor:
        """[scored tokens, hidden]: what each of them is predicted from. Rows of like length share a forward, as many of
        each run."""
        lengths, order = batch.lengths.view(batch.runs, -1).sort(dim=1, descending=True)
        order += torch.arange(batch.runs)[:, None] * order.shape[1]
        device, found, tokens = batch.embeds.device, [], []
        for part, longest in alike(lengths.amax(dim=0).tolist()):
            rows = order[:, part].flatten()
            states: Tensor = self.network.base_model(
                inputs_embeds=batch.embeds[rows.to(device), :longest],
                attention_mask=batch.mask[rows.to(device), :longest],
                use_cache=False,
            ).last_hidden_state
            place_of = torch.full((len(batch.lengths),), -1)
            place_of[rows] = torch.arange(len(rows))
            scored = (place_of[batch.row] >= 0).nonzero(as_tuple=True)[0]
            found.append(states[place_of[batch.row[scored]].to(device), batch.place[scored].to(device)])
            tokens.append(scored)
        return torch.cat(found)[torch.cat(tokens).argsort().to(device)]

    def score_rows(self, prompts: Tensor | None, rows: Sequence[Sequence[dict[str, Any]]]) -> "RowScores":
        """All rows, run by run, without a gradient."""
        batch = self.inputs(prompts, rows)
        hidden = self.hidden(batch)
        nll, wrong = [], []
        for states, wanted in zip(
            hidden.split(LOGITS_AT_ONCE), batch.wanted.to(hidden.device).split(LOGITS_AT_ONCE), strict=True
        ):
            logits = self.network.get_output_embeddings()(states).float()
            nll.append(functional.cross_entropy(logits, wanted, reduction="none"))
            wrong.append((logits.argmax(dim=-1) != wanted).float())
        row, zeros = batch.row.to(hidden.device), torch.zeros(len(batch.embeds), device=hidden.device)
        misses = zeros.index_add(0, row, torch.cat(wrong))
        of_tokens = torch.cat(nll)
        return RowScores(
            zeros.index_add(0, row, of_tokens), zeros.index_add(0, row, torch.ones_like(of_tokens)), misses == 0
        )

    # --- what is kept of a run ---

    @torch.no_grad()
    def scores(self, prompted: Sequence[Prompted], loras: "SharedLoras | None") -> list[dict[str, Any]]:
        """Of each run, as it is now."""
        with training_autocast(self.plan):
            return self.scores_now(prompted, loras)

    def scores_now(self, prompted: Sequence[Prompted], loras: "SharedLoras | None") -> list[dict[str, Any]]:
        found: dict[int, dict[str, Any]] = {}
        for task in {one.run.task for one in prompted}:
            places = [place for place, one in enumerate(prompted) if one.run.task == task]
            if loras is not None:
                loras.choose(places)
            own = [prompted[place] for place in places]
            found |= dict(zip(places, self.scores_of_task(own, task), strict=True))
        if loras is not None:
            loras.choose(None)
        return [found[place] for place in range(len(prompted))]

    def scores_of_task(self, prompted: Sequence[Prompted], task: str) -> list[dict[str, Any]]:
        held_out = self.prepared[task].examples["validation"]
        examples = [{key: row[key] for key in ("input_ids", "labels")} for row in held_out]
        if not prompted[0].virtual:
            return self.score(None, len(prompted), examples, task)
        trained = [one.model.training for one in prompted]
        for one in prompted:
            one.model.eval()
        prompts = torch.stack([one.prompt() for one in prompted]).float()
        for one, in_training in zip(prompted, trained, strict=True):
            one.model.train(in_training)
        of_last = self.score(prompts, len(prompted), examples, task)
        of_mean: list[dict[str, Any]] = [{} for _ in prompted]
        if all(one.summed for one in prompted) and any(one.training.schedule == "constant" for one in prompted):
            of_mean = self.score(torch.stack([one.mean() for one in prompted]), len(prompted), examples, task)
        return [
            last
            | {f"mean_{key}": value for key, value in average.items() if key != "right"}
            | {"longest_vector": round(float(vectors.norm(dim=1).max()) / self.word, 2)}
            for last, average, vectors in zip(of_last, of_mean, prompts, strict=True)
        ]

    def score(
        self, prompts: Tensor | None, runs: int, examples: Sequence[dict[str, Any]], task: str
    ) -> list[dict[str, Any]]:
        """Of each run, by the same rows."""
        size = max(1, SCORED_AT_ONCE // runs)
        pieces_of = [
            self.score_rows(prompts, [examples[first : first + size]] * runs).of_runs(runs)
            for first in range(0, len(examples), size)
        ]
        nll, tokens, right = (torch.cat(parts, dim=1).cpu() for parts in zip(*pieces_of, strict=True))
        parts = {name: slice(*bounds) for name, bounds in self.parts[task].items()}
        return [
            {f"{name}loss": mean(nll[run, part].sum() / tokens[run, part].sum()) for name, part in parts.items()}
            | {f"{name}exact_match": mean(right[run, part].float().mean()) for name, part in parts.items()}
            | {"right": "".join(str(int(answer)) for answer in right[run])}
            for run in range(runs)
        ]


@dataclass(frozen=True)
class Inputs:
    """What a forward is given, and which of its tokens are scored."""

    embeds: Tensor
    """[rows, virtual + length, hidden]"""
    mask: Tensor
    """[rows, virtual + length]"""
    runs: int
    """Which have equal shares of the rows, in their order."""
    lengths: Tensor
    """Of each row without its padding, on the CPU, as the next three."""
    row: Tensor
    """Of each scored token."""
    place: Tensor
    """Where it is predicted from."""
    wanted: Tensor
    """Its number."""


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


class SharedLora(nn.Module):
    """A linear layer with the LoRA of each of several runs, which have equal shares of its rows, in their order."""

    def __init__(self, base: nn.Module, pairs: Sequence[tuple[Tensor, Tensor, float]]) -> None:
        """pairs: A [rank, in], B [out, rank] and alpha / rank of each run."""
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.stack([down for down, _, _ in pairs]))
        self.up = nn.Parameter(torch.stack([up for _, up, _ in pairs]))
        self.scale = pairs[0][2]
        self.chosen: list[int] | None = None

    def forward(self, x: Tensor) -> Tensor:
        down, up = (each if self.chosen is None else each[self.chosen] for each in (self.down, self.up))
        own = x.reshape(len(down), -1, x.shape[-1])
        change = torch.bmm(torch.bmm(own, down.transpose(1, 2)), up.transpose(1, 2)) * self.scale
        result: Tensor = self.base(x)
        return result + change.view(result.shape)


class SharedLoras:
    """The LoRAs of a group, on the base for as long as it is trained. They differ in seed and task alone."""

    def __init__(self, network: PreTrainedModel, prompted: Sequence[Prompted]) -> None:
        self.network = network
        self.layers = {
            name: SharedLora(network.get_submodule(name), [one.lora[name] for one in prompted])
            for name in prompted[0].lora
        }
        for name, layer in self.layers.items():
            network.set_submodule(name, layer)
        self.parameters = [weight for layer in self.layers.values() for weight in (layer.down, layer.up)]

    @classmethod
    def on(cls, network: PreTrainedModel, prompted: Sequence[Prompted]) -> "SharedLoras | None":
        """None for prompts."""
        return None if prompted[0].virtual else cls(network, prompted)

    def clip_gradients(self, largest: float) -> None:
        """Each run's to this norm."""
        gradients = [weight.grad for weight in self.parameters if weight.grad is not None]
        squares = torch.stack([gradient.pow(2).sum(dim=(1, 2)) for gradient in gradients]).sum(dim=0)
        factors = (largest / (squares.sqrt() + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factors[:, None, None])

    def choose(self, places: list[int] | None) -> None:
        """The runs whose rows come next; None: all."""
        for layer in self.layers.values():
            layer.chosen = places

    def take_off(self) -> None:
        for name, layer in self.layers.items():
            self.network.set_submodule(name, layer.base)


def taken_off(model: PeftModel) -> dict[str, tuple[Tensor, Tensor, float]]:
    """A, B and alpha / rank of each layer of a LoRA as it has been started; the base is bare again."""
    name = model.active_adapter
    found = {
        where: (
            layer.lora_A[name].weight.detach().clone(),
            layer.lora_B[name].weight.detach().clone(),
            layer.scaling[name],
        )
        for where, layer in model.get_base_model().named_modules()
        if isinstance(layer, LoraLayer)
    }
    model.unload()
    return found


def alike(lengths: Sequence[int]) -> Iterator[tuple[slice, int]]:
    """Where lengths, the longest first, may share a forward, and how long the longest of them is."""
    first = 0
    for place in range(1, len(lengths) + 1):
        if place == len(lengths) or lengths[place] < LIKE_LENGTH * lengths[first]:
            yield slice(first, place), lengths[first]
            first = place


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


def cache_of(rows: Path) -> Path:
    """Where the prepared rows are, which the first process makes and the others read."""
    return rows / "cache"


# --- the whole search ---


def groups_of(runs: Sequence[Run], together: int) -> list[list[Run]]:
    """Runs that share a forward of at most `together` rows, the urgent ones first."""
    by_key: dict[tuple[Any, ...], list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: run.priority):
        by_key[run.group].append(run)
    parts = []
    for found in by_key.values():
        rows = (TRAINING | found[0].config["training"])["batch_size"]
        parts += pieces(found, max(1, together // rows))
    return sorted(parts, key=lambda part: min(run.priority for run in part))


def pieces(runs: list[Run], size: int) -> Iterator[list[Run]]:
    count = -(-len(runs) // size)
    for place in range(count):  # of like size
        yield runs[place * len(runs) // count : (place + 1) * len(runs) // count]


def work(queue: Any, lock: Any, rows: Path, given: argparse.Namespace, deadline: float) -> None:
    """A process: takes groups until there are none, or no time for another one."""
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(1)  # several processes whose threads wait for each other are slower than one
    began = time.monotonic()
    worker = Worker(rows, given.rows, given.every)
    say(f"a process on {worker.device.name} is ready after {time.monotonic() - began:.0f} s")
    deadline -= SECONDS_TO_SCORE
    while (group := queue.get()) is not None and time.monotonic() < deadline:
        waiting = [group]
        while waiting:
            group, began = waiting.pop(), time.monotonic()
            name = f"{len(group)} runs, the first {' '.join(map(str, group[0].key))}"
            try:
                lines = worker.train(group, deadline)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                if len(group) > 1:
                    waiting += [group[1::2], group[::2]]
                say(f"{name}: no memory")
                continue
            except Exception:  # the other groups do not depend on what is wrong with this one
                say(f"{name}: {traceback.format_exc()}")
                continue
            with lock, given.output.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
            say(f"{name}: {time.monotonic() - began:.1f} s")


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def write_rows(found: dict[str, Task], folder: Path, asked: str, every: int = 1) -> None:
    """`asked`: one of SPLITS. `every`: one of so many of its rows."""
    parts = {}
    for task in found.values():
        held_out: list[dict[str, Any]] = []
        parts[task.name] = {}
        for split in SPLITS[asked]:
            rows, first = list(getattr(task, split)[::every]), len(held_out)
            held_out += rows
            prefix = f"{split}_" if len(SPLITS[asked]) > 1 and split == "test" else ""
            parts[task.name][prefix] = [first, len(held_out)]
            if known := -(-task.known.get(split, 0) // every):
                parts[task.name][f"{prefix}known_"] = [first, first + known]
                parts[task.name][f"{prefix}new_"] = [first + known, len(held_out)]
        for split, rows in (("train", list(task.train)), ("held_out", held_out)):
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{task.name}_{split}.jsonl").write_text(lines, encoding="utf-8")
    (folder / "parts.json").write_text(json.dumps(parts), encoding="utf-8")


def prepare_rows(groups: Sequence[Sequence[Run]], rows: Path) -> None:
    """Once for all processes, which find them in the cache."""
    tokenizer = None
    for run in {group[0].task: group[0] for group in groups}.values():
        recipe = run.recipe(rows)
        tokenizer = tokenizer or load_tokenizer(recipe.model)
        prepare(recipe.data, tokenizer, rows, cache=cache_of(rows))


def runs_of(configs: Sequence[dict[str, Any]], seeds: Sequence[int], names: Sequence[str]) -> list[Run]:
    """Every configuration on its own tasks and with its own seeds, or else on those of the command."""
    known = tasks()
    return [
        Run(with_instruction(config, known[name]), name, seed)
        for config in configs
        for name in config.get("tasks", names)
        for seed in config.get("seeds", seeds)
    ]


def with_instruction(config: dict[str, Any], task: Task) -> dict[str, Any]:
    """A text of "{task}" means the task's own instruction, as does the same within a longer one."""
    text = config["adapter"].get("text")
    if text is None:
        return config
    return config | {"adapter": config["adapter"] | {"text": text.replace("{task}", task.instruction)}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--minutes", type=float, default=600, help="for everything, from now on")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--together", type=int, default=24, help="rows of a step that share a forward (default 24)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--tasks", nargs="+", default=["quickstart", "triage", "docstrings"])
    parser.add_argument("--only", default="", help="configurations whose name contains this")
    parser.add_argument("--steps", type=int, help="a rehearsal: so many, and few held-out rows")
    parser.add_argument("--every", type=int, help="ask the held-out rows after so many steps, too: the line's curve")
    parser.add_argument("--rows", choices=list(SPLITS), default="validation", help="what is asked (default validation)")
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
        done = {(line["config"], line["task"], line["seed"]) for line in lines if "cut_at" not in line}
    runs = runs_of(configs, given.seeds, given.tasks)
    for run in runs:
        assert run.ideas is not None  # a wrong one is said before anything is loaded
    groups = groups_of([run for run in runs if run.key not in done], given.together)
    known = tasks()
    say(f"{sum(map(len, groups))} runs in {len(groups)} groups")
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        write_rows(
            {name: known[name] for name in {run.task for run in runs}},
            Path(folder),
            given.rows,
            every=20 if given.steps else 1,
        )
        queue, lock = context.Queue(), context.Lock()
        arguments = (queue, lock, Path(folder), given, deadline)
        processes = [context.Process(target=work, args=arguments) for _ in range(given.processes)]
        for process in processes:
            process.start()
        try:
            prepare_rows(groups, Path(folder))
            for group in groups:
                queue.put(group)
        finally:
            for _ in processes:
                queue.put(None)
        for process in processes:
            process.join()
        queue.cancel_join_thread()
    say("done")


if __name__ == "__main__":
    main()
