"""The part of Go's text/template that our Modelfiles use, evaluated as Go does.

    {{ .Name }}  {{ $.Name }}  {{ "text" }}  {{ range .Messages }} … {{ end }}  {{ range $i, $m := .Messages }} …
    {{ if .Name }} … {{ else if eq .Role "user" }} … {{ else }} … {{ end }}  and, len, slice
    {{- and -}}, which take the white space on their side away

Source: the documentation of Go's text/template. Ollama runs templates with .System, .Messages (each with .Role and
.Content), .Prompt and .Response.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_ACTION = re.compile(r"\{\{(- )?\s*((?:\"(?:\\.|[^\"\\])*\"|[^\"{}])*?)\s*( -)?\}\}", re.DOTALL)


class GoTemplateError(ValueError):
    """A construct that this evaluator does not know."""


@dataclass
class _Block:
    """An if or range with its branches: condition (None for else) -> body."""

    keyword: str
    branches: list[tuple[str | None, list[Any]]] = field(default_factory=list)


def evaluate(template: str, values: Mapping[str, Any]) -> str:
    """The text that Go makes of a template with these values.

    Raises:
        GoTemplateError: there is anything outside of the part described above.
    """
    return _run(_parse(template), values, {"$": values})


def quoted(text: str) -> str:
    """A text that comes out of a Go template unchanged: braces that would open an action become a quoted string."""
    return text.replace("{{", '{{ "{{" }}')


def _parse(template: str) -> list[Any]:
    """Nested nodes: a str is text, a tuple ("value", expression), a _Block."""
    root: list[Any] = []
    open_blocks: list[_Block] = []
    body = root
    position = 0
    trim_next = False
    for match in _ACTION.finditer(template):
        text = template[position : match.start()]
        text = text.lstrip(" \t\r\n") if trim_next else text
        text = text.rstrip(" \t\r\n") if match[1] else text
        if text:
            body.append(text)
        position, trim_next = match.end(), bool(match[3])
        word, _, rest = match[2].partition(" ")
        if word in ("if", "range"):
            block = _Block(word, [(rest.strip(), [])])
            body.append(block)
            open_blocks.append(block)
            body = block.branches[-1][1]
        elif word == "else":
            condition = rest.strip().removeprefix("if ").strip() if rest.strip() else None
            open_blocks[-1].branches.append((condition, []))
            body = open_blocks[-1].branches[-1][1]
        elif word == "end":
            open_blocks.pop()
            body = open_blocks[-1].branches[-1][1] if open_blocks else root
        else:
            body.append(("value", match[2]))
    tail = template[position:]
    tail = tail.lstrip(" \t\r\n") if trim_next else tail
    if tail:
        body.append(tail)
    if open_blocks:
        raise GoTemplateError(f"{{{{ {open_blocks[-1].keyword} }}}} has no end")
    return root


def _run(nodes: Sequence[Any], dot: Any, variables: Mapping[str, Any]) -> str:
    made = []
    for node in nodes:
        if isinstance(node, str):
            made.append(node)
        elif isinstance(node, tuple):
            made.append(str(_value(node[1], dot, variables)))
        elif node.keyword == "range":
            head, body = node.branches[0]
            names, _, items = head.rpartition(":=")
            index_name, _, item_name = (name.strip() for name in names.partition(","))
            for index, item in enumerate(_value(items, dot, variables)):
                made.append(_run(body, item, {**variables, index_name: index, item_name: item}))
        else:
            chosen: list[Any] = next(
                (body for condition, body in node.branches if condition is None or _value(condition, dot, variables)),
                [],
            )
            made.append(_run(chosen, dot, variables))
    return "".join(made)


_WORD = re.compile(r"\s*(\"(?:\\.|[^\"\\])*\"|[()]|[^\s()]+)")
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "eq": lambda first, *others: first in others,
    "and": lambda *values: next((value for value in values if not value), values[-1]),
    "len": len,
    "slice": lambda items, start: items[start:],
}


def _value(expression: str, dot: Any, variables: Mapping[str, Any]) -> Any:
    """A pipeline of one command: a value, or a function and its arguments, which may be in parentheses."""
    words = _WORD.findall(expression)

    def command() -> Any:
        if words and words[0] in FUNCTIONS:
            function, arguments = FUNCTIONS[words.pop(0)], []
            while words and words[0] != ")":
                arguments.append(operand())
            return function(*arguments)
        return operand()

    def operand() -> Any:
        word = words.pop(0)
        if word == "(":
            inner = command()
            words.pop(0)
            return inner
        if word.startswith('"') or word.isdigit():
            return json.loads(word)
        if re.fullmatch(r"\.\w+", word):
            return dot[word[1:]]
        if re.fullmatch(r"\$\.\w+", word):
            return variables["$"][word[2:]]
        if word in variables and word.startswith("$"):
            return variables[word]
        raise GoTemplateError(f"{{{{ {expression} }}}} is not known here")

    result = command()
    if words:
        raise GoTemplateError(f"{{{{ {expression} }}}} is not known here")
    return result
