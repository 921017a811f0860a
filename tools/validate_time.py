"""Real training steps on the device that is here, beside the time that is predicted for them.

    qtune doctor --measure                                    # once: predictions from measured rates as well
    python tools/validate_time.py --model "SmolLM2 135M" --rows 2 --length 256
    python tools/validate_time.py --measure                   # rates taken just before the steps, and again after them
    python tools/validate_time.py --base FOLDER --rows 4 --length 2048 --kernels --json time.json

The steps are those of `qtune run`: its trainer, on random rows of the asked length (--masked: of unequal lengths, the
longest as asked). --model makes a checkpoint of random weights of that geometry first, which time does not depend on;
--base takes one that is there. Time is taken from the end of one step to the end of a later one, with nothing waited
for in between; on one thread of a processor it is the process's own, so that other programs do not count. --kernels
also profiles two steps on a card: what its kernels take, and how many there are.
"""

import argparse
import contextlib
import itertools
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import torch  # noqa: E402
from bare_trainer import bare_trainer  # noqa: E402
from memory_table import MODELS  # noqa: E402
from random_checkpoint import random_checkpoint  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from tokenizers.models import WordLevel  # noqa: E402
from transformers import PreTrainedTokenizerFast, TrainerCallback  # noqa: E402

from qtune.adapter.attach import attach_adapter  # noqa: E402
from qtune.device.cards import card_named  # noqa: E402
from qtune.device.present import Device, present_device  # noqa: E402
from qtune.device.rates import Rates, data_sheet_rates  # noqa: E402
from qtune.errors import InputError  # noqa: E402
from qtune.memory.predict import Longest, predict, summarize  # noqa: E402
from qtune.model.load import attention_rule, load_base, load_config  # noqa: E402
from qtune.plan import Plan, make_plan  # noqa: E402
from qtune.recipe.parse import parse_recipe  # noqa: E402
from qtune.recipe.schema import Recipe  # noqa: E402
from qtune.startup.allocator import use_expandable_segments  # noqa: E402
from qtune.startup.quiet import quiet_libraries, quiet_loading  # noqa: E402
from qtune.timing.forecast import step_duration  # noqa: E402
from qtune.timing.known import known_rates  # noqa: E402
from qtune.timing.measure import measured_rates  # noqa: E402

UNCOUNTED = 3
"""First steps: memory is taken, kernels are chosen."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", default="SmolLM2 135M", help=", ".join(model[0] for model in MODELS))
    which.add_argument("--base", type=Path, help="a folder with a checkpoint")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--masked", action="store_true", help="rows of unequal lengths")
    parser.add_argument("--checkpointing", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--steps", type=int, default=8, help="counted ones")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--measure", action="store_true", help="measure the rates beside the steps")
    parser.add_argument("--kernels", action="store_true", help="also profile two steps on a card")
    parser.add_argument("--json", type=Path, help="write the result here too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    use_expandable_segments()
    quiet_libraries()
    quiet_loading()
    with tempfile.TemporaryDirectory() as folder:
        base = options.base or random_checkpoint(options.model, Path(folder) / "model")
        found = compared(base, options, Path(folder))
    text = json.dumps(found, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")


def compared(base: Path, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything that was predicted and measured."""
    recipe = recipe_of(base, options)
    device = present_device()
    config = load_config(recipe.model)
    plan = make_plan(recipe, device, attention_rule(config))
    lengths = row_lengths(options)
    seconds = clock_for(device)
    own = [measured_rates(device, seconds)] if options.measure else []
    clock = measured_steps(recipe, plan, folder, lengths, config.vocab_size, options)
    own += [measured_rates(device, seconds)] if options.measure else []
    longest = Longest(options.length, -(-(sum(lengths) - len(lengths)) // len(lengths)), equal=not options.masked)
    prediction = summarize(predict(config, recipe, plan, longest, plays_allocator=False))
    measured = clock.seconds
    found: dict[str, Any] = {
        "device": device.name,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "base": str(options.base or options.model),
        "batch": {"rows": options.rows, "length": options.length, "masked": options.masked},
        "compute_dtype": plan.compute_dtype,
        "gradient_checkpointing": plan.gradient_checkpointing,
        "measured_seconds": round(measured, 4),
        "measured_each": [round(one, 4) for one in clock.each],
        "tokens_per_second": round(sum(lengths) / measured, 1),
        "predicted": [],
        **({"profiled": clock.profiled} if clock.profiled else {}),
    }
    for rates in [*all_rates(device), *own]:
        step = step_duration(prediction, plan, rates)
        found["predicted"].append(
            {
                "source": rates.source,
                "seconds": round(step.seconds, 4),
                "device_seconds": round(step.device_seconds, 4),
                "processor_seconds": round(step.processor_seconds, 4),
                "launches": step.launches,
                "error": round(step.seconds / measured - 1, 4),
                "rates": rates.to_json(),
            }
        )
    return found


def clock_for(device: Device) -> Callable[[], float]:
    """On one thread of a processor what other programs do meanwhile can be left out, and is."""
    alone = device.kind == "cpu" and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter


def all_rates(device: Device) -> list[Rates]:
    """The data sheet's, where there is one, and those that were measured here."""
    found = []
    with contextlib.suppress(InputError):  # a processor has none
        found.append(data_sheet_rates(card_named(device.name)))
    known = known_rates(device)
    return [*found, *([known] if known is not None and known.kind == "measured" else [])]


def recipe_of(base: Path, options: argparse.Namespace) -> Recipe:
    given = {} if options.checkpointing == "auto" else {"gradient_checkpointing": options.checkpointing == "on"}
    recipe = parse_recipe(
        {
            "model": {"base": str(base)},
            # A checkpoint that goes away again leaves nothing behind in the cache.
            "quantization": {"kind": "nf4", "keep_copy": options.base is not None},
            "data": {"train": "random.jsonl", "max_length": options.length},
            "training": {
                "batch_size": options.rows,
                "micro_batch_size": options.rows,
                "steps": UNCOUNTED + options.steps + (3 if options.kernels else 0),
                "checkpoint_every": 1000,
                "schedule": "constant",
                "warmup": 0.0,
                **given,
            },
        }
    )
    assert isinstance(recipe, Recipe)
    return recipe


def row_lengths(options: argparse.Namespace) -> list[int]:
    """Of the rows of one step."""
    shorter = options.length - options.length // 4 if options.masked else options.length
    return [options.length, *([shorter] * (options.rows - 1))]


@dataclass
class Clock(TrainerCallback):
    """When steps end; the card is waited for before the first counted one and after the last."""

    counted: int
    kernels: bool
    clock: Callable[[], float]
    ends: list[float] = field(default_factory=list)
    profiled: dict[str, Any] = field(default_factory=dict)
    profiler: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step = state.global_step
        if step in (UNCOUNTED, UNCOUNTED + self.counted):
            wait()
        self.ends.append(self.clock())
        if not (self.kernels and torch.cuda.is_available()):
            return
        if step == UNCOUNTED + self.counted:
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self.profiler.__enter__()
            self.began = time.perf_counter()
        elif step == UNCOUNTED + self.counted + 2:
            wait()
            wall = time.perf_counter() - self.began
            self.profiler.__exit__(None, None, None)
            self.profiled = profile_of(self.profiler, wall, steps=2)

    @property
    def seconds(self) -> float:
        """Of a step, the mean of the counted ones."""
        return (self.ends[UNCOUNTED + self.counted - 1] - self.ends[UNCOUNTED - 1]) / self.counted

    @property
    def each(self) -> list[float]:
        counted = self.ends[UNCOUNTED - 1 : UNCOUNTED + self.counted]
        return [after - before for before, after in itertools.pairwise(counted)]


def profile_of(profiler: Any, wall: float, steps: int) -> dict[str, Any]:
    """Kernels of one step: seconds, how many, and the longest by name."""
    kernels = [one for one in profiler.key_averages() if "CUDA" in str(getattr(one, "device_type", ""))]
    longest = sorted(kernels, key=lambda one: -one.self_device_time_total)[:60]
    return {
        "wall_seconds": round(wall / steps, 4),
        "kernel_seconds": round(sum(one.self_device_time_total for one in kernels) / 1e6 / steps, 4),
        "kernels": sum(one.count for one in kernels) // steps,
        "longest": [
            [round(one.self_device_time_total / 1e3 / steps, 3), one.count / steps, one.key[:120]] for one in longest
        ],
    }


def measured_steps(
    recipe: Recipe, plan: Plan, folder: Path, lengths: list[int], vocabulary: int, options: argparse.Namespace
) -> Clock:
    """Runs the recipe's steps on random rows."""
    torch.manual_seed(0)
    model = attach_adapter(load_base(recipe.model, recipe.quantization, plan), recipe.adapter, plan)
    rows = [torch.randint(3, vocabulary, (length,)).tolist() for length in lengths]
    clock = Clock(options.steps, options.kernels, clock_for(plan.device))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"end": 0})), eos_token="end", pad_token="end"
    )
    labelled = {"input_ids": rows, "labels": rows}
    trainer = bare_trainer(model, recipe, plan, tokenizer, labelled, folder / "run", [clock])
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ in ("PrinterCallback", "ProgressCallback"):
            trainer.remove_callback(callback)
    trainer.train()
    return clock


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
