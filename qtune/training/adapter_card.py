"""README.md of a run's adapter: what it is, and what loads it."""

from qtune.export.opened_run import in_public
from qtune.model.load import load_config
from qtune.model.quantization import held_as
from qtune.recipe.schema import Quantization
from qtune.training.inputs import Inputs

TEXT = """\
---
library_name: peft
tags:
- qtune
---
# {words} for {base}

- trained by qtune on {examples}, in the run `{run}`
- base: `{base}`, held {held}, computed in {dtype}
- every value of the run: `resolved.toml` in the run's folder, which is the one above this one

Commands for that folder:

```sh
qtune chat .                     # talk to it
qtune export . --adapter-only    # the adapter for others, with the lines of Python that load it as it was trained
qtune export .                   # a model that needs no adapter, compared with this one
```

`adapter_config.json` and `adapter_model.safetensors` are what peft loads.
"""


def adapter_card(inputs: Inputs, run: str) -> str:
    """The text, which holds for what a run of this name has trained."""
    recipe, count = inputs.recipe, len(inputs.prepared.examples["train"])
    words = recipe.adapter.in_words
    return TEXT.format(
        words=f"{words[0].upper()}{words[1:]}",
        base=in_public(recipe.model.base),
        run=run,
        examples="1 example" if count == 1 else f"{count:,} examples",
        held=_held(held_as(recipe.quantization, load_config(recipe.model))),
        dtype=inputs.plan.compute_dtype,
    )


def _held(table: Quantization) -> str:
    if table.kind == "none":
        return "unquantized"
    double = " with double quantization" if getattr(table, "double_quantization", False) else ""
    return f"in {table.kind.upper()}{double}"
