"""Tiny tokenizers in the manner of the model families, and their chat templates, for tests.

Byte-level BPE (GPT-2's split, or Llama 3's) and SentencePiece-like BPE with byte fallback are what the families use;
the vocabularies are trained here on a few sentences. The templates are written to the families' public formats.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parent / "chat_templates"
CORPUS = [
    "What is the capital of France? The capital of France is Paris, of course.",
    "And 3 + 3? It is 6. Then 12 times 12 is 144, which is a dozen dozens.",
    "def main():\n    print('hello')\n\n\nReturn the answer, please.  Thank you!\n",
    'Add eggs to the list -> {"command": "add_item", "item": "eggs", "list": "shopping"}',
    "user assistant system tool model <think>\n\n</think>\n\n### Instruction:\n\n### Response:\n",
] * 3
# Llama 3's split of words; Qwen 2's differs in how many digits stay together.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Family:
    """How a family writes and splits text; `before` and `after` frame an answer in what is scored."""

    name: str
    style: str
    """"gpt2", "llama3", "sentencepiece" (▁ at the start of a text) or "sentencepiece-legacy" (▁ after every token)."""
    bos: str | None
    eos: str
    special: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    """Added tokens that are not special, such as <tool_call>."""
    before: str = ""
    after: str = ""
    system: bool = True
    """Whether the template takes a system message."""
    adds_bos: bool = False
    strips_space_after: bool = False
    """Whether special tokens swallow the white space behind them, as Phi-3's do."""


IM = ("<|im_start|>", "<|im_end|>")
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>")
TURNS = ("<start_of_turn>", "<end_of_turn>")
THOUGHT = ("<think>", "</think>", "<tool_call>", "</tool_call>")
DEEPSEEK = ("<｜User｜>", "<｜Assistant｜>")
DEEPSEEK_ENDS = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")

FAMILIES = {
    family.name: family
    for family in (
        Family("chatml", "gpt2", None, "<|im_end|>", IM, after="<|im_end|>"),
        Family("chatml_generation", "gpt2", None, "<|im_end|>", IM, after="<|im_end|>"),
        Family("smollm2", "gpt2", "<|im_start|>", "<|im_end|>", IM, after="<|im_end|>"),
        Family("llama2", "sentencepiece-legacy", "<s>", "</s>", before=" ", after=" </s>", adds_bos=True),
        Family("llama3", "llama3", "<|begin_of_text|>", "<|eot_id|>", HEADERS, after="<|eot_id|>", adds_bos=True),
        Family("llama3_1", "llama3", "<|begin_of_text|>", "<|eot_id|>", HEADERS, after="<|eot_id|>", adds_bos=True),
        Family(
            "mistral_v1",
            "sentencepiece-legacy",
            "<s>",
            "</s>",
            before=" ",
            after="</s>",
            system=False,
            adds_bos=True,
        ),
        Family(
            "mistral_v3",
            "sentencepiece",
            "<s>",
            "</s>",
            (
                "[INST]",
                "[/INST]",
                "[AVAILABLE_TOOLS]",
                "[/AVAILABLE_TOOLS]",
                "[TOOL_CALLS]",
                "[TOOL_RESULTS]",
                "[/TOOL_RESULTS]",
            ),
            before=" ",
            after="</s>",
            adds_bos=True,
        ),
        Family("gemma2", "sentencepiece", "<bos>", "<eos>", TURNS, after="<end_of_turn>", system=False, adds_bos=True),
        Family("gemma3", "sentencepiece", "<bos>", "<eos>", TURNS, after="<end_of_turn>", adds_bos=True),
        Family("qwen2_5", "llama3", None, "<|im_end|>", IM, ("<tool_call>", "</tool_call>"), after="<|im_end|>"),
        Family(
            "qwen3", "llama3", None, "<|im_end|>", IM, THOUGHT, before="<think>\n\n</think>\n\n", after="<|im_end|>"
        ),
        Family(
            "phi3",
            "sentencepiece",
            "<s>",
            "<|endoftext|>",
            ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
            after="<|end|>",
            strips_space_after=True,
        ),
        Family("phi4", "llama3", "<|endoftext|>", "<|im_end|>", (*IM, "<|im_sep|>"), after="<|im_end|>"),
        Family("deepseek_v3", "llama3", *DEEPSEEK_ENDS, DEEPSEEK, after=DEEPSEEK_ENDS[1], adds_bos=True),
        Family("zephyr", "sentencepiece-legacy", "<s>", "</s>", after="</s>", adds_bos=False),
        Family("olmo2", "llama3", "<|endoftext|>", "<|endoftext|>", ("<|pad|>",), after="<|endoftext|>"),
    )
}
# Templates that cannot be exact, and what is found on them.
R1 = Family("deepseek_r1", "llama3", *DEEPSEEK_ENDS, DEEPSEEK, ("<think>", "</think>"), after=DEEPSEEK_ENDS[1])
VICUNA = Family("vicuna", "sentencepiece-legacy", "<s>", "</s>", before="ASSISTANT: ", after="</s>")


@cache
def tokenizer_of(family: Family) -> PreTrainedTokenizerFast:
    """The family's tokenizer with its chat template."""
    ends = [token for token in (family.bos, family.eos) if token]
    if family.style.startswith("sentencepiece"):
        backend = _sentencepiece(legacy=family.style.endswith("legacy"))
    else:
        backend = _byte_level(LLAMA3_SPLIT if family.style == "llama3" else None)
    names = dict.fromkeys([*ends, *family.special])
    backend.add_special_tokens([AddedToken(name, rstrip=family.strips_space_after, normalized=False) for name in names])
    backend.add_tokens([AddedToken(name, normalized=False) for name in family.plain])
    if family.adds_bos and family.bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A",
            pair=f"{family.bos} $A {family.bos} $B",
            special_tokens=[(family.bos, backend.token_to_id(family.bos))],
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=family.bos, eos_token=family.eos, pad_token=family.eos
    )
    tokenizer.chat_template = (TEMPLATES / f"{family.name}.jinja").read_text(encoding="utf-8")
    return tokenizer


def byte_level_tokenizer(special: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """A tokenizer with these special tokens; the first is BOS, the second ends a text and pads."""
    backend = _byte_level(LLAMA3_SPLIT)
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    bos, eos, *_ = special
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=eos)


def _byte_level(split: str | None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if split is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def _sentencepiece(*, legacy: bool) -> Tokenizer:
    """A BPE with ▁ for spaces and bytes for what it does not know."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False)
    )
    learned = json.loads(trained.to_str())["model"]
    vocabulary = {token: number for token, number in learned["vocab"].items() if token != "\n"}
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(learned["vocab"]) + byte
    vocabulary = {token: number for number, token in enumerate(vocabulary)}
    merges = [tuple(pair) for pair in learned["merges"] if all(part in vocabulary for part in (*pair, "".join(pair)))]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer
