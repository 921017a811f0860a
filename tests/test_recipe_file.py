"""A recipe file becomes a checked recipe, or every error at once: place, key, value and what would be right."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from qtune.errors import RecipeError
from qtune.init import new_recipe
from qtune.recipe.file import Origin, Resolved, check_recipe, load_recipe
from qtune.recipe.schema import Lora, PTuning, Unquantized
from qtune.recipe.shipped import find_recipe, shipped_recipes
from qtune.sizes import size_in_bytes

GOOD = '[model]\nbase = "org/model"\n[data]\ntrain = "rows.jsonl"\n'


@pytest.fixture
def check(tmp_path: Path):
    """`check_recipe` on a text beside rows.jsonl; errors name the file "recipe.toml"."""
    (tmp_path / "rows.jsonl").write_text("{}\n")

    def check(text: str, *changes: str) -> Resolved:
        return check_recipe(text, tmp_path / "recipe.toml", changes)

    return check


@pytest.fixture
def problems(check, tmp_path: Path):
    """The lines of the error that a text and its changes raise."""

    def problems(text: str, *changes: str) -> list[str]:
        with pytest.raises(RecipeError) as caught:
            check(text, *changes)
        assert caught.value.exit_code == 2
        return (
            str(caught.value)
            .replace(f"{tmp_path}/recipe.toml", "recipe.toml")
            .replace(str(tmp_path), "HERE")
            .split("\n")
        )

    return problems


def test_a_small_recipe_gets_the_documented_defaults(check) -> None:
    recipe = check(GOOD).recipe
    assert recipe.quantization.kind == "nf4"
    assert recipe.quantization.double_quantization
    assert isinstance(recipe.adapter, Lora)
    assert (recipe.adapter.rank, recipe.adapter.target_modules) == (16, "all-linear")
    assert recipe.training.epochs == 1.0
    assert recipe.data.max_length == 2048


def test_what_is_wrong_beside_a_mistyped_kind_is_reported_with_it(problems) -> None:
    """By the kind that is meant; where none is, no key can be known."""
    text = '[model]\nbase = "org/model"\n[adapter]\nkind = "KIND"\nrnak = 16\nalpha = "many"\n'
    text += '[data]\ntrain = "rows.jsonl"\n'
    found = problems(text.replace("KIND", "lorra"))
    assert [line.partition(" = ")[0] for line in found[:3]] == [
        "recipe.toml:4: adapter.kind", "recipe.toml:5: adapter.rnak", "recipe.toml:6: adapter.alpha",
    ]  # fmt: skip
    assert found[0].endswith("did you mean 'lora'?")
    (alone,) = (line for line in problems(text.replace("KIND", "xyzzy")) if "adapter" in line)
    assert "adapter.kind" in alone
    quantized = problems(
        '[model]\nbase = "org/model"\n[quantization]\nkind = "nf5"\ndouble = 1\n[data]\ntrain = "rows.jsonl"\n'
    )
    assert any("quantization.double" in line for line in quantized)


def test_everything_that_is_wrong_is_reported_at_once(problems) -> None:
    text = """\
[model]
bse = "org/model"

[adapter]
kind = "lora"
rnak = 16
alpha = "32"

[quantization]
kind = "nf5"

[data]
train = "missing.jsonl"
max_length = 0
on_long_row = "cut"

[training]
epochs = 1
steps = 10
micro_batch_size = "four"
optimizer = "adam"

[memroy]
budget = "8GB"
"""
    assert problems(text) == [
        "recipe.toml:1: model.base: is required and missing",
        "recipe.toml:2: model.bse = \"org/model\": no such key in [model]; did you mean 'base'?",
        "recipe.toml:6: adapter.rnak = 16: no such key in [adapter]; did you mean 'rank'?",
        'recipe.toml:7: adapter.alpha = "32": must be a number without quotes: 32',
        'recipe.toml:10: quantization.kind = "nf5": must be "nf4", "fp4", "int8" or "none"; did you mean \'nf4\'?',
        'recipe.toml:13: data.train = "missing.jsonl": no such file or folder in HERE',
        "recipe.toml:14: data.max_length = 0: must be greater than 0",
        'recipe.toml:15: data.on_long_row = "cut": must be "error", "drop", "cut-left" or "cut-right"; '
        "did you mean 'cut-left'?",
        'recipe.toml:20: training.micro_batch_size = "four": must be "auto" or a whole number',
        'recipe.toml:21: training.optimizer = "adam": must be "auto" or "adamw", "adamw-8bit", "paged-adamw" or '
        "\"paged-adamw-8bit\"; did you mean 'adamw'?",
        "recipe.toml:23: memroy: no such key in a recipe; did you mean 'memory'?",
    ]


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ("[adapter]\nrank = true", "6: adapter.rank = true: must be a whole number"),
        ("[adapter]\nrank = 1.5", "6: adapter.rank = 1.5: must be a whole number"),
        ("[adapter]\nrank = 0", "6: adapter.rank = 0: must be greater than 0"),
        ("[adapter]\ndropout = 1", "6: adapter.dropout = 1: must be less than 1"),
        (
            '[adapter]\ntarget_modules = "q_proj"',
            '6: adapter.target_modules = "q_proj": must be a list, as ["q_proj"] or "all-linear"',
        ),
        (
            '[adapter]\ntarget_modules = ["q_proj", 3]',
            "6: adapter.target_modules.1 = 3: must be a text in quotes",
        ),
        (
            '[adapter]\nkind = "p-tunning"',
            '6: adapter.kind = "p-tunning": must be "lora", "p-tuning", "prompt-tuning", "prefix-tuning" or "ia3"; '
            "did you mean 'p-tuning'?",
        ),
        (
            '[adapter]\nkind = "ia3"\nrank = 4',
            '7: adapter.rank = 4: no such key in [adapter]; that is a key of kind = "lora"',
        ),
        (
            "[training]\nlearning_rate = nan",
            '6: training.learning_rate = nan: must be "auto" or a finite number',
        ),
        ("[training]\nweight_decay = inf", "6: training.weight_decay = inf: must be a finite number"),
        ("[training]\nseed = -1", "6: training.seed = -1: must be greater than or equal to 0"),
        (
            "[training]\neval_every = 0",
            '6: training.eval_every = 0: must be greater than 0 or "epoch" or "never"',
        ),
        (
            '[training]\ngradient_checkpointing = "yes"',
            '6: training.gradient_checkpointing = "yes": must be "auto" or true or false or a whole number',
        ),
        ('[memory]\nbudget = "8 GO"', '6: memory.budget = "8 GO": must be "auto" or must look like "8GiB" or "512MiB"'),
        ("[memory]\nbudget = 8", '6: memory.budget = 8: must be "auto" or a text in quotes: "8GiB"'),
        ("[memory]\nloss_tile = 64", '6: memory.loss_tile = 64: must be a text in quotes: "64MiB"'),
        ('[training]\nlearning_rate = "fast"', '6: training.learning_rate = "fast": must be "auto" or a number'),
        (
            '[training]\nlearning_rate = "1e-4"',
            '6: training.learning_rate = "1e-4": must be "auto" or a number without quotes: 1e-4',
        ),
        ('[training]\ntrackers = "wandb"', '6: training.trackers = "wandb": must be a list, as ["wandb"]'),
        ("[training]\ntrackers = 1", "6: training.trackers = 1: must be a list"),
        (
            '[output]\nname = "../x"',
            '6: output.name = "../x": must look like a folder name: letters, digits, . _ + -',
        ),
        ('[training]\ntrackers = "wandb, a"', '6: training.trackers = "wandb, a": must be a list, as ["wandb", "a"]'),
        ("training = 3", "5: data.training = 3: no such key in [data]; did you mean 'train'?"),
        ("[[training]]\nepochs = 2", "5: training = [{ epochs = 2 }]: must be a table"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named_with_what_would_be_right(problems, table: str, problem: str) -> None:
    assert problems(GOOD + table) == [f"recipe.toml:{problem}"]


@pytest.mark.parametrize(
    ("tables", "problem"),
    [
        (
            '[adapter]\nkind = "prefix-tuning"\nprojection = true\ninitialization = "rows"',
            '8: adapter.initialization = "rows": the projection computes something else from what it starts with; set '
            "projection = false or remove the key",
        ),
        (
            '[adapter]\nkind = "p-tuning"\nencoder_layers = 3',
            '7: adapter.encoder_layers = 3: only the "lstm" encoder has layers to count; remove the key',
        ),
        (
            '[adapter]\nkind = "p-tuning"\nencoder_dropout = 0.1',
            '7: adapter.encoder_dropout = 0.1: only the "lstm" encoder has dropout; remove the key',
        ),
        (
            '[adapter]\nkind = "prefix-tuning"\nencoder_hidden_size = 8',
            "7: adapter.encoder_hidden_size = 8: only the projection has a width; set projection = true",
        ),
        (
            '[adapter]\nkind = "prompt-tuning"\ninitialization = "text"',
            '5: adapter.text: initialization = "text" and a text belong together; give both or neither',
        ),
        (
            '[adapter]\nkind = "prompt-tuning"\ntext = "Hello"',
            '7: adapter.text = "Hello": initialization = "text" and a text belong together; give both or neither',
        ),
        (
            '[adapter]\nkind = "prompt-tuning"\ninitialization = "text"\ntext = " \\n\\t\\u0000\\u3000"',
            r'8: adapter.text = " \n\t\u0000　": says nothing; give a sentence that says what is wanted',
        ),
        (
            '[memory]\nlayers = "streamed"',
            '6: memory.layers = "streamed": must be "device", "host", "disk" or "sharded"; did you mean \'host\'?',
        ),
        (
            '[memory]\nlayers = "NVMe"',
            '6: memory.layers = "NVMe": must be "device", "host", "disk" or "sharded"; did you mean \'disk\'?',
        ),
        (
            '[adapter]\ntarget_modules = ["q_proj", "lm_head"]',
            '6: adapter.target_modules = ["q_proj", "lm_head"]: the loss reads the LM head\'s weight directly, so an '
            "adapter on it would not be trained; remove lm_head",
        ),
        (
            '[adapter]\ninitialization = "pissa"',
            '6: adapter.initialization = "pissa": PiSSA moves part of the base into the adapter, and a nf4 base cannot '
            "be "
            'rewritten without rounding it again; use "loftq", "eva", or [quantization] kind = "none"',
        ),
        (
            '[adapter]\ninitialization = "loftq"\n[quantization]\nkind = "int8"',
            '6: adapter.initialization = "loftq": LoftQ corrects the error of a 4-bit base; use it with [quantization] '
            'kind = "nf4" or "fp4"',
        ),
        (
            '[adapter]\ndora = true\ninitialization = "eva"',
            "6: adapter.dora = true: not together with eva initialization",
        ),
        (
            '[adapter]\nkind = "ia3"\nfeedforward_modules = ["up_proj"]',
            '7: adapter.feedforward_modules = ["up_proj"]: names a part of target_modules; give target_modules too',
        ),
        (
            'packing = true\n[adapter]\nkind = "p-tuning"',
            "5: data.packing = true: a soft prompt stands once before each packed row, so only its first "
            "document would "
            ""
            ""
            "see it, and peft drops the positions that keep documents apart; not with p-tuning",
        ),
        (
            "[training]\nepochs = 1\nsteps = 5",
            "7: training.steps = 5: the run ends after steps or after epochs; give one of them",
        ),
        (
            "[training]\nbatch_size = 10\nmicro_batch_size = 4",
            "7: training.micro_batch_size = 4: batch_size = 10 must be a whole number of micro-batches",
        ),
    ],
)
def test_values_that_cannot_work_together_are_refused_with_the_reason(problems, tables: str, problem: str) -> None:
    assert problems(GOOD + tables) == [f"recipe.toml:{problem}"]


def test_values_that_cannot_work_together_are_told_beside_faults_that_have_no_part_in_it(problems) -> None:
    changes = ("data.packing=true", "data.streaming=true")
    (conflict,) = problems(GOOD, *changes)
    assert "packing fits rows together" in conflict
    for fault in ("adapter.rnak=4", "adapter.kind=rola", "model.bse=x", "quantization.bits=4", "training.patience=x"):
        found = problems(GOOD, *changes, fault)
        assert conflict in found, fault
        assert len(found) == 2, fault


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[model\n", "1: not valid TOML: Expected ']' at the end of a table declaration"),
        ('[model]\nbase = "x\n', "2: not valid TOML: Illegal character '\\n'"),
        ("[model]\nbase = \n", "2: not valid TOML: Invalid value"),
        ('[model]\nbase = "x"\nbase = "y"\n', "3: not valid TOML: Cannot overwrite a value"),
        ("[data]\ntrain = [1,\n", "3: not valid TOML: Invalid value"),
        (
            "[memory]\nbudget = 8GiB  # of 12\n",
            '2: not valid TOML: Expected newline or end of document after a statement; did you mean budget = "8GiB"?',
        ),
        ("[model]\nbase = org/model\n", '2: not valid TOML: Invalid value; did you mean base = "org/model"?'),
        ("model.base = x", '1: not valid TOML: Invalid value; did you mean model.base = "x"?'),
        (
            "[adapter]\ntarget_modules = [q_proj, 3, v_proj]",
            '2: not valid TOML: Invalid value; did you mean target_modules = ["q_proj", 3, "v_proj"]?',
        ),
        ("[adapter]\ndora = True", "2: not valid TOML: Invalid value; did you mean dora = true?"),
        ("[model]\nbase = 'x\n", '3: not valid TOML: Expected "\'"'),
        ("[model]\nbase: x\n", "2: not valid TOML: Expected '=' after a key in a key/value pair"),
        ("[model]\nb@se = x\n", "2: not valid TOML: Expected '=' after a key in a key/value pair"),
        ("[model]\nbase = " + "x" * 500, "2: not valid TOML: Invalid value"),
    ],
)
def test_invalid_toml_is_named_with_its_line(problems, text: str, problem: str) -> None:
    assert problems(text) == [f"recipe.toml:{problem}"]


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "no.toml")
    assert str(caught.value) == f"{tmp_path}/no.toml: cannot be read: No such file or directory"
    (tmp_path / "latin.toml").write_bytes(b"[model]\nbase = '\xe9'")
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "latin.toml")
    assert str(caught.value) == f"{tmp_path}/latin.toml: is not UTF-8 text (byte 16)"


def test_an_editors_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "recipe.toml").write_text("\ufeff" + GOOD, encoding="utf-8")
    assert load_recipe(tmp_path / "recipe.toml").recipe.model.base == "org/model"


def test_a_mistyped_data_file_is_named_with_the_one_beside_it(problems) -> None:
    assert problems(GOOD.replace("rows.jsonl", "row.jsonl")) == [
        "recipe.toml:4: data.train = \"row.jsonl\": no such file or folder in HERE; did you mean 'rows.jsonl'?"
    ]


def test_missing_data_files_are_named_one_by_one(problems) -> None:
    text = """\
[model]
base = "./no_model"
[data]
train = [
  "rows.jsonl",
  "no1.jsonl",
  { path = "no2.jsonl", weight = 2.0 },
  { hub = "owner/name" },
  "data/*.jsonl",
]
validation = "no3.jsonl"
test = "hub:owner/name"
"""
    assert problems(text) == [
        'recipe.toml:2: model.base = "./no_model": no such file or folder',
        'recipe.toml:6: data.train.1 = "no1.jsonl": no such file or folder in HERE',
        'recipe.toml:7: data.train.2.path = "no2.jsonl": no such file or folder in HERE',
        'recipe.toml:11: data.validation = "no3.jsonl": no such file or folder in HERE',
    ]


def test_a_base_is_a_folder_if_it_exists_however_deep(check, problems, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "runs" / "quick" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert check(GOOD.replace("org/model", "runs/quick/model")).recipe.model.base == "runs/quick/model"
    assert problems(GOOD.replace("org/model", "runs/slow/model")) == [
        'recipe.toml:2: model.base = "runs/slow/model": neither a folder that exists nor a hub id (owner/name)'
    ]


# --- --set ---------------------------------------------------------------------------------------------------------


def test_set_changes_values_and_shells_may_eat_their_quotes(check) -> None:
    recipe = check(
        GOOD,
        "training.learning_rate=1e-4",
        "model.base=other/model",
        'output.name="quoted"',
        "adapter.target_modules=['q_proj']",
        "data.columns.instruction=query",
        "quantization.double_quantization = false",
    ).recipe
    assert recipe.training.learning_rate == 1e-4
    assert recipe.model.base == "other/model"
    assert recipe.output.name == "quoted"
    assert recipe.adapter.target_modules == ("q_proj",)
    assert recipe.data.columns == {"instruction": "query"}
    assert recipe.quantization.double_quantization is False


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ('training.trackers=["wandb", "mlflow"]', ("wandb", "mlflow")),
        ("training.trackers=[wandb, mlflow]", ("wandb", "mlflow")),
        ("adapter.target_modules=[q_proj,v_proj]", ("q_proj", "v_proj")),
        ("data.allow=[ too-long ]", ("too-long",)),
        ("data.system_prompt=[hello]", "[hello]"),  # a text, as it stands
    ],
)
def test_a_list_may_lose_its_quotes_on_the_way_through_a_shell(check, change: str, value: Any) -> None:
    table, key = change.partition("=")[0].split(".")
    found = getattr(getattr(check(GOOD, change).recipe, table), key)
    assert (found if isinstance(found, str) else tuple(found)) == value


@pytest.mark.parametrize(
    "change",
    [
        "training.trackers=wandb",
        "adapter.target_modules=😀",
        "adapter.target_modules=q_proj, v_proj",
        "adapter.target_modules=[q_proj",
    ],
)
def test_who_sets_a_word_for_a_list_is_told_what_a_shell_lets_through(check, problems, change: str) -> None:
    (told,) = problems(GOOD, change)
    command = told.partition(": must be a list, as ")[2].removesuffix(' or "all-linear"')
    option, given = shlex.split(command)
    assert option == "--set"
    assert given.partition("=")[0] == change.partition("=")[0]
    check(GOOD, given)


def test_set_is_checked_like_the_file(problems) -> None:
    text = GOOD + "[training]\nepochs = 1\n"
    assert problems(text, "training.epohcs=2", "adapter.rank=many", "rank=3", "training.epochs", "model.base.x=1") == [
        "--set rank=3: must look like table.key=value; did you mean adapter.rank=3?",
        "--set training.epochs: must look like table.key=value",
        "--set model.base.x: base is not a table",
        '--set: adapter.rank = "many": must be a whole number',
        "--set: training.epohcs = 2: no such key in [training]; did you mean 'epochs'?",
    ]


def test_a_key_without_its_table_is_found_in_the_tables_that_have_it(problems) -> None:
    assert problems(GOOD, "learning_rate=1e-4", "kind=none", "colour=red", "system_prompt=You are brief.") == [
        "--set learning_rate=1e-4: must look like table.key=value; did you mean training.learning_rate=1e-4?",
        "--set kind=none: must look like table.key=value; did you mean quantization.kind=none or adapter.kind=none?",
        "--set colour=red: must look like table.key=value",
        "--set system_prompt=You are brief.: must look like table.key=value; did you mean "
        "'data.system_prompt=You are brief.'?",
    ]


@pytest.mark.parametrize("size", ["8GB", "8 GB", "512MB", "8G", "8 gib", "512m"])
def test_sizes_are_written_in_a_recipe_as_for_the_card(check, size: str) -> None:
    recipe = check(GOOD + f'[memory]\nbudget = "{size}"\n').recipe
    assert size_in_bytes(recipe.memory.budget, "memory.budget") == size_in_bytes(size, "--vram")


def test_a_name_that_is_near_a_shipped_recipe_and_folders_are_answered(tmp_path: Path) -> None:
    for name, said in (
        ("quickstrat", "no such file, nor a recipe that comes with qtune; did you mean 'quickstart'?"),
        ("lama_lora", "no such file, nor a recipe that comes with qtune; did you mean 'llama_lora'?"),
    ):
        with pytest.raises(RecipeError) as caught:
            find_recipe(name)
        assert str(caught.value) == f"{name}: {said}"
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    (run / "resolved.toml").touch()
    with pytest.raises(RecipeError) as caught:
        find_recipe(str(run))
    assert str(caught.value) == (
        f"{run}: is a run's folder, not a recipe: qtune run --resume {run} goes on with it, "
        f"qtune run {run}/resolved.toml begins anew"
    )
    with pytest.raises(RecipeError, match=rf"its recipe is meant by: qtune fit {run}/resolved.toml$"):
        find_recipe(str(run), "fit")
    (run / "adapter").mkdir()
    (run / "adapter" / "adapter_config.json").touch()
    with pytest.raises(RecipeError, match=rf"it has ended; qtune run {run}/resolved.toml begins anew$"):
        find_recipe(str(run))
    (run / "adapter" / "trained_state.safetensors").touch()
    with pytest.raises(RecipeError, match=rf"resolved.toml --set adapter.start_from={run} goes on from its adapter"):
        find_recipe(str(run))
    (tmp_path / "a.toml").touch()
    with pytest.raises(RecipeError, match=rf"is a folder, not a recipe; it holds {tmp_path}/a.toml$"):
        find_recipe(str(tmp_path))


def test_another_kind_takes_the_place_of_the_whole_table(check) -> None:
    text = GOOD + '[adapter]\nkind = "lora"\nrank = 8\n[quantization]\ndouble_quantization = true\n'
    recipe = check(text, "adapter.kind=p-tuning", "quantization.kind=none").recipe
    assert isinstance(recipe.adapter, PTuning)
    assert isinstance(recipe.quantization, Unquantized)
    assert check(text, "adapter.kind=lora").recipe.adapter.rank == 8


@pytest.mark.parametrize("reverse", [False, True])
def test_the_order_of_changes_does_not_matter(check, reverse: bool) -> None:
    changes = ["adapter.kind=p-tuning", "adapter.virtual_tokens=5"]
    recipe = check(GOOD, *(reversed(changes) if reverse else changes)).recipe
    assert recipe.adapter == PTuning(kind="p-tuning", virtual_tokens=5)


def test_steps_replace_the_epochs_of_the_file_but_not_of_the_command_line(check, problems) -> None:
    text = GOOD + "[training]\nepochs = 3\n"
    assert check(text, "training.steps=10").recipe.training.steps == 10
    assert check(text.replace("epochs", "steps"), "training.epochs=2").recipe.training.steps is None
    assert problems(text, "training.steps=10", "training.epochs=2") == [
        "--set: training.steps = 10: the run ends after steps or after epochs; give one of them"
    ]


@pytest.mark.parametrize(
    ("written", "changes", "said"),
    [
        (
            "[training]\nepochs = 3\n",
            ["training.steps=6"],
            ["--set training.steps: training.epochs = 3 (recipe.toml:6) is set aside"],
        ),
        (
            "[training]\nsteps = 6\n",
            ["training.epochs=3"],
            ["--set training.epochs: training.steps = 6 (recipe.toml:6) is set aside"],
        ),
        (
            '[adapter]\nkind = "lora"\nrank = 8\nalpha = 16\n',
            ["adapter.virtual_tokens=5", "adapter.kind=p-tuning"],
            ["--set adapter.kind: adapter.rank = 8 (recipe.toml:7), adapter.alpha = 16 (recipe.toml:8) are set aside"],
        ),
        (
            "[quantization]\ndouble_quantization = false\n",
            ["quantization.kind=none"],
            ["--set quantization.kind: quantization.double_quantization = false (recipe.toml:6) is set aside"],
        ),
        (
            '[adapter]\nkind = "prompt-tuning"\ninitialization = "text"\ntext = "Be brief."\n',
            ["adapter.start_from={run}"],
            [
                '--set adapter.start_from: adapter.initialization = "text" (recipe.toml:7), '
                'adapter.text = "Be brief." (recipe.toml:8) are set aside'
            ],
        ),
        ('[adapter]\nkind = "prompt-tuning"\ninitialization = "random"\n', ["adapter.start_from={run}"], []),
        (
            '[adapter]\nkind = "p-tuning"\ninitialization = "rows"\nresidual = true\n',
            ["adapter.start_from={run}", "adapter.kind=lora"],
            [
                '--set adapter.kind: adapter.initialization = "rows" (recipe.toml:7), adapter.residual = true '
                "(recipe.toml:8) are set aside"
            ],
        ),
        ("[training]\nepochs = 3\n", ["training.epochs=2"], []),
        ("[adapter]\nrank = 8\n", ["adapter.kind=lora"], []),
        ("", ["training.steps=6"], []),
    ],
)
def test_what_a_change_leaves_nothing_of_is_said(
    check, tmp_path: Path, written: str, changes: list[str], said: list[str]
) -> None:
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "adapter" / "adapter_config.json").touch()
    changes = [change.format(run=tmp_path / "run") for change in changes]
    assert list(check(GOOD + written, *changes).set_aside) == said


@pytest.mark.parametrize("adapter", ["p-tuning", "prompt-tuning"])
def test_a_start_from_a_run_names_all_keys_of_the_recipe_s_own_start_with_their_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: str
) -> None:
    """Of the recipes that init writes for a soft prompt."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "adapter" / "adapter_config.json").touch()
    (tmp_path / "rows.jsonl").touch()
    written = new_recipe("builtin:smollm2-135m-instruct", "rows.jsonl", adapter, tmp_path / "recipe.toml", None)
    text = written.replace("[data]", 'text = "Be brief."\nstart_from = "run"\n[data]', 1)
    lines = [line.partition(" ")[0] for line in text.splitlines()]
    with pytest.raises(RecipeError) as caught:
        check_recipe(text, tmp_path / "recipe.toml")
    wrong = "an adapter that starts from a run has the values of that one; remove the key"
    shown = {
        key: f"{tmp_path / 'recipe.toml'}:{lines.index(key) + 1}: adapter.{key}" for key in ("initialization", "text")
    }
    assert str(caught.value).splitlines() == [
        f'{shown["initialization"]} = "rows": {wrong}',
        f'{shown["text"]} = "Be brief.": {wrong}',
    ]
    mended = "".join(
        line for line in text.splitlines(keepends=True) if line.partition(" ")[0] not in ("initialization", "text")
    )
    assert check_recipe(mended, tmp_path / "recipe.toml").recipe.adapter.start_from == "run"
    assert check_recipe(written, tmp_path / "recipe.toml", ["adapter.start_from=run"]).set_aside


# --- origins -------------------------------------------------------------------------------------------------------


def test_every_value_knows_where_it_came_from(check) -> None:
    origins = check(GOOD + "[training]\nepochs = 2\n", "adapter.rank=4").origins
    assert origins["model", "base"] == Origin("recipe", "recipe.toml:2")
    assert origins["training", "epochs"] == Origin("recipe", "recipe.toml:6")
    assert origins["adapter", "rank"] == Origin("--set")
    assert origins["adapter", "alpha"] == Origin("default")
    assert check(GOOD, "data.columns.instruction=query").origins["data", "columns"] == Origin("--set")


def test_a_key_of_the_kind_that_was_replaced_has_no_origin_in_the_file(check) -> None:
    origins = check(GOOD + '[adapter]\nkind = "lora"\ndtype = "float32"\n', "adapter.kind=ia3").origins
    assert origins["adapter", "dtype"] == Origin("default")


# --- the recipes that come along -----------------------------------------------------------------------------------


def test_every_shipped_recipe_can_be_named_and_is_right() -> None:
    assert "quickstart" in shipped_recipes()
    for name, path in shipped_recipes().items():
        assert find_recipe(name) == path
        load_recipe(path)


def test_a_name_that_is_no_recipe_is_answered_with_the_names_that_are(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        find_recipe(str(tmp_path / "nope"))
    assert str(caught.value) == (
        f"{tmp_path}/nope: no such file, nor a recipe that comes with qtune ({', '.join(shipped_recipes())})"
    )


def test_files_that_are_not_there_are_said_beside_keys_that_are_wrong(problems, tmp_path: Path) -> None:
    text = GOOD.replace("org/model", "./no-model").replace('"rows.jsonl"', '["rows.jsonl", { path = "b.jsonl" }]')
    text += 'validation = "c.jsonl"\ntset = "d.jsonl"\n[adapter]\nstart_from = "runs/none"\nrnak = 4\n'
    assert problems(text) == [
        'recipe.toml:2: model.base = "./no-model": no such file or folder',
        'recipe.toml:4: data.train.1.path = "b.jsonl": no such file or folder in HERE',
        'recipe.toml:5: data.validation = "c.jsonl": no such file or folder in HERE',
        "recipe.toml:6: data.tset = \"d.jsonl\": no such key in [data]; did you mean 'test'?",
        'recipe.toml:8: adapter.start_from = "runs/none": is not a finished run',
        "recipe.toml:9: adapter.rnak = 4: no such key in [adapter]; did you mean 'rank'?",
    ]


@pytest.mark.parametrize("key", ["training", "data", "adapter", "memory"])
@pytest.mark.parametrize("value", ["3", '"text"', "[1]"])
def test_a_table_that_is_a_value_is_a_problem_also_where_set_reaches_into_it(problems, key: str, value: str) -> None:
    given = "".join(
        line + "\n" for line in GOOD.splitlines() if key != "data" or not line.startswith(("[data", "train"))
    )
    found = problems(f"{key} = {value}\n{given}", f"{key}.steps=5", f"{key}.kind=x")
    assert f"--set {key}.steps: {key} is not a table" in found
    assert any(line.startswith(f"recipe.toml:1: {key} = {value}") for line in found) or any(
        line.startswith(f"--set: {key} = {value}") for line in found
    )
