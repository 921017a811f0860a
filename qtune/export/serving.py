"""An exported folder -> the commands that serve it: those that hold for what is in it, ready to paste."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig
from transformers import PretrainedConfig

from qtune.export.adapter_weights import CONFIG, WEIGHTS
from qtune.export.llama_cpp import ADAPTER_FILE, ignored_window
from qtune.export.opened_run import OpenedRun
from qtune.model.load import load_config
from qtune.recipe.schema import Recipe

USUAL_CONTEXT = 8192
"""Tokens of a conversation that are held unless rows were longer: a cache for a model's whole context, 131,072 tokens
for Llama 3.1 8B, is 16 GiB."""
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What --max-lora-rank may be (vLLM, config/lora.py)."""


@dataclass(frozen=True)
class Serving:
    """A program and the command that serves the export with it."""

    program: str
    command: str


def serving(source: OpenedRun, folder: Path, shown: Path | None = None) -> tuple[Serving, ...]:
    """The commands for what is in a folder, which others know as `shown`."""
    return tuple(_commands(source, folder, folder if shown is None else shown, load_config(source.recipe.model)))


def serving_text(commands: tuple[Serving, ...]) -> str:
    """A line for each command under its program."""
    return "\n".join(["serve it with one of:", *(f"  {one.program + ':':<11} {one.command}" for one in commands)])


def context_of(config: PretrainedConfig, recipe: Recipe) -> int:
    """Tokens of a conversation: twice the longest row and at least USUAL_CONTEXT, as far as the model reaches."""
    trained = 2 * recipe.data.max_length + recipe.adapter.prompt_length
    reach = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(reach or trained, max(USUAL_CONTEXT, trained))


def context_in_llama_cpp(config: PretrainedConfig, recipe: Recipe) -> int:
    """`context_of`, within the sliding window that llama.cpp would ignore."""
    return min(context_of(config, recipe), ignored_window(config) or context_of(config, recipe))


def _commands(source: OpenedRun, folder: Path, shown: Path, config: PretrainedConfig) -> Iterator[Serving]:
    name = source.run.name
    if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
        yield from _adapter_in_vllm(source, folder, shown, config)
        return
    trust = ["--trust-remote-code"] if source.recipe.model.trust_remote_code else []
    length = ["--max-model-len", str(context_of(config, source.recipe))]
    yield _serving("vLLM", "vllm", "serve", shown, "--served-model-name", name, *length, *trust)
    files = sorted(file.name for file in folder.glob("*.gguf") if file.name != ADAPTER_FILE)
    context = str(context_in_llama_cpp(config, source.recipe))
    for file in files:
        yield _serving("llama.cpp", "llama-server", "-m", shown / file, "--alias", name, "-c", context, "--jinja")
    if files and (folder / ADAPTER_FILE).is_file():
        base = source.base_name if source.base_name.endswith(".gguf") else "BASE.gguf"
        adapter, template = str(shown / ADAPTER_FILE), str(shown / "chat_template.jinja")
        asks = ["--jinja", "--chat-template-file", template]
        yield _serving("llama.cpp", "llama-server", "-m", base, "--lora", adapter, "-c", context, *asks)
    if files and (folder / "Modelfile").is_file():
        tag = _ollama_name(name)
        made = shlex.join(["ollama", "create", tag, "-f", str(shown / "Modelfile")])
        yield Serving("Ollama", f"{made} && ollama run {tag}")


def _adapter_in_vllm(source: OpenedRun, folder: Path, shown: Path, config: PretrainedConfig) -> Iterator[Serving]:
    """vLLM takes plain LoRA on linear layers; it quantizes a base to NF4 with double quantization, as training did."""
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
    model, is_nf4 = source.recipe.model, source.basis.kind == "nf4" and source.basis.double_quantization
    is_hub = not Path(model.base).exists() and ":" not in model.base and model.base.count("/") == 1
    template = shown / "chat_template.jinja"
    yield _serving(
        "vLLM",
        "vllm",
        "serve",
        model.base if is_hub else source.base,
        *(["--revision", model.revision] if is_hub and model.revision is not None else []),
        *(["--quantization", "bitsandbytes"] if is_nf4 else []),
        "--enable-lora",
        "--max-lora-rank",
        str(rank),
        "--lora-modules",
        f"{source.run.name}={shown}",
        *(["--chat-template", str(template)] if (folder / template.name).is_file() else []),
        "--max-model-len",
        str(context_of(config, source.recipe)),
        *(["--trust-remote-code"] if model.trust_remote_code else []),
    )


def _serving(program: str, *words: str | Path) -> Serving:
    return Serving(program, shlex.join(map(str, words)))


def _ollama_name(run: str) -> str:
    """Ollama knows small letters, digits and a few signs."""
    return re.sub(r"[^a-z0-9._-]+", "-", run.lower()).strip("-._") or "model"
