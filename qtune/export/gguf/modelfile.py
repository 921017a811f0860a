"""A chat template -> an Ollama Modelfile whose Go template gives the same tokens, or none at all."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from qtune.data.conversation import Conversation, RowError
from qtune.data.template import Renderer, default_template
from qtune.export.gguf.go_template import evaluate, quoted
from qtune.export.greedy import in_ollama
from qtune.export.verify.rows import encode

# Texts that no template has words for, to find where a template puts what it is given.
SYSTEM, FIRST, ANSWER, SECOND = "Sy5t3m", "F1rst", "An5w3r", "S3cond"


@dataclass(frozen=True)
class NoModelfile:
    """Why a template has no Modelfile."""

    reason: str


@dataclass(frozen=True)
class Modelfile:
    """An Ollama template proven on conversations, and what ends an answer."""

    template: str
    stops: tuple[str, ...]
    system: str | None
    parameters: dict[str, Any]
    of_the_base: dict[str, Any]
    """How the base's generation config asks, where that is otherwise than the parameters."""

    def text(self, weights: str) -> str:
        """The file; `weights` is the GGUF file or folder beside it."""
        lines = [f"FROM ./{weights}", f'TEMPLATE """{self.template}"""']
        if self.system is not None:
            lines.append(f'SYSTEM """{self.system}"""')
        lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in self.stops]
        lines += [f"PARAMETER {name} {value}" for name, value in self.parameters.items()]
        if self.of_the_base:
            lines.append(
                "# It answers with the likeliest token each time, as qtune did. The base's own settings instead:"
            )
            lines += [f"# PARAMETER {name} {value}" for name, value in self.of_the_base.items()]
        return "\n".join(lines) + "\n"


def modelfile_for(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    *,
    system: str | None,
    adds_bos: bool,
    generation: dict[str, Any],
    context: int,
) -> Modelfile | NoModelfile:
    """Reads a Go template off what the chat template does, and proves it on `conversations`.

    context: tokens of a conversation that are held; Ollama's own default forgets the beginning of longer ones.

    `adds_bos` says that the runner puts a beginning of text before every prompt by itself. A template that does more
    than put fixed texts around messages (a date, trimming inside a text, tools) has no Modelfile: none is better than
    a wrong one.
    """
    renderer = Renderer.of(tokenizer, default_template(tokenizer))
    if '"""' in default_template(tokenizer) + (system or ""):
        return NoModelfile('a text with """ cannot stand in a Modelfile')
    bos = str(tokenizer.bos_token) if adds_bos else ""
    try:
        template = derive(renderer, bos)
    except (RowError, ValueError) as error:
        return NoModelfile(f"the chat template cannot be written as an Ollama template: {error}")
    for conversation in conversations:
        problem = parity_problem(renderer, template, conversation, bos)
        if problem is not None:
            return NoModelfile(problem)
    stops = dict.fromkeys(stop for stop in (renderer.end_of_turn, tokenizer.eos_token) if stop is not None)
    own, greedy = _parameters(generation), in_ollama()
    return Modelfile(
        template, tuple(map(str, stops)), system, {**greedy, "num_ctx": context}, {} if own == greedy else own
    )


def derive(renderer: Renderer, bos: str) -> str:
    """The Go template that puts the same texts around messages as the chat template does around four probes.

    Raises:
        ValueError: the template does not put each probe into the text once and in order, or not the same texts around
            each turn.
        RowError: it refuses a plain conversation.
    """
    user, assistant = {"role": "user", "content": FIRST}, {"role": "assistant", "content": ANSWER}
    second, system = {"role": "user", "content": SECOND}, {"role": "system", "content": SYSTEM}
    whole = _pieces(renderer.render([user, assistant, second], generation_prompt=True), [FIRST, ANSWER, SECOND])
    before, asks, between, end = whole
    if not asks.startswith(end):
        raise ValueError("it asks for the first answer in other words than for the second")
    # Some (Mistral, Vicuna) put a space before an answer that is there, which a new answer brings along.
    opens = asks.removeprefix(end)
    if not before.startswith(bos):
        raise ValueError(f"the text does not begin with {bos}, which the runner puts there")
    before = before.removeprefix(bos)
    turns = (
        "{{ range .Messages }}"
        '{{ if eq .Role "user" }}{{ .Content }}' + quoted(end) + "{{ end }}"
        '{{ if eq .Role "assistant" }}' + quoted(opens) + "{{ .Content }}" + quoted(between) + "{{ end }}"
        "{{ end }}"
    )
    try:
        told = renderer.render([system, user, assistant, second], generation_prompt=True)
    except RowError:
        return quoted(before) + turns
    if told.find(SYSTEM) > told.find(ANSWER):
        return _with_system_last(told.removeprefix(bos), before, end, opens, between)
    head, middle, *rest = _pieces(told, [SYSTEM, FIRST, ANSWER, SECOND])
    if rest != [asks, between, end]:
        raise ValueError("a system text changes the turns behind it")
    with_system = quoted(head.removeprefix(bos)) + "{{ .System }}" + quoted(middle)
    return "{{ if .System }}" + with_system + "{{ else }}" + quoted(before) + "{{ end }}" + turns


def _with_system_last(told: str, before: str, end: str, opens: str, between: str) -> str:
    """The system text stands in the last user turn, wherever that is (Mistral)."""
    head, answers, into, middle, rest = _pieces(told, [FIRST, ANSWER, SYSTEM, SECOND])
    if (head, answers, rest) != (before, end + opens, end) or not into.startswith(between):
        raise ValueError("a system text changes the turns around it")
    opening = quoted(into.removeprefix(between)) + "{{ $.System }}" + quoted(middle)
    return (
        quoted(before) + "{{ range $i, $m := .Messages }}"
        '{{ if eq .Role "user" }}'
        "{{ if and $.System (eq (len (slice $.Messages $i)) 1) }}" + opening + "{{ end }}"
        "{{ .Content }}" + quoted(end) + "{{ end }}"
        '{{ if eq .Role "assistant" }}' + quoted(opens) + "{{ .Content }}" + quoted(between) + "{{ end }}"
        "{{ end }}"
    )


def parity_problem(renderer: Renderer, template: str, conversation: Conversation, bos: str) -> str | None:
    """What differs between the ids of both templates asking for a conversation's last answer; None: nothing."""
    try:
        expected = encode(renderer.tokenizer, renderer.prompt(conversation))
    except RowError:
        return None  # nobody can have trained on what the chat template refuses
    found = encode(renderer.tokenizer, bos + ollama_prompt(template, conversation))
    if found == expected:
        return None
    return f"the Ollama template would give {conversation.place!r} other tokens than the chat template"


def ollama_prompt(template: str, conversation: Conversation) -> str:
    """The prompt that Ollama makes: .System is the system message, .Messages are all of them."""
    messages = [{"Role": message["role"], "Content": message.get("content") or ""} for message in conversation.prompt]
    system = "\n\n".join(message["Content"] for message in messages if message["Role"] == "system")
    return evaluate(template, {"System": system, "Messages": messages, "Prompt": "", "Response": ""})


def write_modelfile(folder: Path, modelfile: Modelfile, weights: str) -> Path:
    """Writes `Modelfile` beside the weights."""
    file = folder / "Modelfile"
    file.write_text(modelfile.text(weights), encoding="utf-8")
    return file


def _pieces(text: str, marks: Sequence[str]) -> list[str]:
    """The texts before, between and behind the marks; ValueError unless each is there once and in order."""
    pieces = []
    for mark in marks:
        if text.count(mark) != 1:
            raise ValueError("it does not put every message into the text once and in order")
        piece, _, text = text.partition(mark)
        pieces.append(piece)
    return [*pieces, text]


def _parameters(generation: dict[str, Any]) -> dict[str, Any]:
    """Sampling settings of the generation config in Ollama's words.

    What transformers leaves to its defaults is spelled out, for Ollama's own differ.
    """
    penalty = generation.get("repetition_penalty") or 1.0
    if not generation.get("do_sample", False):
        return {"temperature": 0, "repeat_penalty": penalty}
    defaults = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}
    drawn = {name: default if (value := generation.get(name)) is None else value for name, default in defaults.items()}
    return {**drawn, "repeat_penalty": penalty}
