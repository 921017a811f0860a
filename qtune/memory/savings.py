"""What a recipe saves: the usual ways of fine-tuning the same model, traced; its techniques switched off one by one."""

from __future__ import annotations

import copy
import importlib.metadata
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from qtune.adapter.attach import attach_adapter
from qtune.memory.budget import EMBEDDINGS, LAYERS
from qtune.memory.cached import cached, predicted
from qtune.memory.kept_dequantized import KEEP_DEQUANTIZED
from qtune.memory.kept_layers import CHECKPOINTING
from qtune.memory.predict import Longest, build, card_of, summarize, training_step
from qtune.memory.tracing.bare_model import bare_model
from qtune.memory.tracing.step import Step
from qtune.memory.tracing.trace import trace
from qtune.model.load import attention_rule
from qtune.model.loss import TILE_BYTES, install_loss
from qtune.model.quantization import held_as, is_stored_quantized, quantization_config, unquantized
from qtune.plan import make_plan
from qtune.recipe.parse import changed
from qtune.recipe.schema import FourBit, Lora, Unquantized
from qtune.sizes import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PretrainedConfig

    from qtune.memory.predict import Prediction
    from qtune.memory.tracing.step import ParameterGroups
    from qtune.plan import Plan
    from qtune.recipe.schema import Recipe


log = logging.getLogger(__name__)

TRL_HOW = "SFTTrainer's own step: fused head in tiles, a 16-bit adapter on a quantized base, AdamW"


def trl_version() -> str:
    """Of the TRL that is installed: "1.16"."""
    return ".".join(importlib.metadata.version("trl").split(".")[:2])


def trl_name() -> str:
    """What the way of the TRL that is installed is called."""
    return f"TRL {trl_version()} as it comes"


@dataclass(frozen=True)
class Variant:
    """One way of training the same model on the same batch."""

    name: str
    how: str
    prediction: Prediction

    def to_json(self) -> dict[str, Any]:
        """As it stands in memory.json, with how its figures were obtained; sizes in bytes."""
        prediction = self.prediction
        return {
            "name": self.name,
            "how": f"traced: {self.how}",
            "peak_bytes": prediction.peak.bytes,
            "needed_bytes": prediction.need.total_bytes,
        }


def baselines(
    config: PretrainedConfig,
    recipe: Recipe,
    plan: Plan,
    longest: Longest | None = None,
    tell: Callable[[str], None] = lambda words: None,
) -> list[Variant]:
    """The usual ways: full fine-tuning, 16-bit adapter, QLoRA as its first scripts had it, TRL's trainer of today; on
    the recipe's model, batch, length.

    They get gradient checkpointing and accumulation wherever the recipe has them, and PyTorch's AdamW; TRL's trainer
    checkpoints by itself. What a recipe saves is against TRL: the others are there to see what quantization and the
    loss are worth.

    tell: hears what is traced next.
    """
    step = training_step(recipe, plan, longest or Longest(plan.max_length))
    validates_more = step.eval_batch is not None and step.eval_batch.length > step.batch.length
    plain = Step(
        step.batch, logits_loss, _adamw, step.checkpointing, step.autocast, step.max_gradient_norm,
        accumulates=step.accumulates, checkpointed=step.checkpointed,
        eval_batch=step.eval_batch if validates_more else None,  # of training rows it holds less than their step
    )  # fmt: skip
    low = torch.bfloat16 if plan.compute_dtype != "float16" else torch.float16
    four_bit = quantization_config(FourBit(kind="nf4", double_quantization=True), low)
    card = card_of(plan.device)

    def full(dtype: torch.dtype) -> Any:
        return lambda shape: bare_model(unquantized(shape), dtype, None, plan.attention).requires_grad_(True)

    def adapted(quantized: bool) -> Any:
        def made(shape: PretrainedConfig) -> Any:
            network = bare_model(unquantized(shape), low, four_bit if quantized else None, plan.attention)
            if quantized:
                upcast_unquantized(network)
            with torch.device("meta"):
                return attach_adapter(network, recipe.adapter, plan)

        return made

    def baseline(name: str, how: str, made: Any) -> Variant:
        def traced() -> Prediction:
            return summarize(trace(config, made, plain, card=card))

        tell(name)
        said = f"{how}, AdamW, whole logits"
        return Variant(name, said, cached(config, recipe, plan, longest, traced, name))

    word = "bf16" if low is torch.bfloat16 else "fp16"
    computed = f"autocast to {word}" if step.autocast is not None else "computed in fp32"
    older = [
        baseline("full fine-tuning, fp32", f"fp32 weights, {computed}", full(torch.float32)),
        baseline(f"full fine-tuning, {word}", f"{word} weights and moments", full(low)),
        baseline(f"{recipe.adapter.kind}, {word} base", "unquantized base", adapted(False)),
        baseline("QLoRA as in 2023", "NF4, k-bit preparation (everything else in fp32)", adapted(True)),
    ]
    tell(trl_name())
    newest = _as_trl(config, recipe, plan, longest, step)
    return older if newest is None else [*older, newest]


def _as_trl(
    config: PretrainedConfig, recipe: Recipe, plan: Plan, longest: Longest | None, step: Step
) -> Variant | None:
    """SFTTrainer's own step on the batch of `step`; None where it cannot be traced."""
    from qtune.memory.trl_step import trace_trl

    def traced() -> Prediction:
        return summarize(trace_trl(config, recipe, plan, step, card_of(plan.device)))

    name = trl_name()
    try:
        return Variant(name, TRL_HOW, cached(config, recipe, plan, longest, traced, name))
    except (RuntimeError, AttributeError, TypeError, IndexError, NotImplementedError):
        log.debug("TRL's step of a %s cannot be traced", config.model_type, exc_info=True)
        return None


def attribution(
    config: PretrainedConfig,
    recipe: Recipe,
    plan: Plan,
    longest: Longest | None = None,
    tell: Callable[[str], None] = lambda words: None,
) -> list[Variant]:
    """The recipe with one technique switched off at a time; what each saves is the difference to the recipe's peak.

    tell: hears what is traced next.
    """
    rows = longest or Longest(plan.max_length)
    # As memory chose them, in every variant.
    chosen = {CHECKPOINTING: plan.gradient_checkpointing, KEEP_DEQUANTIZED: plan.keep_dequantized}
    recipe = changed(recipe, {EMBEDDINGS: plan.embeddings, **chosen})
    computed = {"compute_dtype": recipe.quantization.compute_dtype}
    held = held_as(recipe.quantization, config).model_copy(update=computed)
    recipe = recipe.model_copy(update={"quantization": held})

    def without(name: str, how: str, other: Recipe) -> Variant:
        tell(f"without {name}")
        other_plan = make_plan(other, plan.device, attention_rule(config)).with_micro_batch(
            plan.micro_batch_size, "as in the recipe"
        )
        return Variant(name, how, predicted(_stored_as(config, other), other, other_plan, rows))

    def untiled() -> Prediction:
        step = training_step(recipe, plan, rows)
        return summarize(trace(config, lambda shape: _untiled(shape, recipe, plan), step, card=card_of(plan.device)))

    def whole_logits() -> Variant:
        tell("without tiled loss")
        whole = cached(config, recipe, plan, rows, untiled, "untiled")
        return Variant("tiled loss", "the logits of all labelled positions at once", whole)

    return [*(without(*variant) for variant in _switched_off(recipe, plan)), whole_logits()]


def _stored_as(config: PretrainedConfig, recipe: Recipe) -> PretrainedConfig:
    """The configuration of a base whose checkpoint brings its own quantization, had it brought the recipe's."""
    if not is_stored_quantized(config) or isinstance(recipe.quantization, Unquantized):
        return unquantized(config)
    config = copy.deepcopy(config)
    double = isinstance(recipe.quantization, FourBit) and recipe.quantization.double_quantization
    config.quantization_config["bnb_4bit_use_double_quant"] = double
    return config


def _switched_off(recipe: Recipe, plan: Plan) -> Iterator[tuple[str, str, Recipe]]:
    quantization = recipe.quantization
    if not isinstance(quantization, Unquantized):
        word = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[plan.compute_dtype]
        other = recipe.model_copy(update={"quantization": Unquantized(kind="none")})
        yield f"{quantization.kind} weights", f"the base in {word}", other
    if isinstance(quantization, FourBit) and quantization.double_quantization:
        single = quantization.model_copy(update={"double_quantization": False})
        yield "double quantization", "an fp32 absmax for each block", recipe.model_copy(update={"quantization": single})
    if plan.lean_step:
        off = changed(recipe, {("training", "lean_step"): False})
        yield "lean step", "peft's layers, transformers' blocks", off
    if plan.gradient_checkpointing:
        off = changed(recipe, {CHECKPOINTING: False})
        yield "gradient checkpointing", "every activation kept", off
    if plan.gradient_checkpointing is not True:
        every = changed(recipe, {CHECKPOINTING: True})
        yield "layers that keep all", "every layer computed twice", every
    if plan.keep_dequantized:
        off = changed(recipe, {KEEP_DEQUANTIZED: False})
        yield "weights kept dequantized", "dequantized for every product", off
    if plan.optimizer != "adamw":
        yield f"{plan.optimizer} optimizer", "fp32 moments", changed(recipe, {("training", "optimizer"): "adamw"})
    if plan.embeddings == "host":
        yield (
            "embeddings on the host",
            "embeddings and head on the card",
            changed(recipe, {("memory", "embeddings"): "device"}),
        )
    if plan.embeddings in ("int8", "nf4"):
        plain = changed(recipe, {("memory", "embeddings"): "device"})
        yield f"{plan.embeddings} embeddings", f"embeddings and head in {plan.compute_dtype}", plain
    if plan.layers != "device":
        where = "layers shared out" if plan.layers == "sharded" else f"layers on the {plan.layers}"
        yield where, "they stay on the card", changed(recipe, {LAYERS: "device"})
    if plan.activations == "host":
        yield "activations on the host", "they stay on the card", changed(recipe, {("memory", "activations"): "device"})
    if plan.loss_tile_bytes < TILE_BYTES:
        yield (
            "smaller loss tiles",
            f"tiles of {TILE_BYTES // MIB} MiB",
            changed(recipe, {("memory", "loss_tile"): f"{TILE_BYTES // MIB}MiB"}),
        )
    if isinstance(recipe.adapter, Lora) and plan.adapter_dtype != "float32":
        yield "16-bit adapter", "the adapter in fp32", changed(recipe, {("adapter", "dtype"): "float32"})


def _untiled(config: PretrainedConfig, recipe: Recipe, plan: Plan) -> Any:
    model = build(config, recipe, plan)
    install_loss(model.get_base_model(), tiled=False)
    return model


def logits_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """transformers' own: the whole logits, upcast to fp32."""
    loss: torch.Tensor = model(**batch, use_cache=False).loss
    return loss


def upcast_unquantized(model: Any) -> None:
    """What `prepare_model_for_kbit_training` does (peft/utils/other.py): what is not quantized becomes fp32."""
    cast: dict[int, torch.nn.Parameter] = {}
    kept: list[torch.Tensor] = []
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or type(parameter).__name__ in ("Params4bit", "Int8Params"):
                continue
            if id(parameter) not in cast:
                kept.append(parameter)
                cast[id(parameter)] = torch.nn.Parameter(parameter.data.float(), requires_grad=False)
            module._parameters[name] = cast[id(parameter)]


def _adamw(parameters: ParameterGroups) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4, foreach=True)
