"""What was forgotten is the difference of two losses on text that comes with qtune, the same tokens for both models."""

from pathlib import Path

import pytest
import torch
from export_models import tiny_run
from peft import PeftModel
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from qtune.run.folder import RunDir
from qtune.tuned import forgetting
from qtune.tuned.forgetting import measure_forgetting, neutral_pieces
from qtune.tuned.forgotten import Forgetting, PieceLoss
from qtune.tuned.load import load_run

# peft 0.21.2 asks transformers 5.23 for the name that it is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

PLAIN = 'kind = "none"\ncompute_dtype = "float32"'
SOFT = 'kind = "prompt-tuning"\nvirtual_tokens = 3'


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return tiny_run(tmp_path_factory.mktemp("forgetting"), SOFT, quantization=PLAIN)


@torch.no_grad()
def mean_losses(model: torch.nn.Module, folder: Path, front: int = 0) -> list[float]:
    """Of the tokens behind the first of each piece; `front` positions of the logits are a prompt's."""
    found = []
    for piece in neutral_pieces():
        ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(piece)["input_ids"])
        logits = model(input_ids=ids[None]).logits[0, front:]
        found.append(float(functional.cross_entropy(logits[:-1].float(), ids[1:])))
    return found


def test_the_base_s_loss_is_what_plain_transformers_computes_and_the_tuned_one_s_what_peft_does(run: RunDir) -> None:
    base = run.path.parent / "base"
    found = measure_forgetting(run)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert [piece.base for piece in found.pieces] == pytest.approx(mean_losses(plain, base), rel=1e-4)
    tuned = mean_losses(load_run(run).model, base, front=3)
    assert [piece.tuned for piece in found.pieces] == pytest.approx(tuned, rel=1e-4)
    assert found.base != found.tuned


EVERY_KIND = {
    "lora": ('kind = "lora"\nrank = 4', 0),
    "ia3": ('kind = "ia3"', 0),
    "prefix tuning": ('kind = "prefix-tuning"\nvirtual_tokens = 3', 0),
    "p-tuning": ('kind = "p-tuning"\nvirtual_tokens = 3\nencoder_hidden_size = 16', 3),
    "p-tuning, residual": ('kind = "p-tuning"\nvirtual_tokens = 3\nresidual = true', 3),
    "prompt tuning, residual": ('kind = "prompt-tuning"\nvirtual_tokens = 3\nresidual = true', 3),
}
"""Each with the positions that its virtual tokens take before a text."""


@pytest.mark.slow
@pytest.mark.parametrize(("adapter", "front"), EVERY_KIND.values(), ids=EVERY_KIND)
def test_of_every_kind_it_is_the_loss_of_what_peft_loads_from_the_adapter_s_folder(
    adapter: str, front: int, tmp_path: Path
) -> None:
    run = tiny_run(tmp_path, adapter, quantization=PLAIN)
    base = run.path.parent / "base"
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), run.adapter)
    found = measure_forgetting(run)
    assert [piece.tuned for piece in found.pieces] == pytest.approx(mean_losses(theirs.eval(), base, front), rel=1e-4)
    assert found.tuned != found.base


def test_it_is_measured_once_for_a_text(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    first = measure_forgetting(run)
    monkeypatch.setattr(forgetting, "load_untuned", lambda *args, **kwargs: pytest.fail("loaded again"))
    assert measure_forgetting(run) == first
    monkeypatch.setattr(forgetting, "text_name", lambda: "another")
    with pytest.raises(pytest.fail.Exception, match="loaded again"):
        measure_forgetting(run)


def test_long_pieces_count_by_their_tokens() -> None:
    found = Forgetting("", (PieceLoss(1, 1.0, 2.0), PieceLoss(3, 3.0, 4.0)))
    assert (found.base, found.tuned) == (2.5, 3.5)
