"""Keys of other libraries inside a message: obeyed where their meaning is known, refused by name where it is not."""

import re
from collections.abc import Mapping
from typing import Any

from qtune.data.account import Account, holds_something
from qtune.data.conversation import RowError, shown, text_of

# Switches of a turn's loss -> whether "on" means that the turn is scored. OpenAI's and Mistral's weight, ms-swift's and
# XTuner's loss, Axolotl's train and training; torchtune's masked says the opposite.
SWITCHES = {
    "weight": True,
    "loss": True,
    "train": True,
    "training": True,
    "trainable": True,
    "loss_weight": True,
    "loss_scale": True,
    "masked": False,
}
# What else looks like one: libraries disagree about a mask's sense, and some mean parts of the text.
_LIKE_A_SWITCH = re.compile(r"(?:^|[^a-z])(?:un)?(?:mask|loss|train|weight|superv|learn|ignor)")

# Where data sets keep what a model thought before it answered.
REASONING = ("reasoning_content", "reasoning", "thinking")


def loss_weight(turn: Mapping[str, Any], role: str, where: str) -> int | None:
    """0 for a turn that is not to be scored, 1 for one that is, None where the turn does not say.

    Raises:
        RowError: a switch is not on or off, two disagree, or one asks to score a turn that is no answer.
    """
    told = {
        key: _is_on(turn[key], f"{where}.{key}") == means_scored
        for key, means_scored in SWITCHES.items()
        if turn.get(key) is not None
    }
    for key in turn:
        if key not in SWITCHES and turn[key] is not None and is_like_a_switch(key, turn[key]):
            raise RowError(
                f"{where}.{key} = {shown(turn[key])}: looks like a switch of the loss whose meaning is not known here; "
                "say which answers are learned with weight = 0 or 1, or remove it"
            )
    if not told:
        return None
    if len(set(told.values())) > 1:
        said = ", ".join(f"{key} = {shown(turn[key])}" for key in told)
        raise RowError(f"{where}: {said} disagree about whether this turn is learned")
    is_scored = next(iter(told.values()))
    if is_scored and role != "assistant":
        key = next(iter(told))
        raise RowError(
            f"{where}.{key} = {shown(turn[key])} on a turn of {role}: only answers of the assistant are learned; "
            "remove it, or take raw text that is learned as a whole"
        )
    return int(is_scored)


def is_like_a_switch(key: object, value: object) -> bool:
    """Whether a key's name, as compute_loss or isMasked, says that it decides what is learned, and its value could.

    A text says something else (`learning_goal`), unless it is a number, a switch or a list that a table holds as text.
    """
    if not isinstance(key, str) or not _LIKE_A_SWITCH.search(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower()):
        return False
    return _could_switch(value)


_SWITCH_IN_WORDS = re.compile(
    r"\s*(?:true|false|yes|no|on|off|[-+]?[\d.,]+(?:e[-+]?\d+)?|\[.*\])\s*", re.IGNORECASE | re.DOTALL
)


def _could_switch(value: object) -> bool:
    if isinstance(value, str):
        return bool(_SWITCH_IN_WORDS.fullmatch(value))
    if isinstance(value, dict):
        return any(map(_could_switch, value.values()))
    return isinstance(value, (bool, int, float, list))


def _is_on(value: object, where: str) -> bool:
    if value in (0, 1) and isinstance(value, (bool, int, float)):
        return bool(value)
    if isinstance(value, str) and value.lower() in ("true", "false", "1", "0"):
        return value.lower() in ("true", "1")
    raise RowError(f"{where} = {shown(value)}: not 0 or 1 (true or false); a turn is learned whole or not at all")


def reasoning_of(value: Mapping[str, Any], where: str, account: Account) -> str | None:
    """The text that a model thought before its answer, under whichever of its names it stands.

    Raises:
        RowError: it is no text, or stands there twice with different words.
    """
    found = {key: value[key] for key in REASONING if holds_something(value.get(key))}
    if not found:
        return None
    texts = {key: text_of(text, f"{where}{key}") for key, text in found.items()}
    if len(set(texts.values())) > 1:
        raise RowError(f"{where}{' and '.join(f'{key}' for key in texts)} hold different reasoning; keep one")
    text = next(iter(texts.values()))
    return text if text.strip() else None
