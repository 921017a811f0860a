"""A run whose base, rows, recipe or libraries changed under it: every verb says so in words and stops."""

import json
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from conftest import ROWS, run_warm_qtune, short_answers
from export_models import tiny_base, tiny_tokenizer
from kept_folder import KeptFolder
from safetensors.torch import load_file, save_file

from qtune.errors import ModelError, RunError
from qtune.export.export import Options, export_run
from qtune.export.verification import read_proof
from qtune.model.contents import SMALL_BYTES, Contents, WeightFile, checksums_of, contents_of
from qtune.model.load import load_tokenizer
from qtune.preflight import examine
from qtune.recipe.file import load_recipe
from qtune.recipe.schema import Model
from qtune.run.drift import KINDS, base_drifts, said_of
from qtune.run.folder import RunDir
from qtune.run.lock import Lock, read_lock, write_lock
from qtune.training import train
from qtune.training.proof import prove
from qtune.training.trainer import QloraTrainer
from qtune.tuned.chat import open_session
from qtune.tuned.evaluate import asked_rows, evaluate
from qtune.tuned.load import load_untuned

RECIPE = """\
[model]
base = "{home}/base"
[quantization]
compute_dtype = "float32"
minimum_share = 0.0
[adapter]
kind = "lora"
rank = 4
[data]
train = "{home}/rows.jsonl"
validation = "{home}/validation.jsonl"
max_length = 128
{data}
[training]
steps = 4
batch_size = 2
micro_batch_size = 1
checkpoint_every = 1
[output]
directory = "{home}/runs"
"""


class Killed(BaseException):
    """Nothing may catch it."""


@dataclass(frozen=True)
class World:
    """A base, rows, a finished run on them and one that was stopped after its second step."""

    home: Path

    @property
    def base(self) -> Path:
        return self.home / "base"

    @property
    def finished(self) -> RunDir:
        return RunDir.open(self.home / "runs" / "finished")

    @property
    def stopped(self) -> RunDir:
        return RunDir.open(self.home / "runs" / "stopped")


def rows_text(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KeptFolder]:
    """Where the world is, with a copy of it as it was."""
    with pytest.MonkeyPatch.context() as patch:
        yield make_world(tmp_path_factory, patch)


def make_world(folders: pytest.TempPathFactory, patch: pytest.MonkeyPatch, steps: int = 4) -> KeptFolder:
    """Makes what `kept` gives; the stopped run has two of so many steps."""
    home, copy = folders.mktemp("world"), folders.mktemp("copy")
    patch.setenv("QTUNE_CACHE", str(folders.mktemp("cache")))
    short_answers(patch)
    tiny_base(home / "base")
    tiny_tokenizer(home / "base")
    (home / "rows.jsonl").write_text(rows_text(ROWS[:16]))
    (home / "validation.jsonl").write_text(rows_text(ROWS[16:]))
    recipe = RECIPE.format(home=home, data="")
    (home / "recipe.toml").write_text(recipe.replace("steps = 4", f"steps = {steps}"))
    train.run(load_recipe(home / "recipe.toml", ["output.name=finished"]))
    original = QloraTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        if self.state.global_step == 2:
            raise Killed
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as killing:
        killing.setattr(QloraTrainer, "compute_loss", compute_loss)
        with pytest.raises(Killed):
            train.run(load_recipe(home / "recipe.toml", ["output.name=stopped"]))
    shutil.copytree(home, copy / "world")
    return KeptFolder(home, copy / "world")


@pytest.fixture
def world(kept: KeptFolder) -> World:
    kept.put_back()
    return World(kept.folder)


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def negate_weights(world: World) -> None:
    file = world.base / "model.safetensors"
    save_file({name: -tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


def other_weights(world: World) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(8)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(world.base)).to(torch.bfloat16).save_pretrained(
        world.base
    )


def one_number(world: World) -> None:
    file = world.base / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def permute_vocabulary(world: World) -> None:
    file = world.base / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = [token for token in vocabulary if len(token) == 1 and token.isalpha()][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(tokenizer))


def other_template(world: World) -> None:
    for file in (world.base / "chat_template.jinja", world.base / "tokenizer_config.json"):
        if file.is_file():
            text = file.read_text()
            assert "assistant" in text or file.suffix == ".json"
            file.write_text(text.replace("assistant", "model"))


def config(**changes: object) -> Callable[[World], None]:
    return lambda world: edit_json(world.base / "config.json", **changes)


def edit_recipe(old: str, new: str) -> Callable[[World], None]:
    def change(world: World) -> None:
        for run in (world.finished, world.stopped):
            text = run.resolved_file.read_text()
            assert old in text
            run.resolved_file.write_text(text.replace(old, new))

    return change


def rope(world: World) -> None:
    values = json.loads((world.base / "config.json").read_text())
    parameters = values.get("rope_parameters")
    if parameters:
        config(rope_parameters=parameters | {"rope_theta": 500000.0})(world)
    else:
        config(rope_theta=500000.0)(world)


def device_of_another_kind(world: World) -> None:
    for run in (world.finished, world.stopped):
        lock = read_lock(run)
        assert lock is not None
        write_lock(run, replace(lock, device=replace(lock.device, name="CPU of then", bf16=not lock.device.bf16)))


def other_versions(world: World) -> None:
    for run in (world.finished, world.stopped):
        lock = read_lock(run)
        assert lock is not None
        write_lock(run, replace(lock, packages=lock.packages | {"torch": "2.0.0"}))


DRIFTS: dict[str, tuple[Callable[[World], None], str, str]] = {
    "negated weights": (negate_weights, "weights", "model.safetensors holds other numbers (blake2b "),
    "other weights": (other_weights, "weights", "model.safetensors holds other numbers (blake2b "),
    "one bit": (one_number, "weights", "model.safetensors holds other numbers (blake2b "),
    "rope_theta": (rope, "config", "rope_theta 10000.0 -> 500000.0"),
    "eps": (config(rms_norm_eps=1e-3), "config", "rms_norm_eps 1e-06 -> 0.001"),
    "head counts": (
        config(num_attention_heads=2, num_key_value_heads=1, head_dim=32),
        "config",
        "head_dim 16 -> 32; num_attention_heads 4 -> 2; num_key_value_heads 2 -> 1",
    ),
    "activation": (config(hidden_act="gelu"), "config", "hidden_act 'silu' -> 'gelu'"),
    "generation": (
        lambda world: edit_json(world.base / "generation_config.json", eos_token_id=5),
        "generation",
        "eos_token_id 2 -> 5",
    ),
    "vocabulary": (permute_vocabulary, "tokenizer", "the 320 tokens are others, or in another order"),
    "template": (other_template, "template", "the chat template is another (sha256 "),
    "versions": (other_versions, "versions", "torch 2.0.0 -> "),
    "processor": (device_of_another_kind, "processor", "CPU of then, which "),
    "alpha": (
        edit_recipe("alpha = 32", "alpha = 33"),
        "recipe",
        "says otherwise: adapter.alpha 32 -> 33",
    ),
    "system prompt": (
        edit_recipe("max_length = 128", 'max_length = 128\nsystem_prompt = "Lie."'),
        "recipe",
        "data.system_prompt = 'Lie.' is new",
    ),
    "validation rows": (
        lambda world: (world.home / "validation.jsonl").write_text(rows_text(ROWS[10:])),
        "rows",
        "validation.jsonl has other rows (blake2b ",
    ),
}


def said(action: Callable[[], object]) -> str:
    with pytest.raises((RunError, ModelError)) as error:
        action()
    return str(error.value)


@pytest.mark.parametrize("name", DRIFTS)
def test_every_verb_says_what_changed_and_stops(name: str, world: World) -> None:
    change, kind, words = DRIFTS[name]
    change(world)
    verbs: list[Callable[[], object]] = [
        lambda: train.resume(world.stopped),
        lambda: evaluate(world.finished),
    ]
    if kind != "rows":
        verbs += [lambda: open_session(str(world.finished.path)), lambda: export_run(world.finished, Options())]
    before = {file: file.read_bytes() for file in world.home.rglob("*") if file.is_file()}
    for verb in verbs:
        text = said(verb)
        assert f"is no longer what it was: {kind}: " in text
        assert words in text
        assert f"--accept-drift {kind}" in text
    assert {file: file.read_bytes() for file in world.home.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("name", ["negated weights", "eps", "alpha"])
def test_what_only_shows_says_it_too_and_goes_on(name: str, world: World) -> None:
    change, kind, words = DRIFTS[name]
    change(world)
    (sentence,) = said_of(world.finished)
    assert sentence.startswith(f"is no longer what it was: {kind}: ")
    assert words in sentence


@pytest.mark.slow
def test_nothing_is_said_of_a_run_that_is_what_it_was(world: World) -> None:
    assert said_of(world.finished) == []
    assert evaluate(world.finished, max_new_tokens=2).rows == 6
    assert train.resume(world.stopped).is_finished


def test_training_rows_that_were_edited_are_another_run(world: World) -> None:
    (world.home / "rows.jsonl").write_text(rows_text([*ROWS[:15], ROWS[20]]))
    text = said(lambda: train.resume(world.stopped))
    assert "rows: the training rows are not those that the run began with (blake2b " in text
    assert "--accept-drift rows" in text


@pytest.mark.slow
@pytest.mark.parametrize("file", ["rows.jsonl", "validation.jsonl"])
def test_edited_rows_stop_those_who_train_on_them_or_ask_them_and_nobody_else(file: str, world: World) -> None:
    (world.home / file).write_text(rows_text([*ROWS[:5], ROWS[20]]))
    (world.home / "others.jsonl").write_text(rows_text(ROWS[8:12]))
    stopped: list[Callable[[], object]] = [lambda: train.resume(world.stopped), lambda: prove(world.finished)]
    if file == "validation.jsonl":
        stopped.append(lambda: asked_rows(world.finished, rows=4))
    else:
        assert asked_rows(world.finished, rows=4)
    for verb in stopped:
        assert "--accept-drift rows" in said(verb)
    assert asked_rows(world.finished, rows=4, data_file=world.home / "others.jsonl")
    assert load_untuned(world.finished)  # as benchmarks and what was forgotten are measured
    assert open_session(str(world.finished.path))
    proof = read_proof(export_run(world.finished, Options()))
    assert proof.verified, "both models are asked what is here now"


@pytest.mark.slow
def test_rows_of_which_a_share_is_asked_are_the_training_file_s(world: World) -> None:
    changes = ["output.name=share", "data.validation=0.25", "training.steps=1"]
    run = train.run(load_recipe(world.home / "recipe.toml", changes))
    assert asked_rows(run, rows=4)
    (world.home / "rows.jsonl").write_text(rows_text([*ROWS[:15], ROWS[20]]))
    text = said(lambda: asked_rows(run, rows=4))
    assert f"rows: {world.home / 'rows.jsonl'} has other rows (blake2b " in text


def test_whoever_starts_from_a_run_asks_for_its_base_alone(world: World) -> None:
    other_versions(world)
    device_of_another_kind(world)
    edit_recipe("alpha = 32", "alpha = 33")(world)
    (world.home / "rows.jsonl").write_text(rows_text(ROWS[:12]))
    changes = [f"adapter.start_from={world.finished.path}", "output.name=further", "adapter.alpha=33"]
    examine(load_recipe(world.home / "recipe.toml", changes)).require()


@pytest.mark.slow
def test_a_drift_that_is_accepted_is_said_kept_and_asked_no_second_time(world: World, capsys) -> None:
    negate_weights(world)
    begun = read_lock(world.stopped)
    assert begun is not None
    run = train.resume(world.stopped, accepted=("weights",))
    assert "accepted: weights: model.safetensors holds other numbers" in capsys.readouterr().err
    lock = read_lock(run)
    assert lock is not None
    assert replace(lock, resumed=()) == begun
    (part,) = lock.resumed
    assert (part.from_step, part.accepted) == (2, ("weights",))
    assert part.contents is not None
    assert part.contents.weights != begun.contents.weights  # type: ignore[union-attr]
    # The adapter belongs to the negated weights now: on those of the beginning it is not what was trained.
    evaluate(run, max_new_tokens=2)
    negate_weights(world)
    assert "weights: " in said(lambda: evaluate(run))


def test_one_acceptance_does_not_cover_another_drift(world: World) -> None:
    negate_weights(world)
    config(rms_norm_eps=1e-3)(world)
    text = said(lambda: evaluate(world.finished, accepted=("weights",)))
    assert "config: " in text
    assert "weights: " not in text


def test_a_name_that_is_no_drift_is_refused(world: World) -> None:
    assert said(lambda: evaluate(world.finished, accepted=("wieghts",))) == (
        f"--accept-drift: 'wieghts' is none of {', '.join(KINDS)}"
    )


def test_a_name_that_is_no_drift_is_refused_by_a_new_run_and_a_plain_model(world: World) -> None:
    for work in (
        lambda: train.run(load_recipe(world.home / "recipe.toml"), accepted=("wieghts",)),
        lambda: open_session(str(world.base), accepted=("wieghts",)),
    ):
        assert said(work) == f"--accept-drift: 'wieghts' is none of {', '.join(KINDS)}"


def test_a_lower_rate_leaves_no_branch_where_something_has_changed(world: World) -> None:
    negate_weights(world)
    before = sorted((world.home / "runs").iterdir())
    text = said(lambda: train.resume(world.stopped, ["training.learning_rate=1e-9"]))
    assert f"{world.stopped.path}: is no longer what it was: weights: " in text
    assert sorted((world.home / "runs").iterdir()) == before


def test_an_adapter_starts_from_a_run_on_the_same_base_alone(world: World) -> None:
    changes = [f"adapter.start_from={world.finished.path}", "output.name=further", "training.steps=1"]
    negate_weights(world)
    text = said(lambda: train.run(load_recipe(world.home / "recipe.toml", changes)))
    assert f"{world.finished.path}: is no longer what it was: weights: " in text
    run = train.run(load_recipe(world.home / "recipe.toml", changes), accepted=("weights",))
    assert run.is_finished


@pytest.mark.slow
def test_the_command_takes_the_name(world: World) -> None:
    negate_weights(world)
    chat = ("chat", world.finished.path, "-p", "Hello", "--max-new-tokens", "1")
    done = run_warm_qtune(*chat)
    assert done.returncode == 2
    assert "--accept-drift weights" in done.stderr
    done = run_warm_qtune(*chat, "--accept-drift", "weights")
    assert done.returncode == 0
    assert "accepted: weights: " in done.stderr


def old_lock(run: RunDir) -> None:
    """As versions before this wrote it: sizes of the base's files, and none of the values."""
    lock = read_lock(run)
    assert isinstance(lock, Lock)
    values = json.loads(run.lock_file.read_text())
    for key in ("contents", "recipe", "compute_dtype", "crc32"):
        values.pop(key)
    run.lock_file.write_text(json.dumps(values))


def test_a_key_that_a_later_version_knows_is_no_drift(world: World) -> None:
    """It stands in no resolved.toml of then; its default is what the run did."""
    from qtune.run.drift import recipe_drifts, values_of

    lock = read_lock(world.finished)
    assert lock is not None
    lines = world.finished.resolved_file.read_text().splitlines(keepends=True)
    world.finished.resolved_file.write_text("".join(line for line in lines if not line.startswith("warmup")))
    assert lock.recipe is not None
    earlier = replace(lock, recipe={key: value for key, value in lock.recipe.items() if key != "training.warmup"})
    assert list(recipe_drifts(earlier, values_of(world.finished))) == []
    assert [drift.kind for drift in recipe_drifts(lock, values_of(world.finished))] == ["recipe"]


@pytest.mark.slow
def test_an_older_lock_is_read_and_what_it_cannot_say_is_said(world: World, capsys) -> None:
    for run in (world.finished, world.stopped):
        old_lock(run)
    negate_weights(world)
    evaluate(world.finished, max_new_tokens=2)
    words = "lock.json is of an older version: it knows the sizes of the base's files, and not what was in them"
    assert words in capsys.readouterr().err
    resumed = train.resume(world.stopped)
    assert words in capsys.readouterr().err
    # From here on it is known.
    lock = read_lock(resumed)
    assert lock is not None
    assert lock.latest.contents is not None
    negate_weights(world)
    assert "weights: " in said(lambda: evaluate(resumed))


def test_an_older_lock_knows_sizes_and_configuration(world: World) -> None:
    old_lock(world.finished)
    config(rms_norm_eps=1e-3)(world)
    text = said(lambda: evaluate(world.finished))
    assert "weights: the sizes of the base's files or its config.json have changed" in text


def test_a_run_without_a_lock_goes_on_and_says_so(world: World, capsys) -> None:
    world.finished.lock_file.unlink()
    evaluate(world.finished, max_new_tokens=2)
    assert "has no lock.json: whether its base is the one it was trained on cannot be told" in capsys.readouterr().err


# --- large files ---------------------------------------------------------------------------------------------------


def large_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny base that counts as a large one."""
    tiny_base(folder)
    tiny_tokenizer(folder)
    monkeypatch.setattr("qtune.model.contents.SMALL_BYTES", 0)
    assert SMALL_BYTES > 0
    return folder


def test_a_change_in_any_tensor_of_a_large_file_is_seen_in_its_samples(tmp_path, monkeypatch) -> None:
    folder = large_model(tmp_path, monkeypatch)
    tokenizer = load_tokenizer(Model(base=str(folder)))
    before = contents_of(folder, tokenizer)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        save_file(tensors | {name: -tensor}, file, metadata={"format": "pt"})
        assert contents_of(folder, tokenizer).weights != before.weights, name


def test_the_whole_of_a_large_file_finds_what_lies_between_samples(tmp_path, monkeypatch) -> None:
    folder = large_model(tmp_path, monkeypatch)
    monkeypatch.setattr("qtune.model.contents.BLOCK_BYTES", 16)
    before, whole_before = contents_of(folder, None), contents_of(folder, None, whole=True)
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    content[header + 100] ^= 1
    file.write_bytes(content)
    after, whole_after = contents_of(folder, None), contents_of(folder, None, whole=True)
    assert after.weights == before.weights
    assert whole_after.weights != whole_before.weights


def turn_a_bit_between_samples(world: World) -> None:
    file = world.base / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[8 + int.from_bytes(content[:8], "little") + 100] ^= 1
    file.write_bytes(content)


def test_a_bit_between_samples_is_said_by_every_verb_that_loads_the_weights(world: World, monkeypatch) -> None:
    monkeypatch.setattr("qtune.model.contents.SMALL_BYTES", 0)
    monkeypatch.setattr("qtune.model.contents.BLOCK_BYTES", 16)
    base = Model(base=str(world.base))
    for run in (world.finished, world.stopped):
        lock = read_lock(run)
        assert lock is not None
        now = contents_of(world.base, load_tokenizer(base), checksums=checksums_of(world.base))
        write_lock(run, replace(lock, contents=now))
    further = load_recipe(
        world.home / "recipe.toml", ["output.name=further", f"adapter.start_from={world.finished.path}"]
    )
    turn_a_bit_between_samples(world)
    # Whoever loads no weights reads blocks of a large file alone.
    assert said_of(world.finished) == []
    examine(further).require()
    verbs: list[Callable[[], object]] = [
        lambda: train.resume(world.stopped),
        lambda: prove(world.finished),
        lambda: train.run(further),
        lambda: evaluate(world.finished),
        lambda: open_session(str(world.finished.path)),
        lambda: export_run(world.finished, Options()),
    ]
    for verb in verbs:
        assert "weights: model.safetensors holds other numbers (crc32 " in said(verb)
    turn_a_bit_between_samples(world)
    open_session(str(world.finished.path))
    export_run(world.finished, Options(adapter_only=True))


def test_a_run_on_a_large_base_begins_with_a_checksum_of_every_byte_and_keeps_it(world: World, monkeypatch) -> None:
    monkeypatch.setattr("qtune.model.contents.SMALL_BYTES", 0)
    run = train.run(load_recipe(world.home / "recipe.toml", ["output.name=large", "training.steps=1"]))
    lock = read_lock(run)
    assert lock is not None
    assert lock.contents is not None
    content = (world.base / "model.safetensors").read_bytes()
    assert lock.contents.weights["model.safetensors"].checksum == checksum_by_hand(content)


def checksum_by_hand(content: bytes) -> str:
    """The documented one, in one line: of a file that is one piece."""
    assert len(content) <= 64 * 2**20
    return f"{zlib.crc32(zlib.crc32(content).to_bytes(4, 'little')):08x}"


@pytest.mark.parametrize("nbytes", [0, 1, 64, 65, 128, 1000])
def test_every_byte_of_a_file_counts_wherever_pieces_end(nbytes: int, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("qtune.model.contents.SMALL_BYTES", -1)
    monkeypatch.setattr("qtune.model.contents.PIECE_BYTES", 64)
    monkeypatch.setattr("qtune.model.contents.READ_BYTES", 16)
    content = bytes(number % 251 for number in range(nbytes))
    (tmp_path / "model.safetensors").write_bytes(content)
    pieces = [zlib.crc32(content[start : start + 64]).to_bytes(4, "little") for start in range(0, nbytes, 64)]
    expected = {"model.safetensors": f"{zlib.crc32(b''.join(pieces)):08x}"}
    assert checksums_of(tmp_path) == expected


@pytest.mark.slow
def test_a_run_can_be_begun_and_resumed_on_every_byte_of_its_weights(world, monkeypatch) -> None:
    """Between two samples of a large file, which sampling alone passes by."""
    monkeypatch.setattr("qtune.model.contents.SMALL_BYTES", 0)
    monkeypatch.setattr("qtune.model.contents.BLOCK_BYTES", 16)
    lock = read_lock(world.stopped)
    assert lock is not None
    assert lock.contents is not None
    now = contents_of(world.base, load_tokenizer(Model(base=str(world.base))), whole=True)
    write_lock(world.stopped, replace(lock, contents=now))
    file = world.base / "model.safetensors"
    content = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    content[header + 100] ^= 1
    file.write_bytes(content)
    text = said(lambda: train.resume(world.stopped, whole_weights=True))
    assert "weights: model.safetensors holds other numbers (sha256 " in text
    content[header + 100] ^= 1
    file.write_bytes(content)
    # Less was read this time, and what is known of the whole stays.
    lock = read_lock(train.resume(world.stopped))
    assert lock is not None
    assert lock.knows_whole_weights


@pytest.mark.parametrize(
    ("seen", "known"),
    [
        (WeightFile(9, "s", checksum="new"), WeightFile(9, "s", checksum="new")),
        (WeightFile(9, "s", whole="new"), WeightFile(9, "s", whole="new")),
        (WeightFile(9, "s", checksum="old"), WeightFile(9, "s", "old", "old")),
        (WeightFile(9, "s", whole="old"), WeightFile(9, "s", "old", "old")),
        (WeightFile(9, "t"), WeightFile(9, "t")),
        (WeightFile(9, "s"), WeightFile(9, "s", "old", "old")),
    ],
)
def test_what_was_known_of_a_file_is_kept_only_where_nothing_says_that_it_is_another(
    seen: WeightFile, known: WeightFile
) -> None:
    begun = Lock(contents=Contents({"w": WeightFile(9, "s", "old", "old")}, {}, {}))
    now = replace(begun, contents=Contents({"w": seen}, {}, {}))
    contents = begun.resumed_as(now, 1, ("weights",)).latest.contents
    assert contents is not None
    assert contents.weights["w"] == known
    # The same file, seen in each way again, is no other.
    assert list(base_drifts(Lock(contents=contents), Contents({"w": seen}, {}, {}), ("weights",))) == []
