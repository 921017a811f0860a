"""One preflight: what stops a run is found before a weight is read, and `check`, `run` and `resume` say the same."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import WriteRecipe
from export_models import tiny_base, tiny_tokenizer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from qtune import cli
from qtune.adapter.state import STATE_FILE
from qtune.check import check
from qtune.device.present import Device
from qtune.errors import GateError, InputError, QtuneError
from qtune.manifest import seal
from qtune.memory.forecast import Forecast, attempted
from qtune.plan import make_plan
from qtune.preflight import examine
from qtune.recipe.file import load_recipe
from qtune.run.folder import RunDir
from qtune.run.resolved import resolved_text
from qtune.sizes import size_text
from qtune.startup.launched import launched
from qtune.training import build, train
from qtune.training.inputs import gather

CPU = Device("cpu", "CPU", 8 << 30, 6 << 30, bf16=False)
CARD = Device("cuda", "a card", 8 << 30, 8 << 30, bf16=True, capability=(8, 6))


@pytest.fixture(autouse=True)
def weightless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody may read a weight, and a trace says nothing that stops a run."""
    monkeypatch.setattr(build, "load_base", lambda *_: pytest.fail("weights were read"))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    monkeypatch.setattr("qtune.preflight.attempted", lambda *_: "not asked")


BAD = {
    "a tracker that is not installed": (
        ('training.trackers=["mlflow"]',),
        "training.trackers: not installed: mlflow; pip install mlflow, or remove it",
    ),
    "attention that is not installed": (
        ("model.attention=flash_attention_2",),
        'model.attention: "flash_attention_2" needs the package flash-attn, which is not installed',
    ),
    "a gguf that the family cannot have": (("model.base={opt}", "output.gguf=f16"), "{opt}: "),
    "too little quantized": (
        ("quantization.minimum_share=1.0",),
        "could be quantized; quantization.minimum_share asks for 100%",
    ),
    "target modules that match nothing": (
        ('adapter.target_modules=["query"]',),
        "adapter.target_modules: 'query': no module of ",
    ),
    "an adapter on the head": (
        (
            "adapter.kind=ia3",
            'adapter.target_modules=["lm_head", "up_proj"]',
            'adapter.feedforward_modules=["up_proj"]',
        ),
        "adapter.target_modules: lm_head is the model's LM head",
    ),
    "a start of another kind": (
        ("adapter.start_from={earlier}",),
        "{earlier}: adapter.kind = 'ia3' there, 'lora' in the recipe",
    ),
    "an output directory that is a file": (
        ("output.directory={file}",),
        "output.directory: {file} cannot be written: Not a directory; name another folder",
    ),
    "an output directory inside a file": (
        ("output.directory={file}/runs",),
        "output.directory: {file}/runs cannot be written ({file}): Not a directory; name another folder",
    ),
    "a template that is not there": (
        ("data.chat_template=no.jinja",),
        'data.chat_template = "no.jinja": no such file',
    ),
    "a model folder without a configuration": (("model.base={empty}",), "{empty}: has no config.json"),
    "bad rows": (("data.train={bad}",), "bad.jsonl:1: messages is empty"),
    "rows that are too long": (("data.max_length=20",), "  too-long: "),
    "a finding that cannot be waived": ((), "--allow nothing: no finding that can be waived"),
    "a file that is not there beside a key that is wrong": (
        ("data.train=none.jsonl", "adapter.rnak=3"),
        'data.train = "none.jsonl": no such file or folder in ',
    ),
}


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    """What the bad recipes name."""
    found = {name: tmp_path / name for name in ("file", "empty", "opt", "earlier")}
    found["file"].write_text("")
    found["empty"].mkdir()
    (tmp_path / "bad.jsonl").write_text('{"messages": []}\n{"messages": []}\n')
    return {**{name: str(path) for name, path in found.items()}, "bad": "bad.jsonl"}


def prepared_for(name: str, recipe: Path, places: dict[str, str], folder: Path) -> tuple[list[str], str]:
    """Makes what the bad recipe of this name needs; its options, and what is said of it."""
    changes, said = BAD[name]
    if "gguf" in name:
        tiny_tokenizer(tiny_base(folder / "opt", "opt", ffn_dim=64, word_embed_proj_dim=64))
    if "start" in name:
        earlier = RunDir(folder / "earlier")
        earlier.path.mkdir(exist_ok=True)
        resolved = load_recipe(recipe, ["adapter.kind=ia3"])
        earlier.write_text(earlier.resolved_file, resolved_text(resolved, make_plan(resolved.recipe, CPU)))
        earlier.adapter.mkdir()
        for file in ("adapter_config.json", STATE_FILE):
            (earlier.adapter / file).touch()
        seal(earlier.adapter)
    return [part for change in changes for part in ("--set", change.format_map(places))], said.format_map(places)


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD)
def test_check_and_run_say_the_same_before_a_weight_is_read(
    name: str, write_recipe: WriteRecipe, places: dict[str, str], tmp_path: Path
) -> None:
    recipe = write_recipe()
    options, said = prepared_for(name, recipe, places, tmp_path)
    options += ["--allow", "nothing"] if "waived" in name else []
    errors = []
    for verb in ("check", "run"):
        result = CliRunner().invoke(cli.app, [verb, str(recipe), *options])
        assert isinstance(result.exception, QtuneError), result.output
        errors.append((type(result.exception), str(result.exception)))
    assert errors[0] == errors[1]
    assert said in errors[0][1]
    assert not (tmp_path / "runs").exists()


FORESEEN = [
    "a tracker that is not installed", "a gguf that the family cannot have", "too little quantized",
    "a start of another kind", "an output directory that is a file",
]  # fmt: skip
"""What needs neither rows nor weights. Attention and target modules are not in it: without them nothing is traced."""


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["profile", "fit"])
@pytest.mark.parametrize("name", FORESEEN)
def test_profile_and_fit_say_what_a_run_would_refuse(
    verb: str, name: str, write_recipe: WriteRecipe, places: dict[str, str], tmp_path: Path
) -> None:
    recipe = write_recipe()
    changes, said = prepared_for(name, recipe, places, tmp_path)
    options = ["--vram", "8GiB", *(["--no-savings"] if verb == "profile" else [])]
    result = CliRunner().invoke(cli.app, [verb, str(recipe), *options, *changes])
    assert result.exit_code == 0, result.output
    assert "qtune run would refuse this: " in result.output
    assert said.split()[0] in result.output.replace("\n", "")


def changes_of(name: str, places: dict[str, str]) -> list[str]:
    return [change.format_map(places) for change in BAD[name][0]]


def test_everything_that_stops_a_run_is_said_at_once_and_shown_by_check(
    write_recipe: WriteRecipe, places: dict[str, str]
) -> None:
    at_once = ["a tracker that is not installed", "an output directory that is a file"]
    names = [
        *at_once,
        "attention that is not installed",
        "too little quantized",
        "target modules that match nothing",
        "bad rows",
    ]
    changes = [change.format_map(places) for name in names for change in BAD[name][0]]
    resolved = load_recipe(write_recipe(), changes)
    with pytest.raises(InputError) as caught:
        train.run(resolved)
    for name in names:
        assert BAD[name][1].format_map(places) in str(caught.value), name
    # What the recipe alone tells is refused before the libraries are loaded that the rest would take.
    early = CliRunner().invoke(cli.app, ["check", str(resolved.file), *(f"--set={change}" for change in changes)])
    assert [BAD[name][1].format_map(places) in str(early.exception) for name in at_once] == [True, True]
    changes = [change for change in changes if not any(change in changes_of(name, places) for name in at_once)]
    result = CliRunner().invoke(cli.app, ["check", str(resolved.file), *(f"--set={change}" for change in changes)])
    for problem in caught.value.problems:
        if problem in early.exception.problems:
            continue
        # Bad rows are counted on the screen, and listed by the error below it.
        assert f"error  {problem}" in result.output or "bad" in str(problem), problem
    assert "error  bad-rows: 2 bad rows, each named with the error" in result.output
    assert "nothing stands in the way" not in result.output


def test_the_gate_speaks_when_the_input_is_right(write_recipe: WriteRecipe) -> None:
    resolved = load_recipe(write_recipe(), ["data.max_length=20", 'training.trackers=["mlflow"]'])
    with pytest.raises(InputError, match=r"^training\.trackers"):
        examine(resolved).require()
    with pytest.raises(GateError, match="too-long"):
        examine(load_recipe(resolved.file, ["data.max_length=20"])).require()
    examine(load_recipe(resolved.file, ["data.max_length=20"]).allowing(["too-long"])).require()


def test_a_launcher_is_refused_where_no_work_is_shared(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert launched().processes == 1  # which is read once: what comes now is of this test alone
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="WORLD_SIZE: only qtune run shares its work out; start this without a"):
        check(load_recipe(write_recipe())).require()


def test_a_run_that_goes_on_meets_the_same_preflight(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    resolved = load_recipe(write_recipe(), ['training.trackers=["mlflow"]', "quantization.minimum_share=1.0"])
    stopped = RunDir.create(tmp_path / "runs", "tiny", resolved.text)
    stopped.write_text(stopped.resolved_file, resolved_text(resolved, make_plan(resolved.recipe, CPU)))
    before = {file: file.read_bytes() for file in stopped.path.iterdir()}
    with pytest.raises(InputError) as resumed:
        train.resume(stopped)
    with pytest.raises(InputError) as begun:
        train.run(resolved)
    assert resumed.value.problems == begun.value.problems
    assert len(begun.value.problems) == 2
    assert {file: file.read_bytes() for file in stopped.path.iterdir()} == before


def test_a_run_that_goes_on_writes_into_its_own_folder_wherever_it_is_called_from(
    write_recipe: WriteRecipe, places: dict[str, str], tmp_path: Path
) -> None:
    resolved = load_recipe(write_recipe())
    there = load_recipe(resolved.file, ["output.directory={file}".format_map(places)])
    examine(there, folder=tmp_path).require()
    with pytest.raises(InputError, match="cannot be written"):
        examine(there).require()


def test_what_a_run_only_warns_of_is_said_by_both(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(training="steps = 40")
    monkeypatch.setattr("qtune.preflight.present_device", lambda: CARD)
    monkeypatch.setattr("qtune.preflight.attempted", lambda *_: "RuntimeError: no such kernel")
    needed = examine(load_recipe(recipe)).disk
    assert needed is not None
    free = needed.least_bytes
    monkeypatch.setattr("qtune.preflight.shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    warnings = examine(load_recipe(recipe)).warnings
    assert warnings[0] == (
        "memory: could not be predicted (RuntimeError: no such kernel); micro-batches shrink if they must"
    )
    assert warnings[1].startswith(f"disk: {size_text(free)} are free, and the run and a merged export will write ")
    result = CliRunner().invoke(cli.app, ["check", str(recipe)])
    assert all(f"warning  {warning}" in result.output for warning in warnings)

    capsys.readouterr()
    gather(load_recipe(recipe))  # the first thing that a run does
    said = capsys.readouterr().err
    assert all(warning in said for warning in warnings)


def test_a_disk_that_holds_no_checkpoint_is_refused_by_all_before_a_weight_is_read(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short runs are not rehearsed: the last step would have said it."""
    resolved = load_recipe(write_recipe(training="steps = 4"))
    needed = examine(resolved).disk
    assert needed is not None
    monkeypatch.setattr("qtune.preflight.shutil.disk_usage", lambda _: SimpleNamespace(free=needed.least_bytes - 1))
    with pytest.raises(InputError, match=r"^output\.directory: .* are free at .*, and one checkpoint and the adapter"):
        train.run(resolved)
    with pytest.raises(InputError, match="one checkpoint and the adapter take"):
        check(resolved).require()
    assert not list(Path(resolved.recipe.output.directory).glob("*/metrics.jsonl"))


def test_a_good_recipe_passes(write_recipe: WriteRecipe) -> None:
    found = examine(load_recipe(write_recipe(training="steps = 40")))
    found.require()
    assert (found.refusals, found.stopping, found.warnings) == ((), [], [])
    assert found.disk is not None
    assert found.disk.is_enough


def test_an_export_that_is_quantized_again_is_said_to_lose_what_it_learned(
    write_recipe: WriteRecipe, tiny_model: Path, tmp_path: Path
) -> None:
    export = tmp_path / "model"
    shutil.copytree(tiny_model, export)
    recipe = write_recipe(training="steps = 40")
    changes = [f"model.base={export}"]
    assert examine(load_recipe(recipe, changes)).warnings == []
    (export / "verify.json").write_text("{}")
    (said,) = examine(load_recipe(recipe, changes)).warnings
    assert said.startswith(f"{export} is an export, and quantizing it rounds away")
    assert "start_from" in said
    assert examine(load_recipe(recipe, [*changes, "quantization.kind=none"])).warnings == []


def test_what_a_run_that_goes_on_cannot_change_is_no_advice_to_it(
    write_recipe: WriteRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(write_recipe(training="batch_size = 2"))
    for run_dir, is_told in ((None, True), (RunDir(tmp_path), False)):
        gather(recipe, run_dir).prepared.close()
        assert ("steps are few" in capsys.readouterr().err) is is_told


def test_an_epoch_of_few_steps_is_a_warning_that_names_the_key(write_recipe: WriteRecipe) -> None:
    (said,) = examine(load_recipe(write_recipe(training="batch_size = 2"))).warnings
    assert "steps are few" in said
    assert "training.epochs = " in said


@pytest.mark.parametrize("packed", [False, True])
def test_few_held_out_rows_are_a_warning_that_names_a_share_that_is_enough(
    packed: bool, write_recipe: WriteRecipe, rows_file: Path
) -> None:
    rows_file.write_text(
        "".join(json.dumps({"prompt": f"{n} and one?", "completion": f"{n + 1}"}) + "\n" for n in range(60))
    )
    recipe = write_recipe(training="steps = 40", data=f"packing = {str(packed).lower()}")
    (said,) = examine(load_recipe(recipe, ["data.validation=0.05"])).warnings
    assert said.startswith("data: 3 rows are held out, too few to tell a change of their loss from noise; ")
    assert said.endswith("data.validation = 0.09 makes 5")
    assert examine(load_recipe(recipe, ["data.validation=0.09"])).warnings == []
    assert examine(load_recipe(recipe, ["data.validation=0.0"])).warnings == []


@pytest.mark.parametrize(("long_rows", "packed", "is_told"), [(1, False, True), (1, True, False), (6, False, False)])
def test_a_row_that_is_far_longer_than_all_others_is_named_with_what_leaves_it_out(
    long_rows: int, packed: bool, is_told: bool, write_recipe: WriteRecipe, rows_file: Path
) -> None:
    rows = [{"prompt": f"{n} and one?", "completion": f"{n + 1}"} for n in range(10, 70)]
    for row in rows[:long_rows]:
        row["prompt"] += " and one" * 15
    rows_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = write_recipe(training="steps = 40", data=f"packing = {str(packed).lower()}")
    changes = ["data.validation=0.0", "data.max_length=128"]
    examined = examine(load_recipe(recipe, changes))
    lengths = np.array(examined.prepared.examples["train"]["length"])
    assert lengths[0] > 4 * lengths[-1]
    found = [one for one in examined.inspection.findings if one.kind == "stray-length"]
    assert bool(found) is is_told
    for one in found:
        assert (one.count, one.level, one.places) == (1, "warning", ("rows.jsonl:1",))
        assert one.detail == f"{lengths[0]} tokens, the others at most {lengths[1:].max()}"
        key, option = re.findall(r"data\.\w+ = \S+", one.advice)
        mended = examine(load_recipe(recipe, [*changes, key, option]))
        assert len(mended.prepared.train) == len(rows) - 1
        assert "stray-length" not in {other.kind for other in mended.inspection.findings}


def test_a_row_that_is_longer_than_the_model_has_positions_is_a_warning(
    write_recipe: WriteRecipe, tiny_model: Path, tmp_path: Path
) -> None:
    base = tmp_path / "short"
    shutil.copytree(tiny_model, base)
    config = json.loads((base / "config.json").read_text())
    recipe, changes = write_recipe(training="steps = 40"), [f"model.base={base}"]
    longest = int(examine(load_recipe(recipe)).prepared.lengths.max())
    for reach, is_warned in ((longest, False), (longest - 1, True)):
        (base / "config.json").write_text(json.dumps({**config, "max_position_embeddings": reach}))
        said = [one for one in examine(load_recipe(recipe, changes)).warnings if "positions" in one]
        assert bool(said) == is_warned
        assert all(f"{longest} tokens" in one and f"data.max_length = {reach}" in one for one in said)


@pytest.mark.parametrize("kind", ["p-tuning", "prompt-tuning", "prefix-tuning"])
def test_a_soft_prompt_that_leaves_no_position_for_a_row_is_refused(
    kind: str, write_recipe: WriteRecipe, tiny_model: Path, tmp_path: Path
) -> None:
    base = tmp_path / "short"
    shutil.copytree(tiny_model, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 40}))
    recipe = write_recipe(training="steps = 40", adapter=f'kind = "{kind}"')
    for virtual, is_refused in ((38, False), (39, True), (400, True)):
        changes = [f"model.base={base}", f"adapter.virtual_tokens={virtual}"]
        found = examine(load_recipe(recipe, changes)) if not is_refused else None
        assert found is None or not found.refusals
        if is_refused:
            with pytest.raises(InputError) as refusal:
                examine(load_recipe(recipe, changes)).require()
            said = f"adapter.virtual_tokens = {virtual}: the model was made for 40 positions, and none of them would be"
            assert f"{said} left for a row; give fewer" in str(refusal.value)


@pytest.mark.parametrize("key", ["training.gradient_checkpointing", "memory.keep_dequantized"])
def test_more_layers_than_the_model_has_are_refused(key: str, write_recipe: WriteRecipe, tiny_model: Path) -> None:
    recipe = write_recipe(training="steps = 40")
    has = json.loads((tiny_model / "config.json").read_text())["num_hidden_layers"]
    nf4 = ["quantization.kind=nf4", f"model.base={tiny_model}"]
    assert not examine(load_recipe(recipe, [*nf4, f"{key}={has}"])).refusals
    with pytest.raises(InputError) as refusal:
        examine(load_recipe(recipe, [*nf4, f"{key}={has + 1}"])).require()
    assert f"{key} = {has + 1}: the model has {has} layers; true is all of them" in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            ["memory.keep_dequantized=true", "memory.layers=host"],
            ['layers = "host" saves nothing', "dequantized = true has no effect: the layers wait"],
        ),
        (["memory.keep_dequantized=1", "training.lean_step=false"], ["dequantized = 1 has no effect: the lean step"]),
        (["memory.layers=sharded"], ['layers = "sharded" divides nothing in one process; torchrun']),
        (["memory.activations=host"], ["activations = \"host\" saves nothing: a processor's memory is the host's"]),
        (["memory.embeddings=host"], ["embeddings = \"host\" saves nothing: a processor's memory is the host's"]),
        (["training.optimizer=paged-adamw-8bit"], ["pages nothing: a processor's memory is the host's"]),
        (["training.optimizer=adamw-8bit"], []),
        (["memory.embeddings=int8"], []),
        (["memory.layers=disk"], []),
        (["memory.keep_dequantized=true"], []),
    ],
)
def test_what_a_recipe_asks_of_memory_without_effect_is_said(
    changes: list[str], said: list[str], write_recipe: WriteRecipe
) -> None:
    recipe = load_recipe(write_recipe(training="steps = 40"), ["quantization.kind=nf4", *changes])
    words = ("no effect", "divides nothing", "saves nothing", "pages nothing")
    found = [one for one in examine(recipe).warnings if any(word in one for word in words)]
    assert len(found) == len(said)
    assert all(expected in one for expected, one in zip(said, found, strict=True))


@pytest.mark.parametrize(
    ("dtype", "compute", "is_refused"),
    [("float16", "float16", True), ("float16", "float32", False), ("auto", "float16", False)],
)
def test_an_adapter_whose_gradients_cannot_be_scaled_is_refused(
    dtype: str, compute: str, is_refused: bool, write_recipe: WriteRecipe
) -> None:
    changes = ["quantization.kind=nf4", f"adapter.dtype={dtype}", f"quantization.compute_dtype={compute}"]
    found = examine(load_recipe(write_recipe(training="steps = 40"), changes))
    said = [str(error) for error in found.refusals if "adapter.dtype" in str(error)]
    assert bool(said) == is_refused
    if is_refused:
        assert "gradients of float16 weights cannot be; remove the key, which makes it float32" in said[0]


@pytest.mark.slow
def test_each_step_that_a_card_has_traced_is_said_before_a_run(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qtune.preflight.present_device", lambda: CARD)
    monkeypatch.setattr("qtune.preflight.attempted", attempted)
    found = examine(load_recipe(write_recipe(training="steps = 40\nbatch_size = 4")))
    assert isinstance(found.forecast, Forecast)
    said = re.findall(r"^tracing a step: ((\d+) x \d+ tokens.*)$", capsys.readouterr().err, re.MULTILINE)
    assert {"1", str(found.plan.micro_batch_size)} <= {rows for _, rows in said}
    searched = [words for words, _ in said[:-1]]  # the last one is the step that was chosen, and traced already
    assert sorted(searched) == sorted(set(searched))


def test_short_rows_go_together_on_a_processor_however_long_they_might_be(
    write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qtune.preflight.present_device", lambda: CPU)
    examined = examine(
        load_recipe(
            write_recipe(training="batch_size = 8"), ["data.max_length=2048", "quantization.compute_dtype=bfloat16"]
        )
    )
    longest = max(examined.prepared.lengths)
    assert longest < 128
    assert examined.plan.micro_batch_size == 8
    assert examined.plan.reasons["training", "micro_batch_size"] == f"at most 4096 tokens at once, 8 x {longest}"
