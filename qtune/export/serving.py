"""An exported folder -> the commands that serve it: those that hold for what is in it, ready to paste."""

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from peft import LoraConfig
from transformers import PretrainedConfig

from qtune.export.adapter_weights import CONFIG, WEIGHTS
from qtune.export.greedy import generation_settings, in_llama_cpp, in_python, in_vllm
from qtune.export.llama_cpp import ADAPTER_FILE, ignored_window
from qtune.export.opened_run import OpenedRun
from qtune.model.load import load_config
from qtune.recipe.schema import Recipe

USUAL_CONTEXT = 8192
"""Tokens of a conversation that are held unless rows were longer: a cache for a model's whole context, 131,072 tokens
for Llama 3.1 8B, is 16 GiB."""
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What --max-lora-rank may be (vLLM, config/lora.py)."""
OTHER_WEIGHTS = (
    "on the base's own weights: trained on {}, which vLLM does not make of them, it answers a little otherwise"
)

PIPELINE = (
    'from transformers import pipeline; print(pipeline("text-generation", {folder})'
    '([{{"role": "user", "content": "Hello"}}], max_new_tokens=200, {greedy})[0]["generated_text"][-1]["content"])'
)
"""What asks an export in one line of Python, as `qtune chat` and `eval` ask it: a pipeline draws unless it is told not
to. README.md beside it has the longer ones."""


@dataclass(frozen=True)
class Serving:
    """A program and the command that serves the export with it."""

    program: str
    command: str
    note: str = ""
    """In what it answers otherwise than what was trained."""


def serving(source: OpenedRun, folder: Path, *, is_public: bool = False) -> tuple[Serving, ...]:
    """The commands for what is in a folder.

    is_public: for others than who exported it: no path of this computer is in the commands then, which hold inside of
    the folder, and BASE stands for a base that is not on the hub.
    """
    config = load_config(source.recipe.model)
    base, gguf = _base(source), str(source.base) if source.base_name.endswith(".gguf") else "BASE.gguf"
    if is_public:
        base, gguf = base if source.is_of_hub else "BASE", "BASE.gguf"
    return tuple(_commands(source, folder, Path() if is_public else folder, config, base, gguf))


def _base(source: OpenedRun) -> str:
    """The base as a program here finds it."""
    return source.base_name if source.is_of_hub else str(source.base)


def uses_text(folder: Path, commands: tuple[Serving, ...], gguf_command: str | None) -> str:
    """A line for each program that loads what is in a folder; the ways of libraries are in its README.md.

    gguf_command: makes the GGUF file that llama.cpp and Ollama load, where there is none and one can be made.
    """
    is_adapter = (folder / CONFIG).is_file()
    if is_adapter:
        lines = [("transformers, peft", f"the lines in {folder / 'README.md'}, from inside of that folder")]
    else:
        greedy = in_python(generation_settings(folder))
        asked = PIPELINE.format(folder=json.dumps(str(folder), ensure_ascii=False), greedy=greedy)
        lines = [
            ("here", shlex.join(["qtune", "chat", str(folder)])),
            ("transformers", shlex.join(["python", "-c", asked])),
        ]
    for one in commands:
        lines += [(one.program, one.command), *([("", f"({one.note})")] if one.note else [])]
    if gguf_command is not None:
        lines.append(("llama.cpp, Ollama", f"load a GGUF file, which is written by: {gguf_command}"))
    width = max(len(name) for name, _ in lines) + 1
    named = ((f"{name}:" if name else "", does) for name, does in lines)
    return "\n".join(
        [
            "use it with one of (each asked for the likeliest token, as qtune asks):",
            *(f"  {name:<{width}} {does}" for name, does in named),
        ]
    )


def context_of(config: PretrainedConfig, recipe: Recipe) -> int:
    """Tokens of a conversation: twice the longest row and at least USUAL_CONTEXT, as far as the model reaches."""
    trained = 2 * recipe.data.max_length + recipe.adapter.prompt_length
    reach = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(reach or trained, max(USUAL_CONTEXT, trained))


def context_in_llama_cpp(config: PretrainedConfig, recipe: Recipe) -> int:
    """`context_of`, within the sliding window that llama.cpp would ignore."""
    return min(context_of(config, recipe), ignored_window(config) or context_of(config, recipe))


def _commands(
    source: OpenedRun, folder: Path, shown: Path, config: PretrainedConfig, base: str, base_gguf: str
) -> Iterator[Serving]:
    name = source.run.name
    if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
        yield from _adapter_in_vllm(source, folder, shown, config, base)
        return
    trust = ["--trust-remote-code"] if source.recipe.model.trust_remote_code else []
    length = ["--max-model-len", str(context_of(config, source.recipe))]
    generation = generation_settings(folder)
    greedy = in_llama_cpp(generation)
    asked = in_vllm(generation)
    yield _serving("vLLM", "vllm", "serve", shown, "--served-model-name", name, *length, *asked, *trust)
    files = sorted(file.name for file in folder.glob("*.gguf") if file.name != ADAPTER_FILE)
    context = str(context_in_llama_cpp(config, source.recipe))
    for file in files:
        held = ["-m", str(shown / file), "--alias", name, "-c", context]
        yield _serving("llama.cpp", "llama-server", *held, *greedy, "--jinja")
    if files and (folder / ADAPTER_FILE).is_file():
        adapter, template = str(shown / ADAPTER_FILE), str(shown / "chat_template.jinja")
        asks = [*greedy, "--jinja", "--chat-template-file", template]
        yield _serving("llama.cpp", "llama-server", "-m", base_gguf, "--lora", adapter, "-c", context, *asks)
    if files and (folder / "Modelfile").is_file():
        tag = _ollama_name(name)
        made = shlex.join(["ollama", "create", tag, "-f", str(shown / "Modelfile")])
        yield Serving("Ollama", f"{made} && ollama run {tag}")


def _adapter_in_vllm(
    source: OpenedRun, folder: Path, shown: Path, config: PretrainedConfig, base: str
) -> Iterator[Serving]:
    """vLLM takes plain LoRA on linear layers; it quantizes a base to NF4 with double quantization, and to nothing else
    that training knows."""
    adapter = source.config
    if not isinstance(adapter, LoraConfig) or adapter.use_dora or adapter.bias != "none" or adapter.modules_to_save:
        return
    targets = adapter.target_modules or ()
    if adapter.init_lora_weights == "pissa" or {"embed_tokens", "lm_head"} & set(targets):
        return
    largest = max([adapter.r, *(adapter.rank_pattern or {}).values()])
    rank = next((one for one in VLLM_RANKS if one >= largest), None)
    if rank is None:
        return
    model, basis = source.recipe.model, source.basis
    is_nf4 = basis.kind == "nf4" and basis.double_quantization
    as_trained = is_nf4 or basis.is_stored  # what a checkpoint brings, vLLM finds in its config.json
    if starts_from_error(source) and not as_trained:
        return
    template = shown / "chat_template.jinja"
    command = _serving(
        "vLLM",
        "vllm",
        "serve",
        base,
        *(["--revision", model.revision] if source.is_of_hub and model.revision is not None else []),
        *(["--quantization", "bitsandbytes"] if is_nf4 and not basis.is_stored else []),
        "--enable-lora",
        "--max-lora-rank",
        str(rank),
        "--lora-modules",
        f"{source.run.name}={shown}",
        *(["--chat-template", str(template)] if (folder / template.name).is_file() else []),
        "--max-model-len",
        str(context_of(config, source.recipe)),
        *in_vllm(generation_settings(source.base)),
        *(["--trust-remote-code"] if model.trust_remote_code else []),
    )
    yield replace(command, note="" if as_trained or basis.kind == "none" else OTHER_WEIGHTS.format(_held(source)))


def starts_from_error(source: OpenedRun) -> bool:
    """Whether the adapter began as what quantization took from the weights (LoftQ): on weights that are not quantized
    in the same way it would add that a second time."""
    return getattr(source.recipe.adapter, "initialization", None) == "loftq"


def _held(source: OpenedRun) -> str:
    plain = source.basis.kind in ("nf4", "fp4") and not source.basis.double_quantization
    return source.basis.kind.upper() + (" without double quantization" if plain else "")


def _serving(program: str, *words: str | Path) -> Serving:
    return Serving(program, shlex.join(map(str, words)))


def _ollama_name(run: str) -> str:
    """Ollama knows small letters, digits and a few signs."""
    return re.sub(r"[^a-z0-9._-]+", "-", run.lower()).strip("-._") or "model"
