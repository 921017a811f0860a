"""What a later verb would refuse of a base, `check` says, in the same words; nobody meets it in a traceback."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import EVERYTHING
from test_run_drift import World, edit_json, kept, world  # noqa: F401  fixtures
from transformers import AutoConfig, PretrainedConfig

from qtune.errors import InputError
from qtune.export.export import Options, export_run
from qtune.model.load import load_config
from qtune.preflight import examine
from qtune.recipe.file import load_recipe
from qtune.recipe.schema import Model
from qtune.run.drift import KINDS
from qtune.training import train
from qtune.tuned.chat import open_session
from qtune.tuned.evaluate import evaluate

Change = Callable[[Path], object]

GENERATION, CONFIG, TOKENIZER = "generation_config.json", "config.json", "tokenizer_config.json"
SIDE_FILES = (GENERATION, TOKENIZER, "special_tokens_map.json", "added_tokens.json")


def written(content: bytes) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(content)


def to_folder(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.mkdir()


def to_link(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.symlink_to("nowhere")


WAYS: dict[str, tuple[Change, str]] = {
    "cut": (written(b'{"a": '), "is not JSON: Expecting value: line 1 column 7"),
    "empty": (written(b""), "is not JSON: Expecting value: line 1 column 1"),
    "a list": (written(b"[1]"), "must be an object with keys, not '[1]'"),
    "null": (written(b"null"), "must be an object with keys, not 'None'"),
    "Latin-1": (written(b'{"a": "\xff"}'), "is not JSON: 'utf-8' codec can't decode byte 0xff"),
    "without end": (written(b"[" * 100_000), "is not JSON: maximum recursion depth exceeded"),
    "a folder": (to_folder, "is a folder; a file of the model has this name: put that back"),
    "a dangling link": (to_link, "is a link to what is not there; a file of the model has this name: put that back"),
}

VALUES: tuple[tuple[str, str, object, str], ...] = (
    (GENERATION, "eos_token_id", "x", "eos_token_id = 'x': is not the number of a token"),
    (GENERATION, "eos_token_id", [1, None], "eos_token_id = 'None': is not the number of a token"),
    (GENERATION, "eos_token_id", -5, "eos_token_id = '-5': is not the number of a token"),
    (GENERATION, "pad_token_id", "x", "pad_token_id = 'x': is not the number of a token"),
    (GENERATION, "cache_implementation", "nope", "transformers refuses it: Invalid `cache_implementation` (nope)"),
    (GENERATION, "watermarking_config", 4, "transformers refuses it: "),
    (CONFIG, "pad_token_id", 10**9, "no model can be built from it: AssertionError: Padding_idx must be within"),
    (CONFIG, "pad_token_id", "x", "cannot be: Field 'pad_token_id' with value 'x' doesn't match"),
    (CONFIG, "hidden_act", "nope", "no model can be built from it: KeyError: 'nope'"),
    (CONFIG, "rope_parameters", {"rope_type": "nope"}, "no model can be built from it: KeyError: 'nope'"),
    (CONFIG, "rope_parameters", 3, "cannot be: Field 'rope_parameters' with value 3"),
    (CONFIG, "use_cache", "x", "cannot be: Field 'use_cache' expected bool"),
    (CONFIG, "head_dim", 7, "cannot be: RoPE requires an even rotary dimension"),
    (CONFIG, "rms_norm_eps", -1.0, "rms_norm_eps = -1.0: must be a small number that is not below 0"),
    (CONFIG, "attention_dropout", 2.0, "attention_dropout = 2.0: must be a share, from 0 to 1"),
    (CONFIG, "sliding_window", 1e30, "sliding_window = 1e+30: no number of a model is that large"),
    (CONFIG, "sliding_window", 0, "sliding_window = 0: must be a whole number above 0"),
    (CONFIG, "output_attentions", True, "output_attentions = true: attention is computed by kernels"),
    (CONFIG, "output_hidden_states", -1, "output_hidden_states = -1: must be true or false"),
    (CONFIG, "return_dict", "", 'return_dict = "": must be true or false'),
    (CONFIG, "return_dict", False, "return_dict = false: results are taken by their names"),
    (CONFIG, "model_type", [], 'model_type = []: must be the name of an architecture, as "llama"'),
    (CONFIG, "model_type", "nope", 'model_type = "nope": unknown to transformers'),
    (TOKENIZER, "model_max_length", "abc", "model_max_length = 'abc': is no number of tokens"),
)


def said_by(verb: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        verb()
    return str(caught.value)


def require_same_words(world: World, words: str) -> None:  # noqa: F811
    """Of the run that goes on no more is compared, for it may say its own drift first."""
    recipe = load_recipe(world.home / "recipe.toml", ["output.name=new"])
    checked = said_by(lambda: examine(recipe).require())
    assert words in checked
    run = str(world.finished.path)
    verbs: list[Callable[[], object]] = [
        lambda: train.run(recipe),
        lambda: evaluate(world.finished, accepted=KINDS),
        lambda: open_session(run, accepted=KINDS),
        lambda: export_run(world.finished, Options(accepted=KINDS)),
    ]
    for verb in verbs:
        assert said_by(verb) == checked
    assert words in said_by(lambda: train.resume(world.stopped, accepted=KINDS))


# Each file and each way; all combinations are four times the work.
COMBINED = [
    (name, way)
    for at, name in enumerate(SIDE_FILES)
    for number, way in enumerate(WAYS)
    if EVERYTHING or (at + number) % len(SIDE_FILES) == 0
]


@pytest.mark.parametrize(("name", "way"), COMBINED)
def test_a_damaged_file_beside_the_weights_is_said_by_every_verb(name: str, way: str, world: World) -> None:  # noqa: F811
    change, words = WAYS[way]
    change(world.base / name)
    require_same_words(world, f"{world.base / name}: {words}")


@pytest.mark.parametrize("way", WAYS)
def test_a_damaged_configuration_is_said_by_every_verb(way: str, world: World) -> None:  # noqa: F811
    change, _ = WAYS[way]
    change(world.base / CONFIG)
    require_same_words(world, CONFIG)


def test_a_configuration_that_is_gone_is_said_by_every_verb(world: World) -> None:  # noqa: F811
    (world.base / CONFIG).unlink()
    require_same_words(world, f"{world.base}: has no config.json, so it is no model folder")


@pytest.mark.parametrize(("name", "key", "value", "words"), VALUES)
def test_a_value_that_nothing_can_be_done_with_is_said_by_every_verb(
    name: str,
    key: str,
    value: object,
    words: str,
    world: World,  # noqa: F811
) -> None:
    file = world.base / name
    if not file.is_file():
        file.write_text("{}")
    edit_json(file, **{key: value})
    require_same_words(world, f"{file}: {words}")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        (GENERATION, {"pad_token_id": -1, "bos_token_id": -1}),
        (CONFIG, {"pad_token_id": -1}),
        (CONFIG, {"max_length": 10**30, "model_max_length": 1e30}),
        (CONFIG, {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 0}),
        (CONFIG, {"model_type": "qwen2", "sliding_window": 0}),
    ],
)
def test_what_older_folders_hold_and_transformers_loads_is_not_refused(
    name: str,
    values: dict[str, object],
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    if not (base / name).is_file():
        (base / name).write_text("{}")
    edit_json(base / name, **values)
    assert AutoConfig.from_pretrained(base) is not None
    assert isinstance(load_config(Model(base=str(base))), PretrainedConfig)


def test_a_window_of_nothing_is_refused_where_it_is_used(tiny_model: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    edit_json(base / CONFIG, model_type="qwen2", use_sliding_window=True, sliding_window=0)
    assert "sliding_window = 0: must be a whole number above 0" in said_by(lambda: load_config(Model(base=str(base))))


@pytest.mark.parametrize("name", [*SIDE_FILES, CONFIG])
def test_a_file_that_may_not_be_read_is_named(
    name: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its owner forbids it; whoever runs the tests may be allowed everything."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    (base / name).touch()
    read = Path.read_text

    def refused(file: Path, *arguments: str | None, **options: str | None) -> str:
        if file == base / name:
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return read(file, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", refused)
    assert said_by(lambda: load_config(Model(base=str(base)))) == f"{base / name}: cannot be read: Permission denied"


def test_a_tokenizer_without_a_token_to_pad_with_is_said_before_a_run(world: World) -> None:  # noqa: F811
    (world.base / TOKENIZER).unlink()
    recipe = load_recipe(world.home / "recipe.toml", ["output.name=new"])
    words = f"{world.base}: its tokenizer names neither an end of text nor a token to pad with (eos_token, pad_token)"
    for verb in (lambda: examine(recipe).require(), lambda: train.run(recipe)):
        assert words in said_by(verb)


def test_a_template_that_renders_nothing_is_no_proof_of_an_export(world: World) -> None:  # noqa: F811
    (world.base / "chat_template.jinja").write_text("")
    said = said_by(lambda: export_run(world.finished, Options(accepted=KINDS)))
    assert said == (
        f"{world.base}: its chat template renders nothing of a conversation: there is nothing to compare models on"
    )
