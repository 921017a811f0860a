"""A run's folder -> everything that an export starts from."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftConfig
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from qtune.data.asking import asking_template
from qtune.data.template import ChatTemplate, choose_template
from qtune.device.present import present_device
from qtune.export.adapter_weights import adapter_config
from qtune.export.basis import Basis
from qtune.model.contents import checksums_of
from qtune.model.load import load_config, load_tokenizer
from qtune.model.local import local_base
from qtune.model.quantization import held_as, is_stored_quantized
from qtune.model.trust import code_files, code_hash, require_consent
from qtune.plan import compute_dtype_rule
from qtune.recipe.schema import FourBit, Recipe
from qtune.run.drift import require_same_base
from qtune.run.finished import whole_adapter
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

    def trusts(self, folder: Path) -> bool:
        """Whether the code in an exported folder may run: it is the base's own, which was agreed to.

        Raises:
            ModelError: it is other code, and nobody at this computer has agreed to it.
        """
        if self.recipe.model.trust_remote_code and not code_files(folder) <= code_files(self.base):
            require_consent(str(folder), code_hash(folder))
        return self.recipe.model.trust_remote_code

    @property
    def base_name(self) -> str:
        """The base as the user knows it: a hub id, a built-in name, a path."""
        return self.recipe.model.base

    @property
    def is_of_hub(self) -> bool:
        """Whether the base's name is an id of the hub."""
        base = self.base_name
        return base.count("/") == 1 and ":" not in base and not _local(base).exists() and base[0] not in "~./"

    @property
    def base_in_public(self) -> str:
        """The base in a card, which others read: the own name of a folder or file here, without where it lies."""
        return in_public(self.base_name)


def in_public(base: str) -> str:
    """What others are told of a base: the own name of a folder or file here, without where it lies."""
    return _local(base).name if _local(base).exists() else base


def _local(base: str) -> Path:
    """A base as a path, whether there is one or not."""
    return Path(os.path.expanduser(base))  # noqa: PTH111  pathlib raises for a home that nobody has


def open_for_export(
    run: RunDir, adapter: Path | None = None, *, accepted: Sequence[str] = (), reads_weights: bool = True
) -> OpenedRun:
    """Opens a run for export; `adapter` names another of its adapters, a checkpoint for example.

    accepted: kinds of drift (`run.drift`) that it goes on with. reads_weights: whether the base's weights are about to
    be read, and every byte of them is compared.

    Raises RunError when training has not ended, its files are not readable or not what was trained with, and ModelError
    when the base model cannot be
    had.
    """
    adapter = adapter or whole_adapter(run)
    recipe = resolved_recipe(run)
    base_config = load_config(recipe.model)
    tokenizer = load_tokenizer(recipe.model)
    trained = choose_template(recipe.data.chat_template, tokenizer, run.path)
    checksums = checksums_of(local_base(recipe.model)) if reads_weights else {}
    require_same_base(run, recipe, tokenizer, trained.text, accepted, device=present_device(), checksums=checksums)
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
        basis=basis_of(recipe, base_config),
    )


def basis_of(recipe: Recipe, config: PretrainedConfig) -> Basis:
    """How training with this recipe held the base model of this configuration."""
    held = held_as(recipe.quantization, config)
    double = isinstance(held, FourBit) and held.double_quantization
    load_dtype, compute_dtype = _dtype(recipe.quantization.compute_dtype), _dtype(held.compute_dtype)
    return Basis(held.kind, double, load_dtype, compute_dtype, is_stored=is_stored_quantized(config))


def _dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, compute_dtype_rule(present_device())[0] if name == "auto" else name)
    return dtype
