"""What a value that memory has decided does, in words."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from qtune.recipe.text import show_changes

if TYPE_CHECKING:
    from qtune.plan import Plan
    from qtune.recipe.schema import KeyPath

EMBEDDINGS = {
    "device": "embeddings and head are on the card",
    "host": "embeddings and head wait in the computer's memory",
    "int8": "embeddings and head are on the card, in 8 bits",
    "nf4": "embeddings and head are on the card, in 4 bits",
}


def lines_of(values: "Mapping[KeyPath, Any]", plan: "Plan", layers: int) -> Iterator[str]:
    """A line for each value, as a recipe sets it, with what it does. layers: that the model has."""
    shown = {key: show_changes({key: value}) for key, value in values.items()}
    width = max(map(len, shown.values()), default=0)
    for key, value in values.items():
        words = in_words(key, value, layers) or plan.reasons.get((str(key[0]), str(key[1])), "")
        yield f"  {shown[key]:<{width}}  {f'# {words}' if words else ''}".rstrip()


def in_words(key: "KeyPath", value: Any, layers: int) -> str:
    """What a value does; nothing for keys that say it themselves. layers: that the model has."""
    match key, value:
        case ("training", "gradient_checkpointing"), bool():
            twice = (
                "every layer is computed twice and keeps little" if value else "every layer keeps what it has computed"
            )
            return f"{twice}: {'less memory, more time' if value else 'the fastest, with the most memory'}"
        case ("training", "gradient_checkpointing"), int():
            return (
                f"the first {value} of {layers} layers are computed twice and keep little, the others keep everything"
            )
        case ("training", "micro_batch_size"), int():
            return f"{value} {'row' if value == 1 else 'rows'} of a step at once"
        case ("memory", "keep_dequantized"), bool():
            words = "every layer keeps its" if value else "no layer keeps its"
            price = "more memory, less time" if value else "less memory, more time"
            return f"{words} 4-bit weights dequantized: {price}, the same results"
        case ("memory", "keep_dequantized"), int():
            words = f"the first {value} of {layers} layers keep their"
            return f"{words} 4-bit weights dequantized: less time, the same results"
        case ("memory", "embeddings"), str():
            return EMBEDDINGS.get(value, "")
    return ""
