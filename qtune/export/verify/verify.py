"""The proof: an exported folder, loaded as a user would, against the live model that was trained."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qtune import console
from qtune.data.template import choose_template
from qtune.device.present import is_out_of_memory, present_device
from qtune.errors import ModelError, VerificationError, first_line
from qtune.export.closeness import ClosenessMeter, PerplexityMeter, limits, shortfalls
from qtune.export.merge import Merge, Weights
from qtune.export.opened_run import OpenedRun
from qtune.export.verification import Answer, Closeness, Limits, Verification, mark_unverified, write_verification
from qtune.export.verify.differences import differing_tensors
from qtune.export.verify.logits import GROUP_BYTES, STREAMED_GROUP_BYTES, group_logits, rows_that_fit
from qtune.export.verify.models import Exported, Models, comparing, load_exported, load_models, too_large
from qtune.export.verify.rows import CheckedRow, CheckedRows, probes, rendered_ids
from qtune.plan import Plan, make_plan
from qtune.tuned.asked import asked_turns, last_words
from qtune.tuned.generate import find_ends, generate, positions_left, within_reach
from qtune.tuned.precision import training_autocast

ANSWERS = 3


@dataclass
class _Measured:
    """What the rows gave, filled by `measure`."""

    exported: ClosenessMeter = field(default_factory=ClosenessMeter)
    bare: ClosenessMeter = field(default_factory=ClosenessMeter)
    against_trained: ClosenessMeter = field(default_factory=ClosenessMeter)
    other_weights: ClosenessMeter = field(default_factory=ClosenessMeter)
    live: ClosenessMeter = field(default_factory=ClosenessMeter)
    perplexity: dict[str, PerplexityMeter] = field(
        default_factory=lambda: {name: PerplexityMeter() for name in ("trained", "exported", "bare base")}
    )


def verify(
    source: OpenedRun,
    folder: Path,
    held_out: CheckedRows,
    weights: Weights = "dequantized",
    *,
    merge: Merge | None = None,
    virtual_ids: Sequence[int] = (),
    compare_bases: bool = False,
    streamed: bool | None = None,
    known: Sequence[str] = (),
) -> Verification:
    """Compares an exported folder with the trained model, writes verify.json into it and returns the result.

    Both compute in float32 on the values that their weights have (`in_float32`), so that what differs is the export.

    `virtual_ids` are the ids that an exported soft prompt puts before every conversation. With `merge`, a failure names
    the tensors that are not as that merge makes them. With `compare_bases`, the cost of the original weights is
    measured as well. `streamed` models stay on the disk and are read module by module; None decides by the memory.
    `known` are failures that were found before.

    Raises:
        VerificationError: the folder cannot be loaded; verify.json says so.
    """
    began = time.monotonic()
    plan = comparing(make_plan(source.recipe, present_device()))
    rows = held_out.rows
    streamed, exported = _loaded(folder, source, plan, streamed, known)
    models = load_models(source, plan, exported, weights, compare_bases=compare_bases, streamed=streamed)
    failures = [*known, *loading_failures(exported)]
    failures += rendering_failures(source, exported.tokenizer, rows, virtual_ids)
    measured = _Measured()
    noisy = not streamed and (plan.compute_dtype != "float32" or source.basis.kind == "int8")
    asked = _rows_asked(models, is_live=noisy) * len(rows)
    with console.progress(f"comparing with the trained model, {len(rows)} rows", asked) as bar:
        for group in _groups(rows, models):
            measure(measured, group, virtual_ids, models, live=plan if noisy else None, on_rows=bar.advance)
    closeness, effect = measured.exported.result(), measured.bare.result()
    allowed = limits(_stored_dtype(folder), effect.kl)
    answers = () if streamed else _answers(source, models, rows[:ANSWERS], virtual_ids)
    failures += _shortfalls(closeness, allowed, merge, folder)
    failures += overflow_failures(models, rows, virtual_ids, _stored_dtype(folder))
    cost: dict[str, Closeness] = {weights: measured.against_trained.result()}
    if models.other_weights is not None:
        cost["original"] = measured.other_weights.result()
    verification = Verification(
        verified=not failures,
        failures=tuple(failures),
        weights=weights,
        rows=len(rows),
        rows_from=held_out.origin,
        exported=closeness,
        bare_base=effect,
        cost=cost,
        live=measured.live.result() if noisy else None,
        limits=allowed,
        perplexity={name: meter.result() for name, meter in measured.perplexity.items()},
        answers=answers,
        answers_equal=sum(answer.trained == answer.exported for answer in answers),
        compute_dtype="int8 products" if source.basis.kind == "int8" else plan.compute_dtype,
        streamed=streamed,
        seconds=round(time.monotonic() - began, 1),
    )
    write_verification(folder, verification)
    return verification


def _loaded(
    folder: Path, source: OpenedRun, plan: Plan, streamed: bool | None, known: Sequence[str]
) -> tuple[bool, Exported]:
    """Whether models are read module by module, and the exported one; a folder that cannot be loaded is marked."""
    try:
        streamed = too_large(folder, plan) if streamed is None else streamed
        return streamed, load_exported(folder, source, plan, streamed=streamed)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError, ModelError) as error:
        if is_out_of_memory(error):  # which says nothing about the folder
            raise
        reason = "; ".join([f"cannot be loaded: {first_line(error)}", *known])
        mark_unverified(folder, reason)
        raise VerificationError(f"{folder}: {reason}") from error


def _shortfalls(closeness: Closeness, allowed: Limits, merge: Merge | None, folder: Path) -> list[str]:
    """What is too far from the trained model, and with the merge at hand which tensors that comes from."""
    short = shortfalls(closeness, allowed)
    if short and merge is not None:
        short += [f"tensor {difference}" for difference in differing_tensors(merge, folder)]
    return short


def loading_failures(exported: Exported) -> list[str]:
    """Tensors that a loader had to invent, to leave out or to reshape, and a quantization that came along."""
    failures = [
        f"{kind.replace('_', ' ')} when loading: {', '.join(names[:5])}" for kind, names in exported.misfits.items()
    ]
    if getattr(exported.model.config, "quantization_config", None) is not None:
        failures.append("config.json still has a quantization_config")
    return failures


def rendering_failures(
    source: OpenedRun, tokenizer: PreTrainedTokenizerBase, rows: Sequence[CheckedRow], virtual_ids: Sequence[int]
) -> list[str]:
    """Conversations that the exported tokenizer and template turn into other ids than training did."""
    if not tokenizer.chat_template:
        return ["the chat template is lost"]
    exported = choose_template(None, tokenizer, Path())
    failures = []
    for conversation in probes(rows):
        for asks in (False, True):
            try:
                trained = source.template.for_tools(conversation.tools)
                expected = rendered_ids(source.tokenizer, trained, conversation, generation_prompt=asks)
            except ValueError:
                continue  # the trained template refuses it, a system message for example
            template = exported.for_tools(conversation.tools)
            found = rendered_ids(tokenizer, template, conversation, generation_prompt=asks)
            if found != (*virtual_ids, *expected):
                failures.append(f"the chat template renders {conversation.place!r} to other tokens than training did")
                break
    return failures


def overflow_failures(
    models: Models, rows: Sequence[CheckedRow], virtual_ids: Sequence[int], dtype: torch.dtype
) -> list[str]:
    """Whether the export computes numbers in float16, as loaders have it compute by its dtype: what was compared is
    what its weights say in float32, and some models' activations (Gemma's) are beyond float16's largest number."""
    if dtype is not torch.float16:
        return []
    ids = (*virtual_ids, *rows[0].ids[:OVERFLOW_TOKENS])
    (logits,) = group_logits(models.exported.model, [ids], models.device)
    if bool(torch.isfinite(logits).all()):
        return []
    return ["its logits are no numbers where it computes in float16, as it is loaded; --dtype bfloat16 keeps them"]


def _rows_asked(models: Models, *, is_live: bool) -> int:
    """How many models `measure` asks each row: the trained one, the exported one, the bare base, and those that are
    compared besides."""
    others = (models.reference is not models.trained, models.other_weights is not None, is_live)
    return 3 + sum(others)


def measure(
    measured: _Measured,
    rows: Sequence[CheckedRow],
    virtual_ids: Sequence[int],
    models: Models,
    *,
    live: Plan | None,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> None:
    """Adds rows to all meters; to that of the live model with the plan by which it computes, if that is not exact.

    on_rows: hears how many more have been asked, each time a model has been (`_rows_asked`).
    """

    def of(model: PreTrainedModel | PeftModel, before: Sequence[int] = ()) -> list[Tensor]:
        made = group_logits(model, [(*before, *row.ids) for row in rows], models.device)
        on_rows(len(rows))
        return [logits[len(before) :] for logits in made]

    as_it_runs: list[Tensor] = []
    if live is not None:
        with training_autocast(live):
            as_it_runs = of(models.trained)
    with models.exactly():
        trained = of(models.trained)
        reference = trained if models.reference is models.trained else of(models.reference)
        exported = of(models.exported.model, virtual_ids)
        with models.trained.disable_adapter():
            bare = of(models.trained)
        other = [] if models.other_weights is None else of(models.other_weights)
    for index, row in enumerate(rows):
        measured.exported.add(reference[index], exported[index])
        measured.bare.add(reference[index], bare[index])
        measured.against_trained.add(trained[index], exported[index])
        labels = torch.tensor(row.labels)
        for name, logits in (("trained", trained), ("exported", exported), ("bare base", bare)):
            measured.perplexity[name].add(logits[index], labels)
    for meter, compared in ((measured.live, as_it_runs), (measured.other_weights, other)):
        for expected, found in zip(trained if compared else (), compared, strict=True):
            meter.add(expected, found)


def _groups(rows: Sequence[CheckedRow], models: Models) -> Iterator[Sequence[CheckedRow]]:
    """As many rows at a time as their logits allow."""
    vocabulary = models.exported.model.config.get_text_config().vocab_size
    limit = STREAMED_GROUP_BYTES if models.streamed else GROUP_BYTES
    while rows:
        count = rows_that_fit([row.ids for row in rows], vocabulary, limit)
        yield rows[:count]
        rows = rows[count:]


def _answers(
    source: OpenedRun, models: Models, rows: Sequence[CheckedRow], virtual_ids: Sequence[int]
) -> tuple[Answer, ...]:
    """Greedy answers of both to the same requests, up to 32 tokens."""
    reach = positions_left(models.trained)
    asked, prompts, limits = [], [], []
    for conversation in (row.conversation for row in rows):
        if conversation is None or conversation.is_document:
            continue
        template = source.template.for_tools(conversation.tools)
        prompt = rendered_ids(source.tokenizer, template, conversation, generation_prompt=True)
        if (limit := within_reach(32, len(prompt), reach)) > 0:
            asked.append(conversation)
            prompts.append(prompt)
            limits.append(limit)
    if not asked:
        return ()
    ends = find_ends(models.trained, source.tokenizer)
    made: list[list[str]] = []
    both = console.progress(f"asking both models {len(asked)} questions", 2 * len(asked))
    with both as bar, models.exactly():
        for model, before in ((models.trained, ()), (models.exported.model, tuple(virtual_ids))):
            given = [(*before, *prompt) for prompt in prompts]
            answers = generate(model, given, limits, ends, on_rows=bar.advance)
            made.append([str(models.exported.tokenizer.decode(ids)) for ids in answers])
    return tuple(
        Answer(last_words(one.prompt), trained, exported, asked_turns(one.prompt, one.tools))
        for one, trained, exported in zip(asked, *made, strict=True)
    )


OVERFLOW_TOKENS = 32
"""Of a row: an activation that is too large is so from the first token on."""


def _stored_dtype(folder: Path) -> torch.dtype:
    name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["dtype"]
    dtype: torch.dtype = getattr(torch, name)
    return dtype
