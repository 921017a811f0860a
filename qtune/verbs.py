"""What is wrong with a command line, in one sentence: a mistyped verb or option, a value that is none."""

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from qtune import console
from qtune.errors import InputError, Interrupted, Problem
from qtune.spelling import did_you_mean, meant_file, nearest
from qtune.startup.launched import is_to_meet

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
    "augment": "swap",
    "estimate": "profile",
    "estimate-memory": "profile",
    "memory": "profile",
    "env": "doctor",
    "info": "doctor",
    "ls": "list",
    "runs": "list",
    "status": "list",
    "history": "list",
    "show": "report",
    "inspect": "report",
    "view": "report",
    "plot": "report",
    "logs": "report",
    "tokenize": "check",
    "prepare": "check",
    "lint": "check",
    "plan": "profile",
    "cost": "profile",
    "vram": "profile",
    "upload": "export --push-to-hub",
    "publish": "export --push-to-hub",
    "score": "eval",
    "benchmark": "eval --tasks",
    "bench": "eval --tasks",
    "diff": "compare",
    "new": "init",
    "create": "init",
    "version": "--version",
    "help": "--help",
}

# What other tools have a verb for, and how it is done here, where none of ours is meant.
DONE_BY = {
    "serve": (("deploy", "api"), "the commands that serve what was trained are printed by: qtune export RUN"),
    "quantize": (
        ("quantise", "quant"),
        "a run loads its base in 4 bits by itself (quantization.kind of its recipe); what it has trained is written in "
        "8 bits by: qtune export RUN --gguf q8_0",
    ),
    "stop": (("kill", "pause", "cancel"), "Ctrl-C in its terminal saves and stops a run; on with: qtune run --resume"),
    "delete": (("rm", "remove", "clean", "prune"), "qtune deletes no run; its folder is all that there is of one"),
    "login": (("auth",), "qtune uses the login of: hf auth login"),
    "download": (("pull", "fetch"), "a verb that needs a base fetches it, once"),
}
HOW = {word: how for verb, (others, how) in DONE_BY.items() for word in (verb, *others)}

# What a verb that was stopped leaves, true whenever that is: what it writes is there at once or not at all. A run says
# more while it trains, and when it has ended.
KEPT = {
    "init": "a recipe is written whole or not at all",
    "run": "what a run has saved stays",
    "check": "a check keeps nothing",
    "profile": "what was traced to its end is kept in the cache",
    "fit": "a recipe is written whole or not at all",
    "swap": "what is written is written whole, the recipe last",
    "eval": "the run's folder keeps the last evaluation that came to its end",
    "compare": "what was measured of a run to its end is kept in its folder",
    "export": "what stands under its name, if anything, is whole, and its verify.json says whether it was compared",
    "report": "the last page that was drawn to its end stays",
}
RUNS = Path("runs")
"""The default of output.directory."""
ALIKE = 0.7
"""Share of letters that a word has in common with what it is a slip of; so many are known that less says little."""


OTHER_NAMES = {
    "--test": "--data", "--dataset": "--data", "--train": "--data", "--rows-file": "--data", "--model": "--base",
    "--base-model": "--base", "--kind": "--adapter", "--peft": "--adapter", "--out": "--output", "--card": "--gpu",
    "--device": "--gpu", "--memory": "--vram", "--quantization": "--gguf", "--quantize": "--gguf", "--limit": "--rows",
    "--samples": "--rows", "--num-samples": "--rows", "--overwrite": "--force", "--yes": "--force",
}  # fmt: skip
"""What other tools, or our own recipe, call an option."""


BELONGING: dict[str, str | None] = {
    "--vram": "memory.budget", "--base": "model.base", "--adapter": "adapter.kind", "--data": "data.train",
    "--length": "data.max_length", "--system": "data.system_prompt", "--gguf": "output.gguf",
    "--output": "output.directory", "--prompt": None, "--limit": None, "--dtype": None, "--rows": None,
}  # fmt: skip
"""Options of our own verbs that others have in the recipe, as which key; None: what it means there is none."""


class Verbs(TyperGroup):
    """The verbs; one that is not there is answered with the one that is meant."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for command in self.commands.values():
            command.help = _flowing(command.help or "")

    def main(  # type: ignore[override]  # two of its five arguments have names here, the others go through
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> Any:
        """The parser's own, but that it says what is wrong as every other error is said, and draws no box."""
        words = list(sys.argv[1:] if args is None else args)
        try:
            code = super().main(words, prog_name, **{**extra, "standalone_mode": False})
        except USAGE_ERROR as error:
            if not words:  # what is asked for without a verb is help
                console.out_raw(f"{error}\n")
            elif is_to_meet():  # all of several processes end with it, and one says it
                raise InputError(self._problem(error, words)) from error
            else:
                console.say_error(str(self._problem(error, words)))
            code = 2
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        """click's, but that who stops a verb is told what is left of it."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            kept = KEPT.get(str(ctx.invoked_subcommand))
            raise Interrupted(f"stopped; {kept}" if kept else "stopped") from error

    def _problem(self, error: Any, words: list[str]) -> Problem:
        """A usage error of the parser in our words: verb, option and value that were found, and what would be right."""
        verb = next((word for word in words if word in self.commands), None)
        command = self if verb is None else self.commands[verb]
        name = "qtune" if verb is None else f"qtune {verb}"
        option, param = getattr(error, "option_name", None), getattr(error, "param", None)
        if isinstance(hint := getattr(error, "param_hint", None), str):
            return Problem(hint, error.message)
        if param is not None and not error.message:
            about = (param.help or "").partition("\n")[0].rstrip(".")
            said = f"{param.metavar or param.opts[0]} is missing: {about[:1].lower()}{about[1:]}"
            return Problem(name, f"{said}{_runs_here() if (param.metavar or '').startswith('RUN') else ''}")
        if param is not None:
            is_option = param.param_type_name == "option"
            given = _value_of(param.opts, words) if is_option else None
            if is_option and (choices := _choices(param)) and (not given or _is_no_value(given)):
                return Problem(f"{name} {param.opts[0]}", f"its value is missing: {choices}")
            place = shlex.join(filter(None, [param.opts[0] if is_option else (param.metavar or param.name), given]))
            said = f"must be {choices}" if is_option and (choices := _choices(param, given)) else _plain(error.message)
            if is_option and given and said.endswith("does not exist"):
                said += meant_file(given)
            return Problem(f"{name} {place}", said)
        if option is not None and hasattr(error, "possibilities"):
            known = [one for one in _options(command) if one.startswith("--")]
            if (meant := OTHER_NAMES.get(option)) in known:
                return Problem(f"{name} {option}", f"no such option; did you mean {meant!r}?")
            if "--set" in known and (key := _as_key(option, words)) is not None:
                return Problem(f"{name} {option}", f"no such option; the recipe has it as a key: {key}")
            near = did_you_mean(option, error.possibilities or (), f"its options: {', '.join(known)}", most=2)
            return Problem(f"{name} {option}", f"no such option; {near}")
        if option is not None:
            asked = _options(command).get(option)
            said = f"its value is missing: {_choices(asked) or _about(asked)}{_meant_export(option, words)}"
            return Problem(f"{name} {option}", said)
        if (extra := re.search(r"unexpected extra arguments?(?:\(s\))? \((.*)\)", error.message)) is not None:
            meant = shlex.join(["qtune", *_meant_words(verb, words, extra[1])])
            return Problem(f"{name} {extra[1]}", f"one argument too many; did you mean: {meant}")
        return Problem(name, _plain(error.message))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """click's search for the verb that the first argument names."""
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            meant = _meant(args, self.list_commands(ctx))
            raise typer.BadParameter(f"no such verb; {meant}", param_hint=f"qtune {name}")
        found = super().resolve_command(ctx, args)
        self._refuse_others_options(ctx, *found)
        return found

    def _refuse_others_options(self, ctx: Any, name: str | None, command: Any, words: list[str]) -> None:
        """An option of another verb is named as such; click would offer the one that is spelled most like it."""
        own = _options(command)
        for at, word in enumerate(words):
            if word == "--":
                return
            option = word.partition("=")[0]
            before = own.get(words[at - 1]) if at else None
            is_value = before is not None and not before.is_flag
            if not option.startswith("--") or option in own or is_value:
                continue
            others = [verb for verb in self.list_commands(ctx) if option in _options(self.get_command(ctx, verb))]
            if not others:
                continue
            told = f"belongs to {' and '.join(f'qtune {verb}' for verb in others)}"
            if "--set" in own and (key := _as_key(option, words)) is not None:
                told += f"; for qtune {name} the recipe has it as a key: {key}"
            raise InputError(Problem(f"qtune {name} {option}", told))


def _flowing(text: str) -> str:
    """A help text whose paragraphs are one line each: typer joins the lines of the first alone, and would break the
    others where our source does, and where the terminal ends."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text.strip()))


def _meant_words(verb: str | None, words: Sequence[str], extra: str) -> list[str]:
    """The command line with the option that stands for each word too many; without those for which none does.

    extra: those words, with spaces between them.
    """
    meant = list(words)
    for word in [extra] if extra in words else [one for one in extra.split() if one in words]:
        at = len(meant) - 1 - meant[::-1].index(word)
        meant[at : at + 1] = [] if verb == "chat" else _option_for(verb, word, words)
        if verb == "run" and "--resume" in words and (RUNS / word).is_dir():
            first = next((one for one in meant[1:] if not one.startswith("-")), None)
            meant = [str(RUNS / word) if one == first else one for one in meant]
    return [*meant, "--prompt", extra] if verb == "chat" else meant


def _option_for(verb: str | None, word: str, words: Sequence[str]) -> list[str]:
    """The option and the word, by what the word looks like."""
    is_number, is_size = word.isdigit(), re.fullmatch(r"[0-9.]+ ?[KMGT]i?B?", word, re.IGNORECASE)
    match verb:
        case "init" if word.endswith(".toml"):
            option = "--output"
        case "init":
            option = "--data" if Path(word).exists() and "--data" not in words else "--base"
        case "eval" | "check" | "compare" if is_number:
            option = "--rows"
        case "eval" if Path(word).is_file():
            option = "--data"
        case "fit" | "profile" if is_number or is_size:
            option = "--vram"
        case "profile" | "fit":
            option = "--gpu"
        case "export":
            option = "--gguf" if word in ("f16", "bf16", "q8_0") else "--output"
        case "run" if "=" in word:
            option = "--set"
        case _:
            return []
    return [] if option in words else [option, word]


USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]
"""What every error of the parser is; the only one of them that typer names in public is below it."""


def _value_of(names: Sequence[str], words: Sequence[str]) -> str | None:
    """The value that an option was given; None where it cannot be told."""
    for at, word in enumerate(words):
        option, is_joined, value = word.partition("=")
        if option in names:
            return value if is_joined else next(iter(words[at + 1 :]), None)
    return None


def _as_key(option: str, words: Sequence[str]) -> str | None:
    """The --set for an option that the recipe has as a key: one of another of our verbs, else by the key's name or what
    another tool calls it; None for any other. A value stands there where it is sure to be meant so."""
    # They have the whole schema, for which help need not wait.
    from qtune.recipe.meant_keys import is_switch, keys_meant

    if option in BELONGING:
        keys, is_ours = [key for key in (BELONGING[option],) if key is not None], True
    else:
        name = option.lstrip("-").replace("-", "_").lower()
        keys = keys_meant(name)
        is_ours = any(name in (key, key.rpartition(".")[2]) for key in keys)
    is_joined = any(word.startswith(f"{option}=") for word in words)
    value = _value_of([option], words) or ""
    is_given = value != "" and (is_joined or not _is_no_value(value) or option == "--data")

    def given(key: str) -> str:
        if is_switch(key) and not is_joined:  # what follows is the recipe
            return "true"
        return value if is_ours and is_given else "VALUE"

    return " or ".join(shlex.join(["--set", f"{key}={given(key)}"]) for key in keys) or None


def _plain(message: str) -> str:
    """A sentence of the library that reads values, as ours begin: with what would be right."""
    said = re.sub(r"^(Value error, |Assertion failed, )", "", message.strip()).rstrip(".")
    said = said.replace("Input should be", "should be").partition(", unable to parse")[0]
    return f"{said[:1].lower()}{said[1:]}" if said[1:2].islower() else said


def _choices(option: Any, given: str | None = None) -> str:
    """The values that an option can have, and how the one most like `given` is written; empty where any will do."""
    choices = [str(one) for one in getattr(getattr(option, "type_descriptor", None), "choices", None) or ()]
    if not choices:
        return ""
    *others, last = choices
    meant = nearest(given or "", choices) or choices[0]
    return f"{', '.join(others)} or {last}, as {option.opts[0]} {meant}"


def _runs_here() -> str:
    from qtune.run.folder import runs_here  # it reads recipes, for which help need not wait

    return runs_here()


def _meant_export(option: str, words: list[str]) -> str:
    """The command that verifies an export, where its folder is missing, but it, or its run, stands elsewhere."""
    if option != "--verify-only" or words[-1:] != [option]:
        return ""
    from qtune.run.folder import EXPORTED

    for folder in map(Path, words[1:-1]):
        run, exported = (folder, folder / EXPORTED) if (folder / EXPORTED).is_dir() else (folder.parent, folder)
        if exported.is_dir() and (run / "resolved.toml").is_file():
            return f"; did you mean: {shlex.join(['qtune', 'export', str(run), '--verify-only', str(exported)])}"
    return ""


def _is_no_value(word: str) -> bool:
    """Whether a word in a value's place is the next option, or the file or folder behind it."""
    return word.startswith("-") or Path(word).exists()


def _about(option: Any) -> str:
    """What an option takes: its help."""
    about = "" if option is None else (option.help or "").rstrip(".")
    return f"{about[:1].lower()}{about[1:]}" if about[1:2].islower() else about


def _options(command: Any) -> dict[str, Any]:
    """The options of a verb by each of their names."""
    of_kind = [one for one in command.params if one.param_type_name == "option"]
    return {name: option for option in of_kind for name in (*option.opts, *option.secondary_opts)}


def _meant(words: Sequence[str], verbs: list[str]) -> str:
    """What to say of a verb that is not there, the first of the words: what another tool's word means here, what a verb
    is wanted before, or what a mistyped one means; else all."""
    word = words[0].lower()
    known = {*ELSEWHERE, *HOW}
    if word not in known and (said := _of_verbless(words)) is not None:
        return said
    near = word if word in known else nearest(word, [*verbs, *sorted(known)], ALIKE) or nearest(word, verbs)
    if near in HOW:
        return HOW[near]
    if near in ELSEWHERE:
        return f"here that is: qtune {ELSEWHERE[near]}"
    return f"did you mean {near!r}?" if near else f"the verbs: {', '.join(verbs)}"


def _of_verbless(words: Sequence[str]) -> str | None:
    """What to say of a recipe, rows, a run or a path to nothing where a verb is wanted; None where the first word is
    none of them."""
    # They read recipes, for which help need not wait.
    from qtune.recipe.row_kinds import ROW_KINDS, TEXT_KINDS, kind_of
    from qtune.recipe.shipped import shipped_recipes
    from qtune.run.folder import RunDir

    first, path = words[0], Path(words[0])
    run = next((one for one in (path, RUNS / path) if RunDir(one).resolved_file.is_file()), None)
    if run is not None:
        commands = (shlex.join(["qtune", verb, str(run)]) for verb in ("eval", "chat", "export", "report"))
        return f"it is a run, for: {', '.join(commands)}"
    if first in shipped_recipes() or (path.suffix == ".toml" and path.is_file()):
        return f"it is a recipe, for: {shlex.join(['qtune', 'run', *words])}"
    if path.is_file() and kind_of(path)[0] in {*ROW_KINDS} - {*TEXT_KINDS}:
        return f"it has rows; a recipe for them: {shlex.join(['qtune', 'init', '--base', 'MODEL', '--data', first])}"
    if (near := nearest(first, shipped_recipes(), ALIKE)) is not None:
        return f"did you mean: {shlex.join(['qtune', 'run', near, *words[1:]])}"
    is_path = path.name != first or path.suffix == ".toml"
    return f"no such file either{meant_file(first)}" if is_path and not path.exists() else None
