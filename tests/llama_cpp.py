"""llama.cpp itself, in a process of its own: what it makes of a GGUF file. Only where xllamacpp has a wheel."""

import json
import subprocess
import sys
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

needed = pytest.mark.skipif(find_spec("xllamacpp") is None, reason="xllamacpp has no wheel for this platform")


def ask(
    file: Path,
    ids: list[int],
    texts: list[str] = [],  # noqa: B006
    *,
    lora: Path | None = None,
) -> tuple[dict[int, float], list[list[int]]]:
    """The log-probabilities of the 40 likeliest tokens after `ids`, by token, and the ids of each text.

    lora: an adapter that is put on the model, as --lora does it.
    """
    asked = json.dumps({"file": str(file), "ids": ids, "texts": texts, "lora": None if lora is None else str(lora)})
    answered = subprocess.run([sys.executable, __file__], input=asked, capture_output=True, text=True, check=False)
    assert answered.returncode == 0, answered.stderr[-2000:]
    found = json.loads(answered.stdout.splitlines()[-1])
    return {int(token): value for token, value in found["logprobs"]}, found["ids"]


def main() -> None:
    import xllamacpp

    asked = json.load(sys.stdin)
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.warmup = asked["file"], 256, 1, False
    settings.cpuparams.n_threads = 1
    if asked["lora"] is not None:
        settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(asked["lora"])]
    server = xllamacpp.Server(settings)

    def post(path: str, **body: object) -> dict[str, Any]:
        url, headers = f"{server.listening_address}{path}", {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)) as reply:
            return json.load(reply)

    answer = post("/completion", prompt=asked["ids"], n_predict=1, n_probs=40, temperature=0, cache_prompt=False)
    (likeliest,) = answer["completion_probabilities"]
    logprobs = [(one["id"], one["logprob"]) for one in likeliest["top_logprobs"]]
    ids = [post("/tokenize", content=text, add_special=False, parse_special=True)["tokens"] for text in asked["texts"]]
    sys.stdout.write("\n" + json.dumps({"logprobs": logprobs, "ids": ids}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
