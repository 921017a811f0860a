"""The lines of Python in a card are run as they stand, and give the trained model's answer."""

import contextlib
import functools
import inspect
import io
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from export_models import SHAPE, some_ids, tiny_run
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from qtune.export import model_card
from qtune.export.export import Options, export_run
from qtune.model.builtin import builtin_folder
from qtune.run.folder import RunDir
from qtune.run.metrics import NoteRecord, TrainRecord, append_metric
from qtune.tuned.generate import Ends, find_ends, generate, mend_generate
from qtune.tuned.load import load_run

# peft 0.21.2 asks transformers 5.23 for the name that it is about to drop.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    # What peft says of the positions that it leaves out, which stand for nothing where there is no padding.
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
]


KINDS = {
    "LoRA": 'kind = "lora"\nrank = 4',
    "prompt tuning": 'kind = "prompt-tuning"\nvirtual_tokens = 3',
    "p-tuning": 'kind = "p-tuning"\nvirtual_tokens = 3',
    "prefix-tuning": 'kind = "prefix-tuning"\nvirtual_tokens = 3',
}
DRAWS = {"do_sample": True, "temperature": 5.0, "top_k": 300, "repetition_penalty": 9.0, "eos_token_id": 2}


def let_the_base_draw(run: RunDir) -> None:
    """A generation config like those of many chat models, in the extreme."""
    (run.path.parent / "base" / "generation_config.json").write_text(json.dumps(DRAWS))


def name_the_cache_as_transformers_5_24_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a base prepares for peft holds "cache" and no "past_key_values"; its forward takes it by that name."""
    prepare, forward = LlamaForCausalLM.prepare_inputs_for_generation, LlamaForCausalLM.forward
    if "cache" in inspect.signature(forward).parameters:
        return

    def prepared(self: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = prepare(self, *args, **kwargs)
        return {"cache" if name == "past_key_values" else name: value for name, value in inputs.items()}

    @functools.wraps(forward)
    def renamed(self: Any, *args: Any, cache: Any = None, **kwargs: Any) -> Any:
        return forward(self, *args, **(kwargs if cache is None else kwargs | {"past_key_values": cache}))

    monkeypatch.setattr(LlamaForCausalLM, "prepare_inputs_for_generation", functools.wraps(prepare)(prepared))
    monkeypatch.setattr(LlamaForCausalLM, "forward", renamed)


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


@pytest.mark.parametrize("kind", KINDS)
def test_the_lines_of_an_adapter_card_answer_as_the_trained_model_with_every_transformers_that_is_allowed(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(tmp_path, KINDS[kind])
    for step, loss in enumerate((3.0, 1.0), 1):
        append_metric(run.metrics_file, TrainRecord(step, 2, step / 2, step, loss, 0.5, 1e-4, 1.0, 100.0, 1, 1))
    let_the_base_draw(run)
    folder = export_run(run, Options(adapter_only=True))
    card = (folder / "README.md").read_text()
    assert "- training loss: 3.00 -> 1.00 (first and last logged step)\n" in card
    assert "\n- 2 steps, batch 16, " in card
    expected = live_answer(run)
    assert printed_by_the_card(folder / "README.md", monkeypatch, folder) == expected
    name_the_cache_as_transformers_5_24_does(monkeypatch)
    assert printed_by_the_card(folder / "README.md", monkeypatch, folder) == expected


@pytest.mark.parametrize("kind", list(KINDS)[1:])
def test_pefts_own_generate_answers_as_ours_for_those_who_call_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-evaluation-harness does, for tasks that are answered in free text."""
    name_the_cache_as_transformers_5_24_does(monkeypatch)
    config = LlamaConfig(**SHAPE)
    torch.manual_seed(7)
    sizes: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    made = {"prompt tuning": PromptTuningConfig, "p-tuning": PromptEncoderConfig, "prefix-tuning": PrefixTuningConfig}
    model = get_peft_model(LlamaForCausalLM(config), made[kind](**sizes)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    ids = some_ids(1, 9)
    [expected] = generate(model, [tuple(ids[0].tolist())], [12], Ends((), 0))
    mend_generate(model)
    asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "eos_token_id": None}
    assert model.generate(**asked, do_sample=False, use_cache=True)[0, 9:].tolist() == expected


def test_what_is_printed_for_a_merged_model_answers_as_the_trained_one_though_its_base_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny_run(tmp_path, quantization='kind = "none"\ncompute_dtype = "float32"', dtype=torch.float32)
    let_the_base_draw(run)
    folder = export_run(run, Options(verify=False, gguf="f16"))
    said = capsys.readouterr().err.partition("use it with one of")[2]
    assert said.startswith(" (each asked for the likeliest token, as qtune asks):\n")
    expected = live_answer(run)
    card = folder / "README.md"
    assert printed_by_the_card(card, monkeypatch, folder) == expected
    (line,) = (line for line in said.splitlines() if "transformers:" in line)
    _, _, code = shlex.split(line.partition("transformers:")[2])
    exec(code.replace("max_new_tokens=200", "max_new_tokens=12"), {})
    assert capsys.readouterr().out.removesuffix("\n") == expected
    # Servers are told the same, and the export keeps the settings of its base.
    for text in (said, card.read_text()):
        assert """--override-generation-config '{"temperature": 0, "repetition_penalty": 1.0}'""" in text
        assert text.count("--temp 0 --repeat-penalty 1.0") == 2
    kept = json.loads((folder / "generation_config.json").read_text())
    assert {name: kept[name] for name in ("do_sample", "temperature", "repetition_penalty")} == {
        "do_sample": True,
        "temperature": 5.0,
        "repetition_penalty": 9.0,
    }
    modelfile = (folder / "Modelfile").read_text()
    assert "\nPARAMETER temperature 0\nPARAMETER repeat_penalty 1.0\n" in modelfile
    assert "\n# PARAMETER temperature 5.0\n" in modelfile


def test_the_loader_of_a_model_card_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run(tmp_path, 'kind = "p-tuning"\nvirtual_tokens = 3')
    folder = export_run(run, Options(verify=False))
    assert printed_by_the_card(folder / "README.md", monkeypatch, folder).startswith(live_answer(run)[:3])


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
    of_hub = model_card._loaded_from(SimpleNamespace(base_in_public='org/"name"', is_of_hub=True))  # type: ignore[arg-type]
    assert (eval(of_hub["base"]), of_hub["imports"]) == ('org/"name"', "")


def test_a_card_says_after_which_step_the_adapter_stands_as_far_as_a_file_tells(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    for step in (1, 2):
        append_metric(run.metrics_file, TrainRecord(step, 9, step / 9, step, 2.0, 0.5, 1e-4, 1.0, 100.0, 1, 1))
    append_metric(run.metrics_file, NoteRecord("the best state is kept", 2.0, adapter_step=1, ended_step=2))
    folder = export_run(run, Options(adapter_only=True))
    assert "\n- 2 of 9 steps (this is the state after step 1), batch 16, " in (folder / "README.md").read_text()
    run.metrics_file.write_text("damaged\n")
    folder = export_run(run, Options(adapter_only=True, output=tmp_path / "again"))
    assert "\n- batch 16, " in (folder / "README.md").read_text()
