"""A tokenizer.json -> the vocabulary of a GGUF: tokens, types, merges or scores, and how text is split before."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from qtune.data.template import Renderer, choose_template, default_template
from qtune.errors import ModelError, Problem

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# How a byte-level tokenizer splits text before its merges, and llama.cpp's name for it.
SPLITS = {
    ("Split", LLAMA3_SPLIT): "llama-bpe",
    ("Split", QWEN2_SPLIT): "qwen2",
    ("Split", TEKKEN_SPLIT): "tekken",
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
}


PROBE = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"})


@dataclass(frozen=True)
class Vocabulary:
    """What llama.cpp needs to tokenize as the tokenizer does.

    `model` is "gpt2" (byte-level BPE, with `merges`) or "llama" (SentencePiece, with `scores`); tokens are in the order
    of their ids, filled up to the rows of the embedding.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    scores: tuple[float, ...]
    adds_space: bool
    adds_bos: bool
    adds_eos: bool


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, rows: int, place: str) -> Vocabulary:
    """Reads a fast tokenizer.

    Raises:
        ModelError: it is of a kind that llama.cpp would tokenize differently; better no file than a wrong one.
    """
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    model = spec["model"]
    if model["type"] != "BPE":
        raise ModelError(Problem(place, f"a {model['type']} tokenizer has no GGUF export here; BPE has"))
    if len(tokenizer) > rows:
        message = (
            f"the tokenizer has {len(tokenizer)} tokens, the model's embedding {rows} rows; llama.cpp wants no more"
        )
        raise ModelError(Problem(place, message))
    merges = tuple(" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"])
    is_byte_level = not model.get("byte_fallback")
    tokens, types = _tokens(tokenizer, spec, rows, is_byte_level=is_byte_level)
    probe = tokenizer("a")["input_ids"]
    return Vocabulary(
        model="gpt2" if is_byte_level else "llama",
        pre=_split_name(spec, place) if is_byte_level else "default",
        tokens=tokens,
        types=types,
        merges=merges if is_byte_level else (),
        scores=() if is_byte_level else _scores(tokens, merges),
        adds_space=not is_byte_level and _adds_space(tokenizer, spec, place),
        adds_bos=tokenizer.bos_token_id is not None and probe[:1] == [tokenizer.bos_token_id],
        adds_eos=tokenizer.eos_token_id is not None and probe[-1:] == [tokenizer.eos_token_id],
    )


def add_vocabulary(
    writer: GGUFWriter, vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase, end_of_turn: int | None
) -> None:
    """Writes the vocabulary, the special tokens and the chat template.

    The token that ends a turn becomes the end-of-text token: chat programs stop there and nowhere else.
    """
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.types))
    if vocabulary.merges:
        writer.add_token_merges(list(vocabulary.merges))
    if vocabulary.scores:
        writer.add_token_scores(list(vocabulary.scores))
    writer.add_add_space_prefix(vocabulary.adds_space)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(vocabulary.adds_eos)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.eos_token_id is not None:
        writer.add_eos_token_id(tokenizer.eos_token_id)
    if end_of_turn is not None:
        writer.add_eot_token_id(end_of_turn)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    template = choose_template(None, tokenizer, Path()).of_tokenizer
    several = template if isinstance(template, dict) else {"default": template}
    writer.add_chat_template([{"name": name, "template": text} for name, text in several.items()])


def _tokens(
    tokenizer: PreTrainedTokenizerBase, spec: dict[str, Any], rows: int, *, is_byte_level: bool
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Tokens and their types by id; rows of the embedding without a token are called [PADn] and unused."""
    names = {number: name for name, number in tokenizer.get_vocab().items()}
    added = {entry["id"]: entry for entry in spec["added_tokens"]}
    unknown = spec["model"].get("unk_token")
    tokens: list[str] = []
    types: list[int] = []
    for number in range(max(rows, len(names))):
        name = names.get(number)
        kind = TokenType.NORMAL
        if name is None:
            name, kind = f"[PAD{number}]", TokenType.UNUSED
        elif number in added:
            name = added[number]["content"]
            kind = TokenType.CONTROL if added[number]["special"] else TokenType.USER_DEFINED
        if not is_byte_level and name == unknown:
            kind = TokenType.UNKNOWN
        elif not is_byte_level and len(name) == 6 and name.startswith("<0x"):
            kind = TokenType.BYTE
        tokens.append(name)
        types.append(int(kind))
    return tuple(tokens), tuple(types)


def _scores(tokens: tuple[str, ...], merges: tuple[str, ...]) -> tuple[float, ...]:
    """SentencePiece joins the pair with the best score first, BPE the pair of the earliest merge: score = −rank."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", "", 1), rank)
    return tuple(-float(ranks.get(token, len(merges))) for token in tokens)


def _split_name(spec: dict[str, Any], place: str) -> str:
    """llama.cpp's name of the pre-tokenizer."""
    found = spec.get("pre_tokenizer") or {}
    parts = found.get("pretokenizers", [found])
    shape: tuple[str, ...] = tuple(part.get("type", "none") for part in parts)
    if shape[0] == "Split":
        shape = ("Split", parts[0]["pattern"].get("Regex", ""))
    if shape not in SPLITS:
        raise ModelError(Problem(place, f"splits text in a way that llama.cpp has no known name for: {shape}"))
    return SPLITS[shape]


def _adds_space(tokenizer: PreTrainedTokenizerBase, spec: dict[str, Any], place: str) -> bool:
    """Whether a space is put before the first word, and before every word behind a special token, as llama.cpp does.

    Newer tokenizers put it at the very start of a text only. A prompt that begins with a special token never gets it,
    which llama.cpp can do as well; with other prompts it cannot follow.
    """
    normalizer = spec.get("normalizer") or {}
    if any(step.get("type") == "Prepend" for step in normalizer.get("normalizers", [normalizer])):
        return True
    split = spec.get("pre_tokenizer") or {}
    scheme = split.get("prepend_scheme", "never") if split.get("type") == "Metaspace" else "never"
    if scheme == "first":
        renderer = Renderer.of(tokenizer, default_template(tokenizer))
        begin = tokenizer(renderer.render(PROBE), add_special_tokens=False)["input_ids"][:1]
        if not begin or begin[0] not in tokenizer.all_special_ids:
            raise ModelError(Problem(place, "puts a space before the first word of a prompt only; llama.cpp cannot"))
    return scheme == "always"
