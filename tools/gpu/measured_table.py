"""The README's tables of what cards measured: measured_table.py tests/measured/h100.json --lean-step false
                                                  measured_table.py tests/measured/h200.json

Every run of the file is traced for the batch that was measured, and set beside the allocator's peak and what the card
had in use.
"""

import argparse
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as the runs had them

from runs import ALONE, GEOMETRIES, RUNS, Run  # noqa: E402
from transformers import LlamaConfig  # noqa: E402

from qtune.device.cards import card_named  # noqa: E402
from qtune.memory.predict import Longest, predict, summarize  # noqa: E402
from qtune.plan import make_plan  # noqa: E402
from qtune.recipe.parse import parse_recipe  # noqa: E402
from qtune.recipe.schema import Recipe  # noqa: E402

GIB = 2**30


def row(run: Run, card: str, lean: bool, measured: dict[str, Any], context: float) -> str:
    """One run: counted and traced, in use and needed."""
    batch = measured["batch"]
    tables = run.recipe("models", "data", "runs")
    tables["data"]["max_length"] = batch["length"]
    tables["training"]["lean_step"] = "auto" if lean else False
    if run is ALONE:  # the card had room for everything
        tables["training"]["gradient_checkpointing"] = False
    recipe = parse_recipe(tables)
    assert isinstance(recipe, Recipe)
    longest = Longest(batch["length"], -(-batch["scored"] // batch["rows"]), equal=not batch["padded"])
    plan = make_plan(recipe, card_named(card).device())
    need = summarize(predict(LlamaConfig(**GEOMETRIES[run.model], pad_token_id=0), recipe, plan, longest)).need
    phases = measured["by_phase"]
    counted = max(phases[name]["allocated_peak_bytes"] for name in ("forward", "backward", "optimizer"))
    used = max(phase["reserved_peak_bytes"] for phase in phases.values()) + context * GIB
    traced = need.traced_bytes + need.workspace_bytes
    cells = [run.name, f"{batch['rows']} x {batch['length']}"]
    for ours, theirs in ((traced, counted), (need.total_bytes, used)):
        cells += [f"{ours / GIB:.3f}", f"{theirs / GIB:.3f}", f"{ours / theirs - 1:+.1%}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--lean-step", choices=("true", "false"), default="true", help="what the runs were made with")
    options = parser.parse_args()
    found = json.loads(options.file.read_text(encoding="utf-8"))
    context = max(one["device_used_gib"] - one["reserved_gib"] for one in found["alone"].values())
    heads = ("run", "batch", "traced + cuBLAS", "allocated", "error", "needed", "in use", "error")
    print(f"| {' | '.join(heads)} |\n| --- | --- |{' ---: |' * 6}")
    for run in (*RUNS, ALONE):
        if measured := found["runs"].get(run.name):
            print(row(run, found["card"], options.lean_step == "true", measured, context), flush=True)


if __name__ == "__main__":
    main()
