"""A process that encodes rows beside others; it imports only what that takes."""

import os
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from qtune.data.examples import EncodedBatch, RowEncoder, RowRules
from qtune.data.rows import BadRow, Row
from qtune.data.template import ChatTemplate

# Made once in each process; a pool's initializer is the only way to hand it over.
_encoder: list[RowEncoder] = []


def start(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, rules: RowRules) -> None:
    """Gives this process its encoder."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the other cores have workers of their own
    _encoder[:] = [RowEncoder(tokenizer, template, rules)]


def encode(rows: Sequence[Row | BadRow]) -> EncodedBatch:
    """The examples of some rows."""
    return _encoder[0](rows)
