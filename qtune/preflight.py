"""Everything that can stop a run, found before a weight is read: in the same words for `run`, `check` and `resume`."""

import logging
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from qtune import console
from qtune.adapter.attach import attach_adapter
from qtune.adapter.from_run import earlier_adapter
from qtune.adapter.lean_check import examined
from qtune.at_once import Asked, require_name, require_trackers, together
from qtune.cache import cache_folder
from qtune.data.asking import asking_template
from qtune.data.findings import Finding, gate, stopping
from qtune.data.inspection import Inspection, inspect
from qtune.data.prepare import Prepared, refuse_bad_rows, survey
from qtune.device.present import Device, present_device
from qtune.disk import bytes_in
from qtune.errors import InputError, ModelError, Problem
from qtune.export.gguf.file import refuse_unconvertible
from qtune.export.verification import VERIFICATION
from qtune.memory.forecast import Forecast, attempted
from qtune.memory.kept_dequantized import plan_at_first
from qtune.memory.kept_layers import could_fill
from qtune.memory.longest import Rows, longest_of
from qtune.memory.tracing.bare_model import bare_model
from qtune.model.completeness import require_complete
from qtune.model.folder import require_weights
from qtune.model.host import store_embeddings
from qtune.model.layer_stream import stream_layers
from qtune.model.load import attention_rule, checksums_loaded, load_config, load_tokenizer, require_kernels
from qtune.model.local import base_folder, base_on_disk
from qtune.model.quantization import (
    ParameterCount,
    count_parameters,
    is_stored_quantized,
    quantization_config,
    quantized_too_little,
    require_kind,
)
from qtune.model.reach import reach_of
from qtune.plan import Plan, make_plan
from qtune.recipe.file import Resolved
from qtune.recipe.rates import doubtful_rate
from qtune.recipe.schema import Model, Recipe, Unquantized
from qtune.recipe.steps import few_held_out, few_steps, few_steps_of_a_prompt, kept_checkpoints
from qtune.recipe.text import show_changes
from qtune.run.drift import BASE, require_same_base
from qtune.run.folder import OUTPUT, RunDir, existing_folder, require_writable
from qtune.sizes import size_text, texts_apart
from qtune.startup.launched import said_in
from qtune.startup.quiet import quiet_loading

log = logging.getLogger(__name__)

# bf16 or fp16: what an export writes for each parameter.
EXPORT_BYTES = 2
# Two moments of AdamW in fp32 for each trained parameter.
OPTIMIZER_BYTES = 8


@dataclass(frozen=True)
class Disk:
    """Bytes that a run and its export will write, and what is free where they go."""

    checkpoints_bytes: int
    export_bytes: int
    cache_bytes: int
    free_bytes: int
    least_bytes: int
    """Of the checkpoints and the adapter those without which nothing is left of a run: one, and the adapter."""

    @property
    def is_enough(self) -> bool:
        """Whether both fit beside what is there."""
        return self.checkpoints_bytes + self.export_bytes <= self.free_bytes


@dataclass(frozen=True)
class Preflight:
    """A recipe, its model and its rows, examined. No weight was read."""

    resolved: Resolved
    plan: Plan
    """What will be done on this device; on a card with what is left to its memory settled."""
    tokenizer: PreTrainedTokenizerBase
    prepared: Prepared
    inspection: Inspection
    forecast: Forecast | str | None
    """What a step will need; in words why, where that cannot be traced; None where it was not asked for."""
    beyond_reach: str | None
    """In words, rows that are longer than the model has positions."""
    disk: Disk | None
    """None where no model can be built from the configuration alone."""
    refusals: tuple[InputError, ...]
    """What is wrong with the input, each as the stage says it that would otherwise meet it."""

    @property
    def stopping(self) -> list[Finding]:
        """The findings of the gate that would stop a run."""
        return stopping(self.inspection.findings, self.resolved.recipe.data.allow)

    @property
    def warnings(self) -> list[str]:
        """What a run does not stop for, and may come to regret; a sentence each."""
        return [*self.advice, *self.limits]

    @property
    def advice(self) -> list[str]:
        """Of them those on what is learned, which cannot change any more once a run has begun."""
        recipe, trained = self.resolved.recipe, len(self.prepared.train)
        held_out = 0 if self.prepared.validation is None else len(self.prepared.validation)
        of_a_prompt = few_steps_of_a_prompt(recipe.adapter, recipe.training, trained)
        told = (
            _lost_in_quantization(recipe),
            doubtful_rate(recipe.adapter, self.plan.learning_rate),
            of_a_prompt or few_steps(recipe.training, trained),
            few_held_out(recipe.data, len(self.prepared.examples["train"]) + held_out, held_out),
        )
        return [sentence for sentence in told if sentence is not None]

    @property
    def limits(self) -> list[str]:
        """Of them those on this computer."""
        forecast, said = self.forecast, _without_effect(self.resolved.recipe, self.plan)
        if self.beyond_reach is not None:
            said.append(self.beyond_reach)
        if self.plan.device.lean_problem is not None and not self.plan.lean_step:
            said.append(f"training with peft's own layers: {self.plan.reasons['training', 'lean_step']}")
        if isinstance(forecast, str) and self.plan.device.kind == "cuda":
            said.append(f"memory: could not be predicted ({forecast}); micro-batches shrink if they must")
        if isinstance(forecast, Forecast) and not forecast.fits:
            need, budget = texts_apart(forecast.prediction.need.total_bytes, forecast.budget_bytes)
            rows = forecast.plan.micro_batch_size
            what = "one row is" if rows == 1 else f"{rows} rows are"
            close = ", too close to say" if forecast.verdict == "too close to say" else ""
            said.append(f"memory: {what} predicted to need {need} of {budget}{close}; qtune fit shows what would help")
        if self.disk is not None and not self.disk.is_enough:
            needed = self.disk.checkpoints_bytes + self.disk.export_bytes
            said.append(
                f"disk: {size_text(self.disk.free_bytes)} are free, and the run and a merged export will write "
                f"{size_text(needed)}"
            )
        return said

    def require(self) -> None:
        """Lets nothing through that would stop the run.

        Raises:
            InputError: everything that is wrong with the input, at once.
            GateError: the rows would train the wrong thing, and the recipe does not waive it.
        """
        if self.refusals:
            raise together(self.refusals)
        gate(self.inspection.findings, self.resolved.recipe.data.allow)


def examine(
    resolved: Resolved,
    *,
    folder: Path | None = None,
    traced: bool = False,
    accepted: Sequence[str] = (),
    loads: bool = False,
    goes_on: bool = False,
) -> Preflight:
    """Looks at everything that a run depends on. What stops it is collected: `Preflight.require` raises it.

    folder: where the run writes; left out, a new one in output.directory. traced: whether the step's memory is traced
    where nothing is decided by it, on a CPU. accepted: drifts of the base of the run that the adapter starts from.
    loads: whether the base's weights are loaded next, and every byte of them is compared with what that run had.
    goes_on: whether a checkpoint is loaded, which holds all that the adapter has started from.

    Raises:
        InputError: model or rows cannot be read at all, so that there is nothing more to look at; with whatever else
            was found.
        OutOfMemory: the card has no room even to be asked.
    """
    quiet_loading()
    recipe, asked = resolved.recipe, Asked()
    if folder is None:
        asked.of(require_name, resolved.run_name)
    _ask_of_recipe(recipe, folder or Path(recipe.output.directory), asked, starts=not goes_on)
    device = examined(present_device(), recipe)
    asked.of(_require_lean_step, recipe, device)
    config, tokenizer = asked.of(load_config, recipe.model), asked.of(load_tokenizer, recipe.model)
    if config is None or tokenizer is None:
        raise together(asked.refusals)
    asked.of(_require_whole_base, recipe.model, config)
    asked.of(_require_padding, recipe.model, tokenizer)
    asked.of(_require_room, config, recipe)
    asked.of(_require_layers, config, recipe)
    asked.of(require_kind, config, recipe.quantization)
    plan = make_plan(recipe, device, attention_rule(config))
    asked.of(_require_scaled_adapter, plan)
    if recipe.adapter.start_from is not None and not goes_on and not asked.refusals:
        earlier = RunDir.open(Path(recipe.adapter.start_from).expanduser())
        checksums = checksums_loaded(recipe.model, recipe.quantization, plan) if loads else {}
        asked.of(require_same_base, earlier, recipe, tokenizer, None, accepted, kinds=BASE, checksums=checksums)
    asked.of(require_kernels, recipe.quantization, plan)
    if recipe.output.gguf is not None:
        asked.of(refuse_unconvertible, config, tokenizer, recipe.model.base)
    count = _examined_model(config, recipe, plan, asked)
    prepared = asked.of(survey, recipe.data, tokenizer, resolved.folder, seed=recipe.training.seed)
    if prepared is None:
        raise together(asked.refusals)
    # What is saved beside the adapter asks as training does.
    tokenizer.chat_template = asking_template(prepared.template, recipe.data).of_tokenizer
    asked.of(refuse_bad_rows, prepared, recipe.data)
    inspection = inspect(prepared, recipe.data, config.get_text_config().vocab_size)
    forecast: Forecast | str | None = None
    beyond_reach = None
    if not len(prepared.train):
        forecast = "there are no rows"
    else:
        rows = longest_of(prepared, recipe.data)
        beyond_reach = _beyond_reach(config, recipe, prepared, rows)
        plan = plan_at_first(recipe, device, config, rows.longest.most)
        is_asked = not asked.refusals and (device.kind == "cuda" or _is_short(config, recipe, plan, rows.longest.most))
        if traced or is_asked:
            with console.progress("tracing a step") as bar:
                forecast = attempted(config, recipe, device, rows, bar.tell)
    directory = folder or Path(recipe.output.directory)
    disk = None if count is None else _disk(recipe, plan, count, directory, len(prepared.train))
    # Where nothing can be written nothing is free, and it is said already.
    is_said = any(problem.place == OUTPUT for error in asked.refusals for problem in error.problems)
    if disk is not None and disk.free_bytes < disk.least_bytes and not is_said:
        asked.refusals.append(_too_small(disk, directory))
    settled = forecast.plan if isinstance(forecast, Forecast) else plan
    if recipe.data.streaming == "auto" and prepared.streaming.streams:
        settled = settled.with_streaming(prepared.streaming.reason)
    return Preflight(
        resolved,
        settled,
        tokenizer,
        prepared,
        inspection,
        forecast,
        beyond_reach,
        disk,
        tuple(asked.refusals),
    )


def _beyond_reach(config: PretrainedConfig, recipe: Recipe, prepared: Prepared, rows: Rows) -> str | None:
    """What is said of a longest row that has more tokens than the model has positions; packed rows count each alone."""
    reach, soft = reach_of(config.to_dict()), recipe.adapter.prompt_length
    lengths = prepared.examples["train"].with_format("numpy")["length"][:] if prepared.packed else ()
    # Where no row is within max_length nothing is known of the longest but that the gate stops for it.
    longest = 0 if rows.data is None else int(max(lengths)) if prepared.packed else rows.longest.most
    if reach is None or longest + soft <= reach:
        return None
    behind = f" behind a soft prompt of {soft}" if soft else ""
    return (
        f"data: the longest row has {longest:,} tokens{behind}, and the model was made for {reach:,} positions: what "
        f"lies beyond them it has never seen; data.max_length = {reach - soft} names such rows, and data.on_long_row "
        "drops or cuts them"
    )


def foreseen(recipe: Recipe, config: PretrainedConfig, plan: Plan) -> list[Problem]:
    """What `qtune run` would refuse whatever rows and memory there are, for verbs that need neither rows nor weights.

    A tokenizer that is not here is not asked for: a configuration alone is enough to plan with.
    """
    asked = Asked()
    _ask_of_recipe(recipe, Path(recipe.output.directory), asked)
    asked.of(_require_room, config, recipe)
    asked.of(_require_layers, config, recipe)
    asked.of(require_kind, config, recipe.quantization)
    if recipe.output.gguf is not None:
        with suppress(ModelError):
            tokenizer = load_tokenizer(recipe.model)
            asked.of(refuse_unconvertible, config, tokenizer, recipe.model.base)
    _examined_model(config, recipe, plan, asked)
    return [problem for error in asked.refusals for problem in error.problems]


def _ask_of_recipe(recipe: Recipe, folder: Path, asked: Asked, *, starts: bool = True) -> None:
    """What neither model nor rows are needed for. starts: whether the adapter's start is made."""
    asked.of(_require_one_process)
    asked.of(require_trackers, recipe)
    asked.of(require_writable, folder)
    if starts:
        asked.of(earlier_adapter, recipe)


def _lost_in_quantization(recipe: Recipe) -> str | None:
    """A sentence on a base that is an export of ours, and is about to be quantized: the change that its training made
    to a weight is mostly smaller than a step of the quantization, and rounded away (an export's loss of 0.27 was seen
    to begin at 5.6 again, and the bare base's was 6.0)."""
    folder = Path(recipe.model.base).expanduser()
    if isinstance(recipe.quantization, Unquantized) or not (folder / VERIFICATION).is_file():
        return None
    return (
        f"{recipe.model.base} is an export, and quantizing it rounds away most of what its training has changed; go on "
        'from the run itself with [adapter] start_from, or set quantization.kind = "none"'
    )


def _require_one_process() -> None:
    """Whoever shares work has taken the launcher's words out of the environment (`training.ranks`)."""
    said = said_in(os.environ)
    if isinstance(said, str):
        raise InputError(Problem("", said))
    if said.processes > 1:
        raise InputError(Problem("WORLD_SIZE", "only qtune run shares its work out; start this without a launcher"))


def _require_whole_base(model: Model, config: PretrainedConfig) -> None:
    """The base's weights are there, and are those of its model; one that is not on this disk yet is not asked."""
    require_weights(base_folder(model))
    if (folder := base_on_disk(model)) is not None:
        require_complete(folder, config)


def _require_padding(model: Model, tokenizer: PreTrainedTokenizerBase) -> None:
    """Rows of a batch are padded with some token that is none of their text."""
    if tokenizer.pad_token_id is None:
        message = "its tokenizer names neither an end of text nor a token to pad with (eos_token, pad_token)"
        raise ModelError(Problem(model.base, f"{message}: is its tokenizer_config.json whole?"))


def _require_room(config: PretrainedConfig, recipe: Recipe) -> None:
    """A soft prompt leaves positions for rows: two at least, a token and the one that is predicted from it."""
    reach, soft = reach_of(config.to_dict()), recipe.adapter.prompt_length
    if reach is not None and soft and reach - soft < 2:
        message = f"the model was made for {reach:,} positions, and none of them would be left for a row; give fewer"
        raise InputError(Problem(f"adapter.virtual_tokens = {soft}", message))


def _require_layers(config: PretrainedConfig, recipe: Recipe) -> None:
    """A number of layers is not more than the model has: who gives one counts on the rest to be otherwise."""
    layers = config.get_text_config().num_hidden_layers
    counts = {
        "training.gradient_checkpointing": recipe.training.gradient_checkpointing,
        "memory.keep_dequantized": recipe.memory.keep_dequantized,
    }
    problems = [
        Problem(f"{key} = {count}", f"the model has {layers} layers; true is all of them")
        for key, count in counts.items()
        if isinstance(count, int) and not isinstance(count, bool) and count > layers
    ]
    if problems:
        raise InputError(problems)


def _without_effect(recipe: Recipe, plan: Plan) -> list[str]:
    """Of what a recipe asks that memory be saved by, what changes nothing here, and why; a sentence each."""
    memory, said = recipe.memory, []
    if plan.device.kind == "cpu":
        places = {"embeddings": memory.embeddings, "activations": memory.activations, "layers": memory.layers}
        said += [
            f"{show_changes({('memory', key): place})} saves nothing: a processor's memory is the host's"
            for key, place in places.items()
            if place == "host"
        ]
        if recipe.training.optimizer.startswith("paged-"):
            paged = show_changes({("training", "optimizer"): recipe.training.optimizer})
            said.append(f"{paged} pages nothing: a processor's memory is the host's")
    if memory.keep_dequantized not in ("auto", False) and plan.keep_dequantized is False:
        key = ("memory", "keep_dequantized")
        said.append(f"{show_changes({key: memory.keep_dequantized})} has no effect: {plan.reasons[key]}")
    if memory.layers == "sharded" and plan.layers == "device":
        alone = show_changes({("memory", "layers"): memory.layers})
        said.append(f"{alone} divides nothing in one process; torchrun -m qtune run starts several")
    return said


def _is_short(config: PretrainedConfig, recipe: Recipe, plan: Plan, length: int) -> bool:
    """Whether on a processor the micro-batch or the layers that are computed twice depend on its memory."""
    is_open = "auto" in (recipe.training.gradient_checkpointing, recipe.training.micro_batch_size)
    return is_open and could_fill(config, plan, length)


def _require_lean_step(recipe: Recipe, device: Device) -> None:
    if recipe.training.lean_step is True and device.lean_problem is not None:
        message = (
            f"qtune's functions do not agree with peft's layers on {device.name}: {device.lean_problem}; "
            "false trains with peft's own, which takes more memory"
        )
        raise InputError(Problem("training.lean_step = true", message))


def _require_scaled_adapter(plan: Plan) -> None:
    """Gradients of float16 weights cannot be scaled: the first step would end in a ValueError of torch's scaler."""
    if plan.loss_scaling and plan.adapter_dtype == "float16":
        message = (
            "losses are scaled where products are in float16, and gradients of float16 weights cannot be; remove the "
            "key, which makes it float32, or choose quantization.compute_dtype"
        )
        raise InputError(Problem('adapter.dtype = "float16"', message))


def _examined_model(config: PretrainedConfig, recipe: Recipe, plan: Plan, asked: Asked) -> ParameterCount | None:
    """Whether enough of the model is quantized and the adapter finds its place, on the meta device; its parameters.

    None where it cannot be built there: a run may work all the same.
    """
    dtype = getattr(torch, plan.compute_dtype)
    attention = "sdpa" if plan.attention.startswith("flash") else plan.attention
    try:
        network = bare_model(config, dtype, quantization_config(recipe.quantization, dtype), attention)
    except ModelError:
        log.debug("no bare model", exc_info=True)
        return None
    if not is_stored_quantized(config):
        too_little = quantized_too_little(recipe.model.base, network, recipe.quantization)
        if too_little is not None:
            asked.refusals.append(ModelError(too_little))
    try:
        store_embeddings(network, plan.embeddings, "meta")
        if plan.layers != "device":
            stream_layers(network, plan.layers, "meta", parts=plan.device.processes)
        with torch.device("meta"):
            model = attach_adapter(network, recipe.adapter, plan)
    except ModelError as error:
        # peft names what it does not find by a ValueError; anything else may be the meta device's own fault.
        if isinstance(error.__cause__, (ValueError, type(None))):
            asked.refusals.append(error)
        return None
    return count_parameters(model)


def _disk(recipe: Recipe, plan: Plan, count: ParameterCount, directory: Path, rows: int) -> Disk:
    """What the run will write, over so many rows. A checkpoint is written before the oldest goes, so one more than is
    kept must fit."""
    adapter_bytes = count.trainable * getattr(torch, plan.adapter_dtype).itemsize
    # The adapter in peft's format and its full state, and the optimizer's moments.
    checkpoint = 2 * adapter_bytes + OPTIMIZER_BYTES * count.trainable
    free = _free_bytes(directory)
    return Disk(
        (kept_checkpoints(recipe.training, rows) + 1) * checkpoint + (1 + best_states(recipe)) * adapter_bytes,
        EXPORT_BYTES * (count.total - count.trainable),
        bytes_in(cache_folder() / "examples"),
        free,
        checkpoint + adapter_bytes,
    )


def _too_small(disk: Disk, directory: Path) -> InputError:
    """What the last step would else say, when all is lost."""
    what = f"{size_text(disk.free_bytes)} are free at {existing_folder(directory)}"
    needed = f"one checkpoint and the adapter take {size_text(disk.least_bytes)}"
    return InputError(Problem(OUTPUT, f"{what}, and {needed}; free some, or name another folder"))


def best_states(recipe: Recipe) -> int:
    """How many trained states the best evaluations keep at once: the new one is written before the older goes."""
    is_evaluated = recipe.data.validation not in (None, 0) and recipe.training.eval_every != "never"
    return 2 if is_evaluated and recipe.training.result != "last" else 0


def _free_bytes(directory: Path) -> int:
    """Free where a folder is or would be made; where that cannot be, which is refused elsewhere, nothing."""
    try:
        return shutil.disk_usage(existing_folder(directory)).free
    except OSError:
        return 0
