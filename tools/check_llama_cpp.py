"""Whether llama.cpp reads an exported GGUF file as transformers reads the model beside it.

    pip install xllamacpp                 # llama.cpp's server as a wheel; only this check needs it
    python tools/check_llama_cpp.py runs/NAME/model/NAME-f16.gguf ROWS.jsonl [--rows 8]
    python tools/check_llama_cpp.py runs/NAME/model/NAME-f16.gguf ROWS.jsonl --base BASE.gguf

For held-out conversations in the "messages" form: the prompt that llama.cpp renders with the chat template inside the
file, the ids that its tokenizer makes of it, and the greedy answer, each beside those of transformers. Prompts and ids
must be equal, else the exit code is 1. Answers may part where two tokens are almost equally likely: they are counted.
With --base it is the adapter.gguf beside the file that is asked, put on a GGUF file of the base as --lora does it.
"""

import argparse
import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

import torch
import xllamacpp
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

LONGEST_ANSWER = 64


def main() -> None:
    """Compares row by row and prints what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("rows", type=Path, help="conversations as JSON lines, each ending with the answer")
    parser.add_argument("--base", type=Path, help="a GGUF file of the base: adapter.gguf is put on it, as --lora does")
    parser.add_argument("--rows", dest="count", type=int, default=8)
    options = parser.parse_args()
    logging.disable_progress_bar()
    plain = Transformers(options.gguf.parent)
    template = plain.tokenizer.chat_template
    llama = (
        LlamaCpp(options.gguf)
        if options.base is None
        else LlamaCpp(options.base, options.gguf.with_name("adapter.gguf"), template)
    )
    same = dict.fromkeys(("prompts", "ids", "answers"), 0)
    lines = options.rows.read_text(encoding="utf-8").splitlines()[: options.count]
    for number, line in enumerate(lines, 1):
        *asked, _ = json.loads(line)["messages"]
        for what, theirs, ours in zip(same, llama.answer(asked), plain.answer(asked), strict=True):
            same[what] += theirs == ours
            if theirs != ours:
                print(f"row {number}, {what}:\n  llama.cpp    {theirs!r}\n  transformers {ours!r}")
    print(", ".join(f"{what} equal in {count} of {len(lines)} rows" for what, count in same.items()))
    sys.exit(same["prompts"] < len(lines) or same["ids"] < len(lines))


class LlamaCpp:
    """llama.cpp's own server over a GGUF file, or over that of a base with an adapter and its chat template."""

    def __init__(self, file: Path, lora: Path | None = None, template: str = "") -> None:
        settings = xllamacpp.CommonParams()
        settings.model.path = str(file)
        settings.use_jinja, settings.warmup, settings.verbosity = True, False, 0
        settings.n_parallel, settings.n_ctx = 1, 1024
        if lora is not None:
            settings.lora_adapters, settings.chat_template = [xllamacpp.CommonAdapterLoraInfo(str(lora))], template
        self.server = xllamacpp.Server(settings)

    def answer(self, messages: list[dict[str, str]]) -> tuple[str, list[int], str]:
        """The rendered prompt, its ids and the greedy answer."""
        prompt = self._post("/apply-template", messages=messages)["prompt"]
        ids = self._post("/tokenize", content=prompt, add_special=True, parse_special=True)["tokens"]
        asked = {"messages": messages, "temperature": 0, "max_tokens": LONGEST_ANSWER}
        return prompt, ids, self._post("/v1/chat/completions", **asked)["choices"][0]["message"]["content"]

    def _post(self, path: str, **body: object) -> dict[str, Any]:
        url = f"{self.server.listening_address}{path}"
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as reply:
            return json.load(reply)


class Transformers:
    """The exported folder, as anybody loads it."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def answer(self, messages: list[dict[str, str]]) -> tuple[str, list[int], str]:
        """The rendered prompt, its ids and the greedy answer."""
        prompt = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = self.tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
        output = self.model.generate(ids, max_new_tokens=LONGEST_ANSWER, do_sample=False)
        return prompt, ids[0].tolist(), self.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    main()
