"""`qtune swap`: a recipe that trains on its rows and on copies of them with other words, and holds out what it held
out."""

import csv
import errno
import json
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner, Result

from qtune import cli
from qtune.data.conversation import Conversation
from qtune.data.prepare import Prepared, prepare
from qtune.data.swapped import spelled_words
from qtune.errors import QtuneError
from qtune.model.load import load_tokenizer
from qtune.recipe.file import load_recipe
from qtune.recipe.schema import Model

PAIRS = [
    (f"Please call {a}{b}{a}ster now", f"call {a}{b}{a}ster")
    for a in string.ascii_uppercase[:4]
    for b in string.ascii_lowercase[:10]
]
"""Each about somebody that no other row speaks of."""

SHAPES: dict[str, Callable[[str, str], dict[str, object]]] = {
    "messages": lambda asked, said: {
        "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    },
    "conversations": lambda asked, said: {
        "conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]
    },
    "prompt and completion": lambda asked, said: {"prompt": asked, "completion": said},
    "instruction": lambda asked, said: {"instruction": asked, "input": "", "output": said},
    "own columns": lambda asked, said: {"symptom": asked, "advice": said},
}
COLUMNS = 'columns = { question = "symptom", answer = "advice" }'


def written(file: Path, rows: Sequence[dict[str, object]]) -> Path:
    """Rows in a file of the kind that its name says."""
    match file.suffix:
        case ".csv":
            with file.open("w", newline="") as stream:
                writer = csv.DictWriter(stream, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(list(rows)), file)
        case _:
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def recipe_in(folder: Path, base: Path, train: str, data: str = "validation = 0.1", training: str = "") -> Path:
    file = folder / "recipe.toml"
    file.write_text(
        f'[model]\nbase = "{base}"\n[data]\n# Whose rows?\ntrain = "{train}"\n{data}\n[training]\n{training}\n'
    )
    return file


def prepared(recipe: Path) -> Prepared:
    resolved = load_recipe(recipe)
    tokenizer = AutoTokenizer.from_pretrained(resolved.recipe.model.base)
    return prepare(resolved.recipe.data, tokenizer, resolved.folder, seed=resolved.recipe.training.seed)


def talks(found: Prepared, split: str) -> list[tuple[str, str]]:
    read = [Conversation.from_json(text).messages for text in found.examples[split]["conversation"]]
    return [(messages[-2]["content"], messages[-1]["content"]) for messages in read]


@pytest.fixture
def swap(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Calls the verb."""
    monkeypatch.setenv("QTUNE_CACHE", str(own_cache))

    def call(*words: str | Path) -> Result:
        done = CliRunner().invoke(cli.app, ["swap", *map(str, words)], env={"COLUMNS": "200"})
        if isinstance(done.exception, QtuneError):
            done.stderr_bytes = str(done.exception).encode()
        return done

    return call


@pytest.mark.parametrize(
    ("shape", "kind"),
    [*((shape, "jsonl") for shape in SHAPES), ("messages", "parquet"), ("instruction", "csv"), ("own columns", "csv")],
)
def test_rows_of_every_shape_are_trained_on_as_before_and_beside_their_copies(
    shape: str, kind: str, swap: Callable[..., Result], tiny_model: Path, tmp_path: Path
) -> None:
    written(tmp_path / f"rows.{kind}", [SHAPES[shape](*pair) for pair in PAIRS])
    data = f"validation = 0.1\n{COLUMNS}" if shape == "own columns" else "validation = 0.1"
    recipe = recipe_in(tmp_path, tiny_model, f"rows.{kind}", data)
    before = prepared(recipe)
    done = swap(recipe)
    assert (done.exit_code, done.stdout.strip()) == (0, str(tmp_path / "recipe.swapped.toml")), done.output
    after = prepared(tmp_path / "recipe.swapped.toml")
    rows = len(before.train)
    assert len(after.train) == 3 * rows
    assert after.train[:rows] == before.train[:], "the same tokens and labels, in the same order"
    assert sorted(after.validation["input_ids"]) == sorted(before.validation["input_ids"])
    changed = 0
    for number, (asked, said) in enumerate(talks(after, "train")[rows:]):
        name = said.removeprefix("call ")
        assert asked == f"Please call {name} now"
        changed += said != talks(before, "train")[number % rows][1]
    assert changed > rows


def test_nothing_is_made_of_a_row_that_is_held_out(
    swap: Callable[..., Result], tiny_model: Path, tmp_path: Path
) -> None:
    """Of such rows one word in two stays, so that a copy of one would be found."""
    rows = [SHAPES["messages"](f"{asked} or {said[5:]}man", f"{said} {said[5:]}man") for asked, said in PAIRS]
    written(tmp_path / "rows.jsonl", rows)
    recipe = recipe_in(tmp_path, tiny_model, "rows.jsonl", "validation = 0.2")
    assert swap(recipe, "--copies", "6").exit_code == 0
    after = prepared(tmp_path / "recipe.swapped.toml")
    held_out = {word for pair in talks(after, "validation") for text in pair for word in text.split()}
    trained = {word for pair in talks(after, "train") for text in pair for word in text.split()}
    assert held_out & trained == {"Please", "call", "now", "or"}


def test_other_splits_keep_their_own_shape_wherever_the_recipe_is_written(
    swap: Callable[..., Result], tiny_model: Path, tmp_path: Path
) -> None:
    for name, part in (("rows", PAIRS[:30]), ("validation", PAIRS[30:35]), ("test", PAIRS[35:])):
        written(tmp_path / f"{name}.jsonl", [SHAPES["own columns"](*pair) for pair in part])
    recipe = recipe_in(
        tmp_path, tiny_model, "rows.jsonl", f'validation = "validation.jsonl"\ntest = "test.jsonl"\n{COLUMNS}'
    )
    made = tmp_path / "elsewhere" / "new.toml"
    done = swap(recipe, "--output", made, "--set", "training.seed=7")
    assert done.exit_code == 0, done.output
    assert not made.with_suffix(".held-out.jsonl").exists(), "the recipe names its own"
    after = prepared(made)
    assert (talks(after, "validation"), talks(after, "test")) == (PAIRS[30:35], PAIRS[35:])
    assert len(after.train) == 90
    assert "# Whose rows?" in made.read_text()
    assert load_recipe(made).recipe.training.seed == 7


def test_what_set_sets_aside_is_said(swap: Callable[..., Result], tiny_model: Path, tmp_path: Path) -> None:
    written(tmp_path / "rows.jsonl", [SHAPES["messages"](*pair) for pair in PAIRS])
    recipe = recipe_in(tmp_path, tiny_model, "rows.jsonl", training="epochs = 3.0")
    said = swap(recipe, "--set", "training.steps=6").stderr
    assert load_recipe(recipe, ["training.steps=6"]).set_aside[0] in said


def test_what_came_in_is_shown_and_how_to_train_as_long_as_before(
    swap: Callable[..., Result], tiny_model: Path, tmp_path: Path
) -> None:
    written(tmp_path / "rows.jsonl", [SHAPES["messages"](*pair) for pair in PAIRS])
    made = tmp_path / "recipe.swapped.toml"
    said = swap(recipe_in(tmp_path, tiny_model, "rows.jsonl", training="epochs = 3.0")).stderr
    assert "36 rows and 72 copies with other words" in said
    assert "the 4 rows that are held out; nothing is made of them" in said
    assert re.search(r"what came in: \d+ different words, as [\w ,]+; drawn from \d+ words of English prose", said)
    assert (
        f"an epoch has 3 times as many steps now; as many as before: qtune run {made} --set training.epochs=1" in said
    )
    assert re.search(r"row +Please call (\w+) now → call \1 *\ncopy +Please call (?!\1)(\w+) now → call \2 *\n", said)
    assert len(load_recipe(made, ["training.epochs=1"]).recipe.data.train) > 0


def test_rows_without_a_word_to_exchange_are_not_copied_and_count_as_often_as_before(
    swap: Callable[..., Result], tiny_model: Path, tmp_path: Path
) -> None:
    rows = [SHAPES["messages"](*pair) for pair in [*PAIRS, *((f"How much is {n}?", f"{n}") for n in range(6))]]
    written(tmp_path / "rows.jsonl", rows)
    recipe = recipe_in(tmp_path, tiny_model, "rows.jsonl", "validation = 0.0")
    said = swap(recipe, "--copies", "3").stderr
    file = tmp_path / "recipe.swapped.unchanged.jsonl"
    assert f"{file}: 6 rows have no word to exchange; nothing is made of them, and they count 4 times" in said
    assert len(file.read_text().splitlines()) == 6
    after = prepared(tmp_path / "recipe.swapped.toml")
    again = Counter(talks(after, "train"))
    assert max(again.values()) == 1, "no row is there twice, which check would name"
    trained = Counter(map(tuple, after.train["input_ids"]))
    assert sorted(trained.values()) == [1] * 160 + [4] * 6
    recipe.write_text(recipe.read_text().replace("[data]\n", "[data]\nstreaming = true\n"))
    done = swap(recipe, "--copies", "3", "--force")
    assert done.exit_code == 0
    assert "\n6 rows have no word to exchange;" in done.stderr
    assert f"(in {tmp_path / 'recipe.swapped.rows.jsonl'} they stand so often)" in done.stderr
    assert len(prepared(tmp_path / "recipe.swapped.toml").train) == 4 * 46, "a stream has no weights"


def test_no_comment_in_the_new_recipe_speaks_of_what_is_no_longer_so(
    swap: Callable[..., Result], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [SHAPES["own columns"](*pair) for pair in [*PAIRS, *((f"How much is {n}?", f"{n}") for n in range(6))]]
    written(tmp_path / "rows.jsonl", rows)
    made = CliRunner().invoke(cli.app, ["init", "--base", str(tiny_model), "--data", "rows.jsonl", "-o", "my own.toml"])
    assert made.exit_code == 0, made.output
    recipe = tmp_path / "my own.toml"
    old = recipe.read_text().replace('"rows.jsonl"', '"rows.jsonl"  # all 46 of them')
    recipe.write_text(f"# Compare with `qtune run other.toml` and `qtune check 'own`.\n{old}")
    assert swap(Path("my own.toml")).exit_code == 0
    new = (tmp_path / "my own.swapped.toml").read_text()
    assert "with `qtune check 'my own.swapped.toml'`, train with `qtune run 'my own.swapped.toml'`" in new
    assert "# Compare with `qtune run other.toml` and `qtune check 'own`.\n" in new
    assert "Columns that have other names" in old
    assert "other names" not in new
    assert "the share of the training rows to set aside" in old
    assert "set aside (" not in new
    (train,) = (line for line in new.splitlines() if line.startswith("train ="))
    assert train.endswith(" # made by qtune swap, of the rows of my own.toml")
    (validation,) = (line for line in new.splitlines() if line.startswith("validation ="))
    assert validation.endswith(" # those that were set aside of them; nothing is made of these")


def test_files_of_the_swap_that_is_replaced_do_not_stay_beside_a_new_one_that_has_none(
    swap: Callable[..., Result], tiny_model: Path, tmp_path: Path
) -> None:
    plain = [SHAPES["messages"](*pair) for pair in PAIRS]
    written(tmp_path / "rows.jsonl", [*plain, *(SHAPES["messages"](f"How much is {n}?", f"{n}") for n in range(6))])
    recipe = recipe_in(tmp_path, tiny_model, "rows.jsonl")
    assert swap(recipe).exit_code == 0
    files = [tmp_path / f"recipe.swapped.{name}.jsonl" for name in ("unchanged", "held-out")]
    assert all(file.is_file() for file in files)
    written(tmp_path / "rows.jsonl", plain)
    again = swap(recipe, "--force", "--set", "data.validation=0.0")
    assert again.exit_code == 0
    assert not any(file.exists() for file in files)
    for file in files:
        assert f"{file}: removed, for only the swap that was replaced had such rows\n" in again.stderr
    # What no recipe of a swap names is somebody's own.
    files[1].write_text("{}\n")
    third = swap(recipe, "--force", "--set", "data.validation=0.0")
    assert f"{files[1]}: stays, and the new recipe does not read it\n" in third.stderr
    assert files[1].read_text() == "{}\n"
    assert "removed" not in third.stderr


def test_no_comment_of_init_speaks_of_a_kind_or_a_base_that_set_has_replaced(
    swap: Callable[..., Result], tiny_model: Path, tmp_path: Path
) -> None:
    written(tmp_path / "rows.jsonl", [SHAPES["messages"](*pair) for pair in PAIRS])
    recipe, same = tmp_path / "recipe.toml", tmp_path / "same.toml"
    asked = ["init", "--base", str(tiny_model), "--data", str(tmp_path / "rows.jsonl")]
    for file, kind in ((recipe, "lora"), (same, "p-tuning")):
        assert CliRunner().invoke(cli.app, [*asked, "--adapter", kind, "-o", str(file)]).exit_code == 0
    assert swap(recipe, "--set", "adapter.kind=p-tuning", "--set", "quantization.kind=int8").exit_code == 0
    new = (tmp_path / "recipe.swapped.toml").read_text()
    assert new.startswith(f"# p-tuning on {tiny_model}, whose weights stay in int8.\n")
    above = re.search(r'((?:#.*\n)+)kind = "p-tuning"\n', same.read_text())
    assert above is not None
    assert f"[adapter]\n{above[0]}" in new
    assert not re.search("LoRA:|NF4|4.127|lora on", new)
    own = (
        recipe.read_text().replace("# LoRA: h", "# We take LoRA: h").replace('kind = "lora"', 'kind = "lora"  # merges')
    )
    recipe.write_text(own.replace("# lora on", "# My own, on"))
    assert swap(recipe, "--force", "--set", "adapter.kind=ia3").exit_code == 0
    new = (tmp_path / "recipe.swapped.toml").read_text()
    assert new.startswith(f"# My own, on {tiny_model}, whose weights stay in NF4.\n")
    assert '[adapter]\nkind = "ia3"\n' in new


def test_rows_that_were_swapped_are_not_swapped_again(
    swap: Callable[..., Result], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "rows.jsonl", [SHAPES["messages"](*pair) for pair in PAIRS])
    done = swap(recipe_in(tmp_path, tiny_model, "rows.jsonl"))
    made = tmp_path / "recipe.swapped.toml"
    assert f"  qtune check {made}  # what would spoil the run\n" in done.stderr
    monkeypatch.setattr("qtune.commands.swap.load_libraries", lambda: pytest.fail("libraries were loaded"))
    assert "has copies of its rows already" in str(swap(made).exception)


@pytest.mark.parametrize(
    ("options", "told"),
    [([], "are there already"), (["--words", "nowhere.txt", "--force"], "cannot be read")],
)
def test_what_names_alone_tell_is_said_before_a_library_is_loaded(
    options: list[str],
    told: str,
    swap: Callable[..., Result],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written(tmp_path / "rows.jsonl", [SHAPES["messages"](*pair) for pair in PAIRS])
    recipe = recipe_in(tmp_path, tiny_model, "rows.jsonl")
    assert swap(recipe).exit_code == 0
    monkeypatch.setattr("qtune.commands.swap.load_libraries", lambda: pytest.fail("libraries were loaded"))
    assert told in str(swap(recipe, *options).exception)


def test_words_come_from_a_text_of_the_user_s_and_kept_ones_stay(
    swap: Callable[..., Result], tiny_model: Path, tmp_path: Path
) -> None:
    letters = string.ascii_lowercase
    words = [f"über{a}{b}" for a in letters[:12] for b in letters[:12]]
    (tmp_path / "words.txt").write_text(" ".join(words))
    written(tmp_path / "rows.jsonl", [SHAPES["messages"](*pair) for pair in PAIRS])
    recipe = recipe_in(tmp_path, tiny_model, "rows.jsonl", "validation = 0.0")
    done = swap(recipe, "--words", tmp_path / "words.txt", "--keep", "aaaster", "--copies", "4")
    assert done.exit_code == 0, done.output
    after = prepared(tmp_path / "recipe.swapped.toml")
    said = [said.removeprefix("call ") for _, said in talks(after, "train")]
    assert said.count("AaAster") == 1
    assert max(Counter(map(tuple, after.train["input_ids"])).values()) == 5
    assert {name for name in said if not name.endswith("ster")} <= {word.capitalize() for word in words}


@pytest.mark.parametrize(
    ("rows", "options", "told"),
    [
        ([{"text": f"{asked} {said}"} for asked, said in PAIRS], [], "is raw text, in which no answer copies"),
        ([SHAPES["messages"](f"what is {n}", f"{n}") for n in range(40)], [], "no word stands in a request and in"),
        ([SHAPES["messages"](*pair) for pair in PAIRS[:5]], [], "no word stands in a request and in its answer"),
        ([SHAPES["messages"](*pair) for pair in PAIRS], ["--words", "nowhere.txt"], "--words nowhere.txt: cannot be"),
        (
            [SHAPES["messages"](*pair) for pair in PAIRS],
            ["--words", "{few}"],
            "few.txt: has 2 different words of 3 to 11 small letters; at",
        ),
        ([SHAPES["messages"](*pair) for pair in PAIRS], ["--words", "{binary}"], "is not UTF-8 text (byte 0)"),
        ([SHAPES["messages"](*pair) for pair in PAIRS], ["-o", "{recipe}"], "is what the new rows would be made of"),
    ],
)
def test_what_cannot_be_swapped_is_said_and_nothing_is_written(
    rows: list[dict[str, object]],
    options: list[str],
    told: str,
    swap: Callable[..., Result],
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    written(tmp_path / "rows.jsonl", rows)
    recipe = recipe_in(tmp_path, tiny_model, "rows.jsonl")
    (tmp_path / "few.txt").write_text("one two one")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe")
    named = {"few": tmp_path / "few.txt", "binary": tmp_path / "binary.txt", "recipe": recipe}
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    done = swap(recipe, *(option.format(**named) for option in options), "--force")
    assert isinstance(done.exception, QtuneError)
    assert told in str(done.exception)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_is_there_is_replaced_only_where_that_is_asked_for_and_never_the_rows_themselves(
    swap: Callable[..., Result], tiny_model: Path, tmp_path: Path
) -> None:
    written(tmp_path / "recipe.swapped.rows.jsonl", [SHAPES["messages"](*pair) for pair in PAIRS])
    recipe = recipe_in(tmp_path, tiny_model, "recipe.swapped.rows.jsonl")
    assert "is what the new rows would be made of" in str(swap(recipe, "--force").exception)
    assert swap(recipe, "--output", tmp_path / "new.toml").exit_code == 0
    assert "are there already" in str(swap(recipe, "--output", tmp_path / "new.toml").exception)
    assert swap(recipe, "--output", tmp_path / "new.toml", "--force").exit_code == 0


def test_weights_of_sources_are_not_lost_in_silence(
    swap: Callable[..., Result], tiny_model: Path, tmp_path: Path
) -> None:
    written(tmp_path / "rows.jsonl", [SHAPES["messages"](*pair) for pair in PAIRS])
    recipe = recipe_in(tmp_path, tiny_model, "rows.jsonl")
    text = recipe.read_text().replace('"rows.jsonl"', '[{ path = "rows.jsonl", weight = 2.0 }]')
    recipe.write_text(text)
    assert "has sources with weights" in str(swap(recipe).exception)


def with_systems(pairs: Sequence[tuple[str, str]]) -> list[dict[str, object]]:
    """Rows without a system message, with one, with two, with one behind the question, and with several turns."""
    rows = []
    for number, pair in enumerate(pairs):
        asked, said = SHAPES["messages"](*pair)["messages"]
        system = {"role": "system", "content": f"You are phone {number}.\n\nBe short."}
        other = {"role": "system", "content": "Now."}
        turns = {
            0: [asked, said],
            1: [system, asked, said],
            2: [system, other, asked, said],
            3: [asked, system, said],
            4: [*SHAPES["messages"]("Hello", "Hi")["messages"], asked, system, said],
        }[number % 5]
        rows.append({"messages": turns})
    return rows


@pytest.mark.parametrize("system", ["keep", "drop", "merge"])
@pytest.mark.parametrize("prompt", ["", 'system_prompt = "You are a phone.\\n\\nAnswer."\n'], ids=["own", "prompt"])
def test_system_messages_are_to_the_model_what_they_were(
    system: str, prompt: str, swap: Callable[..., Result], tiny_model: Path, tmp_path: Path
) -> None:
    written(tmp_path / "rows.jsonl", with_systems(PAIRS))
    written(tmp_path / "test.jsonl", with_systems(PAIRS[:5]))
    data = f'validation = 0.2\nchat_template = "chatml"\ntest = "test.jsonl"\nsystem = "{system}"\n{prompt}'
    recipe = recipe_in(tmp_path, tiny_model, "rows.jsonl", data)
    before = prepared(recipe)
    assert swap(recipe, "--copies", "1").exit_code == 0
    after = prepared(tmp_path / "recipe.swapped.toml")
    rows = len(before.train)
    assert len(after.train) == 2 * rows
    for split, count in (("train", rows), ("validation", None), ("test", None)):
        assert after.examples[split]["input_ids"][:count] == before.examples[split]["input_ids"][:], split
        assert after.examples[split]["labels"][:count] == before.examples[split]["labels"][:], split


@pytest.mark.parametrize("count", [1, 40])
def test_a_file_that_is_named_twice_is_trained_on_twice(
    count: int, swap: Callable[..., Result], tiny_model: Path, tmp_path: Path
) -> None:
    """So people weight without weights. One row: its two readings follow each other."""
    written(tmp_path / "rows.jsonl", [SHAPES["messages"](*pair) for pair in PAIRS])
    written(tmp_path / "often.jsonl", [SHAPES["messages"](*pair) for pair in PAIRS[:count]])
    recipe = recipe_in(tmp_path, tiny_model, "rows.jsonl", "validation = 0.0")
    recipe.write_text(recipe.read_text().replace('"rows.jsonl"', '["often.jsonl", "often.jsonl", "rows.jsonl"]'))
    before = prepared(recipe)
    assert swap(recipe).exit_code == 0
    after = prepared(tmp_path / "recipe.swapped.toml")
    rows = 2 * count + 40
    assert (len(before.train), len(after.train)) == (rows, 3 * rows)
    assert after.train[:rows] == before.train[:]


def test_words_of_a_text_that_are_asked_do_not_count(
    swap: Callable[..., Result], tiny_model: Path, tmp_path: Path
) -> None:
    words = [f"{a}{b}ing" for a in string.ascii_lowercase[:12] for b in string.ascii_lowercase[:9]]
    (tmp_path / "words.txt").write_text(" ".join(words))
    written(tmp_path / "rows.jsonl", [SHAPES["messages"](*pair) for pair in PAIRS])
    recipe = recipe_in(tmp_path, tiny_model, "rows.jsonl", 'validation = "asked.jsonl"')
    for count, left in ((108, 0), (9, 99)):
        written(tmp_path / "asked.jsonl", [SHAPES["messages"](f"Say {word}", word) for word in words[:count]])
        refused = swap(recipe, "--words", tmp_path / "words.txt")
        assert isinstance(refused.exception, QtuneError)
        assert f"words.txt: has {left} different words" in str(refused.exception)
        assert f"({count} more stand in rows that are held out or asked in the end, and may not)" in str(
            refused.exception
        )
    written(tmp_path / "asked.jsonl", [SHAPES["messages"](f"Say {word}", word) for word in words[:8]])
    done = swap(recipe, "--words", tmp_path / "words.txt")
    assert f"; drawn from 100 words of --words {tmp_path / 'words.txt'}\n" in done.stderr


@pytest.mark.parametrize("call", ["Позвони {}, пожалуйста", "请打电话给“{}”。"])
def test_rows_in_other_letters_get_no_english_words(
    call: str, swap: Callable[..., Result], tiny_model: Path, tmp_path: Path
) -> None:
    names = [
        f"{chr(0x0410 + n)}жа{chr(0x0430 + n)}стер" if "П" in call else f"{chr(0x738B + n)}小明" for n in range(30)
    ]
    written(tmp_path / "rows.jsonl", [SHAPES["messages"](call.format(name), name) for name in names])
    recipe = recipe_in(tmp_path, tiny_model, "rows.jsonl")
    refused = swap(recipe)
    assert isinstance(refused.exception, QtuneError)
    assert "in letters that its rows have the model's vocabulary has 0" in str(refused.exception)
    assert "--words FILE" in str(refused.exception)
    assert not (tmp_path / "recipe.swapped.toml").exists()
    (tmp_path / "words.txt").write_text(" ".join(f"слово{a}{b}" for a in "абвгдежзик" for b in "абвгдежзик"))
    assert swap(recipe, "--words", tmp_path / "words.txt").exit_code == 0


def test_several_answers_of_one_row_are_one_row(swap: Callable[..., Result], tiny_model: Path, tmp_path: Path) -> None:
    """A template that renders earlier turns differently makes an example of each answer."""
    turns = [
        {"messages": [message for pair in (one, two) for message in SHAPES["messages"](*pair)["messages"]]}
        for one, two in zip(PAIRS[:20], PAIRS[20:], strict=True)
    ]
    written(tmp_path / "rows.jsonl", turns)
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}"
        "{{ m.content | upper }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    recipe = recipe_in(tmp_path, tiny_model, "rows.jsonl", 'validation = 0.0\nchat_template = "template.jinja"')
    before = len(prepared(recipe).train)
    assert before == 40
    assert swap(recipe).exit_code == 0
    assert len(prepared(tmp_path / "recipe.swapped.toml").train) == 3 * before


def test_a_disk_that_fails_leaves_no_recipe_that_names_rows_which_are_not_there(
    swap: Callable[..., Result], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "rows.jsonl", [SHAPES["messages"](*pair) for pair in PAIRS])
    recipe = recipe_in(tmp_path, tiny_model, "rows.jsonl")
    for failing in range(3):
        done: list[Path] = []

        def write(file: Path, text: str, done: list[Path] = done, failing: int = failing) -> None:
            if len(done) == failing:
                raise OSError(errno.ENOSPC, "No space left on device", str(file))
            done.append(file)

        monkeypatch.setattr("qtune.swap.write_text", write)
        assert isinstance(swap(recipe).exception, OSError)
        assert not any(file.suffix == ".toml" for file in done)


@pytest.mark.slow
def test_what_comes_in_has_to_be_spelled_by_the_model_and_is_not_what_will_be_asked(
    tmp_path: Path,
) -> None:
    base = "builtin:smollm2-135m-instruct"
    letters = {letter for pair in PAIRS for letter in "".join(pair)}
    words = spelled_words(load_tokenizer(Model(base=base))).of_letters(letters)
    asked = words.capital[: len(words.capital) // 2]
    written(tmp_path / "rows.jsonl", [SHAPES["messages"](*pair) for pair in PAIRS])
    questions = [" ".join(asked[first : first + 40]) for first in range(0, len(asked), 40)]
    written(tmp_path / "test.jsonl", [SHAPES["messages"](question, "Who?") for question in questions])
    recipe = recipe_in(tmp_path, Path(base), "rows.jsonl", 'validation = 0.0\ntest = "test.jsonl"')
    done = CliRunner().invoke(cli.app, ["swap", str(recipe), "--copies", "5"])
    assert done.exit_code == 0, done.output
    rows = (tmp_path / "recipe.swapped.rows.jsonl").read_text().splitlines()
    names = {json.loads(row)["messages"][1]["content"].removeprefix("call ") for row in rows}
    came_in = {name for name in names if not name.endswith("ster")}
    assert len(came_in) > 50
    assert came_in <= set(words.capital) - set(asked)
