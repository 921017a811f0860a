"""Traces docs/time.md's table of what was aimed at: python tools/goal_table.py [--write docs/time.md]

NF4 with double quantization, LoRA on all linear layers, rows of equal length, every token scored; time by the data
sheet of an H100, beside TRL's own step, which is traced by its own code. Nothing in it was measured but the column
that says so, from the H200's file of tests/measured/. It takes some minutes of one core.
"""

import json
import sys
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from memory_table import MODELS, config_of, timed  # noqa: E402
from readme_table import print_or_write  # noqa: E402
from step_table import CARD, KEPT, LEAN_ADAPTER, LEANEST, STREAMED, Changes, recipe_of  # noqa: E402
from trace_cost import theirs  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

from qtune.device.cards import card_named  # noqa: E402
from qtune.memory.predict import Longest, predict, summarize  # noqa: E402
from qtune.memory.tracing.trace import Traced  # noqa: E402
from qtune.model.load import attention_rule  # noqa: E402
from qtune.plan import make_plan  # noqa: E402
from qtune.startup.allocator import use_expandable_segments  # noqa: E402
from qtune.timing.price import training_part  # noqa: E402

H200 = json.loads((ROOT / "tests" / "measured" / "h200_time.json").read_text(encoding="utf-8"))
GIB = 2**30

LONG: Changes = {
    ("memory", "embeddings"): "host",
    ("memory", "activations"): "host",
    ("adapter", "rank"): 32,
}


@dataclass(frozen=True)
class Way:
    """One step; every layer is computed twice unless the changes say otherwise."""

    rows: int
    length: int
    changes: tuple[tuple[Any, Any], ...] = ()
    model: str = "Llama 3.1 8B"
    is_trl: bool = False

    def traced(self, plays_allocator: bool = False) -> Traced:
        """What its trace found, of the allocator too where that is asked."""
        return traced(self, plays_allocator)

    @property
    def seconds(self) -> float:
        return timed(training_part(self.traced().work), CARD).seconds

    @property
    def launches(self) -> int:
        return timed(training_part(self.traced().work), CARD).launches

    @property
    def peak(self) -> float:
        """GiB of tensors."""
        return self.traced().history.peak().bytes / GIB

    @property
    def needed(self) -> float:
        """GiB that are needed free on the card: with CUDA's context, workspaces and the allocator's gaps."""
        return summarize(self.traced(plays_allocator=True)).need.total_bytes / GIB


@cache
def traced(way: Way, plays_allocator: bool) -> Traced:
    """The step of a way, each once."""
    recipe = recipe_of(way.rows, dict(way.changes), way.length)
    config = config_of(next(model for model in MODELS if model[0] == way.model))
    plan, longest = (
        make_plan(recipe, card_named(CARD).device(), attention_rule(config)),
        Longest(way.length, equal=True),
    )
    print(f"{way.model}, {way.rows} x {way.length}", file=sys.stderr, flush=True)
    if way.is_trl:
        return theirs(config, recipe, plan, longest)
    return predict(config, recipe, plan, longest, plays_allocator=plays_allocator)


def way(rows: int, length: int, changes: Changes | None = None, **more: Any) -> Way:
    return Way(rows, length, tuple((changes or {}).items()), **more)


def measured(what: str, rows: int, key: str) -> float:
    """The H200's median of a step, by its name in `tools/bench_card.py`."""
    steps = H200["steps"] + H200["steps_before_a_block_of_the_head_was_one_kernel"]
    return float(next(one[key] for one in steps if (one["what"], one["rows"]) == (what, rows)))


def of_theirs(what: str, rows: int, key: str) -> str:
    return f"{measured(what, rows, key) / measured('TRL', rows, key):.2f}"


def lines() -> list[tuple[str, str, str, str]]:
    """What, goal, traced, measured."""
    four, one = way(4, 2048, is_trl=True), way(1, 2048, is_trl=True)
    every, kept = way(4, 2048), way(4, 2048, KEPT | {("memory", "keep_dequantized"): True})
    lean = way(4, 2048, LEAN_ADAPTER | {("memory", "embeddings"): "int8"})
    leanest = way(1, 2048, LEANEST)
    shorter, longer = way(1, 16_384, LONG), way(1, 32_768, LONG)
    slope = (longer.peak - shorter.peak) * GIB / 16_384 / 1e6
    return [
        ("4 x 2,048, every layer computed twice: time, of TRL's", "0.70", f"{every.seconds / four.seconds:.2f}",
         of_theirs("qtune", 4, "seconds")),
        ("the same, embeddings in int8, adapter in bf16, 8-bit AdamW: peak, of TRL's", "0.80",
         f"{lean.peak / four.peak:.2f}, at {lean.seconds / four.seconds:.2f} of its time",
         f"{of_theirs('compressed', 4, 'peak_gib')}, at {of_theirs('compressed', 4, 'seconds')} *"),
        ('4 x 2,048 on 80 GB, "auto": time, of TRL\'s', "0.50", f"{kept.seconds / four.seconds:.2f}",
         f"{of_theirs('kept', 4, 'seconds')}, weights read back for every product"),
        ("1 x 2,048, the leanest with its layers on the card: peak", "4.3 GiB", f"{leanest.peak:.2f} GiB",
         f"{measured('leanest', 1, 'peak_gib'):.2f} GiB"),
        ("1 x 2,048, the leanest: time, of TRL's", "1.15", f"{leanest.seconds / one.seconds:.2f}",
         f"{of_theirs('leanest', 1, 'seconds')} *"),
        ("1 x 2,048, layers on the host: needed on the card", "2.5 GiB",
         f"{way(1, 2048, STREAMED).needed:.2f} GiB", "–"),
        ("Llama 3.1 70B, 1 x 4,096, layers on the host: needed on the card", "6 GiB",
         f"{way(1, 4096, STREAMED, model='Llama 3.1 70B').needed:.2f} GiB", "–"),
        ("a row of 150,000 tokens, rank 32: needed on the card", "24 GB",
         f"{way(1, 150_000, LONG).needed:.1f} GiB", "–"),
        ("a row of 500,000 tokens, rank 32: needed on the card", "80 GB",
         f"{way(1, 500_000, LONG).needed:.1f} GiB", "–"),
        ("a further token of such rows", "0.10 MB", f"{slope:.3f} MB", "–"),
        ("launches of a step at 4 x 2,048, every layer computed twice", "5,000", f"{every.launches:,}", "–"),
    ]  # fmt: skip


def table() -> str:
    """A line for each goal."""
    rows = [f"| {' | '.join(cells)} |" for cells in lines()]
    return "\n".join(["| step | at most | traced, H100 | measured, H200 |", "| --- | ---: | ---: | ---: |", *rows])


def main() -> None:
    use_expandable_segments()
    transformers_logging.set_verbosity_error()
    print_or_write(__doc__.splitlines()[0], "goal table", table)


if __name__ == "__main__":
    main()
