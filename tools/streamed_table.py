"""Traces docs/time.md's table of bases larger than the card: python tools/streamed_table.py [--write docs/time.md]

NF4 with double quantization, LoRA of rank 16 on all linear layers, rows of equal length, the layers and everything else
that can wait in the host's memory; time by the data sheet of an H100. Nothing in it was measured. It takes two minutes
of one core.
"""

import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from memory_table import MODELS, config_of  # noqa: E402
from readme_table import print_or_write  # noqa: E402
from step_table import CARD, STREAMED, recipe_of  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

from qtune.device.cards import card_named  # noqa: E402
from qtune.device.rates import data_sheet_rates  # noqa: E402
from qtune.memory.predict import Longest, predict, summarize  # noqa: E402
from qtune.model.load import attention_rule  # noqa: E402
from qtune.plan import make_plan  # noqa: E402
from qtune.startup.allocator import use_expandable_segments  # noqa: E402
from qtune.timing.forecast import step_duration  # noqa: E402

STEPS = (
    ("Llama 3.1 8B", 1, 2048),
    ("Llama 3.1 8B", 16, 2048),
    ("Llama 3.1 70B", 1, 4096),
    ("Llama 3.1 70B", 8, 4096),
)
"""Base, micro-batches of one row, and tokens."""
GIB = 2**30


def line(model: str, micro_batches: int, length: int) -> str:
    """One step of the table."""
    card, config = card_named(CARD), config_of(next(one for one in MODELS if one[0] == model))
    recipe = recipe_of(micro_batches, STREAMED | {("training", "micro_batch_size"): 1}, length)
    plan = make_plan(recipe, card.device(), attention_rule(config))
    print(f"{model}, {micro_batches} x {length}", file=sys.stderr, flush=True)
    traced = predict(config, recipe, plan, Longest(length, equal=True), plays_allocator=True)
    prediction = summarize(traced)
    found = step_duration(prediction, plan, data_sheet_rates(card))
    star = "*" if found.waits_for_processor else ""
    needed, host = prediction.need.total_bytes / GIB, prediction.host_bytes / GIB
    return (
        f"| {model}, {micro_batches} x 1 x {length:,} | {prediction.peak.bytes / GIB:.2f} GiB | {needed:.2f} GiB "
        f"| {host:.1f} GiB | {time_text(found.seconds)}{star} |"
    )


def time_text(seconds: float) -> str:
    """ "283 ms", "3.2 s", "26 s"."""
    return f"{1e3 * seconds:,.0f} ms" if seconds < 1 else f"{seconds:.1f} s" if seconds < 10 else f"{seconds:,.0f} s"


def table() -> str:
    """A line for each step."""
    head = ["| base, micro-batches x rows x tokens | peak | needed on the card | on the host | a step |"]
    return "\n".join([*head, "| --- | ---: | ---: | ---: | ---: |", *(line(*step) for step in STEPS)])


def main() -> None:
    use_expandable_segments()
    transformers_logging.set_verbosity_error()
    print_or_write(__doc__.splitlines()[0], "streamed table", table)


if __name__ == "__main__":
    main()
