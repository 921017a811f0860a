"""Traces the README's memory table: python tools/memory_table.py [--write README.md]

Every figure is the traced peak of one QLoRA step (NF4, double quantization, LoRA rank 16 on all linear layers, the lean
step with every layer computed twice, one row, every token scored) plus the allowance of qtune/memory/allowance.py;
under each card stands the longest row of a doubling series that still fits it. The time of the step is that of a named
card, by its data sheet: the larger of what its kernels and what the processor's launches take. Sizes of the models are
those of their published config.json, written down here so that nothing is downloaded. What was traced before comes from
the cache of predictions.
"""

import importlib.metadata
import sys
import warnings
from bisect import bisect_right
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from readme_table import print_or_write  # noqa: E402
from transformers import AutoConfig  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

from qtune.device.cards import card_named, described  # noqa: E402
from qtune.device.rates import data_sheet_rates  # noqa: E402
from qtune.memory.allowance import Need  # noqa: E402
from qtune.memory.cached import LIBRARIES, predicted, traced_work  # noqa: E402
from qtune.memory.predict import Longest  # noqa: E402
from qtune.memory.tracing.work import Work  # noqa: E402
from qtune.plan import make_plan  # noqa: E402
from qtune.recipe.parse import parse_recipe  # noqa: E402
from qtune.recipe.schema import Recipe  # noqa: E402
from qtune.startup.allocator import use_expandable_segments  # noqa: E402
from qtune.timing.price import Duration, cost_by, duration, training_part  # noqa: E402

GIB = 2**30
SHOWN = 2048
"""Tokens of the row whose bytes are shown."""
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
CARDS = (6, 8, 12, 16, 24, 48, 80)
TIMED = "RTX 4090"
"""The card whose time is shown, of models of which it holds the shown row."""

# (name, model type, hidden, layers, heads, key-value heads, head size, intermediate, vocabulary, tied embeddings)
MODELS = (
    ("SmolLM2 135M", "llama", 576, 30, 9, 3, 64, 1536, 49152, True),
    ("Qwen2.5 0.5B", "qwen2", 896, 24, 14, 2, 64, 4864, 151936, True),
    ("Llama 3.2 1B", "llama", 2048, 16, 32, 8, 64, 8192, 128256, True),
    ("Qwen3 1.7B", "qwen3", 2048, 28, 16, 8, 128, 6144, 151936, True),
    ("Llama 3.2 3B", "llama", 3072, 28, 24, 8, 128, 8192, 128256, True),
    ("Mistral 7B v0.1", "mistral", 4096, 32, 32, 8, 128, 14336, 32000, False),
    ("Llama 3.1 8B", "llama", 4096, 32, 32, 8, 128, 14336, 128256, False),
    ("Qwen3 14B", "qwen3", 5120, 40, 40, 8, 128, 17408, 151936, False),
    ("Llama 3.1 70B", "llama", 8192, 80, 64, 8, 128, 28672, 128256, False),
)


def config_of(model: tuple[Any, ...]) -> Any:
    _, kind, hidden, layers, heads, kv_heads, head_dim, intermediate, vocab, tied = model
    return AutoConfig.for_model(
        kind,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        max_position_embeddings=131072,
        pad_token_id=0,
    )


def recipe_of(length: int) -> Recipe:
    return parse_recipe(
        {
            "model": {"base": "traced"},
            "data": {"train": "rows.jsonl", "max_length": length},
            "training": {"batch_size": 16, "micro_batch_size": 1, "gradient_checkpointing": True},
        }
    )


def need_of(model: tuple[Any, ...], length: int) -> Need:
    recipe = recipe_of(length)
    found = predicted(config_of(model), recipe, make_plan(recipe, described(24)), Longest(length))
    print(f"{model[0]}, {length} tokens: {found.need.total_bytes / GIB:.2f} GiB", file=sys.stderr, flush=True)
    return found.need


def timed(work: Work, card_name: str) -> Duration:
    """What a step takes on a card, by its data sheet."""
    rates = data_sheet_rates(card_named(card_name))
    return duration(cost_by(work, rates, lambda place, kernel: kernel.kind).values(), rates)


def time_of(model: tuple[Any, ...]) -> str:
    """ "0.83 s": forward, backward and update with the shown row; a star where the card waits for the processor."""
    card, recipe = card_named(TIMED), recipe_of(SHOWN)
    work = training_part(traced_work(config_of(model), recipe, make_plan(recipe, card.device()), Longest(SHOWN)))
    found = timed(work, TIMED)
    return f"{found.seconds:.2f} s{'*' if found.waits_for_processor else ''}"


def row(model: tuple[Any, ...]) -> list[str]:
    """The model's name, its need and time at SHOWN tokens, and under each card the longest of LENGTHS that fits."""
    needs = {SHOWN: need_of(model, SHOWN)}

    def needed(length: int) -> Need:
        if length not in needs:
            needs[length] = need_of(model, length)
        return needs[length]

    def longest(gb: int) -> str:
        """What surely fits, and in brackets what comes too close to say; need grows with length."""
        sure = bisect_right(LENGTHS, gb * GIB, key=lambda length: needed(length).total_bytes)
        maybe = bisect_right(LENGTHS, gb * GIB, key=lambda length: needed(length).least_bytes)
        told = f"{LENGTHS[sure - 1]:,}" if sure else "–"
        return f"{told} ({LENGTHS[maybe - 1]:,}?)" if maybe > sure else told

    shown = needs[SHOWN]
    sizes = f"{shown.traced_bytes / GIB:.2f} + {shown.driver_bytes / GIB:.2f} GiB"
    time = time_of(model) if shown.fits(card_named(TIMED).device().free_bytes) else "–"
    return [model[0], sizes, time, *(longest(gb) for gb in CARDS)]


def table(models: tuple[tuple[Any, ...], ...] = MODELS) -> str:
    heads = ["model", f"{SHOWN:,} tokens: traced + allowance", f"time, {TIMED}", *(f"{gb} GB" for gb in CARDS)]
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " ---: |" * (len(heads) - 1)]
    lines += [f"| {' | '.join(row(model))} |" for model in models]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    series = f"{LENGTHS[0]:,}, {LENGTHS[1]:,} … {LENGTHS[-1]:,}"
    lines += [
        "",
        f"Under each card the longest row, of {series} tokens, that surely fits it; – if none does.",
        "In brackets a longer one where it is too close to say: it fits if the allocator can close every gap.",
        f"Time: a step of one such row on an {TIMED}, by its data sheet; * the processor, launching, is the limit.",
        f"Traced by `tools/memory_table.py` without a GPU; {versions}.",
    ]
    return "\n".join(lines)


def main() -> None:
    use_expandable_segments()  # as the command does
    transformers_logging.set_verbosity_error()
    warnings.simplefilter("ignore")  # peft 0.21 asks for an attribute by the name that transformers 5 has deprecated
    print_or_write(__doc__.splitlines()[0], "memory table", table)


if __name__ == "__main__":
    main()
