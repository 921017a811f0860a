"""The runs that are measured on a card: geometries of known models with random weights, and recipes.

    python tools/gpu/runs.py FOLDER      writes a recipe for each run into FOLDER, and names those that may share a card

Memory and time do not depend on what the weights are, so checkpoints are made on the card (make_checkpoint.py) and
nothing large is carried to it.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Tables = dict[str, dict[str, Any]]

LLAMA = {"vocab_size": 128256, "rope_theta": 500000.0, "max_position_embeddings": 131072}
GEOMETRIES: dict[str, dict[str, Any]] = {
    "135m": {"vocab_size": 49152, "rope_theta": 100000.0, "max_position_embeddings": 8192}
    | {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    | {"num_key_value_heads": 3, "tie_word_embeddings": True},
    "1b": LLAMA
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True},
    "3b": LLAMA
    | {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24}
    | {"num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True},
    "8b": LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "tie_word_embeddings": False},
}
"""SmolLM2 135M, Llama 3.2 1B and 3B, Llama 3.1 8B, as their config.json has them."""

STEPS = 6


@dataclass(frozen=True)
class Run:
    """One recipe on one geometry."""

    name: str
    model: str
    length: int
    batch: int
    """Rows of a step; all of them at once unless `tables` says otherwise."""
    tables: Tables = field(default_factory=dict)
    chat: bool = False
    """Chat rows of many lengths instead of long texts."""

    def recipe(self, models: str, data: str, runs: str) -> Tables:
        """The recipe's tables; `models`, `data` and `runs` are folders."""
        rows: dict[str, Any] = {"train": f"{data}/text.jsonl", "format": "text"}
        if self.chat:
            rows = {"train": f"{data}/chat.jsonl", "chat_template": "chatml", "on_long_row": "cut-right"}
        tables: Tables = {
            "model": {"base": f"{models}/{self.model}"},
            "quantization": {"kind": "nf4"},
            "adapter": {"kind": "lora", "rank": 16, "alpha": 32},
            "data": rows | {"validation": 0.0, "max_length": self.length},
            "training": {
                "batch_size": self.batch,
                "micro_batch_size": self.batch,
                "steps": STEPS,
                "schedule": "constant",
                "warmup": 0.0,
                "learning_rate": 1e-4,
                "gradient_checkpointing": True,
                "checkpoint_every": 1000,
                "eval_every": "never",
            },
            "memory": {},
            "output": {"directory": runs, "name": self.name},
        }
        for name, values in self.tables.items():
            # An adapter of another kind has other keys; the rest is changed key by key.
            tables[name] = values if name == "adapter" and "rank" not in values else tables[name] | values
        return tables


RUNS = (
    Run("8b-1x2048", "8b", 2048, 1),
    Run("8b-4x2048", "8b", 2048, 4),
    Run("8b-1x4096-host", "8b", 4096, 1, {"memory": {"embeddings": "host", "activations": "host"}}),
    Run("1b-1x2048", "1b", 2048, 2, {"training": {"micro_batch_size": 1}}),
    Run("1b-4x2048-kept", "1b", 2048, 4, {"training": {"gradient_checkpointing": False}}),
    Run(
        "3b-bf16-4x640-kept",
        "3b",
        640,
        4,
        {
            "quantization": {"kind": "none"},
            "adapter": {"kind": "lora", "rank": 32, "alpha": 32, "target_modules": ["q_proj", "v_proj"]},
            "training": {"gradient_checkpointing": False},
        },
    ),
    Run("1b-p-tuning", "1b", 2048, 2, {"adapter": {"kind": "p-tuning"}}),
    Run("1b-prompt-tuning", "1b", 1024, 2, {"adapter": {"kind": "prompt-tuning"}}),
    Run(
        "1b-dora-paged-8bit",
        "1b",
        2048,
        2,
        {"adapter": {"kind": "lora", "rank": 16, "dora": True}, "training": {"optimizer": "paged-adamw-8bit"}},
    ),
    Run("8b-chat-16", "8b", 2048, 16, {"training": {"micro_batch_size": 16}}, chat=True),
    Run("1b-int8", "1b", 2048, 2, {"quantization": {"kind": "int8"}}),
)
ALONE = Run("8b-4x2048-auto", "8b", 2048, 4, {"training": {"gradient_checkpointing": "auto"}})
"""The fastest step that the card has room for; alone there, because it takes all the room that it finds."""


def toml(tables: Tables) -> str:
    """Tables of plain values as TOML, whose strings, numbers and lists are written as JSON writes them."""
    lines: list[str] = []
    for name, values in tables.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items()), ""]
    return "\n".join(lines)


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for run in (*RUNS, ALONE):
        text = toml(run.recipe(str(folder / "models"), str(folder), str(folder / "runs")))
        (folder / f"{run.name}.toml").write_text(text, encoding="utf-8")
        if run is not ALONE:
            print(run.name)


if __name__ == "__main__":
    main()
