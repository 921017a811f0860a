"""Tokens that a model has no embedding for: one error instead of an index out of range, or a card that stops."""

from collections.abc import Sequence

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qtune.errors import DataError, Problem


def embedding_rows(model: PreTrainedModel | PeftModel) -> int:
    """How many tokens the model has embeddings for."""
    network = model.get_base_model() if isinstance(model, PeftModel) else model
    rows = getattr(network.get_input_embeddings(), "num_embeddings", None)
    return int(rows or network.config.get_text_config().vocab_size)


def require_known(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> None:
    """Every token of an answer is the tokenizer's; an unknown one would vanish from the text.

    Raises:
        DataError: with the tokens that are not.
    """
    unknown = sorted({token for token in ids if token >= len(tokenizer)})
    if unknown:
        names = ", ".join(map(str, unknown[:5]))
        message = f"holds token {names}, which the tokenizer does not know (it has {len(tokenizer)})"
        raise DataError(Problem("the answer", message))


HALF = "\ufffd"
"""What bytes that are no character, or not yet a whole one, are decoded as."""


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, is_whole: bool = True) -> str:
    """The text of an answer without special tokens; a token that the tokenizer does not know stays to be seen.

    is_whole: whether the answer came to its end; of one that was cut, the character that it was cut in is left out.
    """
    known, parts = list[int](), list[str]()
    for token in ids:
        if token < len(tokenizer):
            known.append(token)
            continue
        parts += [str(tokenizer.decode(known, skip_special_tokens=True)), f"<unknown token {token}>"]
        known = []
    text = "".join([*parts, str(tokenizer.decode(known, skip_special_tokens=True))])
    return text if is_whole else text.rstrip(HALF)


def require_embeddings(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], place: str
) -> None:
    """Every token of `ids` has an embedding; `place` is where they come from, in words.

    Raises:
        DataError: with the tokens that have none.
    """
    rows = embedding_rows(model)
    outside = sorted({token for token in ids if token >= rows})
    if outside:
        names = ", ".join(f"{tokenizer.convert_ids_to_tokens(token)} ({token})" for token in outside[:5])
        message = f"holds {names}, and the model has embeddings for {rows} tokens only: the tokenizer is not its own"
        raise DataError(Problem(place, message))
