"""Each decoder layer through torch.compile on a CPU, beside the layers as they are: what it gives, and when it pays.

    python tools/bench_compiled.py [--model "Llama 3.2 1B"] [--layers 2] [--dtype bfloat16] [--rows 2] [--length 256]

A step is forward, backward and update of full rows, nothing computed twice, LoRA of rank 16 on random NF4 weights. The
ways take steps in turn, peft's layers and qtune's, each as they are and compiled. Times are the processor's own, the
compiler's included, which runs as a child of this process and begins with an empty cache. Printed: what compiling
took, what a compiled step takes of one that is not, and after how many steps the compiler's time has come back. A C++
compiler is needed.
"""

import argparse
import os
import resource
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch._inductor.config
from bench_card import parts, random_model
from bench_other_ways import forward_and_backward
from memory_table import MODELS, config_of

from qtune.adapter.lean import install_lean_step
from qtune.memory.predict import optimizer_of
from qtune.startup.quiet import quiet_libraries

NOT_COUNTED = 3


@dataclass
class Way:
    """A model and its steps."""

    step: Callable[[], torch.Tensor]
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def take(self) -> None:
        """One step, and what the processor spent on it, compilers included."""
        began = worked_seconds()
        loss = self.step()
        self.seconds.append(worked_seconds() - began)
        self.losses.append(float(loss))

    @property
    def counted(self) -> list[float]:
        """Without the first ones."""
        return self.seconds[NOT_COUNTED:]


def main() -> None:
    """Steps in turn; what they came to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=[model[0] for model in MODELS], default="SmolLM2 135M")
    parser.add_argument("--layers", type=int, help="of the model's own number")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=7, help=f"counted ones, after {NOT_COUNTED} that are not")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    quiet_libraries()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # nothing in it has been compiled before
        torch._inductor.config.compile_threads = 1  # compilers are children of this process, whose time is counted
        ways = steps_in_turn(options)
    print(f"{options.model}, {options.layers or 'all'} layers, {options.rows} x {options.length}, {options.dtype}")
    for name, way in ways.items():
        print(
            f"{name:16} {statistics.median(way.counted):7.3f} s ({min(way.counted):.3f} to {max(way.counted):.3f}), "
            f"first steps {', '.join(f'{s:.1f}' for s in way.seconds[:NOT_COUNTED])} s, "
            f"loss {way.losses[0]:.4f} -> {way.losses[-1]:.4f}"
        )
    for plain, compiled in (("peft", "peft, compiled"), ("qtune", "peft, compiled"), ("qtune", "qtune, compiled")):
        if compiled in ways:
            print(verdict((plain, ways[plain]), (compiled, ways[compiled])))


def steps_in_turn(options: argparse.Namespace) -> dict[str, Way]:
    """All steps of each way."""
    ways = {
        f"{whose}{how}": Way(step_of(options, lean=whose == "qtune", compiled=bool(how)))
        for whose in ("peft", "qtune")
        for how in ("", ", compiled")
    }
    for _ in range(NOT_COUNTED + options.steps):
        for name, way in list(ways.items()):
            try:
                way.take()
            except Exception as error:  # whatever the compiler says is the result
                print(f"{name}: step {len(way.seconds) + 1} failed: {type(error).__name__}: {str(error)[:400]}")
                del ways[name]
    return ways


def verdict(before: tuple[str, Way], after: tuple[str, Way]) -> str:
    """What compiling took, what a step takes of one that is not compiled, and when that pays."""
    (whose, plain), (name, compiled) = before, after
    ratios = [its / theirs for theirs, its in zip(plain.counted, compiled.counted, strict=True)]
    usual = statistics.median(compiled.counted)
    spent = sum(seconds - usual for seconds in compiled.seconds[:NOT_COUNTED])
    saved = statistics.median(plain.counted) - usual
    pays = f"pays after {spent / saved:,.0f} steps" if saved > 0 else "never pays"
    return (
        f"{name}: in {spent:.1f} s; a step takes {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f}) of {whose}'s; {pays}"
    )


def step_of(options: argparse.Namespace, *, lean: bool, compiled: bool) -> Callable[[], torch.Tensor]:
    """Forward, backward and update of a model of its own; the same weights and rows in each way."""
    config = config_of(next(model for model in MODELS if model[0] == options.model))
    geometry = {
        name: getattr(config, name)
        for name in (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "vocab_size",
        )
    }  # fmt: skip
    if options.layers:
        geometry["num_hidden_layers"] = options.layers
    dtype = getattr(torch, options.dtype)
    recipe, plan = parts(options.rows, options.length, dtype, "kept")
    model = random_model(geometry, recipe, plan)
    model.train()
    if lean:
        install_lean_step(model, dtype)
    if compiled:
        for layer in model.get_base_model().model.layers:
            layer.forward = torch.compile(layer.forward)
    torch.manual_seed(1)
    ids = torch.randint(3, geometry["vocab_size"], (options.rows, options.length))
    optimizer = optimizer_of(plan)([parameter for parameter in model.parameters() if parameter.requires_grad])
    forward = forward_and_backward(model, ids, plan.loss_tile_bytes, dtype)

    def step() -> torch.Tensor:
        loss = forward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def worked_seconds() -> float:
    """Of this process and of its children that have ended."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


if __name__ == "__main__":
    main()
