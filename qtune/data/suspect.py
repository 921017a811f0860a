"""Texts that went wrong before they came here: nothing of them is lost, but it is not what was meant."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from qtune.data.conversation import Conversation

# What programs write where a table has no value, taken for a text by the next one.
_NOTHING = frozenset(("nan", "NaN", "None", "null", "NULL", "<NA>", "undefined"))
# How the families' models end texts and turns. `</s>` and `<s>` are also HTML's, in pairs.
_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|end|>",
    "<|return|>",
    "<|eot|>",
    "<|END_OF_TURN_TOKEN|>",
    "<end_of_turn>",
    "<turn|>",
    "<｜end▁of▁sentence｜>",
    "<eos>",
    "[EOS]",
    "</s>",
)
_STARTS = ("<|begin_of_text|>", "<｜begin▁of▁sentence｜>", "<bos>", "<s>", "[BOS]")
# Where a picture or a sound stood: LLaVA's, Qwen's, Llama's, Gemma's.
_MEDIA = re.compile(
    r"<(?:\|)?(?:image|images|img|video|audio|image_soft_token|start_of_image|vision_start|image_pad|video_pad)(?:\|)?>"
    r"|\[IMG\]",
)
# UTF-8 that was read as Windows-1252 or Latin-1: "cafÃ©", "itâ€™s".
_WINDOWS = "€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
# What may well follow a capital letter, as in “MAÇÔ.
_PUNCTUATION = "‘’‚“”„…–—‹›"
_RUN = re.compile(f"[\u00c2-\u00f4][\u0080-\u00bf{_WINDOWS}]{{1,3}}")
_LOST = re.compile("[\ufffd\ufeff]")


@dataclass(frozen=True)
class Suspicions:
    """What is looked for in the texts of one tokenizer's rows."""

    ends: tuple[str, ...]
    """Special tokens of other models, which this tokenizer takes for ordinary text."""
    starts: tuple[str, ...]

    @classmethod
    def of(cls, added_tokens: re.Pattern[str]) -> "Suspicions":
        """Without the tokenizer's own tokens, which are a finding of their own."""
        foreign = [tuple(one for one in known if not added_tokens.fullmatch(one)) for known in (_ENDS, _STARTS)]
        return cls(*foreign)

    def about(self, conversation: Conversation) -> Iterator[str]:
        """Kinds of finding (`findings.KINDS`) about the texts of a conversation."""
        for message in conversation.messages:
            for key in ("content", "reasoning_content"):
                if text := message.get(key):
                    yield from self._about(text)

    def _about(self, text: str) -> Iterator[str]:
        if len(text) < 12 and is_word_for_nothing(text):
            yield "word-for-nothing"
        if not text.isascii() and is_broken(text):
            yield "broken-text"
        if "<" in text or "[" in text:
            if _MEDIA.search(text):
                yield "missing-media"
            bare = text.strip()
            is_struck_out = "<s>" in text and "</s>" in text
            if not is_struck_out and (bare.endswith(self.ends) or bare.startswith(self.starts)):
                yield "foreign-token"


def is_word_for_nothing(text: str) -> bool:
    """Whether a text is nothing but what a program writes where a table has no value."""
    return text.strip() in _NOTHING


def is_broken(text: str) -> bool:
    """Whether a text was decoded wrongly, or holds the mark that stands for a lost character or for a file's start."""
    return bool(_LOST.search(text)) or any(_was_utf8(found[0]) for found in _RUN.finditer(text))


def _was_utf8(run: str) -> bool:
    """Whether these characters, as the bytes that Windows-1252 has for them, are one character of UTF-8."""
    codes = bytearray()
    for one in run:
        try:
            codes += one.encode("cp1252") if one in _WINDOWS else one.encode("latin-1")
        except UnicodeEncodeError:
            return False
    length = 2 if codes[0] < 0xE0 else 3 if codes[0] < 0xF0 else 4
    if length == 2 and run[1] in _PUNCTUATION:
        return False
    if len(codes) < length:
        return False
    try:
        decoded = codes[:length].decode("utf-8")
    except UnicodeDecodeError:
        return False
    return len(decoded) == 1
