"""A checkpoint of a published geometry, its weights at random: time and memory of a step do not depend on them."""

from pathlib import Path

import torch
from memory_table import MODELS, config_of
from transformers import AutoModelForCausalLM

from qtune.device.present import present_device
from qtune.model.load import load_tokenizer
from qtune.recipe.schema import Model


def random_checkpoint(name: str, folder: Path) -> Path:
    """Writes it in bfloat16, with the built-in model's tokenizer, which every vocabulary here has room for.

    name: one of the README's table. Made on the card where there is one: 8B take a CPU minutes.
    """
    config = config_of(next(model for model in MODELS if model[0].lower() == name.lower()))
    with torch.device(present_device().torch_name):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    load_tokenizer(Model(base="builtin:smollm2-135m-instruct")).save_pretrained(folder)
    return folder
