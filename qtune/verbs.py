"""Verbs of other tools, and mistyped ones: what they are called here."""

from typing import Any

import typer
from typer.core import TyperGroup

from qtune.spelling import did_you_mean

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
            rest = f"; the verbs: {', '.join(self.list_commands(ctx))}"
            meant = ELSEWHERE.get(name.lower())
            advice = f"here that is: qtune {meant}" if meant else did_you_mean(name, self.list_commands(ctx))
            raise typer.BadParameter(f"no such verb{f'; {advice}' if advice else rest}", param_hint=f"qtune {name}")
        return super().resolve_command(ctx, args)
