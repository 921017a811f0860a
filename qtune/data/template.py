"""The chat template: which one is used, how a conversation is rendered with it, and what ends a turn in it."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qtune.data.bounds import LONGEST_TEMPLATE, TemplateOutOfBoundsError, bounded_rendering
from qtune.data.conversation import Conversation, Message, RowError
from qtune.data.turn_keys import REASONING
from qtune.errors import DataError, Problem, first_line

# ChatML, with tools, calls and reasoning between the tags that Hermes and Qwen models read.
CHATML = """\
{%- set first_is_system = messages and messages[0]['role'] == 'system' -%}
{%- if tools -%}
{{ '<|im_start|>system\\n' }}
{%- if first_is_system -%}{{ messages[0]['content'] + '\\n\\n' }}{%- endif -%}
{{ '# Tools\\n\\nThese functions can be called, each described by a JSON object:\\n<tools>\\n' }}
{%- for tool in tools -%}{{ tool | tojson }}{{ '\\n' }}{%- endfor -%}
{{ '</tools>\\n\\nA call is a JSON object with the name and the arguments:\\n' }}
{{- '<tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call><|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{%- if not (tools and first_is_system and loop.first) -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['reasoning_content'] -%}
{{ '<think>\\n' + message['reasoning_content'] + '\\n</think>\\n\\n' }}
{%- endif -%}
{{ message['content'] or '' }}
{%- for call in message['tool_calls'] or [] -%}
{{ '\\n' if message['content'] or not loop.first else '' }}
{{- '<tool_call>\\n{"name": ' }}{{ call['function']['name'] | tojson }}
{{- ', "arguments": ' }}{{ call['function']['arguments'] | tojson }}{{ '}\\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>' + '\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
# The layout of Stanford Alpaca with the tokenizer's own end of text, which every base model has as one token.
ALPACA = """\
{{- bos_token or '' -}}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{ message['content'] + '\\n\\n' }}
{%- elif message['role'] == 'user' -%}{{ '### Instruction:\\n' + message['content'] + '\\n\\n### Response:\\n' }}
{%- elif message['role'] == 'assistant' -%}{{ message['content'] + eos_token + '\\n\\n' }}
{%- else -%}{{ raise_exception('the alpaca template has no ' + message['role'] + ' messages') }}
{%- endif -%}
{%- endfor -%}
"""
# Prompt and completion joined as they are.
PLAIN = """\
{{- bos_token or '' -}}
{%- for message in messages -%}
{{ message['content'] + (eos_token if message['role'] == 'assistant' else '') }}
{%- endfor -%}
"""
BUILT_IN = {"alpaca": ALPACA, "chatml": CHATML, "plain": PLAIN}
DEFAULT = "alpaca"
# The name under which a tokenizer keeps its template for conversations with tools.
FOR_TOOLS = "tool_use"

_PROBE = "Probe answer"


@dataclass(frozen=True)
class ChatTemplate:
    """A template's jinja text and where it comes from, in words."""

    text: str
    origin: str
    is_default: bool = False
    """Whether nobody chose it: neither the recipe nor the tokenizer."""
    others: Mapping[str, str] = field(default_factory=dict)
    """The tokenizer's further templates by name, where it has several and the recipe chose none."""

    def for_tools(self, tools: Sequence[object]) -> str:
        """The text for a conversation: with tools that of "tool_use", if there is one, as transformers chooses."""
        return self.others.get(FOR_TOOLS, self.text) if tools else self.text

    @property
    def of_tokenizer(self) -> str | dict[str, str]:
        """What a tokenizer's `chat_template` is set to, so that it chooses and saves the same."""
        return {"default": self.text, **self.others} if self.others else self.text


def choose_template(name: str | None, tokenizer: PreTrainedTokenizerBase, folder: Path) -> ChatTemplate:
    """The template that the recipe names (built-in or file), else the tokenizer's own, else the stated default.

    Raises:
        DataError: there is no such template, or the file cannot be read.
    """
    own = tokenizer.chat_template
    if name is None and isinstance(own, dict):
        return _of_several(own)
    if name is None and own is not None:
        return ChatTemplate(own, "the tokenizer's own")
    if name is None:
        return ChatTemplate(BUILT_IN[DEFAULT], f'the built-in "{DEFAULT}": the tokenizer has none', is_default=True)
    if isinstance(own, dict) and name in own:
        return ChatTemplate(own[name], f'the tokenizer\'s "{name}"')
    if name in BUILT_IN:
        return ChatTemplate(BUILT_IN[name], f'the built-in "{name}"')
    try:
        path = folder / Path(name).expanduser()
        with path.open(encoding="utf-8-sig") as stream:
            text = stream.read(LONGEST_TEMPLATE + 1)
        return ChatTemplate(text, f"the file {name}")
    # RuntimeError: a home that nobody has.
    except (OSError, ValueError, RuntimeError) as error:
        built_in = ", ".join(BUILT_IN)
        message = f"no readable template file, nor a built-in template ({built_in})"
        raise DataError(Problem("data.chat_template", f"{name!r}: {message}")) from error


def _of_several(own: Mapping[str, str]) -> ChatTemplate:
    """Tokenizers may carry several templates by name (Command R, Hermes 2 Pro).

    Raises:
        DataError: none of them is the default, so that transformers would render no row without tools.
    """
    if "default" not in own:
        names = ", ".join(sorted(own))
        message = f"is not set, and the tokenizer has the templates {names} but no default; name one of them"
        raise DataError(Problem("data.chat_template", message))
    others = {name: text for name, text in own.items() if name != "default"}
    used = f', "{FOR_TOOLS}" for rows with tools' if FOR_TOOLS in others else ""
    return ChatTemplate(own["default"], f'the tokenizer\'s "default"{used}', others=others)


@dataclass(frozen=True)
class Renderer:
    """Renders conversations with one template, and knows what a probe has shown of it.

    `end_of_turn` is the text of the token that ends an answer, None where the template ends it without one. `closing`
    is everything that stands between an answer and what follows it, up to and including that token: nearly always
    the token alone, but Cohere's newer models close the answer's text first and the turn after it.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str
    end_of_turn: str | None
    closing: str | None
    has_generation_prompt: bool
    """Whether a prompt says that an answer follows. Mistral's does not need to: the question's end says it."""
    added_tokens: re.Pattern[str]
    """Matches every token that the tokenizer takes out of a text before it splits words."""
    special_tokens: re.Pattern[str]
    """Matches those that are marked special: they are never part of what somebody writes."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, template: str) -> "Renderer":
        """A renderer for a tokenizer and a template, which is probed with a question and an answer.

        Raises:
            DataError: the tokenizer cannot say which characters a token stands for.
        """
        if not tokenizer.is_fast:
            name = type(tokenizer).__name__
            raise DataError(Problem("", f"{name} has no character offsets; qtune needs a tokenizer.json"))
        tokens = tokenizer.added_tokens_decoder.values()
        added = _any_of(token.content for token in tokens)
        bare = cls(
            tokenizer, template, None, None, True, added, _any_of(token.content for token in tokens if token.special)
        )
        question, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": _PROBE}
        try:
            asked, told = bare.render([question], generation_prompt=True), bare.render([question])
            answered = bare.render([question, answer])
        except RowError:
            return bare  # a template that refuses this will have refused rows to show
        try:
            continued = bare.render([question, answer, question, answer])
        except RowError:
            continued = answered  # a template for one question and one answer
        closing = _common_closing(added, answered, continued)
        return replace(
            bare,
            end_of_turn=closing[-1] if closing else None,
            closing="".join(closing) if closing else None,
            has_generation_prompt=asked != told,
        )

    def render(
        self, messages: Sequence[Message], tools: Sequence[dict[str, object]] = (), *, generation_prompt: bool = False
    ) -> str:
        """`render` with this tokenizer and template."""
        return render(self.tokenizer, self.template, messages, tools, generation_prompt=generation_prompt)

    def prompt(self, conversation: Conversation) -> str:
        """The rendered conversation up to the last answer, with the generation prompt."""
        return self.render(conversation.prompt, conversation.tools, generation_prompt=True)


def render(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    messages: Sequence[Message],
    tools: Sequence[dict[str, object]] = (),
    *,
    generation_prompt: bool = False,
) -> str:
    """The text of the messages; with `generation_prompt`, up to where the model goes on.

    Raises:
        RowError: the template refuses the messages, with its reason.
        DataError: it takes more time or memory than any chat template does.
    """
    try:
        with bounded_rendering():
            text = tokenizer.apply_chat_template(
                _in_its_words(messages, template),
                tools=list(tools) or None,
                chat_template=template,
                add_generation_prompt=generation_prompt,
                tokenize=False,
            )
    except TemplateOutOfBoundsError as error:
        message = f"the chat template {error} for one conversation: a loop without an end, or no template at all"
        raise DataError(Problem("data.chat_template", message)) from error
    except RecursionError as error:
        raise RowError("the chat template refuses this conversation: it calls itself without an end") from error
    # A template is a program: it fails in every way in which Python does.
    except Exception as error:
        reason = first_line(error)
        raise RowError(f"the chat template refuses this conversation: {reason}{_advice(reason, messages)}") from error
    return str(text)


def _in_its_words(messages: Sequence[Message], template: str) -> list[Message]:
    """The messages with reasoning under the key that the template reads: most read ours, gpt-oss "thinking"."""
    if not any("reasoning_content" in message for message in messages):
        return list(messages)
    key = next((key for key in REASONING if re.search(rf"\b{key}\b", template)), "reasoning_content")
    return [
        {key if name == "reasoning_content" else name: value for name, value in message.items()} for message in messages
    ]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> list[int]:
    """The ids that ask for the last answer, generation prompt included, with the tokenizer's chat template.

    A document has no prompt: its ids are only what the tokenizer puts first.
    """
    if conversation.is_document:
        return list(tokenizer("").input_ids)
    template = choose_template(None, tokenizer, Path()).for_tools(conversation.tools)
    text = render(tokenizer, template, conversation.prompt, conversation.tools, generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def default_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of the tokenizer's template for conversations without tools."""
    return choose_template(None, tokenizer, Path()).text


def template_key(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> str:
    """What two preparations must share so that the same conversation becomes the same ids."""
    special = json.dumps({name: str(token) for name, token in tokenizer.special_tokens_map.items()}, sort_keys=True)
    texts = [template.text, template.for_tools(["a tool"])]
    return "\0".join([*texts, special, tokenizer.backend_tokenizer.to_str()])


def _common_closing(added: re.Pattern[str], answered: str, continued: str) -> list[str]:
    """The added tokens that close the probe's answer, whether or not another question follows it.

    The first may stand behind a space; the others follow it without a gap. What opens the next turn, or is written
    only at the end of a conversation, is in one of the two renderings alone. Where they share nothing (gpt-oss ends
    the last answer with a token of its own), it is the first of the last answer's.
    """
    if _PROBE not in answered:
        return []
    last, earlier = (_tokens_after(added, text, text.find(_PROBE) + len(_PROBE)) for text in (answered, continued))
    shared = [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], zip(last, earlier, strict=False))]
    return shared or last[:1]


def _tokens_after(added: re.Pattern[str], text: str, start: int) -> list[str]:
    """The first added token from `start` on, and those that follow it directly."""
    tokens: list[str] = []
    token = added.search(text, start)
    while token:
        tokens.append(token[0])
        token = added.match(text, token.end())
    return tokens


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the texts, the longest first; nothing where there are none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


def _advice(reason: str, messages: Sequence[Message]) -> str:
    if "content" in reason and any("content" not in message for message in messages):
        return "; it cannot render a turn that calls a tool without a text: set a chat_template that prints calls"
    if "system" in reason.lower():
        return '; [data] system = "merge" puts the system message into the first user message'
    if "alternat" in reason.lower():
        return '; [data] on_turn_order = "merge" puts turns of one role that follow each other into one'
    return ""
