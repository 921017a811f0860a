"""The process that makes the blocks of a stream before they are asked for."""

import multiprocessing
import os
import signal
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from qtune.data.stream_index import Index, IndexReaders
from qtune.data.template import ChatTemplate
from qtune.data.worker import end_with_parent

TRAINED = ["input_ids", "labels"]
# Handed over once; a pool's initializer is the only way to do that.
_given: list[tuple[Sequence[Index], PreTrainedTokenizerBase, ChatTemplate]] = []
_readers: list[IndexReaders] = []


def beside(indexes: Sequence[Index], tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> ProcessPoolExecutor:
    """One process: blocks are read in their order, so a second one would only wait for the first."""
    # Forking a process whose tokenizer and CUDA context have threads could deadlock.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["qtune.data.stream_worker"])
    return ProcessPoolExecutor(1, context, start, (indexes, tokenizer, template))


def start(indexes: Sequence[Index], tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> None:
    """Gives the process what it reads; an error in here would only break the pool."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is answered by the process that the user has started
    end_with_parent()
    _given[:] = [(indexes, tokenizer, template)]


def block(source: int, number: int) -> pa.RecordBatch:
    """The ids and labels of a block.

    Raises:
        DataError: the file is no longer what it was.
    """
    if not _readers:
        _readers.append(IndexReaders(*_given[0]))
    return _readers[0].of(source).block(number).select(TRAINED)
