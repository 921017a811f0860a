"""`qtune chat`: a run or a model answers."""

from typing import Annotated

import typer

from qtune.commands.shared import MOST_TOKENS, AcceptUsingOption, TrustOption, load_libraries, no_more_than


def chat(
    target: Annotated[
        str,
        typer.Argument(metavar="RUN|MODEL", help="A run's folder, an exported model's, a hub id or a built-in model."),
    ],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Answer this and leave.")] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter/--no-adapter", help="Talk to the tuned model or to its base.")
    ] = True,
    system: Annotated[str | None, typer.Option(help="System message; left out, that of the recipe.")] = None,
    temperature: Annotated[
        float,
        typer.Option(
            metavar="T", min=0, callback=no_more_than(100), help="0 takes the likeliest token, 1 draws from the model."
        ),
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            metavar="P",
            min=0,
            max=1,
            callback=no_more_than(1),
            help="Draw from the likeliest tokens of this total share.",
        ),
    ] = 1.0,
    seed: Annotated[
        int, typer.Option(metavar="N", min=0, callback=no_more_than(2**32 - 1), help="Seed of the draws.")
    ] = 0,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, callback=no_more_than(MOST_TOKENS), help="Longest answer, in tokens.")
    ] = 512,
    accept_drift: AcceptUsingOption = None,
    trust: TrustOption = False,
) -> None:
    """Talk to a run or a model; answers appear as they are made.

    /help lists what can be typed besides questions; Ctrl-C stops an answer, Ctrl-D leaves. Lines may be piped in.
    """
    from qtune.run.finished import require_adapter
    from qtune.tuned.target import require_model, run_meant

    run_dir = run_meant(target)
    if run_dir is None:
        require_model(target)
    elif adapter:
        require_adapter(run_dir)
    load_libraries()
    from qtune.tuned import chat as stage
    from qtune.tuned.generate import Sampling

    session = stage.open_session(target, adapter=adapter, accepted=tuple(accept_drift or ()), trusted=trust)
    session.sampling, session.max_new_tokens = Sampling(temperature, top_p, seed), max_new_tokens
    session.system = system if system is not None else session.system
    if prompt is None:
        stage.chat(session, stage.typed_lines())
        return
    stage.answered(session, prompt)
