"""Generation: prompts as ids in, answers as ids out, many at once with the same result as one at a time.

Batches are padded on the left, so that every prompt ends where its answer starts. With a soft prompt the pads must come
before the virtual tokens, not between them and the text (peft 0.21 puts them there): inputs are laid out here and go
to the base model directly.

    LoRA, IA3, no adapter      pads | text                          as ids
    p-tuning, prompt tuning    pads | virtual tokens | text         as embeddings
    prefix tuning              virtual keys and values | pads | text    the prefix as a cache, its positions in the mask
"""

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, PeftType
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

from qtune.data.template import Renderer, choose_template
from qtune.tuned.vocabulary import HALF

Ids = Sequence[int]

BATCH_TOKENS = 8192
"""Positions of the key-value cache of one batch: about 1 GiB for an 8B model with grouped queries in 16 bits."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the likeliest (temperature 0), or drawn."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


GREEDY = Sampling()


@dataclass(frozen=True)
class Ends:
    """Token ids that end an answer, and the one that fills a batch."""

    stop: tuple[int, ...]
    pad: int


def find_ends(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> Ends:
    """The end of turn of the tokenizer's chat template, its end of text, and what the model's own config adds."""
    template = choose_template(None, tokenizer, Path()).text
    end_of_turn = Renderer.of(tokenizer, template).end_of_turn
    own = getattr(model.generation_config, "eos_token_id", None)
    ids = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    if end_of_turn is not None:
        ids.append(tokenizer.convert_tokens_to_ids(end_of_turn))
    stop = tuple(sorted({token for token in ids if token is not None}))
    pad = tokenizer.pad_token_id
    return Ends(stop, pad if pad is not None else stop[0] if stop else 0)


def positions_left(model: PreTrainedModel | PeftModel) -> int | None:
    """Positions that the model was made for, less those that a soft prompt takes; None where it does not say.

    Learned positions (GPT-2, OPT) have no vector beyond them: an answer that goes on reads outside of the table.
    """
    virtual = 0
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        virtual = int(model.active_peft_config.num_virtual_tokens)
    reach = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if not reach else int(reach) - virtual


def within_reach(limit: int, prompt_length: int, reach: int | None) -> int:
    """The limit of an answer behind a prompt, as far as positions go (`positions_left`); below 1 there are none."""
    return limit if reach is None else min(limit, reach - prompt_length)


@dataclass(frozen=True)
class Generated:
    """An answer: its ids without its end token, and whether it came to its end before it was stopped."""

    ids: tuple[int, ...]
    is_whole: bool
    is_late: bool = False
    """Whether it was stopped for its time was over, before it was as long as it might become."""


def generate(
    model: PreTrainedModel | PeftModel,
    prompts: Sequence[Ids],
    limits: Sequence[int],
    ends: Ends,
    sampling: Sampling = GREEDY,
    *,
    batch_tokens: int = BATCH_TOKENS,
    on_rows: Callable[[float], None] = lambda rows: None,
) -> list[list[int]]:
    """The answer to each prompt without its end token, at most `limits[i]` tokens long.

    Prompts of similar length share a batch. `on_rows` hears how many more are done, a share of a row with each token.
    """
    made = answers_to(model, prompts, limits, ends, sampling, batch_tokens=batch_tokens, on_rows=on_rows)
    return [list(answer.ids) for answer in made]


def answers_to(
    model: PreTrainedModel | PeftModel,
    prompts: Sequence[Ids],
    limits: Sequence[int],
    ends: Ends,
    sampling: Sampling = GREEDY,
    *,
    seconds: float | None = None,
    batch_tokens: int = BATCH_TOKENS,
    on_rows: Callable[[float], None] = lambda rows: None,
) -> list[Generated]:
    """`generate`, which also tells whether each answer was stopped: at its limit, or when the `seconds` were over.

    Each batch has its share of what is left of the time, which is looked at after each token.
    """
    answers = [Generated((), is_whole=False) for _ in prompts]
    began = time.monotonic()
    with _ready(model, sampling):
        lengths = [(len(prompt), limit) for prompt, limit in zip(prompts, limits, strict=True)]
        batches = batches_of(lengths, batch_tokens, positions_left(model))
        for number, rows in enumerate(batches):
            left = None
            if seconds is not None:
                left = max(0.0, seconds - (time.monotonic() - began)) / (len(batches) - number)
            longest = max(limits[row] for row in rows)
            told = _Told(on_rows, len(rows), longest)
            asked = [prompts[row] for row in rows]
            made = _generate_batch(model, asked, longest, ends, sampling, seconds=left, criterion=told)
            told.end()
            for row, ids in zip(rows, made.tolist(), strict=True):
                answer = _until_end(ids, ends.stop)
                is_whole = len(answer) < len(ids) and len(answer) <= limits[row]
                is_late = not is_whole and len(answer) < limits[row]
                answers[row] = Generated(tuple(answer[: limits[row]]), is_whole, is_late)
    return answers


def batches_of(lengths: Sequence[tuple[int, int]], batch_tokens: int, reach: int | None = None) -> list[list[int]]:
    """Row numbers, shortest prompt first, in batches whose cache holds at most `batch_tokens` (or one row).

    lengths: (prompt, limit of the answer) of each row; every row of a batch is padded to the longest of both.
    reach: positions that the model has; a row whose own answer ends there is in no batch that goes on beyond.
    """
    batches: list[list[int]] = []
    limit = 0
    for row in sorted(range(len(lengths)), key=lambda row: (lengths[row], row)):
        limit = max(limit, lengths[row][1])
        longest = lengths[row][0] + limit
        is_within = reach is None or longest <= reach
        if batches and is_within and (len(batches[-1]) + 1) * longest <= batch_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
            limit = lengths[row][1]
    return batches


def stream(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Ids,
    limit: int,
    ends: Ends,
    on_text: Callable[[str], None],
    sampling: Sampling = GREEDY,
) -> Generated:
    """The answer to one prompt; `on_text` gets its text piece by piece while it is made. Of likeliest tokens one that
    goes round in a circle is stopped before its limit (`_StopsCircling`)."""
    stops = None if sampling.temperature > 0 else _StopsCircling()
    with _ready(model, sampling):
        made = _generate_batch(model, [prompt], limit, ends, sampling, _Pieces(tokenizer, on_text), criterion=stops)
    ids = made[0].tolist()
    answer = _until_end(ids, ends.stop)
    return Generated(tuple(answer), is_whole=len(answer) < len(ids))


LEAST_LOOP = 24
"""Tokens at the end of an answer that have to be one passage again and again, three times at least, to be called so."""
LONGEST_PASSAGE = 256


ENDLESS = 8, 128
"""Times and tokens that a passage of likeliest tokens is repeated until nobody waits for its end: a line of a table or
a row of dashes is shorter."""


def loop_at_end(ids: Ids, times: int = 3, least: int = LEAST_LOOP) -> Ids:
    """The passage that an answer ends by repeating, without an end; empty where it does not.

    times, least: how often at least, and over how many tokens.
    """
    for period in range(1, min(LONGEST_PASSAGE, len(ids) // times) + 1):
        tail = ids[-max(times * period, least) :]
        if len(tail) >= least and all(one == other for one, other in zip(tail, tail[period:], strict=False)):
            return ids[-period:]
    return ()


class _StopsCircling(StoppingCriteria):
    """Ends the answer to one prompt that has said the same for so long (`ENDLESS`) that it would go on so."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """[1]: whether to stop. input_ids: [1, tokens], the new ones last."""
        self.made += 1
        is_circling = False
        if self.made >= ENDLESS[1] and self.made % 16 == 0:
            is_circling = bool(loop_at_end(input_ids[0, -self.made :].tolist(), *ENDLESS))
        return torch.full((len(input_ids),), is_circling, dtype=torch.bool, device=input_ids.device)


class _Told(StoppingCriteria):
    """Stops nothing: it is asked after each token of a batch, and tells how far its rows have come by then."""

    def __init__(self, on_rows: Callable[[float], None], rows: int, limit: int) -> None:
        """limit: tokens of the longest answer."""
        self.on_rows = on_rows
        self.rows = rows
        self.limit = limit
        self.tokens = 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """[batch]: which rows are to be stopped, none."""
        if self.tokens < self.limit - 1:  # the last one is told by the end
            self.tokens += 1
            self.on_rows(self.rows / self.limit)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def end(self) -> None:
        """The rows are done, also where their answers were shorter than they might have been."""
        self.on_rows(self.rows - self.tokens * self.rows / self.limit)


class _Pieces(TextStreamer):
    """transformers' streamer, which knows when a piece of text is final, without its print."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if stream_end:  # nothing comes that would make half a character whole
            text = text.rstrip(HALF)
        if text:
            self.on_text(text)


@contextmanager
def _ready(model: PreTrainedModel | PeftModel, sampling: Sampling) -> Iterator[None]:
    """Evaluation mode, no gradients, and draws that depend on the seed alone; all as before afterwards."""
    was_training = model.training
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices, enabled=sampling.temperature > 0):
            if sampling.temperature > 0:
                torch.manual_seed(sampling.seed)
            yield
    finally:
        model.train(was_training)


def _generate_batch(
    model: PreTrainedModel | PeftModel,
    prompts: Sequence[Ids],
    limit: int,
    ends: Ends,
    sampling: Sampling,
    streamer: TextStreamer | None = None,
    seconds: float | None = None,
    criterion: StoppingCriteria | None = None,
) -> Tensor:
    """[batch, made]: the new ids of each prompt; what follows a row's end is padding. None is begun after `seconds`.

    criterion: is asked after each token.
    """
    network: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    inputs, given = _inputs(model, prompts, ends.pad)
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p} if sampling.temperature > 0 else {}
    config = GenerationConfig(
        max_new_tokens=limit,
        max_time=seconds,
        do_sample=bool(drawn),
        eos_token_id=list(ends.stop) or None,
        pad_token_id=ends.pad,
        # A model's own generation config would fill in what is left out here; these are the neutral values.
        num_beams=1,
        top_k=0 if drawn else None,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        use_cache=True,
        **drawn,
    )
    with _neutral(network):
        criteria = StoppingCriteriaList([] if criterion is None else [criterion])
        made = network.generate(**inputs, generation_config=config, streamer=streamer, stopping_criteria=criteria)
    return made[:, given:]


@contextmanager
def _neutral(network: PreTrainedModel) -> Iterator[None]:
    """Keeps the model's own sampling defaults (a temperature of 0.6, say) out of this call."""
    own = network.generation_config
    network.generation_config = GenerationConfig()
    try:
        yield
    finally:
        network.generation_config = own


def _inputs(model: PreTrainedModel | PeftModel, prompts: Sequence[Ids], pad: int) -> tuple[dict[str, Any], int]:
    """What the base model's `generate` takes, and how many columns of its output are not new."""
    batch, length = len(prompts), max(map(len, prompts))
    ids = torch.full((batch, length), pad, dtype=torch.long)
    mask = torch.zeros((batch, length), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.as_tensor(prompt, dtype=torch.long)
        mask[row, length - len(prompt) :] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    soft = _active_soft_prompt(model)
    if soft is None or not isinstance(model, PeftModel):
        return {"input_ids": ids, "attention_mask": mask}, length
    virtual = soft.num_virtual_tokens
    if soft.peft_type == PeftType.PREFIX_TUNING:
        # The ids under the prefix are read by nobody: their keys and values are already in the cache.
        ids = torch.cat([ids.new_full((batch, virtual), pad), ids], dim=1)
        mask = torch.cat([mask.new_ones((batch, virtual)), mask], dim=1)
        cache = model.get_prompt(batch_size=batch)
        return {"input_ids": ids, "attention_mask": mask, cache_name(model.get_base_model()): cache}, virtual + length
    text = cast("torch.nn.Module", model.get_base_model().get_input_embeddings())(ids)
    prompt_vectors = model.get_prompt(batch_size=batch).to(text.dtype)
    embeds = text.new_zeros((batch, virtual + length, text.shape[-1]))
    full_mask = mask.new_zeros((batch, virtual + length))
    for row, prompt in enumerate(prompts):
        start = length - len(prompt)
        embeds[row, start : start + virtual] = prompt_vectors[row]
        embeds[row, start + virtual :] = text[row, start:]
        full_mask[row, start:] = 1
    return {"inputs_embeds": embeds, "attention_mask": full_mask}, 0


def cache_name(network: torch.nn.Module) -> str:
    """What a model calls its key-value cache: transformers 5.24 renamed it, code that comes with a model did not."""
    return "cache" if "cache" in inspect.signature(network.forward).parameters else "past_key_values"


def mend_generate(model: PeftModel) -> None:
    """Makes peft's own `generate` right for soft prompts with transformers 5.24, for callers that are not ours.

    peft 0.21 reads the cache that the base prepared as "past_key_values". Where it is called "cache", peft takes every
    token for the first one: it puts the virtual tokens before each again, and a prefix beside the cache, to be dropped.
    """
    prepare = model.base_model_prepare_inputs_for_generation

    def prepared(*args: Any, **kwargs: Any) -> Any:
        inputs = prepare(*args, **kwargs)
        if "cache" in inputs:
            inputs["past_key_values"] = inputs.pop("cache")
        return inputs

    model.base_model_prepare_inputs_for_generation = prepared


def _active_soft_prompt(model: PreTrainedModel | PeftModel) -> Any | None:
    """peft's configuration of the soft prompt that is on; None for other adapters and while it is disabled."""
    if not isinstance(model, PeftModel) or getattr(model, "_adapters_disabled", False):
        return None
    config = model.active_peft_config
    return config if config.is_prompt_learning else None


def _until_end(ids: Sequence[int], stop: Sequence[int]) -> list[int]:
    return list(ids[: next((place for place, token in enumerate(ids) if token in stop), len(ids))])
