"""Traces docs/time.md's table of the lean step's ways: python tools/step_table.py [--write docs/time.md]

Llama 3.1 8B, NF4 with double quantization, LoRA of rank 16 on all linear layers, rows of 2,048 tokens of equal length,
every token scored: time by the data sheet of an H100, launches and the traced peak. The step of TRL is traced by its
own code, the others are recipes, each with the changes that its line names. Nothing in it was measured.
"""

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from memory_table import MODELS, config_of, timed  # noqa: E402
from readme_table import print_or_write  # noqa: E402
from trace_cost import ours, peak_gib, theirs  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

from qtune.device.cards import card_named  # noqa: E402
from qtune.memory.predict import Longest  # noqa: E402
from qtune.model.load import attention_rule  # noqa: E402
from qtune.plan import make_plan  # noqa: E402
from qtune.recipe.parse import changed, parse_recipe  # noqa: E402
from qtune.recipe.schema import KeyPath, Recipe  # noqa: E402
from qtune.timing.price import training_part  # noqa: E402

MODEL, CARD, LENGTH, ROWS = "Llama 3.1 8B", "H100", 2048, (4, 1)

Changes = dict[KeyPath, Any]

KEPT: Changes = {("training", "gradient_checkpointing"): False, ("memory", "keep_dequantized"): False}
LEAN_ADAPTER: Changes = {("training", "optimizer"): "adamw-8bit", ("adapter", "dtype"): "bfloat16"}
ON_HOST: Changes = {("memory", "embeddings"): "host"}
LEANEST: Changes = ON_HOST | {
    ("memory", "activations"): "host",
    ("training", "optimizer"): "paged-adamw-8bit",
    ("memory", "loss_tile"): "16MiB",
}
STREAMED = LEANEST | {("memory", "layers"): "host"}


@dataclass(frozen=True)
class Line:
    """One way to take the step."""

    words: str
    changes: Changes | None
    """Of a recipe that computes every layer twice; None: TRL's own step."""


LINES = (
    Line("TRL, every layer computed twice", None),
    Line("qtune, `lean_step = false`", {("training", "lean_step"): False}),
    Line("qtune, every layer computed twice", {}),
    Line("… embeddings and head in int8", {("memory", "embeddings"): "int8"}),
    Line("… with 8-bit AdamW and the adapter in bf16, as TRL's is", LEAN_ADAPTER | {("memory", "embeddings"): "int8"}),
    Line("… the same with embeddings and head in nf4", LEAN_ADAPTER | {("memory", "embeddings"): "nf4"}),
    Line("… embeddings on the host", ON_HOST),
    Line("… and activations, paged 8-bit AdamW, 16 MiB loss tiles", LEANEST),
    Line("… and the layers (below)", STREAMED),
    Line("qtune, 16 of 32 layers", KEPT | {("training", "gradient_checkpointing"): 16}),
    Line("qtune, nothing computed twice", KEPT),
    Line("… and 16 of 32 layers' weights kept dequantized", KEPT | {("memory", "keep_dequantized"): 16}),
    Line('… and all of them, which is "auto" on 80 GB', KEPT | {("memory", "keep_dequantized"): True}),
)


def recipe_of(rows: int, changes: Changes | None, length: int = LENGTH) -> Recipe:
    """A step of so many rows, every layer computed twice, but for `changes`."""
    recipe = parse_recipe(
        {
            "model": {"base": "traced"},
            "data": {"train": "rows.jsonl", "max_length": length},
            "training": {"batch_size": rows, "micro_batch_size": rows, "gradient_checkpointing": True},
        }
    )
    assert isinstance(recipe, Recipe)
    return changed(recipe, changes) if changes else recipe


def cells(line: Line, rows: int) -> str:
    """ "668 ms | 4,423 | 8.77 GiB"; a star where the card waits for the processor."""
    card = card_named(CARD)
    config = config_of(next(model for model in MODELS if model[0] == MODEL))
    recipe = recipe_of(rows, line.changes)
    plan = make_plan(recipe, card.device(), attention_rule(config))
    traced = (theirs if line.changes is None else ours)(config, recipe, plan, Longest(LENGTH, equal=True))
    found = timed(training_part(traced.work), CARD)
    star = "*" if found.waits_for_processor else ""
    return f"{1e3 * found.seconds:,.0f} ms{star} | {found.launches:,} | {peak_gib(traced):.2f} GiB"


def table() -> str:
    """A line for each way, three columns for each number of rows."""
    columns = [f"{rows} x {LENGTH:,}: time | launches | peak" for rows in ROWS]
    lines = [f"| step | {' | '.join(columns)} |", "| --- |" + " ---: |" * (3 * len(ROWS))]
    for line in LINES:
        print(line.words, file=sys.stderr, flush=True)
        lines.append(f"| {line.words} | {' | '.join(cells(line, rows) for rows in ROWS)} |")
    return "\n".join(lines)


def main() -> None:
    transformers_logging.set_verbosity_error()
    print_or_write(__doc__.splitlines()[0], "step table", table)


if __name__ == "__main__":
    main()
