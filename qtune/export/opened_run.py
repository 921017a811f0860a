"""A run's folder -> everything that an export starts from."""

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftConfig
from transformers import PreTrainedTokenizerBase

from qtune.data.asking import asking_template
from qtune.data.template import ChatTemplate, choose_template
from qtune.device.present import present_device
from qtune.export.adapter_weights import adapter_config
from qtune.export.basis import Basis
from qtune.model.load import load_tokenizer
from qtune.model.local import local_base
from qtune.plan import compute_dtype_rule
from qtune.recipe.schema import FourBit, Recipe
from qtune.run.folder import RunDir
from qtune.run.resolved import resolved_recipe


@dataclass(frozen=True)
class OpenedRun:
    """A finished run, opened for export. No weights are read yet."""

    run: RunDir
    recipe: Recipe
    base: Path
    adapter: Path
    config: PeftConfig
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    """As it is exported: it asks as training did where a conversation has no system message."""
    trained_template: ChatTemplate
    """As the rows were rendered, which had theirs."""
    basis: Basis

    @property
    def base_name(self) -> str:
        """The base as the user knows it: a hub id, a built-in name, a path."""
        return self.recipe.model.base


def open_for_export(run: RunDir, adapter: Path | None = None) -> OpenedRun:
    """Opens a run for export; `adapter` names another of its adapters, a checkpoint for example.

    Raises RunError when training has not ended or its files are not readable, ModelError when the base model cannot be
    had.
    """
    adapter = adapter or run.finished_adapter()
    recipe = resolved_recipe(run)
    tokenizer = load_tokenizer(recipe.model)
    trained = choose_template(recipe.data.chat_template, tokenizer, run.path)
    template = asking_template(trained, recipe.data)
    tokenizer.chat_template = template.of_tokenizer
    return OpenedRun(
        run=run,
        recipe=recipe,
        base=local_base(recipe.model),
        adapter=adapter,
        config=adapter_config(adapter),
        tokenizer=tokenizer,
        template=template,
        trained_template=trained,
        basis=basis_of(recipe),
    )


def basis_of(recipe: Recipe) -> Basis:
    """How training with this recipe held the base model."""
    quantization = recipe.quantization
    name = quantization.compute_dtype
    dtype: torch.dtype = getattr(torch, compute_dtype_rule(present_device())[0] if name == "auto" else name)
    double = isinstance(quantization, FourBit) and quantization.double_quantization
    return Basis(quantization.kind, double, load_dtype=dtype, compute_dtype=dtype)
