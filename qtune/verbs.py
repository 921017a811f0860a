"""Verbs of other tools, and mistyped ones: what they are called here."""

from typing import Any

import typer
from typer.core import TyperGroup

from qtune.errors import InputError, Problem
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
        found = super().resolve_command(ctx, args)
        self._refuse_others_options(ctx, *found)
        return found

    def _refuse_others_options(self, ctx: Any, name: str | None, command: Any, words: list[str]) -> None:
        """An option of another verb is named as such; click would offer the one that is spelled most like it."""
        own = _options(command)
        for at, word in enumerate(words):
            if word == "--":
                return
            option, _, value = word.partition("=")
            before = own.get(words[at - 1]) if at else None
            is_value = before is not None and not before.is_flag
            if not option.startswith("--") or option in own or is_value:
                continue
            others = [verb for verb in self.list_commands(ctx) if option in _options(self.get_command(ctx, verb))]
            if not others:
                continue
            told = f"belongs to {' and '.join(f'qtune {verb}' for verb in others)}"
            if option == "--vram" and "--set" in own:
                size = value or next(iter(words[at + 1 :]), "SIZE")
                told += f"; what qtune {name} may spend is set with: --set memory.budget={size}"
            raise InputError(Problem(f"qtune {name} {option}", told))


def _options(command: Any) -> dict[str, Any]:
    """The options of a verb by each of their names."""
    of_kind = [one for one in command.params if one.param_type_name == "option"]
    return {name: option for option in of_kind for name in (*option.opts, *option.secondary_opts)}


def _meant(name: str, verbs: list[str]) -> str:
    """What to say of a verb that is not there: what another tool's word, or a mistyped one, means here; else all."""
    word = name.lower()
    near = word if word in ELSEWHERE else nearest(word, [*verbs, *ELSEWHERE])
    if near in ELSEWHERE:
        return f"here that is: qtune {ELSEWHERE[near]}"
    return f"did you mean {near!r}?" if near else f"the verbs: {', '.join(verbs)}"
