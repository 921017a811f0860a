"""What compressed embeddings and a compressed head cost in quality: the base's loss on text that comes with qtune.

    python tools/bench_embeddings.py [BASE]

For each way that [memory] embeddings can keep them without the host: bytes of both tables, and the mean loss over the
tokens of qtune/tuned/neutral.txt, beside that of the tables as they are. A line of JSON each.
"""

import argparse
import json
import math

import torch
from torch import nn

from qtune.device.present import present_device
from qtune.model.load import load_base, load_tokenizer
from qtune.model.loss import install_loss
from qtune.model.stored_rows import stored_rows
from qtune.plan import make_plan
from qtune.recipe.parse import parse_recipe
from qtune.tuned.forgetting import neutral_pieces

WAYS = ("device", "int8", "nf4")


def main() -> None:
    """Loads the base once for each way."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("base", nargs="?", default="builtin:smollm2-135m-instruct")
    given = parser.parse_args()
    plain: list[tuple[float, int]] = []
    for how in WAYS:
        tables, losses = _measured(given.base, how)
        plain = plain or losses
        tokens = sum(count for _, count in losses)
        changes = [(loss - before) / count for (loss, count), (before, _) in zip(losses, plain, strict=True)]
        line = {
            "embeddings": how,
            "tables_mib": round(tables / 2**20, 1),
            "loss": round(sum(loss for loss, _ in losses) / tokens, 4),
            "more": round(sum(loss - before for (loss, _), (before, _) in zip(losses, plain, strict=True)) / tokens, 4),
            "standard_error": round(_spread(changes) / math.sqrt(len(changes)), 4),
        }
        print(json.dumps(line), flush=True)


def _spread(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


@torch.no_grad()
def _measured(base: str, how: str) -> tuple[int, list[tuple[float, int]]]:
    """Bytes of the tables; (summed loss, scored tokens) of each piece."""
    recipe = parse_recipe({"model": {"base": base}, "data": {"train": "none"}, "memory": {"embeddings": how}})
    device = present_device()
    network = load_base(recipe.model, recipe.quantization, make_plan(recipe, device)).eval()
    install_loss(network)
    tokenizer = load_tokenizer(recipe.model)
    losses = []
    for piece in neutral_pieces():
        ids = tokenizer(piece, return_tensors="pt").input_ids.to(device.torch_name)
        output = network(input_ids=ids, labels=ids)
        losses.append((float(output.loss), int(output.scored)))
    modules = network.get_input_embeddings(), network.get_output_embeddings()
    tensors = {id(tensor): tensor for module in modules for tensor in _tensors(module)}
    return sum(tensor.nbytes for tensor in tensors.values()), losses


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    rows = stored_rows(module)
    return [module.weight.data] if rows is None else rows.tensors()


if __name__ == "__main__":
    main()
