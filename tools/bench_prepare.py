"""Preparing a large file: speed, cores, memory, and what a second start costs.

    python tools/bench_prepare.py [--rows 100000] [--trl]

Rows: questions about the standard library's docstrings (tools/make_docstring_data.py), again and again with a number
that makes each of them its own. They are rendered with SmolLM2's chat template, tokenized, masked and inspected as at
the start of a run, twice: with an empty cache, and with what the first time has left, each time in a new process.
Printed for each: seconds of the whole process and of the preparation in it, processor seconds, and the peak of the
proportional set size (PSS) summed over the process and its workers, which counts shared pages once. Linux only.
With --trl the same rows are also prepared by TRL's own SFTTrainer, as prompts and completions of which the completion
is scored, once, on as many processes as there are cores; the model beside it is a tiny one.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from make_docstring_data import make_rows

TAKE_A_LOOK_SECONDS = 0.1


def main() -> None:
    """Writes the rows, prepares them twice and prints what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--trl", action="store_true", help="also measure TRL's own preparation")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        (prepare_with_trl if options.trl else prepare_and_inspect)(options.worker)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_rows(folder / "rows.jsonl", options.rows)
        print(f"{options.rows:,} rows, {size / 2**20:.0f} MiB")
        for what in ("first time", "second time", *(["TRL"] if options.trl else [])):
            flag = ["--trl"] if what == "TRL" else []
            wall, cpu, peak, inside = watched([sys.executable, __file__, *flag, "--worker", str(folder)])
            prepared = (
                f"{inside['seconds']:.1f} s to prepare {inside['examples']:,} examples, {inside['tokens']:,} tokens"
            )
            print(f"{what}: {wall:.1f} s, of these {prepared}; {cpu:.1f} s of CPU; peak {peak / 2**20:.0f} MiB")


def write_rows(file: Path, count: int) -> int:
    """Writes `count` different rows; returns their bytes."""
    rows = make_rows()
    with file.open("w", encoding="utf-8") as stream:
        for number in range(count):
            question, answer = rows[number % len(rows)]["messages"]
            asked = {"role": "user", "content": f"({number}) {question['content']}"}
            stream.write(json.dumps({"messages": [asked, answer]}) + "\n")
    return file.stat().st_size


def watched(command: list[str]) -> tuple[float, float, int, dict[str, float]]:
    """Wall and CPU seconds of a command, the peak PSS of its processes in bytes, and the JSON that it printed."""
    began = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak, cpu = 0, dict[int, float]()
    while child.poll() is None:
        processes = family(child.pid)
        peak = max(peak, sum(map(pss_bytes, processes)))
        cpu |= {pid: max(cpu_seconds(pid), cpu.get(pid, 0)) for pid in processes}
        time.sleep(TAKE_A_LOOK_SECONDS)
    wall = time.perf_counter() - began
    if child.returncode or child.stdout is None:
        sys.exit(child.returncode)
    return wall, sum(cpu.values()), peak, json.loads(child.stdout.read())


def family(pid: int) -> list[int]:
    """A process and those that it started, at any depth."""
    found = [pid]
    for one in found:
        for task in Path(f"/proc/{one}/task").glob("*/children"):
            try:
                found += [int(word) for word in task.read_text().split()]
            except OSError:  # it has ended meanwhile
                continue
    return found


def pss_bytes(pid: int) -> int:
    """The proportional set size of a process; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, without its children (proc(5), fields 14 and 15); 0 when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def prepare_and_inspect(folder: Path) -> None:
    """What a run does with its rows before anything is trained."""
    from qtune.data.inspection import inspect
    from qtune.data.prepare import prepare
    from qtune.model.load import load_config, load_tokenizer
    from qtune.recipe.parse import parse_recipe
    from qtune.startup.quiet import quiet_libraries, quiet_loading

    quiet_libraries()
    quiet_loading()
    data = {"train": "rows.jsonl", "validation": 0.01, "max_length": 1024, "on_long_row": "drop"}
    recipe = parse_recipe({"model": {"base": "builtin:smollm2-135m-instruct"}, "data": data})
    config, tokenizer = load_config(recipe.model), load_tokenizer(recipe.model)
    began = time.perf_counter()
    prepared = prepare(recipe.data, tokenizer, folder, cache=folder / "cache")
    inspect(prepared, recipe.data, config.vocab_size)
    seconds = time.perf_counter() - began
    found = {"seconds": seconds, "examples": len(prepared.train), "tokens": int(prepared.lengths.sum())}
    print(json.dumps(found))


def prepare_with_trl(folder: Path) -> None:
    """TRL's own way from the same rows to ids and masks."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, LlamaConfig
    from trl import SFTConfig, SFTTrainer

    from qtune.model.load import load_tokenizer
    from qtune.recipe.schema import Model

    tokenizer = load_tokenizer(Model(base="builtin:smollm2-135m-instruct"))
    rows = [json.loads(line)["messages"] for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    data = Dataset.from_list([{"prompt": row[:-1], "completion": row[-1:]} for row in rows])
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    with torch.device("cpu"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    cores = len(os.sched_getaffinity(0))
    arguments = SFTConfig(
        output_dir=str(folder / "trl"),
        max_length=1024,
        completion_only_loss=True,
        dataset_num_proc=cores if cores > 1 else None,
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    began = time.perf_counter()
    trainer = SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)
    seconds = time.perf_counter() - began
    tokens = sum(map(len, trainer.train_dataset["input_ids"]))
    print(json.dumps({"seconds": seconds, "examples": len(trainer.train_dataset), "tokens": tokens}))


if __name__ == "__main__":
    main()
