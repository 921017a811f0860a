"""Data: rows -> conversations -> ids and labels, with every row accounted for."""

from qtune.data.collate import PaddedCollator
from qtune.data.conversation import Conversation
from qtune.data.prepare import Prepared, prepare
from qtune.data.template import prompt_ids

__all__ = ["Conversation", "PaddedCollator", "Prepared", "prepare", "prompt_ids"]
