"""The lines of Python in a card are run as they stand, and give the trained model's answer."""

import contextlib
import io
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from export_models import tiny_run

from qtune.export import model_card
from qtune.export.export import Options, export_run
from qtune.export.serving import uses_text
from qtune.model.builtin import builtin_folder
from qtune.run.folder import RunDir
from qtune.run.metrics import TrainRecord, append_metric
from qtune.tuned.generate import find_ends, generate
from qtune.tuned.load import load_run

# peft 0.21.2 asks transformers 5.23 for the name that it is about to drop.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    # What peft says of each token that is generated behind a soft prompt.
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
]


def printed_by_the_card(card: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    code = re.search(r"```python\n(.*?)```", card.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    monkeypatch.chdir(folder)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        base = f'from_pretrained("{folder.parents[1] / "base"}"'  # a card names no path of this computer
        exec(code[1].replace('from_pretrained("base"', base).replace("max_new_tokens=200", "max_new_tokens=12"), {})
    return printed.getvalue().removesuffix("\n")


def live_answer(run: RunDir) -> str:
    live = load_run(run)
    asked = live.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_dict=True
    )
    [ids] = generate(live.model, [asked["input_ids"]], [12], find_ends(live.model, live.tokenizer))
    return str(live.tokenizer.decode(ids, skip_special_tokens=True))


@pytest.mark.parametrize(
    "kind",
    [
        'kind = "prefix-tuning"\nvirtual_tokens = 3',
        'kind = "lora"\nrank = 4',
        'kind = "prompt-tuning"\nvirtual_tokens = 3',
        'kind = "p-tuning"\nvirtual_tokens = 3',
    ],
)
def test_the_loader_of_an_adapter_card_works(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run(tmp_path, kind)
    for step, loss in enumerate((3.0, 1.0), 1):
        append_metric(run.metrics_file, TrainRecord(step, 2, step / 2, step, loss, 0.5, 1e-4, 1.0, 100.0, 1, 1))
    folder = export_run(run, Options(adapter_only=True))
    assert "- training loss: 3.00 -> 1.00 (first and last logged step)\n" in (folder / "README.md").read_text()
    assert printed_by_the_card(folder / "README.md", monkeypatch, folder) == live_answer(run)


def test_the_loader_of_a_model_card_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run(tmp_path, 'kind = "p-tuning"\nvirtual_tokens = 3')
    folder = export_run(run, Options(verify=False))
    assert printed_by_the_card(folder / "README.md", monkeypatch, folder.parent).startswith(live_answer(run)[:3])


def test_the_line_that_an_export_ends_with_answers_as_the_trained_model_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(tmp_path)
    folder = export_run(run, Options(verify=False))
    line = next(line for line in uses_text(folder, (), None).splitlines() if " transformers: " in line)
    _, _, code = shlex.split(line.partition(": ")[2])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code.replace("max_new_tokens=200", "max_new_tokens=12"), {})
    assert printed.getvalue().removesuffix("\n") == live_answer(run)


def test_a_prefix_is_exported_as_an_adapter_with_the_reason_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny_run(tmp_path, 'kind = "prefix-tuning"\nvirtual_tokens = 3')
    folder = export_run(run, Options())
    assert (folder / "adapter_model.safetensors").exists()
    assert "where no plain checkpoint can hold it" in capsys.readouterr().err


def test_an_unproven_model_says_so(tmp_path: Path) -> None:
    folder = export_run(tiny_run(tmp_path), Options(verify=False))
    assert (
        "Not verified: this model was not compared with the one that was trained." in (folder / "README.md").read_text()
    )


def test_the_card_of_an_adapter_on_a_built_in_base_loads_it_by_qtunes_own_function() -> None:
    """transformers knows no "builtin:…"."""
    built_in = model_card._loaded_from(SimpleNamespace(base_in_public="builtin:some-model"))  # type: ignore[arg-type]
    scope: dict[str, object] = {}
    exec(built_in["imports"], scope)
    assert scope["builtin_folder"] is builtin_folder
    assert eval(built_in["base"], {"builtin_folder": str.upper}) == "SOME-MODEL"
    of_hub = model_card._loaded_from(SimpleNamespace(base_in_public='org/"name"'))  # type: ignore[arg-type]
    assert (eval(of_hub["base"]), of_hub["imports"]) == ('org/"name"', "")
