"""qtune's trainer without a run around it: what the tools take steps with."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainerCallback

from qtune.data.collate import PaddedCollator
from qtune.memory.measured.meter import Meter
from qtune.plan import Plan
from qtune.recipe.schema import Recipe
from qtune.run.folder import RunDir
from qtune.training.arguments import sft_config
from qtune.training.trainer import QloraTrainer


def bare_trainer(
    model: PeftModel,
    recipe: Recipe,
    plan: Plan,
    tokenizer: PreTrainedTokenizerBase,
    rows: dict[str, list[list[int]]],
    folder: Path,
    callbacks: list[TrainerCallback] | None = None,
) -> QloraTrainer:
    """As a run builds it, on `rows` (input_ids and labels); nothing is evaluated, shown or written down."""
    config = sft_config(recipe.training, plan, RunDir(folder), has_validation=False)
    # One process drives one card; with several visible, transformers would wrap the model in DataParallel.
    config._n_gpu = min(config.n_gpu, 1)
    pad_id: Any = tokenizer.pad_token_id
    return QloraTrainer(
        model=model,
        config=config,
        plan=plan,
        training=recipe.training,
        meter=Meter(torch.device(plan.device.torch_name), names_tensors=False),
        tokenizer=tokenizer,
        train=Dataset.from_dict(rows),
        validation=None,
        collator=PaddedCollator(pad_id),
        lengths=[len(row) for row in rows["input_ids"]],
        callbacks=callbacks or [],
        tiled_loss=True,
        note=print,
        beside=lambda what, share=None: None,
    )
