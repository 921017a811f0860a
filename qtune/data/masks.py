"""A conversation -> ids and labels: which tokens the loss scores, read off the chat template's own rendering.

For each answer the conversation is rendered twice: up to the question, with the generation prompt (what the model
sees), and up to the answer. What the second adds is the answer, the template's additions to it and the end of turn.
No template is known by name, and no marker inside a template is needed.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

from tokenizers import Encoding

from qtune.data.conversation import Conversation, RowError
from qtune.data.documents import Documents
from qtune.data.template import Renderer
from qtune.data.tokens import Tokens

IGNORED = -100
"""Label of a token that the loss does not see."""


@dataclass(frozen=True)
class ScoredTurn:
    """A scored answer as characters [start, end) of the rendered text."""

    start: int
    end: int
    answer: str
    """As the row has it, to the letter; "" beside tool calls."""
    has_end: bool
    """Whether it ends in the end-of-turn token."""
    continues_prompt: bool
    """Whether the text before it is what the model sees when it is asked."""
    index: int = -1
    """Which message of the conversation it is."""


@dataclass(frozen=True)
class Rendered:
    """A text with the answers that are scored in it."""

    conversation: Conversation
    text: str
    turns: tuple[ScoredTurn, ...]
    rewritten: bool = False
    """Whether the template renders an earlier turn differently once there are later ones."""


@dataclass(frozen=True)
class Encoded:
    """One training example: ids [length], labels [length] (-100: not scored; not shifted), and what to report on it."""

    conversation: Conversation
    input_ids: list[int]
    labels: list[int]
    notes: frozenset[str] = field(default_factory=frozenset)


def render_examples(renderer: Renderer, conversation: Conversation, loss_on: str, on_rewritten: str) -> list[Rendered]:
    """The texts to train on. One, unless the template rewrites earlier turns and `on_rewritten` is "split".

    `loss_on` is "all-answers" or "last-answer". With "last" only the last answer of a rewritten conversation is
    scored; with "split" every answer gets a text of its own, that of the moment when it was the last: both are what
    the model sees. "error" keeps the answers that are exact, and the gate reports the row.

    Raises:
        RowError: the template refuses the conversation, or no answer has weight 1.
    """
    messages, last = conversation.messages, len(conversation.messages) - 1
    answers = answers_to_learn(conversation, loss_on)
    if not answers:
        others = [message for message in messages if message["role"] == "assistant" and message.get("weight") != 0]
        why = (
            'the last answer has weight 0, and loss_on = "last-answer" learns no other; '
            '"all-answers" learns those before it'
            if others
            else "every weight is 0"
        )
        raise RowError(f"no assistant turn is left to learn: {why}")
    whole = renderer.render(messages, conversation.tools)
    texts = {
        index: whole if index == last else renderer.render(messages[: index + 1], conversation.tools)
        for index in answers
    }
    turns = {index: _turn(renderer, conversation, index, text) for index, text in texts.items()}
    exact = [index for index in answers if whole.startswith(texts[index][: turns[index].end])]
    if exact == answers:
        return [Rendered(conversation, whole, tuple(turns.values()))]
    if on_rewritten == "split":
        return [
            Rendered(
                Conversation(messages[: index + 1], conversation.tools, conversation.place),
                texts[index],
                (turns[index],),
                rewritten=True,
            )
            for index in answers
        ]
    kept = exact if on_rewritten == "error" else exact[-1:]
    return [Rendered(conversation, whole, tuple(turns[index] for index in kept), rewritten=True)]


def answers_to_learn(conversation: Conversation, loss_on: str) -> list[int]:
    """Which messages are answers that the row wants learned; `loss_on` as in `render_examples`."""
    last = len(conversation.messages) - 1
    return [
        index
        for index, message in enumerate(conversation.messages)
        if message["role"] == "assistant" and message.get("weight") != 0 and (loss_on == "all-answers" or index == last)
    ]


def _turn(renderer: Renderer, conversation: Conversation, index: int, text: str) -> ScoredTurn:
    """Finds the answer of message `index` in `text`, the rendering that ends with it."""
    answer = str(conversation.messages[index].get("content") or "")
    prompt = renderer.render(conversation.messages[:index], conversation.tools, generation_prompt=True)
    start, continues = len(prompt), text.startswith(prompt)
    if not continues:
        start = _common_prefix(prompt, text)
        found = text.rfind(answer.strip()) if answer.strip() else -1
        start = min(start, found) if found >= 0 else start
    end, has_end = _end_of_turn(renderer, text, start)
    return ScoredTurn(start, end, answer, has_end, continues, index)


def _end_of_turn(renderer: Renderer, text: str, start: int) -> tuple[int, bool]:
    """Where the answer ends: after its end-of-turn token; what a template puts behind that is not scored."""
    closing = renderer.closing
    found = text.rfind(closing, start) if closing else -1
    if closing and found >= 0:
        return found + len(closing), True
    # A turn may end otherwise than the probe did: Llama 3.1 ends a tool call with <|eom_id|>.
    *_, last = [None, *renderer.added_tokens.finditer(text, start)]
    if last and not text[last.end() :].strip():
        return last.end(), True
    return len(text), False


def _common_prefix(one: str, other: str) -> int:
    """How many characters two texts share at their start."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((position for position, (a, b) in pairs if a != b), min(len(one), len(other)))


class Encoder:
    """Rendered texts -> ids and labels with one tokenizer, in batches."""

    def __init__(self, renderer: Renderer) -> None:
        self.renderer = renderer
        self.tokenizer = renderer.tokenizer
        # Below the tokenizer's own call, which spends as long again on lists that nobody reads. Some tokenizer.json
        # come with a length to cut or pad to; the call would switch that off, too.
        self.backend = self.tokenizer.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        self.added = frozenset(self.tokenizer.added_tokens_decoder)
        self.prompt_tails: dict[str, list[int]] = {}
        self.documents = Documents.of(renderer)

    def encode(self, rendered: Sequence[Rendered]) -> list[Encoded]:
        """One example for each text, none cut."""
        if not rendered:
            return []
        encodings = self._encodings([one.text for one in rendered])
        return [self._labelled(one, encoding) for one, encoding in zip(rendered, encodings, strict=True)]

    def document(self, conversation: Conversation) -> Encoded:
        """Raw text as the tokenizer frames it, closed with its end of text; all of it scored."""
        text = conversation.answer
        ids = list(self.tokenizer(text, verbose=False).input_ids)
        eos = self.tokenizer.eos_token_id
        if eos is not None and ids[-1:] != [eos] and not self.documents.is_closed(text):
            ids.append(eos)
        notes = {"no-end-of-turn"} if eos is None else set()
        notes |= self.documents.notes(text) | self._bos_notes(ids)
        if not self._keeps(text, ids):
            notes.add("label-text")
        return Encoded(conversation, ids, list(ids), frozenset(notes))

    def _encodings(self, texts: list[str]) -> list[Encoding]:
        return list(self.backend.encode_batch(texts, add_special_tokens=False))

    def _labelled(self, one: Rendered, encoding: Encoding) -> Encoded:
        tokens = Tokens([(encoding, 0, 0)])
        notes = {"rewritten-turn"} if one.rewritten else set()
        cuts = [turn.start for turn in one.turns if not self._prompt_stands_alone(tokens, one.text, turn.start)]
        if cuts:
            apart = self._tokens_cut_at(one.text, cuts)
            if self._decoded(apart.ids) == self._decoded(tokens.ids):
                tokens = apart
            else:
                notes.add("token-boundary")
        labels = [IGNORED] * len(tokens.ids)
        for turn in one.turns:
            first, last = self._first_of_answer(tokens, turn.start), tokens.last_token_before(turn.end)
            labels[first : last + 1] = tokens.ids[first : last + 1]
            notes |= self._turn_notes(turn, one.text, tokens.ids[first : last + 1])
        notes |= self._text_notes(one, tokens.ids)
        return Encoded(one.conversation, tokens.ids, labels, frozenset(notes))

    def _prompt_stands_alone(self, tokens: Tokens, text: str, start: int) -> bool:
        """Whether the ids before `start` are those of the prompt on its own, as generation will see it.

        Comparing from the last added token on is enough: tokenizers split texts there first.
        """
        first = self._first_of_answer(tokens, start)
        if first < len(tokens.ids) and tokens.chars(first)[0] < start:
            return False
        back = first
        while back > 0 and tokens.ids[back - 1] not in self.added:
            back -= 1
        back = max(back - 1, 0)
        tail = text[tokens.chars(back)[0] if back else 0 : start]
        alone = self.prompt_tails.get(tail)
        if alone is None:
            alone = list(self.tokenizer(tail, add_special_tokens=False, verbose=False).input_ids)
            if len(self.prompt_tails) < 1000:
                self.prompt_tails[tail] = alone
        return tokens.ids[back:first] == alone

    def _first_of_answer(self, tokens: Tokens, start: int) -> int:
        """The first token of what begins at `start`. A header may swallow white space behind it (Phi-3's do)."""
        first = tokens.token_at(start)
        swallows = first < len(tokens.ids) and tokens.chars(first)[0] < start and tokens.ids[first] in self.added
        return first + 1 if swallows else first

    def _tokens_cut_at(self, text: str, cuts: Iterable[int]) -> Tokens:
        borders = [0, *cuts, len(text)]
        pieces = [text[start:end] for start, end in pairwise(borders)]
        parts, token_start = [], 0
        for encoding, char_start in zip(self._encodings(pieces), borders, strict=False):
            parts.append((encoding, char_start, token_start))
            token_start += len(encoding)
        return Tokens(parts)

    def _turn_notes(self, turn: ScoredTurn, text: str, ids: list[int]) -> set[str]:
        notes = set()
        span = text[turn.start : turn.end]
        said_before = span.partition(turn.answer.strip())[0].strip() if turn.answer.strip() else ""
        if not turn.continues_prompt or (said_before and not self.renderer.has_generation_prompt):
            notes.add("generation-prompt")
        if not turn.has_end or ids[-1] not in self.added:
            notes.add("no-end-of-turn")
        if (change := change_of(turn.answer, span)) is not None:
            notes.add(change)
        is_kept = change == "answer-changed" or self._keeps(turn.answer, ids)
        if not is_kept or _words(self._decoded(ids)) != _words(self._normalized(span)):
            notes.add("label-text")
        return notes

    def _text_notes(self, one: Rendered, ids: list[int]) -> set[str]:
        notes = set()
        contents = (str(message.get("content") or "") for message in one.conversation.messages)
        if any(self.renderer.special_tokens.search(content) for content in contents):
            notes.add("control-token")
        return notes | self._bos_notes(ids)

    def _bos_notes(self, ids: list[int]) -> set[str]:
        bos = self.tokenizer.bos_token_id
        notes = {"double-bos"} if bos is not None and ids[:2] == [bos, bos] else set()
        return notes | ({"missing-bos"} if self._adds_bos and (not ids or ids[0] != bos) else set())

    def _keeps(self, text: str, ids: list[int]) -> bool:
        """Whether the ids say the text with its line breaks, indentation and spaces.

        Where a tokenizer puts a single space of its own (SentencePiece, before the first word) is not looked at.
        """
        if not _LAID_OUT.search(text):
            return True
        bare = self._normalized(text.strip()).replace("\u2581", " ").strip()
        before, found, _ = self._decoded(ids).replace("\u2581", " ").partition(bare)
        return bool(found) and len(before) - len(before.rstrip(" \t")) >= len(indentation_of(text)) - 1

    @cached_property
    def _adds_bos(self) -> bool:
        """Whether the tokenizer starts every text with BOS by itself, which means that the model expects one."""
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer("a").input_ids[:1] == [bos]

    def _decoded(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _normalized(self, text: str) -> str:
        normalizer = self.backend.normalizer
        return normalizer.normalize_str(text) if normalizer else text


def change_of(answer: str, span: str) -> str | None:
    """What a template did to an answer that it printed as `span`: a kind of finding, None for nothing.

    "answer-trimmed" is white space at its ends that teaches nothing; indentation of its first line belongs to it.
    """
    bare = answer.strip()
    if not bare or answer in span:
        return None
    indentation = indentation_of(answer)
    kept = indentation + bare if len(indentation) > 1 or indentation == "\t" else bare
    return "answer-trimmed" if kept in span else "answer-changed"


def indentation_of(text: str) -> str:
    """The white space before the first word of a text, on its line."""
    return text[: len(text) - len(text.lstrip())].rpartition("\n")[2]


# Text whose white space says something: more than single spaces between words.
_LAID_OUT = re.compile(r"\S(?:[^\S ]|  )|^[ \t]{2}")


def _words(text: str) -> list[str]:
    """White space differs where a tokenizer adds a space of its own (SentencePiece writes spaces as \u2581)."""
    return text.replace("\u2581", " ").split()
