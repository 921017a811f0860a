"""Our merge against the usual way, each in a process of its own: peak memory, time, distance from what was trained.

    python tools/bench_merge.py RUN                       a finished LoRA run, for example runs/quickstart
    python tools/bench_merge.py --synthetic-gib 4         random weights of that size, made in --work and removed

The usual way loads the base model in 16 bits, merges with peft and saves. With a run, each result is also compared with
the live 4-bit model and its adapter on the run's held-out rows.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

WAYS = {
    "ours": "qtune, into the dequantized NF4 weights",
    "ours-original": "qtune, into the original weights",
    "usual": "transformers + peft, 16-bit reload, merge, save",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, help="a finished LoRA run")
    parser.add_argument("--synthetic-gib", type=float, default=0, help="size of a random checkpoint to merge instead")
    parser.add_argument("--work", type=Path, default=None, help="folder for what is written (default: the system's)")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each way, alternating; the fastest counts")
    parser.add_argument("--worker", choices=[*WAYS, "make", "compare"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments.run, arguments.work, arguments.synthetic_gib)
        return
    if (arguments.run is None) == (not arguments.synthetic_gib):
        parser.error("name a run, or a size with --synthetic-gib")
    folder = Path(tempfile.mkdtemp(prefix="bench-merge-", dir=arguments.work))
    try:
        report(arguments, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def report(arguments: argparse.Namespace, folder: Path) -> None:
    """Runs every way and prints one line for each."""
    run = arguments.run
    if run is None:
        run = folder / "synthetic"
        child("make", run, folder, arguments.synthetic_gib)
    seconds: dict[str, float] = {}
    cpus: dict[str, float] = {}
    peaks: dict[str, float] = {}
    for _ in range(arguments.repeats):
        for way in WAYS:
            shutil.rmtree(folder / way, ignore_errors=True)
            wall, cpu, peak = child(way, run, folder, 0)
            seconds[way], cpus[way] = min(wall, seconds.get(way, wall)), min(cpu, cpus.get(way, cpu))
            peaks[way] = max(peak, peaks.get(way, 0))
    closeness: dict[str, dict[str, float]] = {}
    if arguments.run is not None:
        child("compare", run, folder, 0)
        closeness = json.loads((folder / "closeness.json").read_text())
    size = sum(file.stat().st_size for file in (folder / "usual").glob("*.safetensors"))
    print(f"{size / 2**30:.2f} GiB of merged weights, {os.cpu_count()} cores")
    for way, what in WAYS.items():
        line = f"{what:50} peak RSS {peaks[way]:8.0f} MiB   {seconds[way]:7.1f} s ({cpus[way]:.1f} s of CPU)"
        if way in closeness:
            found = closeness[way]
            line += f"   KL {found['kl']:.2e}   top-1 {found['top1']:.2%}   eval loss {found['loss']:.4f}"
        print(line)
    if closeness:
        print(f"{'the live 4-bit model and its adapter':50} eval loss {closeness['live']['loss']:.4f}")


def child(worker: str, run: Path, folder: Path, gib: float) -> tuple[float, float, float]:
    """Wall and CPU seconds and peak RSS in MiB of one step in a process of its own.

    This process imports nothing large: a child starts with the pages of its parent.
    """
    command = [
        sys.executable,
        __file__,
        str(run),
        "--worker",
        worker,
        "--work",
        str(folder),
        "--synthetic-gib",
        str(gib),
    ]
    began = time.monotonic()
    pid = os.posix_spawn(sys.executable, command, os.environ)
    _, status, usage = os.wait4(pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{worker} failed")
    return time.monotonic() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def work(worker: str, run: Path, folder: Path, gib: float) -> None:
    """One step, in its own process."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from qtune.startup.quiet import quiet_libraries

    quiet_libraries()
    if worker == "make":
        make_synthetic(run, gib)
    elif worker == "compare":
        compare(run, folder)
    elif worker == "usual":
        usual_way(*places(run), folder / worker)
    else:
        our_way(*places(run), folder / worker, "original" if worker == "ours-original" else "dequantized")


def places(run: Path) -> tuple[Path, Path]:
    """The base folder and the adapter folder of a run, or of a synthetic one."""
    if (run / "base").is_dir():
        return run / "base", run / "adapter"
    from qtune.export.opened_run import open_for_export
    from qtune.run.folder import RunDir

    source = open_for_export(RunDir.open(run))
    return source.base, source.adapter


def our_way(base: Path, adapter: Path, output: Path, weights: str) -> None:
    import torch

    from qtune.export.adapter_weights import open_adapter
    from qtune.export.basis import Basis
    from qtune.export.layout import empty_model, layout_of
    from qtune.export.merge import plan_merge, write_merge
    from qtune.export.model_files import copy_side_files, merged_config, write_json
    from qtune.model.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(base)
    layout = layout_of(empty_model(base), list(checkpoint.tensors))
    basis = Basis("nf4", True, torch.float32, torch.float32)
    merge = plan_merge(checkpoint, layout, open_adapter(adapter), basis, weights, torch.float16)
    output.mkdir()
    write_merge(merge, output, lambda _: None)
    copy_side_files(base, base, output)
    write_json(output / "config.json", merged_config(base, torch.float16, merge.config_changes))


def usual_way(base: Path, adapter: Path, output: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16)
    PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(output)
    if (base / "tokenizer.json").exists():
        AutoTokenizer.from_pretrained(base).save_pretrained(output)


def make_synthetic(run: Path, gib: float) -> None:
    """A Llama-shaped checkpoint of random fp16 weights and a rank-16 adapter on every linear layer, in a stream."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from qtune.export.layout import empty_model
    from qtune.export.shards import Planned, plan_shards, write_shards

    hidden, wide = 2048, 8192
    layer = 2 * (2 * hidden * hidden + 2 * hidden * 512 + 3 * hidden * wide)
    layers = max(1, round((gib * 2**30 - 4 * 32000 * hidden) / layer))
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=wide,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="float16",
    )
    (run / "base").mkdir(parents=True)
    config.save_pretrained(run / "base")
    shapes = {name: tuple(tensor.shape) for name, tensor in empty_model(run / "base").state_dict().items()}
    planned = [Planned(name, torch.float16, shape) for name, shape in shapes.items()]
    write_shards(run / "base", plan_shards(planned), lambda one: (torch.randn(one.shape) * 0.02).half())
    adapter = {}
    for name, shape in shapes.items():
        if "_proj." in name:
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            adapter[f"{stem}.lora_A.weight"] = torch.randn(16, shape[1]) * 0.02
            adapter[f"{stem}.lora_B.weight"] = torch.randn(shape[0], 16) * 0.02
    LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear").save_pretrained(run / "adapter")
    save_file(adapter, run / "adapter" / "adapter_model.safetensors")


def compare(run: Path, folder: Path) -> None:
    """How far each result is from the live 4-bit model with its adapter, on the run's held-out rows."""
    import math

    import torch
    from transformers import AutoModelForCausalLM

    from qtune.export.closeness import ClosenessMeter, PerplexityMeter
    from qtune.export.opened_run import open_for_export
    from qtune.export.verify.logits import logits_of
    from qtune.export.verify.rows import rows_for
    from qtune.run.folder import RunDir
    from qtune.tuned.load import load_run

    source = open_for_export(RunDir.open(run))
    rows = rows_for(source).rows
    live_model, live_loss = load_run(source.run).model, PerplexityMeter()
    live = [logits_of(live_model, row.ids) for row in rows]
    found = {}
    for way in WAYS:
        model = AutoModelForCausalLM.from_pretrained(folder / way, dtype=torch.float32).eval()
        meter, loss = ClosenessMeter(), PerplexityMeter()
        for row, reference in zip(rows, live, strict=True):
            logits = logits_of(model, row.ids)
            meter.add(reference, logits)
            loss.add(logits, torch.tensor(row.labels))
        found[way] = {"kl": meter.result().kl, "top1": meter.result().top1, "loss": math.log(loss.result())}
    for row, logits in zip(rows, live, strict=True):
        live_loss.add(logits, torch.tensor(row.labels))
    found["live"] = {"loss": math.log(live_loss.result())}
    (folder / "closeness.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
