"""The memory of a recipe on a device, before anything is downloaded: the step that `qtune run` takes, traced."""

from __future__ import annotations

import functools
import itertools
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import bitsandbytes
import torch

from qtune.adapter.attach import attach_adapter
from qtune.adapter.lean import install_lean_step
from qtune.errors import ModelError, Problem, first_line
from qtune.kernels.plain import SCRATCH_BYTES
from qtune.memory.allowance import Need, card_need
from qtune.memory.tracing import categories
from qtune.memory.tracing.bare_model import bare_model
from qtune.memory.tracing.cuda import TODAYS_CARD
from qtune.memory.tracing.history import Moment
from qtune.memory.tracing.reserved import BEFORE_QUANTIZATION
from qtune.memory.tracing.step import Batch, Step
from qtune.memory.tracing.trace import Traced, trace
from qtune.memory.tracing.work import rows_of
from qtune.model.host import store_embeddings
from qtune.model.kept_weights import keep_weights
from qtune.model.layer_stream import stream_layers
from qtune.model.load import require_attention
from qtune.model.loss import install_loss
from qtune.model.quantization import quantization_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from qtune.device.present import Device
    from qtune.memory.tracing.cuda import Capability
    from qtune.memory.tracing.history import History
    from qtune.memory.tracing.work import WorkRow
    from qtune.plan import Plan
    from qtune.recipe.schema import Recipe


@dataclass(frozen=True)
class Longest:
    """The longest rows of the data, as far as memory depends on them."""

    length: int
    """Tokens of the longest training row."""
    scored: int | None = None
    """The most labelled tokens of any row; None: all of them."""
    equal: bool = False
    """Whether all rows are equally long, so that no mask is needed."""
    evaluated: int | None = None
    """Tokens of the longest validation row; None: as long as the training rows."""

    @property
    def most(self) -> int:
        """Tokens of the longest row that is computed, in training or in an evaluation."""
        return max(self.length, self.evaluated or 0)


def predict(
    config: PretrainedConfig,
    recipe: Recipe,
    plan: Plan,
    longest: Longest | None = None,
    *,
    plays_allocator: bool = True,
) -> Traced:
    """Traces the recipe's step under `plan`.

    longest: left out, a whole micro-batch of `max_length` tokens, all of them scored: the most that can come.
    plays_allocator: without, the trace is quicker, and tells nothing of what a card's allocator takes.

    Raises:
        ModelError: no model can be built from the configuration, the adapter does not fit it, or the model's code asks
            tensors without storage for what only weights can tell.
    """
    step = training_step(recipe, plan, longest or Longest(plan.max_length))
    try:
        made = functools.partial(build, recipe=recipe, plan=plan)
        key = model_key(config, recipe, plan) + ("" if plays_allocator else ", without its allocator")
        card = card_of(plan.device)
        traced = trace(config, made, step, card=card, plays_allocator=plays_allocator, same_model=key)
        return replace(traced, scratch_bytes=SCRATCH_BYTES) if plan.lean_step and card is not None else traced
    except (RuntimeError, AttributeError, TypeError, ValueError, LookupError, AssertionError, ArithmeticError) as error:
        reason = f"a step of {config.model_type} cannot be traced without its weights: {first_line(error)}"
        reason += ". A run may work all the same"
        raise ModelError(Problem(recipe.model.base, reason)) from error


def card_of(device: Device) -> Capability | None:
    """What a trace must know of a card; None for a CPU."""
    return (device.capability or TODAYS_CARD) if device.kind == "cuda" else None


def model_key(config: PretrainedConfig, recipe: Recipe, plan: Plan) -> str:
    """Everything that a step's bytes depend on but its batches, as one text: equal for equal models."""
    device = plan.device
    parts = {
        "config": config.to_json_string(use_diff=False),
        "quantization": recipe.quantization.model_dump(exclude={"minimum_share", "keep_copy"}),
        "adapter": recipe.adapter.model_dump(exclude={"alpha", "text"}),
        "clip": recipe.training.max_gradient_norm,
        "plan": [
            device.kind, device.capability, plan.compute_dtype, plan.adapter_dtype, plan.attention,
            plan.gradient_checkpointing, plan.optimizer, plan.embeddings, plan.activations, plan.loss_tile_bytes,
            plan.lean_step, plan.layers, device.processes if plan.layers == "sharded" else 1, plan.keep_dequantized,
        ],
    }  # fmt: skip
    return json.dumps(parts, sort_keys=True, default=str)


def build(config: PretrainedConfig, recipe: Recipe, plan: Plan) -> Any:
    """The model that a run trains, on the meta device: quantized, adapted, with our loss."""
    require_attention(plan.attention)
    dtype = getattr(torch, plan.compute_dtype)
    # PyTorch's own kernel keeps what the package's keeps: the output and the log-sum-exp of each row.
    attention = "sdpa" if plan.attention.startswith("flash") else plan.attention
    network = bare_model(config, dtype, quantization_config(recipe.quantization, dtype), attention)
    store_embeddings(network, plan.embeddings, "meta")
    if plan.layers != "device":
        stream_layers(network, plan.layers, "meta", parts=plan.device.processes)
    with torch.device("meta"):  # nothing to initialise: only the shapes matter
        model = attach_adapter(network, recipe.adapter, plan)
    base = model.get_base_model()
    # As a run finds out by `loss_agrees`: a class without a backbone apart from its head is given whole logits.
    install_loss(base, tiled=base.base_model is not base, tile_bytes=plan.loss_tile_bytes)
    if plan.lean_step:
        install_lean_step(model, dtype)
    keep_weights(model, plan.keep_dequantized, dtype)
    return model


def training_step(recipe: Recipe, plan: Plan, longest: Longest) -> Step:
    """What `QloraTrainer` does with a micro-batch, as a value."""
    rows = plan.micro_batch_size
    masked = recipe.data.packing or (rows > 1 and not longest.equal)
    # Nothing comes before a row's first token that could predict it, unless virtual tokens do.
    unscored = 0 if recipe.adapter.predicts_first_token else 1

    def batch(length: int) -> Batch:
        each = length if longest.scored is None else min(longest.scored, length)
        return Batch(rows, length, masked, rows * min(each, length - unscored))

    return Step(
        batch=batch(longest.length),
        loss=summed_loss,
        optimizer=optimizer_of(plan),
        checkpointing="non-reentrant" if plan.gradient_checkpointing else "none",
        autocast=autocast_of(plan),
        max_gradient_norm=recipe.training.max_gradient_norm,
        paged=plan.device.kind == "cuda" and plan.optimizer.startswith("paged"),
        activations="host" if plan.activations == "host" else "device",
        accumulates=plan.accumulation_steps > plan.together,
        micro_batches=plan.together,
        frees_inputs=True,
        host_apart=plan.device.kind == "cuda",
        eval_batch=batch(longest.length if longest.evaluated is None else longest.evaluated),
        checkpointed=plan.gradient_checkpointing or True,
    )


def autocast_of(plan: Plan) -> torch.dtype | None:
    """The trainer computes under autocast in either 16-bit type (`sft_config`: bf16, fp16), and plainly in fp32."""
    return None if plan.compute_dtype == "float32" else getattr(torch, plan.compute_dtype)


def summed_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """`QloraTrainer.compute_loss`: the summed loss over the number of scored tokens."""
    outputs = model(**batch, use_cache=False)
    loss: torch.Tensor = outputs.loss / max(1, outputs.scored)
    return loss


def optimizer_of(plan: Plan) -> Any:
    """The class that transformers makes of the plan's optimizer."""
    match plan.optimizer:
        case "adamw":
            return lambda parameters: torch.optim.AdamW(parameters, lr=plan.learning_rate, fused=True)
        case "paged-adamw":
            return lambda parameters: bitsandbytes.optim.AdamW(parameters, lr=plan.learning_rate, optim_bits=32)
        case "adamw-8bit" | "paged-adamw-8bit":
            return lambda parameters: bitsandbytes.optim.AdamW(parameters, lr=plan.learning_rate, optim_bits=8)
    raise ValueError(f"no optimizer is called {plan.optimizer}")


@dataclass(frozen=True)
class Prediction:
    """What tracing says about a recipe on a device."""

    peak: Moment
    by_phase: dict[str, Moment]
    need: Need
    paged_bytes: int
    """Optimizer state in managed memory: on the card only while it is used."""
    host_bytes: int
    """The most that waits in the computer's memory: embeddings and head, activations."""
    layers: int
    layers_executed: int
    seconds: float
    timeline: dict[str, list[int]]
    """Live bytes by category in POINTS stretches of the step, each stretch at its fullest tick."""
    phases: list[tuple[int, str]]
    """(first stretch, phase) of the timeline."""
    work: list[WorkRow]
    """What one micro-batch, a step of the optimizer and a batch of an evaluation give the device to do."""

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Prediction:
        """A prediction from what `dataclasses.asdict` made of one.

        Raises:
            KeyError, TypeError: it is one of another version.
        """
        moments = {name: Moment(**moment) for name, moment in stored["by_phase"].items()}
        phases = [(int(point), str(name)) for point, name in stored["phases"]]
        peak, need = Moment(**stored["peak"]), Need(**stored["need"])
        return cls(
            **stored
            | {
                "peak": peak,
                "by_phase": moments,
                "need": need,
                "phases": phases,
                "work": [tuple(row) for row in stored["work"]],
            }
        )


POINTS = 240
LEAST = POINTS // 8
"""Points of the shortest phase in a timeline: room for its name."""
STEP_PHASES = ("forward", "backward", "optimizer", "eval")


def summarize(traced: Traced, *, loaded_whole: bool = False) -> Prediction:
    """The few numbers that tables, pictures and a fit need.

    loaded_whole: what belongs to the host is loaded to the card before it goes there (`model.is_stored_quantized`).
    """
    history = traced.history
    by_phase = {phase: history.peak(phase) for phase in STEP_PHASES}
    if loaded_whole and history.host_at_rest:
        by_phase["load"] = _loading(history)
    at_rest = sum(history.at(0).alive.values()) + history.peak("optimizer").alive.get(categories.OPTIMIZER, 0)
    peak = max(by_phase.values(), key=lambda moment: moment.bytes)
    need = Need(peak.bytes, at_rest)
    if traced.card is not None:
        quantized = sum(history.at(0).alive.get(name, 0) for name in BEFORE_QUANTIZATION)
        need = card_need(peak.bytes, at_rest, quantized, traced.reserved_bytes, traced.card, traced.scratch_bytes)
    timeline, phases = _timeline(history)
    return Prediction(
        peak, {name: moment for name, moment in by_phase.items() if moment.bytes}, need,
        history.paged, history.host, traced.layers, traced.layers_executed, traced.seconds, timeline, phases,
        rows_of(traced.work),
    )  # fmt: skip


def _loading(history: History) -> Moment:
    """The model as it is loaded: whole on the card, before its embeddings and head move to the host."""
    alive = {name: size for name, size in history.at(0).alive.items() if name != categories.ADAPTER}
    alive[categories.EMBEDDINGS] = alive.get(categories.EMBEDDINGS, 0) + history.host_at_rest
    return Moment(sum(alive.values()), "load", "", "the whole model is loaded", alive)


def _timeline(history: History) -> tuple[dict[str, list[int]], list[tuple[int, str]]]:
    """Curves of POINTS points, the phases in the order of a training run (a trace has the optimizer last).

    Points stand for equally many allocations each, but a phase has at least LEAST of them: an optimizer's few
    allocations would be a line.
    """
    phase_of = [label.phase for label in history.labels]
    ticks = {phase: [tick for tick, name in enumerate(phase_of) if name == phase] for phase in STEP_PHASES}
    met = {phase: found for phase, found in ticks.items() if found}
    total, ticks_met = history.total.tolist(), sum(map(len, met.values()))
    counts = {phase: max(LEAST, round(POINTS * len(found) / ticks_met)) for phase, found in met.items()}
    longest = max(counts, key=lambda phase: counts[phase], default="")
    if longest:
        counts[longest] += POINTS - sum(counts.values())
    chosen: list[int] = []
    phases: list[tuple[int, str]] = []
    for phase, found in met.items():
        phases.append((len(chosen), phase))
        edges = [round(number * len(found) / counts[phase]) for number in range(counts[phase] + 1)]
        for start, stop in itertools.pairwise(edges):
            start = min(start, len(found) - 1)
            chosen.append(max(found[start : max(stop, start + 1)], key=total.__getitem__))
    curves = {
        name: [int(v) for v in history.bytes[row, chosen]]
        for row, name in enumerate(history.names)
        if name != categories.HOST
    }
    return curves, phases
