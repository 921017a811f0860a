"""A process that encodes rows beside others; it imports only what that takes."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from multiprocessing.connection import wait

from transformers import PreTrainedTokenizerBase

from qtune.data.examples import EncodedBatch, RowEncoder, RowRules
from qtune.data.rows import BadRow, Row
from qtune.data.template import ChatTemplate

# Handed over once to each process; a pool's initializer is the only way to do that.
_given: list[tuple[PreTrainedTokenizerBase, ChatTemplate, RowRules]] = []
_encoder: list[RowEncoder] = []


def end_with_parent() -> None:
    """Ends this process when the one that has started it is gone: one that was killed can tell nobody to stop."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent.sentinel,), daemon=True).start()


def _end_after(sentinel: int) -> None:
    wait([sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


def start(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, rules: RowRules) -> None:
    """Gives this process what its encoder is made of; an error in here would only break the pool."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the other cores have workers of their own
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is answered by the process that the user has started
    end_with_parent()
    _given[:] = [(tokenizer, template, rules)]


def encode(rows: Sequence[Row | BadRow]) -> EncodedBatch:
    """The examples of some rows."""
    if not _encoder:
        _encoder.append(RowEncoder(*_given[0]))
    return _encoder[0](rows)
