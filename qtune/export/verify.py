"""The proof: an exported folder, loaded as a user would, against the live model that was trained."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from qtune import console
from qtune.adapter import load_adapter
from qtune.errors import VerificationError
from qtune.export.closeness import Closeness, ClosenessMeter, Limits, PerplexityMeter, limits, shortfalls
from qtune.export.differences import differing_tensors
from qtune.export.held_out import Row, Rows, probes, rendered_ids
from qtune.export.logits import logits_of
from qtune.export.merge import Merge, Weights
from qtune.export.merged_folder import VERIFICATION, mark_unverified
from qtune.export.side_files import write_json
from qtune.export.source import Source
from qtune.generate import find_ends, generate
from qtune.load_run import LoadedRun, load_untuned

ANSWERS = 3

Network: TypeAlias = "PreTrainedModel | PeftModel"


@dataclass(frozen=True)
class Answer:
    """One held-out request and the greedy answers to it."""

    request: str
    trained: str
    exported: str


@dataclass(frozen=True)
class Verification:
    """What verify.json holds. An export is verified when `failures` is empty."""

    verified: bool
    failures: tuple[str, ...]
    weights: str
    rows: int
    rows_from: str
    exported: Closeness
    """The exported model against its reference: the trained 4-bit model, or the adapter on the original weights."""
    bare_base: Closeness
    """The base without the adapter against the same reference: what losing the adapter would cost."""
    cost: dict[str, Closeness]
    """By basis, that basis with the adapter against the model that was trained."""
    limits: Limits
    perplexity: dict[str, float]
    """Of the scored tokens: "trained", "exported", "bare base"."""
    answers: tuple[Answer, ...]
    answers_equal: int
    compute_dtype: str
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


@dataclass
class Measured:
    """What the rows gave, filled by `measure`."""

    exported: ClosenessMeter = field(default_factory=ClosenessMeter)
    bare: ClosenessMeter = field(default_factory=ClosenessMeter)
    against_trained: ClosenessMeter = field(default_factory=ClosenessMeter)
    perplexity: dict[str, PerplexityMeter] = field(
        default_factory=lambda: {name: PerplexityMeter() for name in ("trained", "exported", "bare base")}
    )


def verify(
    source: Source,
    folder: Path,
    held_out: Rows,
    weights: Weights = "dequantized",
    *,
    merge: Merge | None = None,
    virtual_ids: Sequence[int] = (),
) -> Verification:
    """Compares an exported folder with the live model, writes verify.json into it and returns the result.

    `virtual_ids` are the ids that an exported soft prompt puts before every conversation. With `merge`, a failure names
    the tensors that are not as that merge makes them.

    Raises VerificationError, after writing verify.json, when the folder cannot be loaded.
    """
    began = time.monotonic()
    run = load_untuned(source.run)
    rows = held_out.rows
    try:
        exported = load_exported(folder, run)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = f"cannot be loaded: {str(error).strip().splitlines()[0]}"
        mark_unverified(folder, reason)
        raise VerificationError(f"{folder}: {reason}") from error
    failures = [*loading_failures(exported), *rendering_failures(source, exported.tokenizer, rows, virtual_ids)]
    trained = load_adapter(_plain(run.model), source.adapter).eval()
    reference = trained if weights == "dequantized" else _on_original_weights(source, run)
    measured = Measured()
    with console.progress("comparing with the trained model, rows", len(rows)) as bar:
        for row in rows:
            measure(measured, row, virtual_ids, trained, reference, exported.model)
            bar.advance()
    closeness, effect = measured.exported.result(), measured.bare.result()
    allowed = limits([_stored_dtype(folder), getattr(torch, run.plan.compute_dtype)], effect.kl)
    answers = _answers(source, trained, exported, rows[:ANSWERS], virtual_ids)
    found = shortfalls(closeness, allowed)
    if found and merge is not None:
        found += [f"tensor {difference}" for difference in differing_tensors(merge, folder)]
    failures += found
    verification = Verification(
        verified=not failures,
        failures=tuple(failures),
        weights=weights,
        rows=len(rows),
        rows_from=held_out.origin,
        exported=closeness,
        bare_base=effect,
        cost={weights: measured.against_trained.result()},
        limits=allowed,
        perplexity={name: meter.result() for name, meter in measured.perplexity.items()},
        answers=answers,
        answers_equal=sum(answer.trained == answer.exported for answer in answers),
        compute_dtype=run.plan.compute_dtype,
        seconds=round(time.monotonic() - began, 1),
    )
    write_json(folder / VERIFICATION, verification.to_json())
    return verification


@dataclass(frozen=True)
class Exported:
    """An exported folder in memory; `misfits` are the tensors that its loading reported, by kind."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    misfits: dict[str, list[str]]


def load_exported(folder: Path, run: LoadedRun) -> Exported:
    """The folder as a user loads it, on the run's device.

    On a processor without 16-bit products the weights are widened to fp32, which holds each of their values.
    """
    dtype = torch.float32 if run.plan.compute_dtype == "float32" else "auto"
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation=run.plan.attention,
        device_map={"": run.plan.device.torch_name},
        use_safetensors=True,
        trust_remote_code=run.recipe.model.trust_remote_code,
        output_loading_info=True,
    )
    model, report = loaded
    return Exported(
        model.eval(),
        AutoTokenizer.from_pretrained(folder, trust_remote_code=run.recipe.model.trust_remote_code),
        {kind: sorted(map(str, names)) for kind, names in report.items() if names},
    )


def loading_failures(exported: Exported) -> list[str]:
    """Tensors that a loader had to invent, to leave out or to reshape, and a quantization that came along."""
    failures = []
    for kind, names in exported.misfits.items():
        failures.append(f"{kind.replace('_', ' ')} when loading: {', '.join(names[:5])}")
    if getattr(exported.model.config, "quantization_config", None) is not None:
        failures.append("config.json still has a quantization_config")
    return failures


def rendering_failures(
    source: Source, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], virtual_ids: Sequence[int]
) -> list[str]:
    """Conversations that the exported tokenizer and template turn into other ids than training did."""
    template = tokenizer.chat_template
    if not isinstance(template, str):
        return ["the chat template is lost"]
    failures = []
    for conversation in probes(rows):
        for asks in (False, True):
            try:
                expected = rendered_ids(source.tokenizer, source.template.text, conversation, generation_prompt=asks)
            except ValueError:
                continue  # the trained template refuses it, a system message for example
            found = rendered_ids(tokenizer, template, conversation, generation_prompt=asks)
            if found != (*virtual_ids, *expected):
                failures.append(f"the chat template renders {conversation.place!r} to other tokens than training did")
                break
    return failures


def measure(
    measured: Measured,
    row: Row,
    virtual_ids: Sequence[int],
    trained: PeftModel,
    reference: Network,
    exported: Network,
) -> None:
    """Adds one row to all meters."""
    trained_logits = logits_of(trained, row.ids)
    reference_logits = trained_logits if reference is trained else logits_of(reference, row.ids)
    exported_logits = logits_of(exported, (*virtual_ids, *row.ids))[len(virtual_ids) :]
    with trained.disable_adapter():
        bare_logits = logits_of(trained, row.ids)
    measured.exported.add(reference_logits, exported_logits)
    measured.bare.add(reference_logits, bare_logits)
    measured.against_trained.add(trained_logits, exported_logits)
    labels = torch.tensor(row.labels)
    for name, logits in (("trained", trained_logits), ("exported", exported_logits), ("bare base", bare_logits)):
        measured.perplexity[name].add(logits, labels)


def _on_original_weights(source: Source, run: LoadedRun) -> Network:
    """The adapter, not merged, on the base's unquantized weights."""
    base = AutoModelForCausalLM.from_pretrained(
        source.base,
        dtype=getattr(torch, run.plan.compute_dtype),
        attn_implementation=run.plan.attention,
        device_map={"": run.plan.device.torch_name},
        trust_remote_code=run.recipe.model.trust_remote_code,
    )
    return load_adapter(base, source.adapter).eval()


def _answers(
    source: Source, trained: Network, exported: Exported, rows: Sequence[Row], virtual_ids: Sequence[int]
) -> tuple[Answer, ...]:
    """Greedy answers of both to the same requests, up to 32 tokens."""
    asked = [row.conversation for row in rows if row.conversation and not row.conversation.is_document]
    if not asked:
        return ()
    prompts = [
        rendered_ids(source.tokenizer, source.template.text, conversation, generation_prompt=True)
        for conversation in asked
    ]
    ends = find_ends(trained, source.tokenizer)
    made: list[list[str]] = []
    for model, before in ((trained, ()), (exported.model, tuple(virtual_ids))):
        given = [(*before, *prompt) for prompt in prompts]
        answers = generate(model, given, [32] * len(given), ends)
        made.append([str(exported.tokenizer.decode(ids)) for ids in answers])
    requests = [str(conversation.prompt[-1].get("content") or "") for conversation in asked]
    return tuple(Answer(*texts) for texts in zip(requests, *made, strict=True))


def _plain(model: Network) -> PreTrainedModel:
    assert not isinstance(model, PeftModel)
    return model


def _stored_dtype(folder: Path) -> torch.dtype:
    name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["dtype"]
    dtype: torch.dtype = getattr(torch, name)
    return dtype
