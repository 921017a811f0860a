"""The story of `qtune export`: a run becomes a folder for others, and the folder is proven."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import HfApi

from qtune import console
from qtune.device.present import one_sentence
from qtune.disk import told
from qtune.errors import ExportError, ModelError, Problem, VerificationError
from qtune.export.adapter_folder import is_adapter_alone, require_same_adapter, write_adapter
from qtune.export.conflicts import refuse_whole
from qtune.export.gguf.file import GgufType, refuse_unconvertible
from qtune.export.gguf.handover import hand_over, hand_over_adapter
from qtune.export.gguf.kept import said_of_gguf_files
from qtune.export.gguf.verify import refuse_small_memory
from qtune.export.merge import Weights
from qtune.export.merged_folder import Target, open_merge, write_merged
from qtune.export.model_card import write_card
from qtune.export.opened_run import OpenedRun, open_for_export
from qtune.export.output import is_verified_export, output_folder, refuse_existing_output, run_around
from qtune.export.push import push, require_repository
from qtune.export.serving import serving, uses_text
from qtune.export.soft_prompt import open_baking, open_soft_prompt
from qtune.export.verification import Verification, damage_of, proof_today, read_proof
from qtune.export.verify.asked import require_same_questions
from qtune.export.verify.rows import CheckedRows, rows_for
from qtune.export.verify.verify import verify
from qtune.manifest import IF_CHANGED
from qtune.model.load import load_config
from qtune.run.folder import RunDir
from qtune.run.resolved import resolved_recipe
from qtune.startup.quiet import quiet_loading

ALONE_NOTE = (
    "What {kind} trains stands where no plain checkpoint can hold it. The adapter is exported alone; its README.md has "
    "the lines that load it."
)


Show = Callable[[Verification], None]
"""Told the figures of a verification as soon as they are there, good or not."""


def _unseen(verification: Verification) -> None:
    pass


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
    accepted: tuple[str, ...] = ()
    """Kinds of drift (`run.drift`) that the export goes on with."""
    given: frozenset[str] = frozenset()
    """Options as they were written on a command line (`export.conflicts`)."""


def export_run(run: RunDir, options: Options, show: Show = _unseen) -> Path:
    """Writes the export of a run, uploads it where a repository is named, and returns its folder.

    Raises InputError before anything is written, ExportError while writing, VerificationError when the written model
    is not the trained one; that folder stays, its verify.json and model card say so, and it is not uploaded.
    """
    if options.push_to is not None:
        require_repository(options.push_to, HfApi())
    with told(ExportError):
        folder = write_export(run, options, show)
    if options.push_to is not None:
        console.say(f"uploaded to {push(folder, options.push_to, HfApi())}")
    return folder


def write_export(run: RunDir, options: Options, show: Show = _unseen) -> Path:
    """`export_run` without the upload."""
    quiet_loading()
    is_alone = resolved_recipe(run).adapter.export == "alone"
    is_added = not is_alone and _is_added_to(run, options)
    reads_base = not (options.adapter_only or is_alone or is_added)
    source = open_for_export(run, accepted=options.accepted, reads_weights=reads_base)
    if is_alone and not options.adapter_only:
        refuse_whole(source.recipe.adapter.kind, options.given | _asked(options))
        console.say(ALONE_NOTE.format(kind=source.recipe.adapter.kind))
    if options.adapter_only or is_alone:
        folder = write_adapter(source, output_folder(run, options.output, alone=True), force=options.force)
        require_same_questions(source, folder)
        _say_uses(source, folder, run, options)
        return folder
    gguf = options.gguf or source.recipe.output.gguf
    if gguf is not None:
        refuse_unconvertible(load_config(source.recipe.model), source.tokenizer, source.base_name)
        refuse_small_memory(source.base)
    folder = output_folder(run, options.output, alone=False)
    if is_added and options.gguf is not None:
        _add_gguf(source, folder, options.gguf)
        _say_uses(source, folder, run, options)
        return folder
    if options.compare_bases and source.basis.is_stored:
        message = "holds quantized weights; there are no original ones to compare with, leave out --compare-bases"
        raise ModelError(Problem(str(source.base), message))
    target = Target(
        folder,
        getattr(torch, options.dtype),
        options.weights,
        force=options.force,
    )
    prompt = open_soft_prompt(source) if source.recipe.adapter.export == "bake" else None
    merge = open_merge(source, target) if prompt is None else open_baking(source, prompt, target.weights, target.dtype)
    with one_sentence("A merge holds the largest tensor several times over; close what else takes memory"):
        write_merged(source, merge, target, prompt)
    ids = () if prompt is None else prompt.ids
    require_same_questions(source, target.output, ids)
    rows = rows_for(source) if options.verify or gguf is not None else None
    if rows is not None and options.verify:
        with one_sentence(_later(target.output, run)):
            verification = verify(
                source,
                target.output,
                rows,
                options.weights,
                merge=merge,
                virtual_ids=ids,
                compare_bases=options.compare_bases,
            )
        prove(source, target.output, verification, show)
    if gguf is not None and rows is not None:
        _write_gguf(source, target.output, gguf, rows, ids)
    _say_uses(source, target.output, run, options)
    return target.output


def _is_added_to(run: RunDir, options: Options) -> bool:
    """Whether there is an export that a GGUF file is asked of, and not asked to be made anew."""
    folder = output_folder(run, options.output, alone=False)
    return options.gguf is not None and not options.adapter_only and not options.force and folder.exists()


def _add_gguf(source: OpenedRun, folder: Path, kind: GgufType) -> None:
    """Writes a GGUF file of an export that is there, whose weights are neither made nor compared again.

    Raises:
        InputError: this GGUF file is there, or the folder is another run's.
        ExportError: the export was not verified, or is not what was verified, every byte of it.
        VerificationError: as `hand_over`.
    """
    refuse_existing_output(source.run, folder, adapter_only=False, force=False, gguf=kind)
    proof = proof_today(folder, source.run.path)
    if not proof.verified:
        message = f"is there already, and no GGUF file can be added: {proof.failures[0]}; --force exports it again"
        raise ExportError(f"{folder}: {message}")
    console.say(f"{folder} is the verified export of this run; llama.cpp's files alone are added")
    ids = open_soft_prompt(source).ids if source.recipe.adapter.export == "bake" else ()
    _write_gguf(source, folder, kind, rows_for(source), ids)


def _write_gguf(source: OpenedRun, folder: Path, kind: GgufType, rows: CheckedRows, ids: tuple[int, ...]) -> None:
    """The GGUF file and what goes with it, proven; the card serves these files as well from then on."""
    with one_sentence(f"{folder} is whole without its GGUF file; close what else takes memory"):
        hand_over(folder, source.run.name, kind, source.recipe, rows.rows, ids)
        hand_over_adapter(source, folder)
    write_card(source, folder, read_proof(folder).figures)


def _later(folder: Path, run: RunDir) -> str:
    """What is said where there is no room to compare."""
    command = shlex.join(["qtune", "export", str(run.path), "--verify-only", str(folder)])
    return f"{folder} is whole, and not compared with the trained model; where more memory is free: {command}"


def _say_uses(source: OpenedRun, folder: Path, run: RunDir, options: Options) -> None:
    console.say(uses_text(folder, serving(source, folder), _gguf_command(source, folder, run, options)))


def _gguf_command(source: OpenedRun, folder: Path, run: RunDir, options: Options) -> str | None:
    """The command that writes a GGUF file; None where there is one, and where none can be made."""
    if source.recipe.adapter.export == "alone" or any(folder.glob("*.gguf")):
        return None
    try:
        refuse_unconvertible(load_config(source.recipe.model), source.tokenizer, source.base_name)
    except ModelError:
        return None
    whole = output_folder(run, None if options.adapter_only else options.output, alone=False)
    where = [] if options.adapter_only or options.output is None else ["--output", str(options.output)]
    again = ["--force"] if whole.exists() and not is_verified_export(run, whole) else []
    return shlex.join(["qtune", "export", str(run.path), *where, "--gguf", "q8_0", *again])


def _asked(options: Options) -> set[str]:
    """What a caller asked of the whole model, by the names of the command line."""
    asked = {
        "--gguf": options.gguf is not None,
        "--compare-bases": options.compare_bases,
        "--base": options.weights == "original",
        "--dtype": options.dtype != "float16",
        "--no-verify": not options.verify,
    }
    return {option for option, is_asked in asked.items() if is_asked}


def verify_only(folder: Path, run: RunDir | None, show: Show = _unseen, *, accepted: Sequence[str] = ()) -> Path:
    """Proves a folder that was exported before; `run` may be left out for a folder inside its run."""
    quiet_loading()
    run = run or run_around(folder)
    source = open_for_export(run, accepted=accepted, reads_weights=not is_adapter_alone(folder))
    if is_adapter_alone(folder):
        require_same_adapter(source, folder)
        console.say(f"{folder} is what was exported, and its adapter is that of {run.path}, byte for byte")
        return folder
    prompt = open_soft_prompt(source) if source.recipe.adapter.export == "bake" else None
    ids = () if prompt is None else prompt.ids
    with one_sentence(_later(folder, run)):
        damage = damage_of(folder)
        if damage is not None:
            console.say(f"{folder}: {damage}; whether it computes what the trained model does is compared all the same")
        verification = verify(
            source,
            folder,
            rows_for(source),
            _weights_of(folder),
            virtual_ids=ids,
            known=() if damage is None else (damage,),
        )
    prove(source, folder, verification, show, damage=damage)
    for sentence in said_of_gguf_files(folder, run.path):
        console.say(sentence)
    return folder


def prove(
    source: OpenedRun, folder: Path, verification: Verification, show: Show = _unseen, *, damage: str | None = None
) -> Path:
    """Writes the card, shows the figures; VerificationError when they are not good enough, or when a file has changed
    since the export (`damage`), whatever they are."""
    write_card(source, folder, verification)
    show(verification)
    if damage is not None and verification.failures == (damage,):
        message = f"{folder}: {damage}; it computes what the trained model does all the same: {IF_CHANGED}"
        raise VerificationError(f"{message}; it is kept, marked as unverified")
    if not verification.verified:
        lines = "\n".join(f"  {failure}" for failure in verification.failures[:20])
        raise VerificationError(f"{folder} is not the trained model; it is kept, marked as unverified\n{lines}")
    return folder


def _weights_of(folder: Path) -> Weights:
    """The basis that an earlier verification noted; the default where there was none."""
    return "original" if read_proof(folder).weights == "original" else "dequantized"
