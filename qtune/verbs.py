"""Verbs of other tools, and mistyped ones: what they are called here."""

from typing import Any

import typer
from typer.core import TyperGroup

from qtune.spelling import nearest

# What other tools call ours, with what theirs does.
ELSEWHERE = {
    "train": "run",
    "finetune": "run",
    "fine-tune": "run",
    "sft": "run",
    "start": "run",
    "resume": "run --resume",
    "continue": "run --resume",
    "merge": "export",
    "merge-lora": "export",
    "merge_and_unload": "export",
    "convert": "export",
    "save": "export",
    "gguf": "export --gguf f16",
    "push": "export --push-to-hub",
    "evaluate": "eval",
    "test": "eval",
    "inference": "chat",
    "infer": "chat",
    "generate": "chat",
    "predict": "chat",
    "ask": "chat",
    "validate": "check",
    "preprocess": "check",
    "estimate": "profile",
    "estimate-memory": "profile",
    "memory": "profile",
    "env": "doctor",
    "info": "doctor",
    "new": "init",
    "create": "init",
    "version": "--version",
    "help": "--help",
}


class Verbs(TyperGroup):
    """The verbs; one that is not there is answered with the one that is meant."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """click's search for the verb that the first argument names."""
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            raise typer.BadParameter(
                f"no such verb; {_meant(name, self.list_commands(ctx))}", param_hint=f"qtune {name}"
            )
        return super().resolve_command(ctx, args)


def _meant(name: str, verbs: list[str]) -> str:
    """What to say of a verb that is not there: what another tool's word, or a mistyped one, means here; else all."""
    word = name.lower()
    near = word if word in ELSEWHERE else nearest(word, [*verbs, *ELSEWHERE])
    if near in ELSEWHERE:
        return f"here that is: qtune {ELSEWHERE[near]}"
    return f"did you mean {near!r}?" if near else f"the verbs: {', '.join(verbs)}"
