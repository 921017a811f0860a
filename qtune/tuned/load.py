"""A run's folder -> its base model, tokenizer and adapter, put together as they were trained."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qtune.adapter.state import load_adapter
from qtune.data.asking import merging_template
from qtune.data.template import choose_template
from qtune.device.present import Device, present_device
from qtune.model.load import checksums_loaded, load_base, load_tokenizer
from qtune.plan import Plan, make_plan
from qtune.recipe.schema import Recipe
from qtune.run.drift import require_same_base
from qtune.run.finished import whole_adapter
from qtune.run.folder import RunDir
from qtune.run.resolved import resolved_recipe
from qtune.startup.quiet import quiet_loading


@dataclass(frozen=True)
class LoadedRun:
    """A run in memory; `tokenizer` has the chat template of the run."""

    run_dir: RunDir
    recipe: Recipe
    plan: Plan
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel | PeftModel


def load_untuned(
    run_dir: RunDir, device: Device | None = None, *, accepted: Sequence[str] = (), parts: Sequence[str] = ()
) -> LoadedRun:
    """The run's base model without its adapter, quantized and in the dtypes that it was trained with.

    accepted: kinds of drift (`run.drift`) that it is loaded with. parts: keys of [data] whose rows will be used.

    Raises:
        RunError, ModelError: the run's files or its base model cannot be read, or are not what was trained with.
    """
    recipe, plan, tokenizer = load_reader(run_dir, device, accepted=accepted, parts=parts, loads=True)
    network = load_base(recipe.model, recipe.quantization, plan)
    return LoadedRun(run_dir, recipe, plan, tokenizer, network.eval())


def load_reader(
    run_dir: RunDir,
    device: Device | None = None,
    *,
    accepted: Sequence[str] = (),
    parts: Sequence[str] = (),
    loads: bool = False,
) -> tuple[Recipe, Plan, PreTrainedTokenizerBase]:
    """What rows are read with, before any weight is: the run's recipe, its plan, and its tokenizer with its template.

    loads: whether the weights will be loaded, and every byte of them is compared. The rest as in `load_untuned`.

    Raises:
        RunError, ModelError: as `load_untuned`.
    """
    quiet_loading()
    recipe = resolved_recipe(run_dir)
    device = device or present_device()
    tokenizer = load_tokenizer(recipe.model)
    template = choose_template(recipe.data.chat_template, tokenizer, run_dir.path)
    plan = make_plan(recipe, device)
    checksums = checksums_loaded(recipe.model, recipe.quantization, plan) if loads else {}
    require_same_base(
        run_dir, recipe, tokenizer, template.text, accepted, device=device, parts=parts, checksums=checksums
    )
    tokenizer.chat_template = merging_template(template, recipe.data).of_tokenizer
    return recipe, plan, tokenizer


def with_adapter(untuned: LoadedRun) -> LoadedRun:
    """The same run with its adapter on the base model (which is changed in place).

    Raises:
        RunError: training has not ended.
    """
    folder = untuned.run_dir.finished_adapter()
    assert not isinstance(untuned.model, PeftModel)
    return replace(untuned, model=load_adapter(untuned.model, folder).eval())


def load_run(run_dir: RunDir, device: Device | None = None, *, accepted: Sequence[str] = ()) -> LoadedRun:
    """The base model with the trained adapter; `accepted` as in `load_untuned`.

    Raises:
        RunError, ModelError: the run has not ended, or its files or base model cannot be read.
    """
    whole_adapter(run_dir)
    return with_adapter(load_untuned(run_dir, device, accepted=accepted))
