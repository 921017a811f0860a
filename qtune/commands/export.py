"""`qtune export`: a model that others can load, with its proof."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from qtune import console
from qtune.commands.shared import AcceptUsingOption, TrustOption, agree, load_libraries, options_given


def export(
    context: typer.Context,
    run: Annotated[
        Path | None, typer.Argument(metavar="RUN", help="A run's folder; may be left out with --verify-only.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Where to write; RUN/model if left out.")
    ] = None,
    dtype: Annotated[
        Literal["float16", "bfloat16"],
        typer.Option("--dtype", metavar="TYPE", help="Type of the exported weights: float16 or bfloat16."),
    ] = "float16",
    base: Annotated[
        Literal["dequantized", "original"],
        typer.Option(
            "--base",
            metavar="WEIGHTS",
            help="What the adapter is merged into: the weights that training saw (dequantized), or those of the base "
            "checkpoint (original), which it was not trained on.",
        ),
    ] = "dequantized",
    force: Annotated[bool, typer.Option("--force", help="Replace a folder that is there.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare the written model with the one that was trained.")
    ] = True,
    verify_only: Annotated[
        Path | None,
        typer.Option(
            "--verify-only",
            metavar="DIR",
            help="Compare a folder that was exported before, as RUN/model; of its GGUF files the checksums.",
        ),
    ] = None,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="Write the adapter alone, in peft's format.")
    ] = False,
    compare_bases: Annotated[
        bool, typer.Option("--compare-bases", help="Also measure what merging into the original weights costs.")
    ] = False,
    gguf: Annotated[
        Literal["f16", "bf16", "q8_0"] | None,
        typer.Option(
            "--gguf",
            metavar="TYPE",
            help="Also write a GGUF file in f16, bf16 or q8_0 for llama.cpp, LoRA as adapter.gguf and, where proven, "
            "an Ollama Modelfile; to a verified export that is there, they alone are added.",
        ),
    ] = None,
    push_to: Annotated[
        str | None,
        typer.Option(
            "--push-to-hub",
            metavar="REPO",
            help="Upload the folder to this repository, private: a model that was verified, or the adapter alone.",
        ),
    ] = None,
    accept_drift: AcceptUsingOption = None,
    trust: TrustOption = False,
) -> None:
    """Turn a run into a model that others can load, and prove that it is the model that was trained.

    LoRA and IA3 are merged into the weights. The folder loads with plain transformers. It is loaded back and compared
    with the live 4-bit model and its adapter on held-out rows; the figures are kept in verify.json and in the model
    card. A model that fails is kept, marked as unverified, and the exit code is 1.
    """
    from qtune.export.conflicts import refuse_conflicts
    from qtune.export.output import refuse_existing_output, require_exported, run_around
    from qtune.run.finished import require_adapter
    from qtune.run.folder import RunDir, runs_here

    given = options_given(context)
    refuse_conflicts(given)
    # What is wrong with a run or a folder is said before seconds of imports.
    if verify_only is not None:
        require_exported(verify_only)
        opened = RunDir.open(run) if run is not None else run_around(verify_only)
    elif run is not None:
        opened = RunDir.open(run)
    else:
        raise typer.BadParameter(f"name a run, as qtune export runs/quickstart{runs_here()}")
    require_adapter(opened)
    if verify_only is None:
        refuse_existing_output(
            opened, output, adapter_only=adapter_only, force=force, gguf=gguf, given=frozenset(given)
        )
    load_libraries()
    from qtune.export import export as stage
    from qtune.report.page import renewed_reports
    from qtune.screens import export as screen

    if trust:
        agree(opened)
    if verify_only is not None:
        with renewed_reports(opened):
            folder = stage.verify_only(verify_only, opened, screen.show, accepted=tuple(accept_drift or ()))
        console.out(f"{folder}")
        return
    options = stage.Options(
        output=output,
        weights=base,
        dtype=dtype,
        force=force,
        verify=verify,
        adapter_only=adapter_only,
        gguf=gguf,
        compare_bases=compare_bases,
        push_to=push_to,
        accepted=tuple(accept_drift or ()),
        given=given,
    )
    with renewed_reports(opened):
        folder = stage.export_run(opened, options, screen.show)
    console.out(f"{folder}")
