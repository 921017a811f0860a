"""Does what makes tracing faster pay for its lines? Seconds of a trace with each of it switched off alone.

    python tools/bench_trace.py [1B 8B 70B]

One trace: the recipe's own step (rank-16 LoRA on NF4, one row of 2048 tokens, checkpointing) on a card of 24 GiB, in
seconds of this process's CPU, the best of two, so that other work on the computer counts little. Nothing comes from a
cache.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

from transformers import LlamaConfig

from qtune.device.cards import described
from qtune.memory import predict
from qtune.memory.predict import Longest
from qtune.memory.tracing import fake_tensors, trace
from qtune.plan import Plan, make_plan
from qtune.recipe.parse import parse_recipe
from qtune.recipe.schema import Recipe
from qtune.startup.imports import import_libraries
from qtune.startup.quiet import quiet_libraries

LENGTH = 2048
# Hidden size, feed-forward size, layers, heads, heads of keys, tied: Llama 3.2 1B, 3.1 8B and 3.3 70B.
GEOMETRIES = {
    "1B": (2048, 8192, 16, 32, 8, True),
    "8B": (4096, 14336, 32, 32, 8, False),
    "70B": (8192, 28672, 80, 64, 8, False),
}


def llama(name: str) -> LlamaConfig:
    hidden, feed_forward, layers, heads, key_heads, tied = GEOMETRIES[name]
    return LlamaConfig(
        vocab_size=128256, hidden_size=hidden, intermediate_size=feed_forward, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_heads, tie_word_embeddings=tied,
        max_position_embeddings=131072,
    )  # fmt: skip


def recipe_and_plan() -> tuple[Recipe, Plan]:
    tables = {
        "model": {"base": "some/model"},
        "data": {"train": "rows.jsonl", "max_length": LENGTH},
        "training": {"batch_size": 16, "micro_batch_size": 1, "gradient_checkpointing": True},
    }
    recipe = parse_recipe(tables)
    assert isinstance(recipe, Recipe)
    return recipe, make_plan(recipe, described(24))


@contextlib.contextmanager
def every_layer() -> Iterator[None]:
    """Layers that repeat are executed all the same (`layers.py`, `repeated_layers.py`)."""
    with mock.patch.object(trace, "signatures", return_value=[]):
        yield


@contextlib.contextmanager
def nothing_remembered() -> Iterator[None]:
    """Each operation is worked out by `FakeTensorMode` or comes from its own cache (`fake_tensors.py`)."""
    made = fake_tensors.RememberingMode.__init__

    def with_its_own_cache(self: fake_tensors.RememberingMode) -> None:
        made(self)
        self.cache_enabled = True

    with (
        mock.patch.object(fake_tensors, "_key", return_value=None),
        mock.patch.object(fake_tensors.RememberingMode, "__init__", with_its_own_cache),
    ):
        yield


def forget() -> None:
    trace._built.clear()
    fake_tensors._known.clear()


def traced(name: str) -> Callable[[], object]:
    recipe, plan = recipe_and_plan()
    return lambda: predict.predict(llama(name), recipe, plan, Longest(LENGTH))


def seconds(work: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(2):
        forget()
        began = time.process_time()
        work()
        best = min(best, time.process_time() - began)
    return best


def main() -> None:
    quiet_libraries()
    import_libraries()
    traced("1B")()  # what is built once for a process
    for name in sys.argv[1:] or GEOMETRIES:
        trace_seconds = {"all of it": seconds(traced(name))}
        for off in (every_layer, nothing_remembered):
            with off():
                trace_seconds[f"without {off.__name__}"] = seconds(traced(name))
        with every_layer(), nothing_remembered():
            trace_seconds["neither"] = seconds(traced(name))
        print(f"{name}, one trace, CPU s:", ", ".join(f"{what} {took:.2f}" for what, took in trace_seconds.items()))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
