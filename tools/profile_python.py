"""What a training step costs in Python: a model as deep as Llama 3.1 8B and so narrow that its products are nothing.

    python tools/profile_python.py [--steps 5] [--layers 32]

On a card a step takes no less than the processor needs to ask for it, and how wide the model is does not change that.
Two tables, of processor time on one thread. The first takes one thing after the other out of a step of peft's layers,
in turn, beside qtune's own step: checkpointing, autocast, the adapter. The second says in whose files the time of a
step goes, by Python's own profiler, which lengthens what is called often: shares, not seconds. "operations" are
PyTorch's in C++, of which a card's launches are a part, "Python's own" what the interpreter brings (isinstance, len …).
"""

import argparse
import cProfile
import pstats
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import torch
import transformers
from bench_card import parts, random_model
from bench_other_ways import forward_and_backward

import qtune
from qtune.adapter.lean import install_lean_step
from qtune.memory.predict import optimizer_of
from qtune.startup.quiet import quiet_libraries

NARROW = {
    "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 256,
}  # fmt: skip
ROWS, LENGTH = 1, 16

Step = Callable[[], object]

FOLDERS = {
    Path(str(package.__file__)).parent: package.__name__ for package in (peft, bitsandbytes, transformers, qtune)
}
TORCH = Path(torch.__file__).parent
PARTS = {
    "nn/modules": "modules and their hooks", "utils/checkpoint.py": "checkpointing",
    "utils/_checkpoint_utils.py": "checkpointing", "amp": "autocast", "autograd": "autograd", "optim": "optimizer",
}  # fmt: skip
"""Of PyTorch's folder."""


def place_of(file: str, function: str) -> str:
    """Whose a function is, by its file; those in C have none, and name themselves."""
    if file == "~":
        is_torch = any(word in function for word in ("torch", "_VariableFunctions", "TensorBase", "run_backward"))
        return "operations" if is_torch else "Python's own"
    path = Path(file)
    if path.is_relative_to(TORCH):
        inside = path.relative_to(TORCH).as_posix()
        return next((PARTS[part] for part in PARTS if inside.startswith(part)), "other PyTorch")
    return next((name for folder, name in FOLDERS.items() if path.is_relative_to(folder)), "other files")


def step_of(layers: int, *, lean: bool, checkpointed: bool, autocast: bool, adapter: bool = True) -> Step:
    """Forward, backward, clipping and update of one row."""
    dtype = torch.bfloat16 if autocast else torch.float32
    recipe, plan = parts(ROWS, LENGTH, dtype, "qtune")
    model = random_model(NARROW | {"num_hidden_layers": layers}, recipe, plan)
    if not adapter:
        model = model.unload()
        model.get_base_model = lambda: model
        model.lm_head.weight.requires_grad_(True)
        model.model.norm.weight.requires_grad_(True)  # something to train, behind all layers
    model.train()
    model.enable_input_require_grads()
    if checkpointed:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if lean:
        install_lean_step(model, dtype)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimizer_of(plan)(trained)
    torch.manual_seed(1)
    ids = torch.randint(3, NARROW["vocab_size"], (ROWS, LENGTH))
    take = forward_and_backward(model, ids, plan.loss_tile_bytes, dtype)

    def step() -> None:
        take()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    return step


def in_turn(steps: dict[str, Step], count: int) -> dict[str, list[float]]:
    """Seconds of processor time of each, in alternation."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(count):
        for name, step in steps.items():
            began = time.process_time()
            step()
            taken[name].append(time.process_time() - began)
    return taken


def by_place(step: Step) -> Counter[str]:
    """Seconds inside of each library's own functions, as the profiler has them."""
    profile = cProfile.Profile()
    profile.enable()
    step()
    profile.disable()
    found: Counter[str] = Counter()
    entries: dict[tuple[str, int, str], Any] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    for (file, _, function), (_, _, own, _, _) in entries.items():
        found[place_of(file, function)] += own
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5, help="counted steps of each")
    parser.add_argument("--layers", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet_libraries()
    usual = {"lean": False, "checkpointed": True, "autocast": True}
    steps = {
        "peft's layers": step_of(options.layers, **usual),
        "… nothing computed twice": step_of(options.layers, **usual | {"checkpointed": False}),
        "… without autocast": step_of(options.layers, **usual | {"autocast": False}),
        "… without the adapter": step_of(options.layers, **usual, adapter=False),
        "qtune's step": step_of(options.layers, **usual | {"lean": True}),
        "qtune's, nothing computed twice": step_of(options.layers, **usual | {"lean": True, "checkpointed": False}),
    }
    taken = in_turn(steps, options.steps)
    whole = taken["peft's layers"]
    print(f"{options.layers} layers, one thread, processor time of a step, medians of {options.steps}")
    for name, seconds in taken.items():
        ratios = [its / theirs for its, theirs in zip(seconds, whole, strict=True)]
        print(f"{name:34}{1000 * statistics.median(seconds):7.1f} ms{statistics.median(ratios):7.2f} of peft's")
    for name in ("peft's layers", "qtune's step"):
        places = by_place(steps[name])
        print(f"\n{name}: where the time goes")
        for place, seconds in places.most_common():
            print(f"{place:34}{seconds / places.total():7.1%}")


if __name__ == "__main__":
    main()
