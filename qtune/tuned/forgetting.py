"""What a tuned model has forgotten: how much worse than its base it predicts text that has nothing to do with its rows.

The text comes with qtune (`neutral.txt`): sixteen short pieces that were written for this, in English and a few lines
of Python: a story, a recipe, a letter, a contract, a game. It is read as plain text, without a template, with the
adapter on as in any use: behind its virtual tokens where it has some.
"""

import hashlib
from importlib.resources import files

import torch
from datasets import Dataset

from qtune import console
from qtune.model.loss import install_loss, loss_agrees
from qtune.run.folder import RunDir
from qtune.run.identity import write_of_run
from qtune.run.measured_adapter import adapter_name
from qtune.tuned.base_once import BaseOnce
from qtune.tuned.forgotten import Forgetting, PieceLoss, read_forgetting
from qtune.tuned.load import LoadedRun, load_untuned, with_adapter
from qtune.tuned.precision import training_autocast
from qtune.tuned.row_losses import require_finite_losses, row_losses


def neutral_pieces() -> list[str]:
    """The pieces of the text, in order. Lines of code keep their indentation."""
    text = files("qtune.tuned").joinpath("neutral.txt").read_text(encoding="utf-8")
    return [piece.strip("\n") for piece in text.split("\n\n") if piece.strip()]


def text_name() -> str:
    """Changes with the text, so that figures of two texts are never compared."""
    return hashlib.sha256("\n\n".join(neutral_pieces()).encode()).hexdigest()[:12]


def measure_forgetting(run_dir: RunDir, *, accepted: tuple[str, ...] = (), bases: BaseOnce | None = None) -> Forgetting:
    """What was measured of this run before, else measures it now and keeps it.

    accepted: kinds of drift (`run.drift`) that the run is loaded with. bases: as `evaluate`'s.

    Raises:
        RunError: the run has not ended, or is not what was trained. WorkError: a loss is no number.
    """
    run_dir.finished_adapter()
    kept = read_forgetting(run_dir)
    if kept is not None and kept.text == text_name():
        return kept
    untuned = load_untuned(run_dir, accepted=accepted)
    rows = _rows(untuned)
    first = torch.tensor([rows[0]["input_ids"]], device=untuned.model.device)
    install_loss(untuned.model, tiled=loss_agrees(untuned.model, first), tile_bytes=untuned.plan.loss_tile_bytes)

    def measured(run: LoadedRun, name: str, what: str) -> list[float]:
        with console.progress(f"{name} model, {what}", len(rows)) as shown:
            return _losses(run, rows, shown, name)

    asked = ["forgetting", list(rows["input_ids"])]
    base = (bases or BaseOnce()).measured(
        untuned, asked, lambda: measured(untuned, "base", "text about none of the rows")
    )
    tuned = measured(with_adapter(untuned), "tuned", f"what {run_dir.path} has forgotten")
    tokens = [length - 1 for length in rows["length"]]
    found = Forgetting(
        text_name(),
        tuple(PieceLoss(count, b / count, t / count) for count, b, t in zip(tokens, base, tuned, strict=True)),
        adapter_name(run_dir),
    )
    write_of_run(run_dir, run_dir.forgetting_file, found)
    return found


def _rows(run: LoadedRun) -> Dataset:
    """The pieces as rows of which every token but the first is scored.

    A soft prompt could predict the first one too; the base could not, and only the same tokens can be compared.
    """
    ids = [run.tokenizer(piece)["input_ids"] for piece in neutral_pieces()]
    labels = [[-100, *one[1:]] for one in ids]
    return Dataset.from_dict({"input_ids": ids, "labels": labels, "length": [len(one) for one in ids]})


def _losses(run: LoadedRun, rows: Dataset, shown: console.Bar, name: str) -> list[float]:
    pad = run.tokenizer.pad_token_id
    assert isinstance(pad, int)
    with training_autocast(run.plan):
        losses, _ = row_losses(run.model.eval(), rows, pad, shown)
    require_finite_losses(losses, [f"neutral.txt:{place + 1}" for place in range(len(losses))], name)
    return losses
