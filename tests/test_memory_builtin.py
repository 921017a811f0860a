"""The built-in model, trained by `qtune run` under the ledger: what was traced is what its real steps took."""

import copy
import json
from pathlib import Path

import pytest
from conftest import EVERYTHING
from transformers import PreTrainedModel

from qtune.device.present import present_device
from qtune.kernels.on_cpu import PIECE
from qtune.memory.profile import trace_run
from qtune.memory.tracing.categories import LOSS, WORKSPACE
from qtune.model.load import load_base
from qtune.plan import make_plan
from qtune.recipe.file import load_recipe
from qtune.training import build, train

LENGTH = 64
TABLES = {
    "lora": 'kind = "lora"\nrank = 4\ntarget_modules = ["q_proj", "v_proj"]',
    "p-tuning": 'kind = "p-tuning"\nvirtual_tokens = 8',
}
RECIPE = """
[model]
base = "builtin:smollm2-135m-instruct"
[adapter]
{adapter}
[data]
train = "rows.jsonl"
format = "text"
validation = 0
max_length = {length}
[training]
steps = 2
batch_size = 2
micro_batch_size = 2
gradient_checkpointing = {checkpointing}
[memory]
keep_dequantized = {keep}
[output]
directory = "{folder}/runs"
"""


def recipe_file(folder: Path, adapter: str, checkpointing: bool, keep: bool = False) -> Path:
    """A recipe of rows that are all cut to `LENGTH` tokens."""
    words = "It takes as many bytes as the trace has said. " * LENGTH
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": f"{number} {words}"}) + "\n" for number in range(4)))
    file = folder / "recipe.toml"
    switches = {"checkpointing": str(checkpointing).lower(), "keep": str(keep).lower()}
    file.write_text(RECIPE.format(adapter=TABLES[adapter], length=LENGTH, folder=folder, **switches))
    return file


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """The built-in model, quantized once for all of these runs."""
    recipe = load_recipe(recipe_file(tmp_path_factory.mktemp("base"), "lora", False)).recipe
    return load_base(recipe.model, recipe.quantization, make_plan(recipe, present_device()))


# Each adapter, kept and checkpointed; tiny models are traced in every combination (`test_memory_trace.py`).
# The last value: whether weights stay dequantized.
CASES = {
    "lora-checkpointed": ("lora", True, False),
    "p-tuning-kept": ("p-tuning", False, False),
    "p-tuning-dequantized": ("p-tuning", False, True),
}
if EVERYTHING:
    CASES |= {
        "lora-kept": ("lora", False, False),
        "lora-dequantized": ("lora", False, True),
        "p-tuning-checkpointed": ("p-tuning", True, False),
    }


@pytest.mark.slow
@pytest.mark.parametrize(("adapter", "checkpointing", "keep"), CASES.values(), ids=CASES)
def test_a_run_of_the_built_in_model_takes_the_traced_bytes(
    base: PreTrainedModel,
    tmp_path: Path,
    adapter: str,
    checkpointing: bool,
    keep: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build, "load_base", lambda *args: copy.deepcopy(base))
    monkeypatch.setattr("qtune.memory.savings.baselines", lambda *args: [])
    monkeypatch.setattr("qtune.memory.cached.cache_folder", lambda: tmp_path)
    found = trace_run(train.run(load_recipe(recipe_file(tmp_path, adapter, checkpointing, keep))))
    batch = found.measured["largest_batch"]["forward"]
    assert (batch["rows"], batch["length"], batch["padded"]) == (2, LENGTH, 0)
    assert found.prediction is not None
    assert found.prediction.peak.bytes == pytest.approx(found.measured["peak_bytes"], rel=0.01)
    for phase in ("forward", "backward", "optimizer"):
        real = found.measured["phases"][phase]["tensor_peak_bytes"]
        assert found.prediction.by_phase[phase].bytes == pytest.approx(real, rel=0.01), phase
    real_at_peak = found.measured["at_peak"]["alive"]
    for category, traced in found.prediction.peak.alive.items():
        # Where the loss is the fullest moment, oneDNN's products have a piece more there than a trace knows
        # (`on_cpu.PIECE`), where nothing is dequantized.
        piece = 4 * PIECE if category == LOSS and keep else 16 * 1024
        assert traced == pytest.approx(real_at_peak[category], rel=0.01, abs=piece), category
    if keep:
        assert found.prediction.peak.alive[WORKSPACE] == 106_168_320 * 4  # the built-in model's linear layers
