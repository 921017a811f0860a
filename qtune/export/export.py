"""The story of `qtune export`: a run becomes a folder for others, and the folder is proven."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import HfApi
from peft import PeftType

from qtune import console
from qtune.errors import InputError, Problem, VerificationError
from qtune.export.adapter_folder import write_adapter
from qtune.export.gguf.file import GgufType, refuse_unconvertible
from qtune.export.gguf.handover import hand_over
from qtune.export.merge import Weights
from qtune.export.merged_folder import VERIFICATION, Target, open_merge, write_merged
from qtune.export.model_card import write_card
from qtune.export.opened_run import Source, open_source
from qtune.export.push import push
from qtune.export.soft_prompt import BAKED, open_baking, open_soft_prompt
from qtune.export.verify.rows import rows_for
from qtune.export.verify.verify import Verification, verify
from qtune.model.load import load_config
from qtune.run.folder import RunDir
from qtune.startup.quiet import quiet_loading

MERGED = {PeftType.LORA, PeftType.IA3}

PREFIX_NOTE = (
    "A prefix lives in the attention cache of every layer, where no plain checkpoint can hold it. The adapter is "
    "exported alone; its README.md has the lines that load it."
)


@dataclass(frozen=True)
class Options:
    """What the user asked for."""

    output: Path | None = None
    weights: Weights = "dequantized"
    dtype: Literal["float16", "bfloat16"] = "float16"
    force: bool = False
    verify: bool = True
    adapter_only: bool = False
    gguf: GgufType | None = None
    compare_bases: bool = False
    push_to: str | None = None


def export_run(run: RunDir, options: Options) -> Path:
    """Writes the export of a run, uploads it where a repository is named, and returns its folder.

    Raises InputError before anything is written, ExportError while writing, VerificationError when the written model
    is not the trained one; that folder stays, its verify.json and model card say so, and it is not uploaded.
    """
    folder = write_export(run, options)
    if options.push_to is not None:
        console.say(f"uploaded to {push(folder, options.push_to, HfApi())}")
    return folder


def write_export(run: RunDir, options: Options) -> Path:
    """`export_run` without the upload."""
    quiet_loading()
    source = open_source(run)
    if source.config.peft_type not in MERGED | BAKED and not options.adapter_only:
        console.say(PREFIX_NOTE)
    if options.adapter_only or source.config.peft_type not in MERGED | BAKED:
        return write_adapter(source, options.output or run.path / "adapter-export", force=options.force)
    gguf = options.gguf or source.recipe.output.gguf
    if gguf is not None:
        refuse_unconvertible(load_config(source.recipe.model), source.tokenizer, source.base_name)
    target = Target(
        options.output or run.path / "model", getattr(torch, options.dtype), options.weights, force=options.force
    )
    prompt = open_soft_prompt(source) if source.config.peft_type in BAKED else None
    merge = open_merge(source, target) if prompt is None else open_baking(source, prompt, target.weights, target.dtype)
    write_merged(source, merge, target, prompt)
    ids = () if prompt is None else prompt.ids
    rows = rows_for(source) if options.verify or gguf is not None else None
    if rows is not None and options.verify:
        verification = verify(
            source,
            target.output,
            rows,
            options.weights,
            merge=merge,
            virtual_ids=ids,
            compare_bases=options.compare_bases,
        )
        prove(source, target.output, verification)
    if gguf is not None and rows is not None:
        hand_over(target.output, run.path.name, gguf, source.recipe, rows.rows, ids)
    return target.output


def verify_only(folder: Path, run: RunDir | None) -> Path:
    """Proves a folder that was exported before; `run` may be left out for a folder inside its run."""
    quiet_loading()
    run = run or _run_around(folder)
    source = open_source(run)
    prompt = open_soft_prompt(source) if source.config.peft_type in BAKED else None
    ids = () if prompt is None else prompt.ids
    return prove(source, folder, verify(source, folder, rows_for(source), _weights_of(folder), virtual_ids=ids))


def prove(source: Source, folder: Path, verification: Verification) -> Path:
    """Writes the card, shows the figures; VerificationError when they are not good enough."""
    write_card(source, folder, verification)
    show(verification)
    if not verification.verified:
        lines = "\n".join(f"  {failure}" for failure in verification.failures[:20])
        raise VerificationError(f"{folder} is not the trained model; it is kept, marked as unverified\n{lines}")
    return folder


def show(verification: Verification) -> None:
    """Prints the figures of a verification."""
    exported, bare = verification.exported, verification.bare_base
    rows = [
        ["KL divergence, nats per token", f"{exported.kl:.2e}", f"{bare.kl:.2e}", f"≤ {verification.limits.kl:.2e}"],
        ["same likeliest token", f"{exported.top1:.2%}", f"{bare.top1:.2%}", f"≥ {verification.limits.top1:.1%}"],
        ["largest logit gap", f"{exported.gap:.3g}", f"{bare.gap:.3g}", ""],
        ["perplexity", *(f"{verification.perplexity[name]:.4g}" for name in ("exported", "bare base")), ""],
    ]
    title = f"Against the trained model (perplexity {verification.perplexity['trained']:.4g})"
    title += f", {verification.rows} {verification.rows_from}, {exported.tokens} tokens"
    console.out(console.table(title, ["", "exported", "bare base", "limit"], rows, right=(1, 2, 3)))
    for weights, cost in verification.cost.items():
        if len(verification.cost) > 1 or cost != exported:
            console.out(f"merged into the {weights} weights: KL {cost.kl:.2e}, same likeliest token {cost.top1:.2%}")
    if (live := verification.live) is not None:
        console.out(
            f"compared in float32; computing with {verification.compute_dtype} alone changes the trained model by KL "
            f"{live.kl:.2e}, same likeliest token {live.top1:.2%}"
        )
    if verification.answers:
        console.out(f"greedy answers equal: {verification.answers_equal} of {len(verification.answers)}")


def _weights_of(folder: Path) -> Weights:
    """The basis that an earlier verification noted; the default where there was none."""
    file = folder / VERIFICATION
    noted = json.loads(file.read_text(encoding="utf-8")).get("weights") if file.exists() else None
    return "original" if noted == "original" else "dequantized"


def _run_around(folder: Path) -> RunDir:
    for parent in folder.resolve().parents:
        if (parent / "resolved.toml").is_file():
            return RunDir.open(parent)
    raise InputError(Problem(str(folder), "is not inside a run; name the run: qtune export RUN --verify-only DIR"))
