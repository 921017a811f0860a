"""What a row holds -> is it in the rendered text? A template is a program and may drop anything without a word.

Two looks at each conversation. Its structure is rendered once with marks in the place of every text: what a template
does not print at all has no mark in the result, whatever the texts are; equal structures are looked at once. And the
row's own texts are looked for in its own rendering, for a template may treat some of them in its own way.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qtune.data.conversation import Conversation, Message, RowError
from qtune.data.masks import Rendered
from qtune.data.template import Renderer

# Structures whose look is remembered.
REMEMBERED = 2000


@dataclass
class Lost:
    """What of a row is not in its texts: kinds of finding, and names of keys that are only named, not refused."""

    notes: set[str] = field(default_factory=set)
    unused: dict[str, None] = field(default_factory=dict)


class RenderGate:
    """Looks at rendered conversations of one template."""

    def __init__(self, renderer: Renderer) -> None:
        self.renderer = renderer
        self.looked_at: dict[str, frozenset[Path]] = {}

    def lost(self, examples: Sequence[Rendered]) -> Lost:
        """What is lost of one row, which has become these texts."""
        lost = Lost()
        scored = {turn.index for example in examples for turn in example.turns}
        for example in examples:
            unprinted = self._unprinted(example.conversation)
            lost.notes.update(_of_structure(example, unprinted), _of_texts(example))
            self._name_the_rest(example, scored, lost)
        return lost

    def _unprinted(self, conversation: Conversation) -> frozenset["Path"]:
        """The parts of a conversation whose marks are not in the rendering of its structure."""
        marks = _Marks()
        marked = marks.conversation(conversation)
        key = json.dumps([marked.messages, marked.tools], sort_keys=True)
        if key not in self.looked_at:
            if len(self.looked_at) >= REMEMBERED:
                self.looked_at.clear()
            self.looked_at[key] = self._look(marked, marks)
        return self.looked_at[key]

    def _look(self, marked: Conversation, marks: "_Marks") -> frozenset["Path"]:
        try:
            text = self.renderer.render(marked.messages, marked.tools)
        except RowError:
            return frozenset()  # it refuses the marks, so that only the row's own texts can be looked for
        return frozenset(path for path, mark in marks.places if mark not in text)

    def _name_the_rest(self, example: Rendered, scored: set[int], lost: Lost) -> None:
        """Names what is no error when it is not printed: thoughts before answers that are context, ids and names."""
        text = example.text
        for index, message in enumerate(example.conversation.messages):
            thought = message.get("reasoning_content")
            if thought is not None and index not in scored and not _is_in(thought, text):
                lost.unused["messages[].reasoning_content"] = None
            for key in ("name", "tool_call_id"):
                if key in message and message[key] not in text:
                    lost.unused[f"messages[].{key}"] = None
            for call in message.get("tool_calls", ()):
                if "id" in call and str(call["id"]) not in text:
                    lost.unused["messages[].tool_calls[].id"] = None
        # Where the definitions are lost as a whole, that is said instead.
        for tool in example.conversation.tools if "tools-lost" not in lost.notes else ():
            for name, value in _leaves(tool):
                if not name.endswith("type") and not _is_in(value, text):
                    lost.unused[f"tools[].{name}"] = None


# ("content", 2), ("reasoning", 2), ("call", 2), ("tools",)
Path = tuple[str | int, ...]


def _of_structure(example: Rendered, unprinted: frozenset[Path]) -> Iterator[str]:
    messages = example.conversation.messages
    scored = {turn.index for turn in example.turns}
    for part, *where in unprinted:
        index = int(where[0]) if where else -1
        if part == "content":
            yield "message-lost" if messages[index]["role"] != "assistant" else "answer-changed"
        elif part == "call":
            yield "tool-call-lost"
        elif part == "tools":
            yield "tools-lost"
        elif part == "reasoning" and index in scored:
            yield "reasoning-lost"


def _of_texts(example: Rendered) -> Iterator[str]:
    """What the row's own texts show. Answers are looked at beside their labels (`masks`)."""
    conversation, text = example.conversation, example.text
    for turn in example.turns:
        message, span = conversation.messages[turn.index], text[turn.start : turn.end]
        # Some templates open the thoughts in the generation prompt, so that they begin before the answer's own span.
        if "reasoning_content" in message and not _is_in(message["reasoning_content"], text):
            yield "reasoning-lost"
        if not all(_call_is_in(call["function"], span) for call in message.get("tool_calls", ())):
            yield "tool-call-lost"
    for index, message in enumerate(conversation.messages):
        if message["role"] != "assistant" and not _is_in(message.get("content", ""), text):
            yield "message-lost"
        is_context = message["role"] == "assistant" and index not in {turn.index for turn in example.turns}
        if is_context and not all(_call_is_in(call["function"], text) for call in message.get("tool_calls", ())):
            yield "tool-call-lost"
    for tool in conversation.tools:
        if not all(_is_in(name, text) for name in _names_of(tool)):
            yield "tools-lost"


def _call_is_in(function: Mapping[str, Any], text: str) -> bool:
    """Whether a call's name and every name and value of its arguments are in a text, in any notation."""
    leaves = (leaf for _, leaf in _leaves(function["arguments"]))
    return all(_is_in(value, text) for value in (function["name"], *_keys(function["arguments"]), *leaves))


def _is_in(value: object, text: str) -> bool:
    """Whether a text or a plain value is in a rendering: as it is, or as JSON or Python write it."""
    if isinstance(value, str):
        bare = value.strip()
        forms = (
            bare,
            json.dumps(bare, ensure_ascii=False)[1:-1],
            json.dumps(bare)[1:-1],
            repr(bare)[1:-1],
        )
        # gpt-oss writes a description as comments: line by line.
        return any(form in text for form in forms) or all(line.strip() in text for line in bare.splitlines())
    if value is None or isinstance(value, bool):
        return any(form in text for form in (json.dumps(value), str(value)))
    # An integer may be larger than any float, in whose form it would be written.
    short = (f"{value:g}",) if isinstance(value, float) else ()
    return any(form in text for form in (json.dumps(value), str(value), repr(value), *short))


def _keys(value: object) -> Iterator[str]:
    """Every name in nested objects."""
    if isinstance(value, dict):
        yield from value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _keys(inner)


def _leaves(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Every plain value in nested objects and lists, with its path; positions in lists are not told apart."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, f"{path}[]")
    else:
        yield path, value


def _names_of(tool: Mapping[str, Any]) -> list[str]:
    """What a definition has to say in any notation: the function's name, its description, its parameters' names."""
    function = tool["function"]
    schema = function.get("parameters")
    properties = schema.get("properties") if isinstance(schema, dict) else None
    described = function.get("description")
    return [
        function["name"],
        *([described] if isinstance(described, str) else ()),
        *(properties if isinstance(properties, dict) else ()),
    ]


class _Marks:
    """A conversation with a mark of its own in the place of each text, and where each mark stands.

    Structures that are equal get equal marks, so that they can be remembered by them.
    """

    def __init__(self) -> None:
        self.places: list[tuple[Path, str]] = []

    def conversation(self, conversation: Conversation) -> Conversation:
        """The marked conversation."""
        messages = tuple(self._message(message, index) for index, message in enumerate(conversation.messages))
        return Conversation(messages, tuple(map(self._tool, conversation.tools)))

    def _mark(self, *path: str | int) -> str:
        # Letters and digits alone: nothing that a notation escapes or a template looks for.
        mark = f"M{len(self.places):04}k"
        self.places.append((path, mark))
        return mark

    def _message(self, message: Message, index: int) -> Message:
        marked = dict(message)
        # The weight is ours; what a name or id is, a template may look at.
        marked.pop("weight", None)
        if str(message.get("content") or "").strip():
            marked["content"] = self._mark("content", index)
        if "reasoning_content" in message:
            marked["reasoning_content"] = self._mark("reasoning", index)
        if "tool_calls" in message:
            marked["tool_calls"] = [self._call(call, index) for call in message["tool_calls"]]
        for key in ("name", "tool_call_id"):
            if key in marked:
                marked[key] = "m" * len(str(marked[key]))
        return marked

    def _call(self, call: Mapping[str, Any], index: int) -> dict[str, Any]:
        function = call["function"]
        marked = {
            "name": self._mark("call", index),
            "arguments": self._value(function["arguments"], "call", index),
        }
        # Mistral's templates ask for ids of nine letters or digits.
        identity = {"id": "m" * len(str(call["id"]))} if "id" in call else {}
        return {**call, **identity, "function": marked}

    def _value(self, value: object, *path: str | int) -> object:
        """Arguments of the same structure, with marks for names, texts and numbers."""
        if isinstance(value, dict):
            return {self._mark(*path): self._value(inner, *path) for inner in value.values()}
        if isinstance(value, list):
            return [self._value(inner, *path) for inner in value]
        if isinstance(value, str):
            return self._mark(*path)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            number = 90_000_001 + len(self.places)
            self.places.append((path, str(number)))
            return number
        return value

    def _tool(self, tool: Mapping[str, Any]) -> dict[str, Any]:
        function = dict(tool["function"])
        function["name"] = self._mark("tools")
        if isinstance(function.get("description"), str) and function["description"].strip():
            function["description"] = self._mark("tools")
        schema = function.get("parameters")
        properties = schema.get("properties") if isinstance(schema, dict) else None
        if isinstance(schema, dict) and isinstance(properties, dict):
            marked = {self._mark("tools"): inner for inner in properties.values()}
            function["parameters"] = {**schema, "properties": marked}
            function["parameters"].pop("required", None)
        return {**tool, "function": function}
