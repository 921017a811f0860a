"""The tools that take steps beside each other: the same rows and losses, in this process and in others."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from trl import SFTConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import bench_card
import bench_compiled
import bench_step
import validate_time
from step_apart import LINEAR, Apart, Job, RefusedError

from qtune.device.present import present_device
from qtune.model.load import load_config
from qtune.plan import make_plan

# The names that older transformers, which Unsloth asks for, have as well.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

STAND_IN = '''
"""Unsloth's two functions, by transformers and peft."""
import json, sys

print("a library that greets on stdout")
assert "transformers" not in sys.modules and "trl" not in sys.modules, "Unsloth has to come first"
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig


class FastLanguageModel:
    @staticmethod
    def from_pretrained(model_name, max_seq_length, load_in_4bit, dtype, local_files_only):
        assert load_in_4bit and local_files_only
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
        model = AutoModelForCausalLM.from_pretrained(
            model_name, dtype=dtype, quantization_config=quantization, device_map={"": "cpu"}
        )
        model.asked = {"max_seq_length": max_seq_length}
        return model, AutoTokenizer.from_pretrained(model_name)

    @staticmethod
    def get_peft_model(model, *, use_gradient_checkpointing, random_state, target_modules, r, lora_alpha, **zero):
        assert zero == {"lora_dropout": 0, "bias": "none"}
        asked = {**model.asked, "checkpointing": use_gradient_checkpointing, "modules": target_modules}
        open("asked.json", "w").write(json.dumps(asked))
        torch.manual_seed(random_state)
        adapter = LoraConfig(task_type="CAUSAL_LM", r=r, lora_alpha=lora_alpha, target_modules=target_modules)
        return get_peft_model(model, adapter)
'''


def as_unsloth(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processes import this as `unsloth` from here on."""
    (folder / "unsloth").mkdir()
    (folder / "unsloth" / "__init__.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def options_for(base: Path, *more: str) -> argparse.Namespace:
    """A short comparison on a tiny model, in float32."""
    given = ["--base", base, "--length", "48", "--steps", "2", "--threads", "1", "--dtype", "float32", *more]
    return bench_step.parsed([str(one) for one in given])


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """One for Unsloth that gets no further than its import."""
    return Job(
        trainer="Unsloth", base="nowhere", rows="nowhere", folder=str(tmp_path / "job"), device="cpu", dtype="float32",
        adapter_dtype=None, checkpointing=False, rank=4, alpha=8, learning_rate=1e-3, seed=1, threads=1,
    )  # fmt: skip


@pytest.mark.slow
def test_a_process_of_its_own_takes_the_steps_that_are_taken_here(tiny_model, own_cache, tmp_path, monkeypatch):
    """Of Unsloth's model in TRL's trainer, which `TRL-apart` is as well with another maker of its model."""
    monkeypatch.setenv("QTUNE_CACHE", str(own_cache))
    as_unsloth(STAND_IN, tmp_path, monkeypatch)
    options = options_for(
        tiny_model, "--scored", "answers", "--trl-adapter", "bfloat16", "--trainers", "TRL", "Unsloth"
    )
    taken = bench_step.steps_in_turn(options, tmp_path)
    losses = {name: torch.tensor([step.loss for step in steps]) for name, steps in taken.items()}
    assert [len(steps) for steps in taken.values()] == [4, 4]
    assert losses["TRL"][0] - losses["TRL"][-1] > 0.01  # what is equal has moved
    torch.testing.assert_close(losses["Unsloth"], losses["TRL"], rtol=0, atol=1e-4)
    asked = json.loads((tmp_path / "Unsloth" / "asked.json").read_text())
    assert asked == {"max_seq_length": 48, "checkpointing": False, "modules": LINEAR}
    if Path("/proc/self/status").exists():
        assert all(step.peak_bytes > 50 << 20 for step in taken["Unsloth"])


def test_a_trainer_that_cannot_be_had_is_left_out_with_the_reason_and_the_others_go_on(
    tiny_model, own_cache, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("QTUNE_CACHE", str(own_cache))
    as_unsloth('raise NotImplementedError("no accelerator")', tmp_path, monkeypatch)
    options = options_for(tiny_model, "--trainers", "Unsloth", "TRL", "qtune")
    taken = bench_step.steps_in_turn(options, tmp_path)
    theirs, ours = ([step.loss for step in taken[name]] for name in ("TRL", "qtune"))
    assert list(taken) == ["TRL", "qtune"]
    assert ours == pytest.approx(theirs, abs=1e-4)
    why = "it is made for CUDA cards, and none is here. It says: NotImplementedError: no accelerator"
    assert f"Unsloth is left out: {why}\n" in capsys.readouterr().out
    bench_step.report(options, taken)
    assert "loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "theirs", "ours"), [("none", False, False), ("every", True, True), ("usual", True, False)]
)
def test_layers_are_computed_twice_by_whom_the_word_says(
    word, theirs, ours, tiny_model, own_cache, tmp_path, monkeypatch
):
    monkeypatch.setenv("QTUNE_CACHE", str(own_cache))
    monkeypatch.setattr(bench_step, "on_card", lambda: False)
    options = options_for(tiny_model, "--checkpointing", word, "--trainers", "TRL", "qtune")
    forwards = {}
    for name, make in bench_step.makers(options, tmp_path).items():
        trainer = make().trainer
        layer = trainer.model.get_base_model().model.layers[0].self_attn.k_proj
        forwards[name] = counted = []
        layer.register_forward_hook(lambda *_, counted=counted: counted.append(1))
        bench_card.update(trainer, next(iter(trainer.get_train_dataloader())))
    assert {name: len(counted) for name, counted in forwards.items()} == {"TRL": 1 + theirs, "qtune": 1 + ours}
    if word == "usual":
        assert SFTConfig(str(tmp_path), use_cpu=True, bf16=False).gradient_checkpointing is True


def test_what_a_card_does_when_it_is_not_told_is_not_asked_here(tiny_model, monkeypatch, capsys):
    monkeypatch.setattr(bench_step, "on_card", lambda: True)
    with pytest.raises(SystemExit):
        options_for(tiny_model, "--checkpointing", "usual")
    assert "use tools/bench_card.py" in capsys.readouterr().err


def test_that_unsloth_is_not_installed_is_said_with_the_way_out(job, tmp_path, monkeypatch):
    hides = "import importlib.util as u; u.find_spec = lambda name: None"
    (tmp_path / "sitecustomize.py").write_text(hides)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RefusedError) as refusal:
        Apart(Path(sys.executable), job)
    assert str(refusal.value) == (
        f"not installed for {sys.executable}. It asks for older transformers and TRL than qtune, so give it an "
        "environment of its own and name that one's Python with --unsloth-python"
    )


def test_a_process_that_ends_is_told_with_its_last_words(job, tmp_path, monkeypatch):
    as_unsloth('import os, sys\nprint("the driver is gone", flush=True)\nos._exit(3)', tmp_path, monkeypatch)
    with pytest.raises(RefusedError) as refusal:
        Apart(Path(sys.executable), job)
    assert str(refusal.value) == "its process ended with exit code 3; its last words:\nthe driver is gone"


def test_a_python_that_is_not_there_is_named(job, tmp_path):
    with pytest.raises(RefusedError) as refusal:
        Apart(tmp_path / "python", job)
    assert str(refusal.value) == f"{tmp_path / 'python'} cannot be started: No such file or directory"


def test_ratios_are_of_steps_that_followed_each_other(tiny_model, capsys):
    options = options_for(tiny_model)
    step = bench_step.Taken(loss=5.0, seconds=1.0, worked_seconds=1.0, peak_bytes=None)
    slower = [replace(step, seconds=seconds, worked_seconds=2.0, peak_bytes=3 << 29) for seconds in (9, 9, 2, 8, 3)]
    bench_step.report(options, {"TRL": slower, "qtune": [replace(step, seconds=s) for s in (9, 9, 1, 2, 3)]})
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].split(",")[0] == "TRL          3.00 s per step (2.00 to 8.00)"
    assert printed[1].endswith("peak 1.50 GiB")
    assert printed[3] == (
        "TRL / qtune, median of pairs (least to most): 2.00 (1.00 to 4.00) by the clock, "
        "2.00 (2.00 to 2.00) of processor time"
    )


def test_the_bench_of_a_card_takes_steps_of_both_trainers(tmp_path):
    geometry = {
        "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 320,
    }  # fmt: skip
    losses = []
    for make in (bench_card.trl, lambda *arguments: bench_card.ours(*arguments, "qtune")):
        trainer = make(geometry, 2, 40, str(tmp_path))
        ids = torch.arange(80).view(2, 40) + 3
        batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
        losses.append(float(bench_card.update(trainer, batch)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)  # the weights are the same, and computed in 16 bits


def test_steps_beside_predictions_are_taken_by_the_same_trainer(tiny_model, own_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("QTUNE_CACHE", str(own_cache))
    options = argparse.Namespace(base=None, length=16, rows=2, steps=1, checkpointing="auto", kernels=False)
    recipe = validate_time.recipe_of(tiny_model, options)
    plan = make_plan(recipe, present_device())
    size = load_config(recipe.model).vocab_size
    clock = validate_time.measured_steps(recipe, plan, tmp_path, [16, 12], size, options)
    assert len(clock.ends) == validate_time.UNCOUNTED + 1
    assert clock.seconds > 0


@pytest.mark.parametrize(("made", "kept"), [("SmolLM2 135M", False), (None, True)])
def test_a_checkpoint_that_goes_away_again_leaves_no_copy_in_the_cache(made, kept, tiny_model):
    given = ["--model", made] if made else ["--base", str(tiny_model)]
    assert bench_step.recipe_of(bench_step.parsed(given)).quantization.keep_copy is kept
    base = None if made else tiny_model
    options = argparse.Namespace(base=base, length=16, rows=2, steps=1, checkpointing="auto", kernels=False)
    assert validate_time.recipe_of(tiny_model, options).quantization.keep_copy is kept


def test_compiling_pays_when_the_steps_have_saved_what_it_took():
    plain = bench_compiled.Way(step=torch.tensor, seconds=[9.0, 9.0, 9.0, 2.0, 2.5, 3.0])
    compiled = bench_compiled.Way(step=torch.tensor, seconds=[22.0, 12.0, 2.0, 2.0, 2.0, 2.4])
    assert bench_compiled.verdict(("peft", plain), ("peft, compiled", compiled)) == (
        "peft, compiled: in 30.0 s; a step takes 0.80 (0.80 to 1.00) of peft's; pays after 60 steps"
    )
    assert bench_compiled.verdict(("qtune", compiled), ("peft, compiled", plain)).endswith("of qtune's; never pays")


def test_what_is_compiled_is_the_same_step_in_both_ways():
    options = argparse.Namespace(model="SmolLM2 135M", layers=1, dtype="float32", rows=1, length=8)
    steps = [bench_compiled.step_of(options, lean=lean, compiled=False) for lean in (False, True)]
    theirs, ours = ([float(step()) for _ in range(2)] for step in steps)
    assert ours == pytest.approx(theirs, abs=1e-4)
