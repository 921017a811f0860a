"""What a training step gives a card to do, ours beside TRL's own: launches, bytes, FLOPs and time, without a card.

    python tools/trace_cost.py --model "Llama 3.1 8B" --rows 4 --length 2048 [--scored 6642] [--gpu H100]
    python tools/trace_cost.py --recipe recipe.toml --length 2048 [--set training.micro_batch_size=2]
    python tools/trace_cost.py --config FOLDER --by op --top 40

Both steps are traced on the same batch: ours as `qtune run` takes it under the recipe, TRL's as its SFTTrainer (1.16)
does it by default, with the same adapter, whose weights it makes bfloat16. The time of a card is its data sheet's, or
that of `qtune doctor --measure` where this device is asked about; the processor's is launches times the time of one.
--masked: rows of unequal length, so that attention reads a mask. Nothing is downloaded, and no weights are needed.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Hashable
from dataclasses import asdict
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from memory_table import MODELS, config_of  # noqa: E402
from transformers import AutoConfig, PretrainedConfig  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

from qtune.device.cards import card_named  # noqa: E402
from qtune.device.rates import Rates  # noqa: E402
from qtune.errors import QtuneError  # noqa: E402
from qtune.memory.predict import Longest, card_of, predict, training_step  # noqa: E402
from qtune.memory.tracing.trace import Traced  # noqa: E402
from qtune.memory.tracing.work import Kernel, Place, Work  # noqa: E402
from qtune.memory.trl_step import trace_trl  # noqa: E402
from qtune.model.load import attention_rule, load_config  # noqa: E402
from qtune.plan import Plan, make_plan  # noqa: E402
from qtune.recipe.file import load_recipe  # noqa: E402
from qtune.recipe.parse import parse_recipe  # noqa: E402
from qtune.recipe.schema import Recipe  # noqa: E402
from qtune.timing.known import known_rates  # noqa: E402
from qtune.timing.price import Cost, Duration, cost_by, duration, training_part  # noqa: E402

Group = Callable[[Place, Kernel], Hashable]

BY: dict[str, Group] = {
    "kind": lambda place, kernel: kernel.kind,
    "phase": lambda place, kernel: phase_of(place),
    "op": lambda place, kernel: f"{kernel.kind}: {kernel.op}{' (scattered)' if kernel.scattered else ''}",
    "op and phase": lambda place, kernel: f"{phase_of(place)}, {kernel.kind}: {kernel.op}",
}


def phase_of(place: Place) -> str:
    """ "forward", "backward, recomputed", "forward, loss"."""
    if place.recomputed:
        return f"{place.phase}, recomputed"
    return f"{place.phase}, loss" if place.part == "loss" else place.phase


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    names = ", ".join(model[0] for model in MODELS)
    which.add_argument("--model", default="Llama 3.1 8B", help=f"a published geometry: {names}")
    which.add_argument("--config", type=Path, help="a folder with a config.json")
    which.add_argument("--recipe", type=Path, help="a recipe: its model, adapter and choices")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe")
    parser.add_argument("--rows", type=int, help="of a micro-batch; 4, or the recipe's")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--scored", type=int, help="labelled positions of the whole batch; all of them")
    parser.add_argument("--masked", action="store_true", help="rows of unequal length")
    parser.add_argument("--no-checkpointing", action="store_true")
    parser.add_argument("--keep-dequantized", type=int, metavar="N", help="weights of the first N layers; none")
    parser.add_argument("--gpu", default="H100", help="whose rates are taken")
    parser.add_argument("--by", choices=BY, action="append", help="kind and phase, if not given")
    parser.add_argument("--top", type=int, default=30, help="lines of each table")
    parser.add_argument("--only", choices=("qtune", "TRL"), help="one of the two steps")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.set and options.recipe is None:
        parser.error("--set changes a recipe; name one with --recipe")
    for name in ("rows", "length", "scored", "top"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} must be 1 at least")
    transformers_logging.set_verbosity_error()
    try:
        card = card_named(options.gpu)
        config, recipe = subject(options)
        plan = make_plan(recipe, card.device(), attention_rule(config))
    except (QtuneError, OSError, ValueError) as error:
        sys.exit(f"trace_cost: {error}")
    rows = plan.micro_batch_size
    if options.scored is not None and options.scored > rows * options.length:
        parser.error(f"--scored: {rows} x {options.length} tokens have no more than {rows * options.length:,} to score")
    each = None if options.scored is None else -(-options.scored // rows)
    longest = Longest(options.length, each, equal=not options.masked)
    rates = known_rates(card.device())
    assert rates is not None  # every card of the table has a data sheet
    traced = {
        name: step(config, recipe, plan, longest)
        for name, step in (("qtune", ours), ("TRL", theirs))
        if options.only in (None, name)
    }
    works = {name: training_part(found.work) for name, found in traced.items()}
    if options.json:
        print(json.dumps(as_json(works, rates, options.by), indent=1))
        return
    what = options.recipe or options.config or options.model
    mask = "with a mask" if options.masked and rows > 1 else "no mask"
    print(f"{what}, {rows} x {options.length} tokens ({mask}) on a {card.name}; {rates.source}")
    for by in options.by or ("kind", "phase"):
        print()
        print("\n".join(table(by, {name: cost_by(work, rates, BY[by]) for name, work in works.items()}, options.top)))
    print()
    for name, work in works.items():
        found = duration(cost_by(work, rates, BY["kind"]).values(), rates)
        print(f"{name:6s} {in_words(found, rows * options.length)}; peak {peak_gib(traced[name]):.2f} GiB traced")


def subject(options: argparse.Namespace) -> tuple[PretrainedConfig, Recipe]:
    """The model's configuration and the recipe under which its step is taken."""
    if options.recipe is not None:
        changes = list(options.set)
        if options.rows:
            changes += [f"training.batch_size={options.rows}", f"training.micro_batch_size={options.rows}"]
        if options.no_checkpointing:
            changes.append("training.gradient_checkpointing=false")
        if options.keep_dequantized is not None:
            changes.append(f"memory.keep_dequantized={options.keep_dequantized or 'false'}")
        recipe = load_recipe(options.recipe, changes, need_rows=False).recipe
        return load_config(recipe.model), recipe
    rows = options.rows or 4
    recipe = parse_recipe(
        {
            "model": {"base": "traced"},
            "data": {"train": "rows.jsonl", "max_length": options.length},
            "training": {
                "batch_size": rows,
                "micro_batch_size": rows,
                "gradient_checkpointing": not options.no_checkpointing,
            },
            "memory": {"keep_dequantized": options.keep_dequantized or False},
        }
    )
    if options.config is not None:
        return AutoConfig.from_pretrained(options.config), recipe
    found = [model for model in MODELS if model[0].lower() == options.model.lower()]
    if not found:
        sys.exit(f"--model {options.model!r}: known are {', '.join(model[0] for model in MODELS)}")
    return config_of(found[0]), recipe


def ours(config: PretrainedConfig, recipe: Recipe, plan: Plan, longest: Longest) -> Traced:
    return predict(config, recipe, plan, longest, plays_allocator=False)


def theirs(config: PretrainedConfig, recipe: Recipe, plan: Plan, longest: Longest) -> Traced:
    step = training_step(recipe, plan, longest)
    return trace_trl(config, recipe, plan, step, card_of(plan.device), plays_allocator=False)


def table(by: str, costs: dict[str, dict[Hashable, Cost]], top: int) -> list[str]:
    """Lines with the most expensive groups first, each step's figures in a block of columns."""
    names = list(costs)
    groups = sorted(
        {group for found in costs.values() for group in found},
        key=lambda group: -max(found.get(group, Cost()).seconds for found in costs.values()),
    )
    width = max(len(str(group)) for group in (*groups, "total")) + 2
    columns = f"{'launches':>9s}{'GB':>9s}{'TFLOP':>8s}{'ms':>9s}"
    lines = [
        f"{'':{width}s}" + " ".join(f"{name:>35s}" for name in names),
        f"{by:{width}s}" + " ".join(columns for _ in names),
    ]
    shown = [(str(group), [found.get(group, Cost()) for found in costs.values()]) for group in groups[:top]]
    total = ("total", [sum(found.values(), Cost()) for found in costs.values()])
    for group, figures in [*shown, total]:
        cells = (f"{c.launches:9,d}{c.bytes / 1e9:9.1f}{c.flops / 1e12:8.1f}{1e3 * c.seconds:9.1f}" for c in figures)
        lines.append(f"{group:{width}s}" + " ".join(cells))
    return lines


def in_words(found: Duration, tokens: int) -> str:
    limit = "processor" if found.waits_for_processor else "card"
    return (
        f"{1e3 * found.seconds:,.0f} ms a step, {tokens / found.seconds:,.0f} tokens/s; the {limit} is the limit: "
        f"{1e3 * found.device_seconds:,.0f} ms of the card, {1e3 * found.processor_seconds:,.0f} of the processor for "
        f"{found.launches:,} launches"
    )


def peak_gib(traced: Traced) -> float:
    return float(traced.history.total.max()) / 2**30


def as_json(works: dict[str, Work], rates: Rates, by: list[str] | None) -> dict[str, Any]:
    found: dict[str, Any] = {"rates": rates.to_json()}
    for name, work in works.items():
        total = duration(cost_by(work, rates, BY["kind"]).values(), rates)
        found[name] = {"step": {**asdict(total), "seconds": total.seconds}} | {
            group: {str(key): asdict(cost) for key, cost in cost_by(work, rates, BY[group]).items()}
            for group in by or BY
        }
    return found


if __name__ == "__main__":
    main()
