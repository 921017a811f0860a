"""A checkpoint of random weights with the geometry of a known model: make_checkpoint.py NAME FOLDER TOKENIZER

TOKENIZER: a folder with the tokenizer's files, which are copied beside the weights.
"""

import shutil
import sys
from pathlib import Path

import torch
from runs import GEOMETRIES
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    name, folder, tokenizer = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if (folder / "config.json").is_file():
        return
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(**GEOMETRIES[name], pad_token_id=0, bos_token_id=1, eos_token_id=2, dtype=torch.bfloat16)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device="cuda" if torch.cuda.is_available() else "cpu")
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(1) if weight.dim() == 1 else weight.normal_(0, 0.02)
    model.tie_weights()
    temporary = folder.with_suffix(".part")
    model.save_pretrained(temporary, max_shard_size="4GB")
    for file in tokenizer.iterdir():
        if "token" in file.name or file.suffix == ".jinja":
            shutil.copy(file, temporary)
    temporary.rename(folder)


if __name__ == "__main__":
    main()
