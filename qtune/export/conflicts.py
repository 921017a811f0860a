"""Options of `qtune export` of which one would be ignored: refused, each with its reason."""

from collections.abc import Collection

from qtune.errors import InputError, Problem

CONFLICTS = {
    "--no-verify": {
        "--push-to-hub": "only a model that was verified is uploaded",
        "--compare-bases": "the bases are compared while verifying",
    },
    "--adapter-only": {
        "--gguf": "a GGUF file holds a whole model",
        "--compare-bases": "nothing is merged",
        "--base": "nothing is merged",
        "--dtype": "the adapter keeps the type that it was trained in",
        "--no-verify": "nothing is merged, so there is nothing to compare",
        "--verify": "nothing is merged, so there is nothing to compare",
    },
    "--base original": {"--compare-bases": "an export into the original weights tells what they cost anyway"},
    "--verify-only": dict.fromkeys(
        (
            "--adapter-only", "--no-verify", "--verify", "--compare-bases", "--gguf", "--push-to-hub", "--output",
            "--force", "--base", "--dtype",
        ),
        "nothing is written but the figures",
    ),
}  # fmt: skip


def refuse_conflicts(given: Collection[str]) -> None:
    """Refuses options that were given and would be ignored beside another one.

    given: the options as they were written; "--base original" stands beside "--base" where that is its value.

    Raises:
        InputError: with each pair.
    """
    problems = [
        Problem(option, f"not together with {other}: {why}")
        for option, others in CONFLICTS.items()
        for other, why in others.items()
        if option in given and other in given
    ]
    if problems:
        raise InputError(problems)


def refuse_whole(kind: str, given: Collection[str]) -> None:
    """Refuses what is asked of a whole model, of an adapter that no whole model can hold.

    Raises:
        InputError: with each option.
    """
    problems = [
        Problem(option, f"{kind} cannot be put into a model's weights, so the adapter is exported alone: {why}")
        for option, why in CONFLICTS["--adapter-only"].items()
        if option in given
    ]
    if problems:
        raise InputError(problems)
