"""How many positions a model was made for, by its configuration. Reads no weight and imports nothing heavy."""

from collections.abc import Mapping
from typing import Any

NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
"""What families call it."""


def reach_of(config: Mapping[str, Any]) -> int | None:
    """Positions of a config.json's values, as far as a factor stretches them; None where they do not say."""
    text = config.get("text_config")
    values = {**config, **text} if isinstance(text, Mapping) else config
    found = [value for name in NAMES if isinstance(value := values.get(name), int) and value > 0]
    return max(found[0], _stretched(values)) if found else None


def _stretched(values: Mapping[str, Any]) -> int:
    """Rotary positions that a factor (YaRN, linear) stretches from those of pretraining; 0 where none does."""
    scaling = values.get("rope_parameters") or values.get("rope_scaling")
    if not isinstance(scaling, Mapping):
        return 0
    factor, original = scaling.get("factor"), scaling.get("original_max_position_embeddings")
    if not isinstance(factor, (int, float)) or not isinstance(original, int) or not 0 < factor < float("inf"):
        return 0
    return int(factor * original)
