"""What training put before the user's words, as part of a chat template: then whoever asks with it asks the same."""

import json
from dataclasses import replace

from qtune.data.template import ChatTemplate
from qtune.recipe.schema import Data

# Only what every reader of chat templates knows (transformers, vLLM, llama.cpp): loops, if, set, namespace,
# the last of a list and what is before it.
_DEFAULT = """\
{%- set asked = namespace(has_system=false) -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{%- set asked.has_system = true -%}{%- endif -%}
{%- endfor -%}
{%- if not asked.has_system -%}
{%- set messages = [{'role': 'system', 'content': PROMPT}] + messages -%}
{%- endif -%}
"""
# A system message that an answer follows stands behind the question before it.
_BEHIND = """\
{%- if asked.waiting -%}
{%- if not asked.messages or asked.messages[-1]['role'] != 'user' -%}
{{- raise_exception('a system message stands beside no user turn, so there is none to merge it into') -}}
{%- endif -%}
{%- set told = asked.messages[-1]['content'] + '\\n\\n' + asked.waiting -%}
{%- set asked.messages = asked.messages[:-1] + [{'role': 'user', 'content': told}] -%}
{%- set asked.waiting = '' -%}
{%- endif -%}"""
_MERGED = """\
{%- set asked = namespace(messages=[], waiting='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- set asked.waiting = (asked.waiting + '\\n\\n' if asked.waiting else '') + message['content'] -%}
{%- elif message['role'] == 'user' and asked.waiting -%}
{%- set told = asked.waiting + '\\n\\n' + message['content'] -%}
{%- set asked.messages = asked.messages + [{'role': 'user', 'content': told}] -%}
{%- set asked.waiting = '' -%}
{%- else -%}
BEHIND
{%- set asked.messages = asked.messages + [message] -%}
{%- endif -%}
{%- endfor -%}
BEHIND
{%- set messages = asked.messages -%}
""".replace("BEHIND", _BEHIND)
# Rows of a run have the text in their first question already; it is not put there twice.
_DEFAULT_TO_MERGE = """\
{%- set given = namespace(system=false, question='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{%- set given.system = true -%}{%- endif -%}
{%- if message['role'] == 'user' and not given.question -%}{%- set given.question = message['content'] -%}{%- endif -%}
{%- endfor -%}
{%- if not given.system and not given.question.startswith(PROMPT) -%}
{%- set messages = [{'role': 'system', 'content': PROMPT}] + messages -%}
{%- endif -%}
"""


def asking_template(template: ChatTemplate, data: Data) -> ChatTemplate:
    """The template with the recipe's system policy in it.

    `data.system_prompt` is the system message of conversations that have none, and `system = "merge"` puts system
    messages into the question behind them.
    """
    before = _before(data)
    others = {name: before + text for name, text in template.others.items()}
    return replace(template, text=before + template.text, others=others) if before else template


def merging_template(template: ChatTemplate, data: Data) -> ChatTemplate:
    """`asking_template` without the default: for who gives the system message themselves, or wants none."""
    return asking_template(template, data.model_copy(update={"system_prompt": None}))


def _before(data: Data) -> str:
    merges = data.system == "merge"
    prompt = ""
    if data.system_prompt is not None:
        # JSON's escapes are Jinja's, too.
        text = json.dumps(data.system_prompt, ensure_ascii=False)
        prompt = (_DEFAULT_TO_MERGE if merges else _DEFAULT).replace("PROMPT", text)
    return prompt + (_MERGED if merges else "")
