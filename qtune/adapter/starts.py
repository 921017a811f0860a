"""Where an adapter starts: at random, from a text, from the base's weights, from the data, or where a run has ended."""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedTokenizerBase

from qtune import console
from qtune.adapter.from_run import earlier_adapter
from qtune.adapter.prefix import prefix_of
from qtune.adapter.prompt_encoder import ResidualPrompt, measure_unit, unit_of
from qtune.adapter.state import load_trained_state, without_card
from qtune.data.collate import PaddedCollator
from qtune.device.present import is_out_of_memory
from qtune.errors import ModelError, Problem, first_line
from qtune.kernels.ops import dequantized
from qtune.model.checkpoint import Checkpoint
from qtune.model.layer_stream import packed_weight
from qtune.model.local import local_base
from qtune.recipe.schema import Lora, PrefixTuning, PromptTuning, PTuning, Recipe

EVA_ROWS = 256
"""Training rows that EVA looks at; the paper's figure 5 finds the components settled after a few batches."""


@dataclass(frozen=True)
class Material:
    """What a start may be made of."""

    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    micro_batch_size: int


def start(model: PeftModel, recipe: Recipe, material: Material, *, goes_on: bool = False) -> None:
    """Gives a freshly attached adapter the start that the recipe asks for, where peft has not given it on attaching.

    goes_on: a checkpoint is loaded next, which holds all that an earlier run has given; that may be gone by now.

    Raises:
        ModelError: the base's weights, or the text, are not what the start needs.
        RunError: the run that it starts from is not one of the same base and adapter.
    """
    measure_unit(model)
    if goes_on and recipe.adapter.start_from is not None:
        return
    if (folder := earlier_adapter(recipe)) is not None:
        load_trained_state(model, folder)
        return
    match recipe.adapter:
        case PromptTuning() | PTuning() as adapter if adapter.residual or adapter.initialization in ("text", "rows"):
            start_prompt(model, adapter, material, recipe.training.seed)
        case PrefixTuning(initialization="text" | "rows") as adapter:
            start_prefix(model, adapter, material, recipe.training.seed)
        case Lora(initialization="eva"):
            pad = material.tokenizer.pad_token_id
            assert isinstance(pad, int)
            start_from_activations(model, material.train, pad, material.micro_batch_size)
        case Lora(initialization="loftq"):
            start_from_residual(model, Checkpoint.open(local_base(recipe.model)))


def kept_start(model: PeftModel, recipe: Recipe, folder: Path) -> Path | None:
    """Keeps the adapter's start in `folder` where the trained one is saved as the difference to it; else None.

    PiSSA moves part of the base's weights into the adapter, the same part in every process of a run, for it depends on
    those weights alone.
    """
    if not (isinstance(recipe.adapter, Lora) and recipe.adapter.initialization == "pissa"):
        return None
    with without_card(model):
        model.save_pretrained(folder)
    return folder


@torch.no_grad()
def start_prompt(model: PeftModel, adapter: PromptTuning | PTuning, material: Material, seed: int) -> None:
    """The vectors of a soft prompt, which begin as what the model reads for words, or as noise of that size.

    Raises:
        ModelError: the text has no tokens.
    """
    encoder = model.prompt_encoder[model.active_adapter]
    words = model.get_base_model().get_input_embeddings()
    table, draw = encoder.embedding.weight, torch.Generator().manual_seed(seed)
    count, vocabulary = len(table), int(words.weight.shape[0])
    match adapter.initialization:
        case "random":
            vectors = unit_of(words) * torch.randn(table.shape, generator=draw).to(table.device)
        case "vocabulary":
            vectors = words(torch.randint(vocabulary, (count,), generator=draw).to(table.device))
        case "text":
            vectors = words(torch.tensor(text_ids(material.tokenizer, str(adapter.text), count), device=table.device))
        case "rows":
            vectors = words(torch.tensor(row_ids(material.train, count, seed), device=table.device))
    if isinstance(encoder, ResidualPrompt):
        encoder.begin_at(vectors.to(table.dtype))
    else:
        table.copy_(vectors.to(table.dtype))


@torch.no_grad()
def start_prefix(model: PeftModel, adapter: PrefixTuning, material: Material, seed: int) -> None:
    """A prefix that begins as what the base keeps of a text, or of training rows.

    Raises:
        ModelError: the text has no tokens, or the model keeps something else than a prefix can be.
    """
    table = model.prompt_encoder[model.active_adapter].embedding.weight
    if adapter.initialization == "text":
        ids = text_ids(material.tokenizer, str(adapter.text), len(table))
    else:
        ids = row_ids(material.train, len(table), seed)
    try:
        table.copy_(prefix_of(model, ids).to(table.dtype))
    except (ValueError, AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        message = f'adapter.initialization = {adapter.initialization!r}: {first_line(error)}; use "random"'
        raise ModelError(Problem("", message)) from error


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, count: int) -> list[int]:
    """Lester et al. 2021, section 2.1: the prompt starts as words, here repeated or cut to `count` tokens."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ModelError(Problem("", f"adapter.text = {text!r}: has no tokens"))
    return [ids[position % len(ids)] for position in range(count)]


def row_ids(train: Dataset, count: int, seed: int) -> list[int]:
    """`count` tokens of training rows, drawn by `seed`, as the model is shown them: questions with their answers.

    Examples in the prompt tell a model what is wanted before anything is trained; the vectors go on from there (Lu et
    al. 2025, "Context Tuning", arXiv:2507.04221, section 3). The first row is cut at its front, so that the last one
    ends whole before the row that is asked; few rows are repeated.
    """
    order = np.random.default_rng(seed).permutation(len(train)).tolist()
    ids: list[int] = []
    for place in itertools.cycle(order):
        if len(ids) >= count:
            break
        ids = [*train[place]["input_ids"], *ids]
    return ids[-count:]


def start_from_activations(model: PeftModel, train: Dataset, pad_id: int, micro_batch_size: int) -> None:
    """EVA: A spans the directions in which a layer's inputs vary most. arXiv:2410.07170, section 3.

    Every layer keeps the rank of the recipe (rho = 1): ranks that move would change the memory that was predicted.
    """
    collate = PaddedCollator(pad_id)
    rows = min(EVA_ROWS, len(train))
    device = next(model.parameters()).device
    batches: list[dict[str, Any]] = []
    for start in range(0, rows, micro_batch_size):
        batch = collate([train[row] for row in range(start, min(rows, start + micro_batch_size))])
        batches.append({name: batch[name].to(device) for name in ("input_ids", "attention_mask")})
    console.say(f"EVA: looking at the activations of {rows} training rows")
    # Each of several processes looks at the same rows: gathered, each row would count once for every process.
    initialize_lora_eva_weights(model, batches, gather_distributed_inputs=False, show_progress_bar=False)


@torch.no_grad()
def start_from_residual(model: PeftModel, base: Checkpoint) -> None:
    """LoftQ with one alternation: scale * B A is the best rank-r approximation of W - dequantized(NF4(W)).

    arXiv:2310.08659, algorithm 1 with T = 1. The 4-bit base stays as it is; only A and B are set. peft's own version
    needs CUDA and leaves the scale out (peft 0.21, loftq_utils.py).

    Raises:
        ModelError: the base's weights have other names than the loaded model's.
    """
    layers = [
        (name, module)
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), bnb.nn.Linear4bit)
    ]
    with console.progress("LoftQ: decomposing the quantization error", len(layers)) as bar:
        for name, module in layers:
            weight = dequantized(*packed_weight(module.get_base_layer())).float()
            original = base.read_finite(_stored_name(base, f"{name}.weight")).to(weight.device, torch.float32)
            error = original - weight
            for adapter, rank in module.r.items():
                left, values, right = torch.linalg.svd(error, full_matrices=False)
                root = (values[:rank] / module.scaling[adapter]).sqrt()
                module.lora_A[adapter].weight.copy_(root[:, None] * right[:rank])
                module.lora_B[adapter].weight.copy_(left[:, :rank] * root)
            bar.advance()


def _stored_name(base: Checkpoint, name: str) -> str:
    """The name of a tensor; some checkpoints were saved from the bare backbone, whose names lack "model."."""
    for spelling in (name, name.partition(".")[2]):
        if spelling in base.tensors:
            return spelling
    message = f"LoftQ needs the unquantized {name}, which the checkpoint has not by that name"
    raise ModelError(Problem(str(base.folder), message))
