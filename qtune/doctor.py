"""`qtune doctor`: what is here, what qtune would choose on it and why, and what stands in the way."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import bitsandbytes.functional
import torch

from qtune import console
from qtune.adapter.lean_check import examined
from qtune.cache import cache_folder
from qtune.device.present import Device, is_out_of_memory, present_device
from qtune.device.products import cpu_product_times, product_times
from qtune.device.rates import MEASURES, Rates, changed_since, not_believed
from qtune.diagnosis import Diagnosis, version_findings
from qtune.errors import InputError, first_line
from qtune.kernels.comparison import COMPARED
from qtune.kernels.ops import without_kernels
from qtune.model.builtin import BUILTIN_MODELS, is_complete
from qtune.plan import make_plan
from qtune.recipe.parse import parse_recipe
from qtune.sizes import GIB, MIB, flops_text, size_text
from qtune.startup.safe_bitsandbytes import BLOCK, wrong_kernels
from qtune.timing.known import beside_here, card_of, keep_rates, known_rates, measured_otherwise

# A 7B model in 16 bits, as it is downloaded and as it is exported, is about 14 GiB each.
ENOUGH_DISK_BYTES = 20 * GIB

# Weights that are quantized to see whether it works: whole blocks in each row, and rows that begin within a block.
WEIGHT_SHAPES = ((BLOCK, BLOCK), (BLOCK, BLOCK + BLOCK // 2))

# NF4's largest error on [-1, 1] is half its widest gap, 0.152 (QLoRA, arXiv:2305.14314, appendix E); the 8 bits of an
# absmax add a little.
LARGEST_ERROR = 0.16


def examine(runs: Path, *, measure: bool = False) -> list[Diagnosis]:
    """Everything that decides how training will go on this computer; `runs` is where run folders would be made.

    measure: first measure how fast the device is, and keep that for predictions of time.
    """
    device = present_device()
    if measure:
        measure_rates(device)
    return [
        *version_findings(),
        *device_findings(device, torch.version.cuda, nvidia_is_here=_nvidia_is_here()),
        *unless_full("device", "NF4", quantization_findings(device)),
        *unless_full("device", "kernels", kernel_findings(device)),
        *unless_full("choices", "recipe", choice_findings(device)),
        *unless_full("choices", "products", product_findings(device)),
        *rate_findings(known_rates(device), beside_here(), measured_otherwise(device)),
        *disk_findings({"runs": runs, "cache": cache_folder(), "hub cache": _hub_cache()}),
        *environment_findings(os.environ),
    ]


def device_findings(device: Device, cuda: str | None, *, nvidia_is_here: bool) -> Iterator[Diagnosis]:
    """The device, its memory, and a card that torch cannot use."""
    memory = f"{device.free_bytes / GIB:.1f} of {device.total_bytes / GIB:.1f} GiB free"
    yield Diagnosis("device", device.torch_name, f"{device.name}, {memory}")
    if device.kind == "cuda":
        capability = ".".join(map(str, device.capability or ()))
        yield Diagnosis("device", "CUDA", f"{cuda}, compute capability {capability}")
        others = torch.cuda.device_count() - 1 if torch.cuda.is_available() else 0
        if others > 0:
            yield Diagnosis(
                "device", "more cards", str(others), "note", "one is used; CUDA_VISIBLE_DEVICES chooses which"
            )
    elif nvidia_is_here:
        why = (
            "this torch is built without CUDA"
            if cuda is None
            else f"torch's CUDA {cuda} does not start; driver too old?"
        )
        advice = "install a CUDA build of torch that fits the driver: https://pytorch.org/get-started/locally/"
        yield Diagnosis("device", "NVIDIA card", f"present but not used: {why}", "problem", advice)
    else:
        yield Diagnosis("device", "graphics card", "none", "note", "a CPU trains small models only")


def quantization_findings(device: Device) -> Iterator[Diagnosis]:
    """Whether bitsandbytes really quantizes and dequantizes on the device, by doing it, and what it does wrong."""
    broken = "this build of bitsandbytes is broken for this device: pip install -U bitsandbytes"
    try:
        errors = [_four_bit_error(device, *shape) for shape in WEIGHT_SHAPES]
        wrong = wrong_kernels() if device.kind == "cpu" else []
    except (RuntimeError, OSError, AttributeError) as failure:
        if is_out_of_memory(failure):  # which says nothing about the build
            raise
        reason = first_line(failure)
        yield Diagnosis("device", "NF4", reason, "problem", broken)
        return
    found = f"{max(errors):.3f} of a block's largest weight, where 4 bits allow at most {LARGEST_ERROR:.2f}"
    if max(errors) > LARGEST_ERROR:
        yield Diagnosis("device", "NF4", f"wrong by {found}", "problem", broken)
    else:
        yield Diagnosis("device", "NF4", f"quantizes and dequantizes as it should, largest error {found}")
    for line in wrong:
        yield Diagnosis("device", "bitsandbytes", line, "problem", broken)


def _four_bit_error(device: Device, rows: int, columns: int) -> float:
    """The largest error of a round trip through NF4, for a weight [rows, columns] whose blocks span [-1, 1]."""
    values = torch.linspace(-1, 1, BLOCK, device=device.torch_name)
    weight = values.repeat(rows * columns // BLOCK).view(rows, columns)
    codes, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return float((bitsandbytes.functional.dequantize_4bit(codes, state) - weight).abs().max())


def kernel_findings(device: Device) -> Iterator[Diagnosis]:
    """Whether the kernels of the lean step are compiled for the card and give there what PyTorch's operations give; the
    first time that takes a while, which a run then need not wait for."""
    if device.kind != "cuda":
        return
    with console.waiting("compiling and comparing the step's kernels"):
        missing = without_kernels()
    if not missing:
        yield Diagnosis("device", "kernels", f"all {len(COMPARED)} of Triton's give what PyTorch's operations give")
    for reason in dict.fromkeys(missing.values()):
        names = [name for name, why in missing.items() if why == reason]
        which = f"all {len(names)}" if len(names) == len(COMPARED) else ", ".join(names)
        advice = "steps are slower, with the same result; Triton compiles with a C compiler and Python's headers"
        yield Diagnosis("device", "kernels", f"PyTorch's operations stand in for {which}: {reason}", "note", advice)


def choice_findings(device: Device) -> Iterator[Diagnosis]:
    """What a recipe that leaves everything open gets here, each with its reason."""
    recipe = parse_recipe({"model": {"base": "any/model"}, "data": {"train": "any.jsonl"}})
    plan = make_plan(recipe, examined(device, recipe))
    chosen: Mapping[tuple[str | int, ...], object] = {
        ("quantization", "compute_dtype"): plan.compute_dtype,
        ("adapter", "dtype"): plan.adapter_dtype,
        ("model", "attention"): plan.attention,
        ("training", "optimizer"): plan.optimizer,
        ("training", "gradient_checkpointing"): "on" if plan.gradient_checkpointing else "off",
        ("training", "lean_step"): "on" if plan.lean_step else "off",
    }
    for path, value in chosen.items():
        yield Diagnosis("choices", ".".join(map(str, path)), f"{value}: {plan.reasons[path]}")


def product_findings(device: Device) -> Iterator[Diagnosis]:
    """How fast products in the shapes of a training step are: what the choice of the compute dtype rests on."""
    if device.kind == "cpu":
        times = cpu_product_times()
    else:
        times = product_times(torch.device(device.torch_name), ("float32", "bfloat16", "float16"))
    for name, taken in times.items():
        yield Diagnosis("choices", f"{name} products", taken.text(is_card=device.kind == "cuda"))


def unless_full(topic: str, name: str, findings: Iterator[Diagnosis]) -> Iterator[Diagnosis]:
    """The findings; where memory runs out on the way, that alone is noted, for all others can be told."""
    try:
        yield from findings
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        yield Diagnosis(topic, name, "not examined: too little memory is free", "note", "close what else takes memory")


def measure_rates(device: Device) -> None:
    """Measures the device and keeps what was found in the cache."""
    from qtune.startup.quiet import quiet_libraries, quiet_loading
    from qtune.timing.measure import measured_rates

    quiet_libraries()
    quiet_loading()
    with console.progress(f"measuring {device.name}"):
        rates = measured_rates(device)
    card = card_of(device)
    if card is not None and (beyond := not_believed(rates, card)):
        console.say(f"not kept, for it cannot be true: {'; '.join(beyond)}")
        return
    try:
        console.say(f"kept for predictions of time: {keep_rates(device, rates)}")
    except InputError as error:
        console.say(f"what was measured is not kept: {error}")


def rate_findings(rates: Rates | None, here: Mapping[str, str], otherwise: Sequence[str] = ()) -> Iterator[Diagnosis]:
    """What predictions of time on this device rest on.

    here: versions and the processor, by name. otherwise: what was measured on this computer in another way than it
    would compute now, which no prediction is made from.
    """
    if rates is None:
        value = f"not predicted, for there is only {'; '.join(otherwise)}" if otherwise else "not predicted"
        yield Diagnosis("rates", "time", value, "note", "qtune doctor --measure finds out how fast this device is")
        return
    speeds = {name: flops for name, flops in rates.products.items() if name in ("bfloat16", "float16", "float32")}
    shown = [
        f"{name} {flops_text(flops, is_card=not rates.is_own_processor)}"
        for name, flops in (speeds | {"attention": rates.attention}).items()
    ]
    changed = changed_since(rates, here)
    if changed is None:
        yield Diagnosis("rates", "from", rates.source)
    else:
        yield Diagnosis("rates", "from", f"{rates.source}; since then {changed}", "note", MEASURES)
    yield Diagnosis("rates", "products", ", ".join(shown))
    moved = {
        "in order": rates.moved,
        "casts": rates.copied,
        "adapter products": rates.thin,
        "NF4 read back": rates.dequantized,
    }
    walked = ", ".join(f"{name} {value / 1e9:,.0f}" for name, value in moved.items())
    yield Diagnosis("rates", "memory", f"{walked} GB/s")
    launching = f"{1e6 * rates.launch_seconds:.0f} microseconds for each operation it launches"
    yield Diagnosis("rates", "processor", f"{launching}, {1e6 * rates.own_launch_seconds:.0f} for one of qtune's own")


def disk_findings(folders: Mapping[str, Path]) -> Iterator[Diagnosis]:
    """Free space where runs, our cache and downloaded models go, and what of the built-in models is there."""
    for name, folder in folders.items():
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
        free = shutil.disk_usage(existing).free
        value = f"{folder}, {size_text(free) if free < GIB else f'{free / GIB:.1f} GiB'} free"
        if not os.access(existing, os.W_OK):
            yield Diagnosis("disk", name, f"{folder} cannot be written", "problem", "choose a folder of your own")
        elif free < ENOUGH_DISK_BYTES:
            yield Diagnosis("disk", name, value, "note", "a 7B model takes about 14 GiB to download and to export")
        else:
            yield Diagnosis("disk", name, value)
    for model in BUILTIN_MODELS.values():
        there = is_complete(cache_folder() / "models" / model.name, model)
        needed = f"not fetched yet, {model.wheel_bytes / MIB:.0f} MiB to download"
        yield Diagnosis("disk", f"builtin:{model.name}", "ready" if there else needed)


def environment_findings(environment: Mapping[str, str]) -> Iterator[Diagnosis]:
    """What decides whether models of the hub can be reached, and which programs an export can go on with."""
    if environment.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        yield Diagnosis("hub", "HF_HUB_OFFLINE", "set", "note", "of the hub's models, only those in its cache")
    token = bool(environment.get("HF_TOKEN")) or (_hub_home() / "token").is_file()
    advice = "" if token else "gated models (Llama, Gemma) need one: hf auth login"
    yield Diagnosis("hub", "token", "present" if token else "none", "ok" if token else "note", advice)
    ollama = shutil.which("ollama")
    advice = "" if ollama else "a Modelfile is written all the same; https://ollama.com/download has it"
    yield Diagnosis("export", "ollama", ollama or "not installed", "ok" if ollama else "note", advice)


def _nvidia_is_here() -> bool:
    return Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None


def _hub_home() -> Path:
    return Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface").expanduser()


def _hub_cache() -> Path:
    return Path(os.environ.get("HF_HUB_CACHE") or _hub_home() / "hub").expanduser()
