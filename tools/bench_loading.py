"""What the first and the second start of a base cost: seconds, bytes of the host and, where there is one, of the card.

    python tools/bench_loading.py BASE [--kind nf4|fp4|int8]

The first start quantizes and keeps a copy, the second reads it; each in a process of its own, in a cache of its own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path


def main() -> None:
    """Two starts, and a line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("base", help="a folder, or a name as model.base takes it")
    parser.add_argument("--kind", default="nf4", choices=("nf4", "fp4", "int8"))
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.once:
        print(json.dumps(_start(given.base, given.kind)))
        return
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(2):
            command = [sys.executable, __file__, given.base, "--kind", given.kind, "--once"]
            done = subprocess.run(
                command, env=os.environ | {"QTUNE_CACHE": cache}, capture_output=True, text=True, check=False
            )
            print(done.stdout.strip() or done.stderr)


def _anonymous_bytes() -> int:
    """Of this process, without what is mapped from files, which the system takes back when it needs room."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/self/status has no RssAnon: this needs Linux")


def _start(base: str, kind: str) -> dict[str, float | str]:
    import torch

    from qtune.device.present import present_device
    from qtune.model.load import load_base
    from qtune.plan import make_plan
    from qtune.recipe.parse import parse_recipe

    table = {"kind": kind, "minimum_share": 0.0}
    recipe = parse_recipe({"model": {"base": base}, "data": {"train": "none.jsonl"}, "quantization": table})
    device = present_device()
    plan = make_plan(recipe, device)
    before, peak, over = _anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.is_set():
            peak = max(peak, _anonymous_bytes())
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began, used = time.perf_counter(), time.process_time()
    network = load_base(recipe.model, recipe.quantization, plan)
    seconds, processor = time.perf_counter() - began, time.process_time() - used
    over.set()
    watcher.join()
    weights = {name: tensor for name, tensor in network.state_dict().items() if isinstance(tensor, torch.Tensor)}
    told: dict[str, float | str] = {
        "device": device.name,
        "seconds": round(seconds, 2),
        "processor_seconds": round(processor, 2),
        "model_mib": round(sum(tensor.nbytes for tensor in weights.values()) / 2**20, 1),
        "largest_tensor_mib": round(max(tensor.nbytes for tensor in weights.values()) / 2**20, 1),
        "host_peak_mib": round((peak - before) / 2**20, 1),
        "host_left_mib": round((_anonymous_bytes() - before) / 2**20, 1),
    }
    if device.kind == "cuda":
        told["card_peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return told


if __name__ == "__main__":
    main()
