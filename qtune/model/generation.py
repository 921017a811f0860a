"""A model's generation_config.json, read and checked before a verb needs it.

Loaders and exports meet it late, and raise over it in words of their own.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from qtune.errors import ModelError, Problem, last_line

FILE = "generation_config.json"
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def require_generation_config(folder: Path) -> None:
    """What a model folder says of how its model is asked can be used, as far as it says anything.

    Raises:
        ModelError: it holds no object, names a token by something else than its number, or transformers refuses it.
    """
    file = folder / FILE
    if not file.is_file():
        return
    if problems := [Problem(str(file), said) for said in _faults(json.loads(file.read_text(encoding="utf-8")))]:
        raise ModelError(problems)
    try:
        GenerationConfig.from_pretrained(folder)
    except (ValueError, TypeError, AttributeError, KeyError, OSError) as error:
        raise ModelError(Problem(str(file), f"transformers refuses it: {last_line(error)}")) from error


def _faults(values: Mapping[str, Any]) -> Iterator[str]:
    """A negative number is how older folders say that there is no such token; no answer would end at such an end."""
    for key in TOKENS:
        found, is_end = values.get(key), key == "eos_token_id"
        several = found if isinstance(found, list) and is_end else [] if found is None else [found]
        if wrong := [
            one for one in several if not isinstance(one, int) or isinstance(one, bool) or (is_end and one < 0)
        ]:
            yield f"{key} = {str(wrong[0])[:40]!r}: is not the number of a token"
