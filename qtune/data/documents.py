"""Raw text that is learned as a whole: what is found in it before it is, above all chats that are rendered already."""

import re
from dataclasses import dataclass

from qtune.data.conversation import RowError
from qtune.data.template import Renderer

# What opens a question and an answer in the families' chat formats, where a text holds both of a pair.
_MARKERS = (
    ("<|im_start|>user", "<|im_start|>assistant"),
    ("<|start_header_id|>user", "<|start_header_id|>assistant"),
    ("<|header_start|>user", "<|header_start|>assistant"),
    ("<start_of_turn>user", "<start_of_turn>model"),
    ("<|turn>user", "<|turn>model"),
    ("<|start|>user", "<|start|>assistant"),
    ("<|user|>", "<|assistant|>"),
    ("<|User|>", "<|Assistant|>"),
    ("<｜User｜>", "<｜Assistant｜>"),
    ("<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
    ("<|prompter|>", "<|assistant|>"),
    ("[INST]", "[/INST]"),
    ("### Instruction:", "### Response:"),
    ("### Human:", "### Assistant:"),
    ("USER: ", " ASSISTANT: "),
)
# Words that people write, too: only at the start of lines, one below the other.
_SPOKEN = re.compile(r"^(?:User|USER|Human): .*^(?:Assistant|ASSISTANT|AI|Bot): ", re.MULTILINE | re.DOTALL)

_QUESTION, _ANSWER, _SECOND = "Qu3stion", "An5wer", "S3cond"


@dataclass(frozen=True)
class Documents:
    """What a tokenizer and a template say about raw text."""

    renderer: Renderer
    own_markers: tuple[str, str] | None
    """What the template puts before a question and before an answer."""
    ends: tuple[str, ...]
    """Texts that close a document: the end of text, and what ends a turn."""

    @classmethod
    def of(cls, renderer: Renderer) -> "Documents":
        """Probes the template once."""
        ends = dict.fromkeys(end for end in (renderer.tokenizer.eos_token, renderer.end_of_turn) if end)
        return cls(renderer, _own_markers(renderer), tuple(map(str, ends)))

    def is_closed(self, text: str) -> bool:
        """Whether a text ends as texts and turns do, so that no end of text has to follow."""
        return text.rstrip().endswith(self.ends) if self.ends else False

    def notes(self, text: str) -> set[str]:
        """Kinds of finding: a chat that is rendered already, or special tokens inside the text."""
        if self.is_rendered_chat(text):
            return {"rendered-chat"}
        # One at the very end closes the text; one at the very start is BOS, which the ids are asked about.
        inner = text.strip()
        for end in self.ends:
            inner = inner.removesuffix(end)
        bos = self.renderer.tokenizer.bos_token
        inner = inner.removeprefix(str(bos)) if bos else inner
        return {"control-token"} if self.renderer.special_tokens.search(inner) else set()

    def is_rendered_chat(self, text: str) -> bool:
        """Whether the marks of a question and of an answer stand in the text: this template's, or another family's."""
        pairs = (*((self.own_markers,) if self.own_markers else ()), *_MARKERS)
        return any(asks in text and answers in text for asks, answers in pairs) or bool(_SPOKEN.search(text))


def _own_markers(renderer: Renderer) -> tuple[str, str] | None:
    """The marks that the template puts before questions and answers; None where they say nothing by themselves."""
    turns = [
        {"role": role, "content": text}
        for role, text in (("user", _QUESTION), ("assistant", _ANSWER), ("user", _SECOND))
    ]
    try:
        text = renderer.render(turns)
    except RowError:
        return None
    if not text.count(_QUESTION) == text.count(_ANSWER) == text.count(_SECOND) == 1:
        return None
    before, _, rest = text.partition(_QUESTION)
    between, _, rest = rest.partition(_ANSWER)
    after, _, _ = rest.partition(_SECOND)
    asks, answers = _common_suffix(before, after).strip(), between.strip()
    return (asks, answers) if len(asks) > 2 and len(answers) > 2 else None


def _common_suffix(one: str, other: str) -> str:
    length = 0
    while length < min(len(one), len(other)) and one[-1 - length] == other[-1 - length]:
        length += 1
    return one[len(one) - length :]
