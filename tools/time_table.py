"""Traces docs/time.md's table of times: python tools/time_table.py [--write docs/time.md]

Every figure is the time of one QLoRA step (NF4, double quantization, LoRA rank 16 on all linear layers, gradient
checkpointing, ROWS x LENGTH tokens, all rows equally long, every token scored) on a named card: the larger of what its
kernels take at the rates of its data sheet and what the processor takes to launch them. Nothing in it was measured.
"""

import sys
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from memory_table import MODELS, config_of, timed  # noqa: E402
from readme_table import print_or_write  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

from qtune.device.cards import card_named  # noqa: E402
from qtune.memory.cached import traced_work  # noqa: E402
from qtune.memory.predict import Longest  # noqa: E402
from qtune.memory.tracing.work import Work  # noqa: E402
from qtune.plan import make_plan  # noqa: E402
from qtune.recipe.parse import parse_recipe  # noqa: E402
from qtune.recipe.schema import Recipe  # noqa: E402
from qtune.timing.price import training_part  # noqa: E402

ROWS, LENGTH = 4, 2048
CARDS = ("RTX 3060", "RTX 3090", "RTX 4090", "A100 80GB", "H100")


def recipe_of() -> Recipe:
    recipe = parse_recipe(
        {
            "model": {"base": "traced"},
            "data": {"train": "rows.jsonl", "max_length": LENGTH},
            "training": {"batch_size": ROWS, "micro_batch_size": ROWS, "gradient_checkpointing": True},
        }
    )
    assert isinstance(recipe, Recipe)
    return recipe


def work_of(model: tuple[Any, ...]) -> Work:
    """What a step gives any of the cards to do: all of them compute in bfloat16."""
    recipe = recipe_of()
    plan = make_plan(recipe, card_named(CARDS[-1]).device())
    return training_part(traced_work(config_of(model), recipe, plan, Longest(LENGTH, equal=True)))


def cell(work: Work, card_name: str) -> str:
    """ "1.19 s, 6,900/s"; a star where the card waits for the processor."""
    found = timed(work, card_name)
    star = "*" if found.waits_for_processor else ""
    return f"{found.seconds:.2f} s, {ROWS * LENGTH / found.seconds:,.0f}/s{star}"


def table() -> str:
    """Rows of models, columns of cards, and what the figures are."""
    models = [model for model in MODELS if "70B" not in model[0]]  # fits none of the cards
    lines = [f"| model | {' | '.join(CARDS)} |", "| --- |" + " ---: |" * len(CARDS)]
    for model in models:
        print(model[0], file=sys.stderr, flush=True)
        work = work_of(model)
        lines.append(f"| {model[0]} | {' | '.join(cell(work, card) for card in CARDS)} |")
    lines += [
        "",
        f"Seconds of a step of {ROWS} x {LENGTH:,} tokens, and tokens per second; * the processor is the limit, at the",
        "time for a launch that the one beside the H100 needed. The lean step with every layer computed twice: traced,",
        "priced by data sheets (`tools/time_table.py`). Whether a step fits a card: the table in the README.",
    ]
    return "\n".join(lines)


def main() -> None:
    transformers_logging.set_verbosity_error()
    print_or_write(__doc__.splitlines()[0], "time table", table)


if __name__ == "__main__":
    main()
