"""`qtune chat`: talk to a run, an exported model or a base model; streamed, with history, adapter on or off."""

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qtune import console
from qtune.data.conversation import Conversation, RowError, shown
from qtune.data.own_system import own_system
from qtune.data.template import Renderer, default_template, prompt_ids
from qtune.device.present import one_sentence, present_device
from qtune.errors import DataError, OutOfMemory, Problem
from qtune.model.load import load_plain, load_tokenizer
from qtune.model.local import base_folder
from qtune.model.trust import grant_for, is_granted
from qtune.plan import Plan, compute_dtype_rule
from qtune.recipe.schema import Model
from qtune.run.drift import known_kinds
from qtune.run.resolved import resolved_recipe
from qtune.spelling import nearest
from qtune.startup.interrupts import take_again
from qtune.startup.quiet import quiet_loading
from qtune.tuned.generate import GREEDY, Ends, Ids, Sampling, find_ends, loop_at_end, positions_left, stream
from qtune.tuned.load import load_run, load_untuned
from qtune.tuned.precision import training_autocast
from qtune.tuned.target import require_model, run_meant
from qtune.tuned.trained_system import usual_system
from qtune.tuned.vocabulary import HALF, decoded, require_embeddings, require_known

HELP = """\
/adapter on|off   answer with or without the adapter
/system TEXT      set the system message and start anew; without TEXT, none
/trained          ask with the system message of the training rows, where most have one
/reset            forget the conversation
/help             this list
/exit             leave (or Ctrl-D)"""

COMMANDS = tuple(line.split()[0] for line in HELP.splitlines())
ALIKE = 0.7
"""Share of letters that a command has in common with what it is a slip of; all begin with the same one."""

Turn = dict[str, str]

SHORTER = "/reset forgets the conversation, and --max-new-tokens bounds an answer"


@dataclass
class Session:
    """A model to talk to, and what has been said so far."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    ends: Ends
    sampling: Sampling = GREEDY
    max_new_tokens: int = 512
    system: str | None = None
    adapter_is_on: bool = True
    turns: list[Turn] = field(default_factory=list)
    plan: Plan | None = None
    """How a run's model computes; None for a plain model."""
    trained_system: str | None = None
    """The system message that most training rows have; empty where they share none, None where that is not known."""
    cut: str | None = None
    """What is to be said of the last answer where it did not come to its end."""

    @property
    def has_adapter(self) -> bool:
        """Whether there is an adapter to switch."""
        return isinstance(self.model, PeftModel)

    @property
    def about_template(self) -> str:
        """What is said of a system message that the chat template writes where none is given; empty where it writes
        none."""
        written = own_system(Renderer.of(self.tokenizer, default_template(self.tokenizer)))
        return "" if written is None else f"; where none is set, the chat template writes: {shown(written, 120)}"

    def ask(self, text: str, on_text: Callable[[str], None]) -> str:
        """The model's answer to `text`, streamed to `on_text` and kept in the history.

        Raises:
            DataError: the chat template refuses the conversation, or the question alone fills the context.
            OutOfMemory: the answer does not fit; the question is forgotten.
        """
        asked = [*self.turns, {"role": "user", "content": text}]
        prompt, asked = self._fitted(asked)
        require_embeddings(self.model, self.tokenizer, prompt, "the message")
        with one_sentence(SHORTER), self._switched(), training_autocast(self.plan):
            made = stream(self.model, self.tokenizer, prompt, self.max_new_tokens, self.ends, on_text, self.sampling)
        require_known(self.tokenizer, made.ids)
        self.cut = None if made.is_whole else self._about_cut(made.ids)
        answer = decoded(self.tokenizer, made.ids, is_whole=made.is_whole).strip()
        self.turns = [*asked, {"role": "assistant", "content": answer}]
        return answer

    def _about_cut(self, ids: Ids) -> str:
        said = f"cut at {len(ids)} tokens; --max-new-tokens allows more"
        if passage := loop_at_end(ids):
            repeated = " ".join(decoded(self.tokenizer, passage).strip(HALF).split())
            said = f"cut at {len(ids)} tokens; it repeats itself and would go on so: {shown(repeated, 60)}"
        return said

    def _fitted(self, turns: list[Turn]) -> tuple[list[int], list[Turn]]:
        """The prompt, and the turns in it: the oldest are forgotten when question and answer would not fit."""
        room = context_length(self.model) - self.max_new_tokens
        while True:
            prompt = self._prompt(turns)
            if len(prompt) <= room or len(turns) == 1:
                break
            turns = turns[2:]
        if len(prompt) > room:
            message = f"is {len(prompt)} tokens long; {room} are left beside {self.max_new_tokens} for the answer"
            raise DataError(Problem("the message", message))
        return prompt, turns

    def _prompt(self, turns: list[Turn]) -> list[int]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        # The conversation type ends with the answer that is asked for; nothing reads it here.
        wanted = {"role": "assistant", "content": ""}
        try:
            return prompt_ids(self.tokenizer, Conversation((*system, *turns, wanted)))
        except RowError as error:
            raise DataError(Problem("the message", str(error))) from error

    def _switched(self) -> AbstractContextManager[None]:
        if isinstance(self.model, PeftModel) and not self.adapter_is_on:
            switched: AbstractContextManager[None] = self.model.disable_adapter()
            return switched
        return nullcontext()


def context_length(model: PreTrainedModel | PeftModel) -> int:
    """Positions of a conversation: those that the model was made for, or 4096 where it does not say."""
    reach = positions_left(model)
    return 4096 if reach is None else reach


def open_session(target: str, *, adapter: bool = True, accepted: Sequence[str] = (), trusted: bool = False) -> Session:
    """A session with a run's folder, or with anything that `model.base` of a recipe may name.

    accepted: kinds of drift (`run.drift`). trusted: whoever asks agrees that code that comes with the model runs.

    Raises:
        RunError, ModelError: it is neither, or cannot be loaded.
    """
    known_kinds(accepted)
    run_dir = run_meant(target)
    if run_dir is None:
        require_model(target)
        return _plain_session(target, trusted=trusted)
    if trusted:
        recipe = resolved_recipe(run_dir)
        grant_for(base_folder(recipe.model), recipe.model.revision)
    run = load_run(run_dir, accepted=accepted) if adapter else load_untuned(run_dir, accepted=accepted)
    data = run.recipe.data
    return Session(
        run.model,
        run.tokenizer,
        find_ends(run.model, run.tokenizer),
        system=data.system_prompt,
        plan=run.plan,
        trained_system=usual_system(data, run_dir.path),
    )


def _plain_session(target: str, *, trusted: bool) -> Session:
    """A model folder, hub id, GGUF file or built-in model, unquantized and in the dtype that suits the device."""
    quiet_loading()
    folder, device = base_folder(Model(base=target)), present_device()
    if trusted:
        grant_for(folder, None)
    named = Model(base=target, trust_remote_code=trusted or is_granted(folder, None))
    tokenizer = load_tokenizer(named)
    dtype, _ = compute_dtype_rule(device)
    model = load_plain(named, device, getattr(torch, dtype))
    return Session(model, tokenizer, find_ends(model, tokenizer))


def chat(session: Session, lines: Iterator[str]) -> None:
    """Answers each line on stdout until the lines or the user end; Ctrl-C stops an answer, not the conversation."""
    if session.trained_system and session.trained_system != session.system:
        console.say(
            f"training's rows have a system message; /trained asks with it: {shown(session.trained_system, 120)}"
        )
    for line in lines:
        text = line.strip()
        if not text:
            continue
        if text.startswith("/"):
            if text.split()[0] in ("/exit", "/quit"):
                return
            console.say(command(session, text))
            continue
        try:
            answered(session, text)
        except KeyboardInterrupt:
            take_again()
            console.say("\nstopped; this question is forgotten")
            console.out_raw("\n")
        except (DataError, OutOfMemory) as error:
            console.say_error(str(error))
            console.out_raw("\n")


def answered(session: Session, text: str) -> None:
    """Answers one question on stdout, and says on stderr where the answer was cut.

    Raises:
        DataError, OutOfMemory: see `Session.ask`.
    """
    # Models that learned from files of Windows end lines with \r\n; the two may come in two pieces.
    lines = io.IncrementalNewlineDecoder(None, translate=True)
    session.ask(text, lambda piece: console.out_raw(lines.decode(piece)))
    console.out_raw(f"{lines.decode('', final=True)}\n")
    if session.cut is not None:
        console.say(session.cut)


def command(session: Session, text: str) -> str:
    """Obeys a line that starts with "/" and says what it did."""
    match text.split(maxsplit=1):
        case ["/reset"]:
            session.turns = []
            return "conversation forgotten"
        case ["/adapter", ("on" | "off") as state]:
            if not session.has_adapter:
                return "there is no adapter to switch"
            session.adapter_is_on = state == "on"
            kept = "; it goes on from what was said so far, which /reset forgets" if session.turns else ""
            return f"adapter {state}{kept}"
        case ["/trained"] if session.trained_system is None:
            said = "no training rows can be read from here, so that their system message is not known"
            return f"{said}{session.about_template}"
        case ["/trained"] if not session.trained_system:
            return f"the training rows have no system message that most of them share{session.about_template}"
        case ["/trained"]:
            session.system, session.turns = session.trained_system, []
            return "the training rows' system message is set, conversation forgotten"
        case ["/system", prompt]:
            session.system, session.turns = prompt, []
            return "system message set, conversation forgotten"
        case ["/system"]:
            session.system, session.turns = None, []
            return f"no system message, conversation forgotten{session.about_template}"
        case ["/help", *_]:
            return HELP
        case ["/adapter", *_]:
            return f"/adapter on, or /adapter off; it is {'on' if session.adapter_is_on else 'off'}"
        case [name, *_] if name in COMMANDS:
            return f"{name} takes no text"
        case [name, *_]:
            near = nearest(name, COMMANDS, ALIKE)
            return f"{name}: no such command; {f'did you mean {near}? ' if near else ''}/help lists all"
        case _:  # `chat` gives no empty line
            return HELP


def typed_lines() -> Iterator[str]:
    """What the user types, until Ctrl-D; Ctrl-C at the prompt leaves too."""
    prompt = "> " if sys.stdin.isatty() else ""
    if prompt:
        console.say("ask something; /help lists what else can be typed, Ctrl-D leaves")
    with suppress(ImportError):
        import readline  # noqa: F401  gives input() a line editor and history, where the platform has it
    while True:
        try:
            yield input(prompt)
        except (EOFError, KeyboardInterrupt):
            console.out_raw("\n" if prompt else "")
            return
