"""How much of a card PyTorch's allocator takes for steps of changing length beyond their tensors.

    python tools/simulate_allocator.py [--only NAME,NAME]

Steps of rows of changing length are traced, every layer of them, and played through the allocator as it comes and with
expandable segments, from loading to the last update. Two figures come of it: what it holds on a card with room to
spare, which is what a prediction allows for as gaps (qtune/memory/tracing/reserved.py), and the least capacity with
which all steps pass: a full card is given back what is unused. The published runs of memory_records.json, which hold
whole logits, are played too, at their one length.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from memory_record import build_of  # noqa: E402
from memory_table import MODELS, config_of  # noqa: E402
from old_transformers import as_in  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

from qtune.device.cards import described  # noqa: E402
from qtune.memory.predict import Longest, build, training_step  # noqa: E402
from qtune.memory.tracing.caching_allocator import MIB, ExpandableSegments, FixedSegments, OutOfMemoryError  # noqa: E402
from qtune.memory.tracing.reserved import StepLives, reserved_bytes  # noqa: E402
from qtune.memory.tracing.trace import lives  # noqa: E402
from qtune.plan import make_plan  # noqa: E402
from qtune.recipe.parse import parse_recipe  # noqa: E402

GIB = 2**30
LENGTHS = (1.0, 0.6, 0.85, 0.45, 1.0, 0.7)
"""Longest rows of the steps, one after the other, as shares of the longest of all."""

LORA = {"kind": "lora", "rank": 16}
SETTINGS: dict[str, dict[str, Any]] = {
    "checkpointing": {"gradient_checkpointing": True},
    "everything kept": {"gradient_checkpointing": False},
    "p-tuning, everything kept": {"gradient_checkpointing": False},
}
BIGGEST = {"checkpointing": 2048, "everything kept": 1024, "p-tuning, everything kept": 1024}
"""Tokens of the longest row."""

Steps = list[StepLives]


def steps_of(model: tuple[Any, ...], name: str) -> Steps:
    """The lives of each step, for one model of the README's table under one of SETTINGS."""
    adapter = {"kind": "p-tuning", "virtual_tokens": 20} if name.startswith("p-tuning") else LORA
    length = BIGGEST[name]
    recipe = parse_recipe(
        {
            "model": {"base": "traced"},
            "data": {"train": "rows.jsonl", "max_length": length},
            "adapter": adapter,
            "training": {"batch_size": 4, "micro_batch_size": 2, **SETTINGS[name]},
        }
    )
    plan = make_plan(recipe, described(24))
    config = config_of(model)
    step = training_step(recipe, plan, Longest(length))
    found: dict[float, StepLives] = {}
    for share in LENGTHS:
        if share not in found:
            shorter = replace(step, batch=replace(step.batch, length=int(share * length)), eval_batch=None)
            found[share] = lives(config, lambda shape: build(shape, recipe, plan), shorter)
    return [found[share] for share in LENGTHS]


def steps_of_record(record: dict[str, Any]) -> Steps:
    """Two equal steps of a published run."""
    found = build_of(record)
    with as_in(found.version, found.config, found.attention):
        return [lives(found.config, found.model, found.step)] * 2


def need(steps: Steps, kind: Callable[[int | None], FixedSegments | ExpandableSegments], peak: int) -> int:
    """The least capacity, to 4 MiB, with which the steps pass."""
    low, high = peak, 2 * peak + 64 * MIB
    while high - low > 4 * MIB:
        middle = (low + high) // 2
        try:
            reserved_bytes(steps, 0, kind(middle))
            high = middle
        except OutOfMemoryError:
            low = middle
    return high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="comma-separated names of models, or ids of records")
    only = [name.strip() for name in parser.parse_args().only.split(",") if name.strip()]
    transformers_logging.set_verbosity_error()
    records = json.loads((ROOT / "tools" / "memory_records.json").read_text(encoding="utf-8"))
    played: list[tuple[str, str, Callable[[], Steps]]] = [
        (model[0], name, partial(steps_of, model, name)) for model in MODELS for name in SETTINGS
    ]
    played += [(record["id"], "as published", partial(steps_of_record, record)) for record in records]
    if unknown := set(only) - {name for name, *_ in played}:
        raise SystemExit(f"--only: nothing is called {', '.join(sorted(unknown))}")
    for name, how, traced in played:
        if only and name not in only:
            continue
        steps = traced()
        cells = []
        for word, kind in (("fixed", FixedSegments), ("expandable", ExpandableSegments)):
            roomy = kind()
            reserved_bytes(steps, 0, roomy)
            peak = roomy.allocated_peak
            least = need(steps, kind, peak) - peak
            cells.append(f"{word} +{(roomy.peak - peak) / MIB:5.0f} MiB, +{least / MIB:5.0f} on a full card")
        print(f"{name:18s} {how:26s} {peak / GIB:6.2f} GiB: {'; '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
