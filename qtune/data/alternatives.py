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
    used = template.for_tools(conversation.tools)
    losses = {name: _losses(conversation, text, tokenizer) for name, text in _others(tokenizer).items() if text != used}
    good = [name for name, lost in losses.items() if not lost] or [
        name for name, lost in losses.items() if kind not in lost
    ]
    what = f"the template is {template.origin.partition(':')[0]}"
    if not good:
        return f"{what}; no built-in one is better here, so set chat_template to a file that prints it"
    return f"{what}; {' or '.join(good)} would print it"


def _others(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The templates that could take its place, by what a recipe would say.

    A model that was tuned with a template of its own is not offered one for base models.
    """
    own = tokenizer.chat_template
    offered = {"chatml": BUILT_IN["chatml"]} if own is not None else BUILT_IN
    named = own if isinstance(own, dict) else {}
    others = {f'[data] chat_template = "{name}"': text for name, text in {**named, **offered}.items()}
    return {"no chat_template (the tokenizer's own)": own, **others} if isinstance(own, str) else others


def _losses(conversation: Conversation, text: str, tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The losses of a conversation under a template; all of them where it cannot be rendered."""
    try:
        renderer = Renderer.of(tokenizer, text)
        examples = render_examples(renderer, conversation, "all-answers", "split")
    except RowError:
        return set(LOSSES)
    if renderer.end_of_turn is None:
        return set(LOSSES)  # made for tokens that this tokenizer does not have
    changes = {change_of(turn.answer, one.text[turn.start : turn.end]) for one in examples for turn in one.turns}
    return RenderGate(renderer).lost(examples).notes | ({"answer-changed"} & changes)


def end_of_turn_advice(template: ChatTemplate) -> str:
    """What to do where a turn does not end with a token: a model that was tuned with its own template keeps it."""
    if template.origin.startswith("the tokenizer's"):
        return (
            "the tokenizer's own template ends answers without a token of the tokenizer; give a copy of it as "
            "chat_template with {{ eos_token }} behind an answer"
        )
    return 'use a template that ends a turn with one token of this tokenizer; [data] chat_template = "alpaca" does'
