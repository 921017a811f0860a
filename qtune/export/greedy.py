"""How the programs that load an export are told to answer as qtune does: the likeliest token each time.

An export keeps the base's generation config, which may say that tokens are drawn, or that repetitions are penalized
also where none is. Where it says nothing, transformers' pipeline, vLLM, llama.cpp and Ollama draw by their own
defaults. What is printed to be pasted says it itself, so that it gives the answers that `chat`, `eval` and the
comparison gave.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qtune.model.generation import FILE

NEUTRAL = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1}
"""What changes answers that are not drawn, and the value with which it does not: `tuned/generate.py` asks so."""


def generation_settings(*folders: Path) -> dict[str, Any]:
    """The generation config of the first folder that has one; of a GGUF file and where there is none, empty."""
    for folder in folders:
        if (folder / FILE).is_file():
            settings: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
            return settings
    return {}


def in_python(generation: Mapping[str, Any]) -> str:
    """Arguments of transformers' `generate`."""
    return ", ".join(f"{name}={value}" for name, value in {"do_sample": False, **_to_neutralize(generation)}.items())


def in_vllm(generation: Mapping[str, Any]) -> list[str]:
    """Options of `vllm serve`, for requests that do not say it themselves."""
    penalty = {name: value for name, value in _to_neutralize(generation).items() if name == "repetition_penalty"}
    return ["--override-generation-config", json.dumps({"temperature": 0, **penalty})]


def in_llama_cpp(generation: Mapping[str, Any]) -> list[str]:
    """Options of `llama-server`, for requests that do not say it themselves."""
    penalty = ["--repeat-penalty", "1.0"] if "repetition_penalty" in _to_neutralize(generation) else []
    return ["--temp", "0", *penalty]


def in_ollama() -> dict[str, Any]:
    """Parameters of a Modelfile; Ollama's own penalty on repetitions, 1.1, would change greedy answers, too."""
    return {"temperature": 0, "repeat_penalty": 1.0}


def _to_neutralize(generation: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in NEUTRAL.items() if generation.get(name, value) not in (None, value)}
