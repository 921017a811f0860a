"""A soft prompt -> rows of the vocabulary, tokens of the tokenizer and the first words of the chat template."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qtune.errors import Problem, RunError
from qtune.export.adapter_weights import WEIGHTS, AdapterWeights, Update
from qtune.export.layout import Layout, layout_of, open_base
from qtune.export.merge import Merge, Weights, plan_merge
from qtune.export.opened_run import OpenedRun
from qtune.model.checkpoint import Checkpoint, tensors_of

# Kept in config.json, for readers of the file; no loader needs it.
CONFIG_KEY = "qtune_soft_prompt"
HEAD_NOTE = (
    "the head is not tied: its rows for these tokens are the mean of all rows, so that their logit is the mean logit, "
    "never the largest, and the logits of all other tokens are unchanged"
)


@dataclass(frozen=True)
class SoftPrompt:
    """The virtual tokens of a trained soft prompt as tokens of an enlarged vocabulary.

    `vectors` [virtual, hidden] are what the model's first layer received; `names` and `ids` are the new tokens.
    """

    vectors: torch.Tensor
    names: tuple[str, ...]
    ids: tuple[int, ...]
    tokenizer: PreTrainedTokenizerBase
    template: str | dict[str, str]
    """Several have names."""

    @property
    def note(self) -> dict[str, Any]:
        """What config.json says about it."""
        return {"tokens": list(self.names), "ids": list(self.ids), "head": HEAD_NOTE}


def open_soft_prompt(source: OpenedRun) -> SoftPrompt:
    """Reads the vectors and gives each a token.

    peft saves what the prompt encoder computed, so the encoder itself is not needed.

    Raises RunError when the adapter file holds anything but one prompt.
    """
    tensors = tensors_of(source.adapter / WEIGHTS)
    if set(tensors) != {"prompt_embeddings"}:
        raise RunError(Problem(str(source.adapter), f"holds {', '.join(sorted(tensors))}; expected one soft prompt"))
    vectors = tensors["prompt_embeddings"].float()
    names = _free_names(source.tokenizer, len(vectors))
    tokenizer, ids = _with_tokens(source.tokenizer, names)
    # The prompt stands before everything, a beginning-of-text token included: that is where training put it.
    opening = "{{- '" + "".join(names) + "' -}}"
    trained = source.template.of_tokenizer
    template = (
        opening + trained if isinstance(trained, str) else {name: opening + text for name, text in trained.items()}
    )
    tokenizer.chat_template = template
    return SoftPrompt(vectors, names, ids, tokenizer, template)


def open_baking(source: OpenedRun, prompt: SoftPrompt, weights: Weights, dtype: torch.dtype) -> Merge:
    """A merge that changes nothing but the vocabulary, on the basis that the prompt was trained on.

    Raises RunError, ModelError when the checkpoint has other tensors with a row for each token, or cannot be merged.
    """
    checkpoint, network = open_base(source.base, trust_remote_code=source.recipe.model.trust_remote_code)
    scale = embedding_scale(network)
    layout = layout_of(network, list(checkpoint.tensors))
    updates = vocabulary_updates(checkpoint, layout, prompt, scale)
    return plan_merge(checkpoint, layout, AdapterWeights(updates, "on its own"), source.basis, weights, dtype)


def vocabulary_updates(checkpoint: Checkpoint, layout: Layout, prompt: SoftPrompt, scale: float) -> dict[str, Update]:
    """New rows for the embedding, and for everything else that has a row for each token.

    Rows that a padded vocabulary has to spare are used first. The head keeps its row for such a token: the trained
    model has a logit for it, too.
    """
    stored = layout.stored_as(layout.input_embedding)
    if stored is None:
        raise RunError(Problem(str(checkpoint.folder), f"has no {layout.input_embedding} of its own"))
    rows = checkpoint.tensors[stored].shape[0]
    scaled = prompt.vectors / scale
    spare = {token: scaled[index] for index, token in enumerate(prompt.ids) if token < rows}
    new = len(prompt.ids) - len(spare)
    updates = {layout.input_embedding: Update(rows=spare, appended=scaled[len(spare) :] if new else None)}
    if not new:
        return updates
    head = layout.output_embedding
    known = {layout.input_embedding, head, None if head is None else head.removesuffix("weight") + "bias"}
    for name, parameter in layout.parameters.items():
        if checkpoint.tensors[name].shape[:1] != (rows,):
            continue
        if parameter not in known and "embed" in parameter:
            raise RunError(Problem(str(checkpoint.folder), f"{parameter} has a row for each token; not supported"))
        if parameter in known and parameter != layout.input_embedding:
            updates[parameter] = Update(mean_rows=new)
    if head is not None:
        updates[head] = Update(mean_rows=new)
    return updates


def embedding_scale(network: PreTrainedModel) -> float:
    """The factor that an embedding multiplies its rows with (Gemma); soft prompts enter behind it."""
    embedding = network.get_input_embeddings()
    scale = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", 1.0))
    return float(scale)


def _free_names(tokenizer: PreTrainedTokenizerBase, count: int) -> tuple[str, ...]:
    """<|qtune_0|> …; a second prompt on an exported model gets other names."""
    vocabulary = tokenizer.get_vocab()
    first = 0
    while f"<|qtune_{first}|>" in vocabulary:
        first += 1
    return tuple(f"<|qtune_{first + index}|>" for index in range(count))


def _with_tokens(
    tokenizer: PreTrainedTokenizerBase, names: tuple[str, ...]
) -> tuple[PreTrainedTokenizerBase, tuple[int, ...]]:
    """A copy of the tokenizer that knows the names as special tokens, and their ids."""
    enlarged = copy.deepcopy(tokenizer)
    enlarged.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    vocabulary = enlarged.get_vocab()
    return enlarged, tuple(vocabulary[name] for name in names)
