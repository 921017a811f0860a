"""Which chat template would do what this one does not: advice for what the gate has found."""

from transformers import PreTrainedTokenizerBase

from qtune.data.conversation import Conversation, RowError
from qtune.data.masks import change_of, render_examples
from qtune.data.render_gate import RenderGate
from qtune.data.template import BUILT_IN, ChatTemplate, Renderer

# Kinds of finding that another template would not have.
LOSSES = ("tool-call-lost", "tools-lost", "reasoning-lost", "message-lost", "answer-changed")


def template_advice(
    kind: str, conversation: Conversation, template: ChatTemplate, tokenizer: PreTrainedTokenizerBase
) -> str:
    """Which templates of the tokenizer, or built-in ones, print a conversation without this finding."""
    own = tokenizer.chat_template
    named = own if isinstance(own, dict) else {}
    used = template.for_tools(conversation.tools)
    good = [
        f'"{name}"'
        for name, text in {**named, **BUILT_IN}.items()
        if text != used and kind not in _findings(conversation, text, tokenizer)
    ]
    what = template.origin.partition(":")[0]
    if not good:
        return f"{what} is at fault, and so would each built-in one be; set chat_template to a file that prints it"
    return f"{what} is at fault; [data] chat_template = {' or '.join(good)} would not"


def _findings(conversation: Conversation, text: str, tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The losses of a conversation under a template; all of them where it cannot be rendered."""
    try:
        renderer = Renderer.of(tokenizer, text)
        examples = render_examples(renderer, conversation, "all-answers", "split")
    except RowError:
        return set(LOSSES)
    changes = {change_of(turn.answer, one.text[turn.start : turn.end]) for one in examples for turn in one.turns}
    return RenderGate(renderer).lost(examples).notes | {change for change in changes if change}


def end_of_turn_advice(template: ChatTemplate) -> str:
    """What to do where a turn does not end with a token: a model that was tuned with its own template keeps it."""
    if template.origin.startswith("the tokenizer's"):
        return (
            "the tokenizer's own template ends answers without a token of the tokenizer; give a copy of it as "
            "chat_template with {{ eos_token }} behind an answer"
        )
    return 'use a template that ends a turn with one token of this tokenizer; [data] chat_template = "alpaca" does'
