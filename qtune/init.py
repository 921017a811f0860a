"""`qtune init`: a commented recipe for a model and a data file, a copy of a shipped one, or the schema for editors.

Nothing is described here: every comment is a docstring of `recipe/schema.py`, every default is the schema's.
"""

import json
import math
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtune.data.findings import FEW_ROWS
from qtune.errors import DataError, ModelError, Problem, RecipeError
from qtune.export.verification import VERIFICATION
from qtune.model.builtin import BUILTIN_MODELS, PREFIX
from qtune.model.reach import reach_of
from qtune.recipe.comments import about_kind, comment_lines, title
from qtune.recipe.file import check_recipe, load_recipe, missing_rows
from qtune.recipe.lines import toml_lines
from qtune.recipe.schema import (
    ADAPTERS,
    AdapterTable,
    Data,
    EightBit,
    FourBit,
    KeyPath,
    Memory,
    Model,
    Output,
    Quantization,
    Recipe,
    Table,
    Training,
    Unquantized,
)
from qtune.recipe.shipped import shipped_recipes
from qtune.recipe.steps import few_steps, first_share, first_steps, held_out_rows
from qtune.recipe.text import show_value
from qtune.sizes import size_text
from qtune.spelling import did_you_mean
from qtune.whole import place_taken, write_text

if TYPE_CHECKING:
    from qtune.data.first_look import FirstLook

LEAST_LENGTH = 2048
"""Of the longest example, in tokens: what most rows stay far below; memory follows the rows that there are."""
MANY_PASSES = 20
"""Over the rows, that a copied recipe's own number of steps makes of other rows: from so many on it is said."""
AROUND_A_ROW = 256
"""Tokens that a template may put around a row. Inside of it there are no more than bytes."""
UNKNOWN_REACH = 131_072
"""Tokens of the longest example at most, where the model's own positions are not at hand."""
ENOUGH_FOR_STRAYS, STRAYS = 20, 0.01
"""From so many rows on, this share of them (one at least) does not decide the length alone."""
NEXT = (("check", "what would spoil the run"), ("run", "train it; Ctrl-C saves"))
"""The verbs that a recipe is written for."""

# The keys worth a first look, so that a recipe stays on one screen; the rest have defaults that are rarely changed.
SHOWN: dict[type[Table], tuple[str, ...]] = {
    Model: ("base",),
    FourBit: ("kind", "double_quantization"),
    EightBit: ("kind",),
    Unquantized: ("kind",),
    Data: ("train", "columns", "validation", "max_length"),
    Training: ("epochs", "batch_size", "learning_rate", "warmup"),
    Memory: ("budget",),
    Output: ("directory",),
}
WHERE_GIVEN = ("columns", "warmup")
"""Of these, those that a recipe has only where there is something to say."""


def look_at(data: str) -> "FirstLook | None":
    """The rows of --data, seen from here; None of a data set on the hub, which is not asked for, and of a file that is
    not there, which is told with everything else that is wrong.

    Raises:
        RecipeError: they are no files that hold rows, or there is no row in them.
    """
    from qtune.data.first_look import first_look  # what reads rows takes a moment, for which a list need not wait

    path = Path(data).expanduser()
    if data.startswith("hub:") or not (path.exists() or any(mark in data for mark in "*?[")):
        return None
    try:
        look = first_look(data, Path.cwd())
    except DataError as error:
        raise RecipeError([Problem("--data", str(problem)) for problem in error.problems]) from error
    if not look.rows:
        raise RecipeError(
            Problem("--data", f"{data}: holds no row; a row is a line of JSONL, or one below CSV's names")
        )
    return look


def new_recipe(base: str, data: str, adapter: str, file: Path, look: "FirstLook | None") -> str:
    """The text of a recipe at `file` that trains `adapter` on `base` with the rows of `data`.

    look: at the rows. Their columns are renamed where the first ones let that be guessed; passes, rows of a step and
    the longest example follow from how many and how long they are. None: the schema's defaults.

    Raises:
        RecipeError: there is no such adapter, model or data, each named by the option that gave it.
    """
    wrong = []
    if adapter not in ADAPTERS:
        is_lora = adapter.lower() == "qlora"
        meant = "here that is lora, on a base in 4 bits as every new recipe has it" if is_lora else None
        wrong.append(Problem("--adapter", f"{adapter}: no such kind; {meant or _nearest(adapter, ADAPTERS)}"))
    _require_options(wrong, base, data)
    table = ADAPTERS[adapter]
    rate, _ = table.model_construct(**table.first_values).usual_rate
    held = _held(base)
    quantization = type(held)
    given: dict[KeyPath, Any] = {
        ("model", "base"): base,
        ("data", "train"): _path_from(data, file),
        ("adapter", "kind"): adapter,
        **{("adapter", key): value for key, value in table.first_values.items()},
        ("training", "learning_rate"): rate,
        **({} if table.first_warmup is None else {("training", "warmup"): table.first_warmup}),
        **{("quantization", key): getattr(held, key) for key in SHOWN[quantization]},
        **({} if look is None else _by_rows(look, table, _positions(base))),
    }
    tables: dict[str, type[Table]] = {
        "model": Model,
        "quantization": quantization,
        "adapter": table,
        "data": Data,
        "training": Training,
        "memory": Memory,
        "output": Output,
    }
    # The commands hold where this one was given.
    named = shlex.quote(str(file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file))
    is_whole = is_export(base)
    lines = [
        title(adapter, base, held.kind, is_export=is_whole),
        f"# Look for mistakes with `qtune check {named}`, train with `qtune run {named}`.",
        "# Keys that are not here have the defaults of `qtune init --schema`.",
    ]
    for name, schema in tables.items():
        keys = schema.first_keys if issubclass(schema, AdapterTable) else SHOWN[schema]
        keys = tuple(key for key in keys if key not in WHERE_GIVEN or given.get((name, key)))
        brief: tuple[str, ...] = ()
        if schema is table:  # those of a soft prompt's start go together, on a line each: a recipe has one screen
            brief = tuple(table.first_values)[1:]
        elif schema is Training and table.first_warmup is not None:
            brief = ("learning_rate", "warmup")
        lines += ["", f"[{name}]"]
        lines += [line for key in keys if key not in brief for line in _key_lines(name, schema, key, given)]
        lines += _aligned([_brief_line(schema, key, given[name, key]) for key in brief])
    return _checked("\n".join(lines) + "\n", file)


def _by_rows(look: "FirstLook", adapter: type[AdapterTable], positions: int) -> dict[KeyPath, Any]:
    """What follows from the rows; nothing where none can be used. positions: that the model has."""
    if not look.usable:
        return {("data", "columns"): look.columns}
    longest = max(1, min(_longest(look.row_bytes), positions - adapter.model_construct().prompt_length))
    examples = max(1, look.examples(longest))
    share = first_share(examples)
    epochs, batch_size = first_steps(adapter, examples - held_out_rows(share, examples))
    return {
        ("data", "columns"): look.columns,
        ("data", "validation"): share,
        ("data", "max_length"): longest,
        ("training", "epochs"): float(epochs),
        ("training", "batch_size"): batch_size,
    }


def _longest(row_bytes: Sequence[int]) -> int:
    """data.max_length for rows of these sizes: enough for each, but for a few that are far longer than the others; one
    row of megabytes would have memory foreseen, and the cache laid out, for rows that there are not."""
    from qtune.data.first_look import BYTES_PER_TOKEN

    sizes = sorted(row_bytes) or [0]
    few = max(1, int(STRAYS * len(sizes))) if len(sizes) >= ENOUGH_FOR_STRAYS else 0
    enough = _enough_for(sizes[len(sizes) - 1 - few])
    return _enough_for(max(size for size in sizes if size <= BYTES_PER_TOKEN * enough))


def _enough_for(size: int) -> int:
    """Tokens that a row of so many bytes cannot exceed, as a power of two."""
    return max(LEAST_LENGTH, 2 ** math.ceil(math.log2(size + AROUND_A_ROW)))


def _positions(base: str) -> int:
    """Positions that the base has, where a look at it can tell."""
    if base.startswith(PREFIX):
        return BUILTIN_MODELS[base.removeprefix(PREFIX)].positions
    return reach_of(_config_of(base)) or UNKNOWN_REACH


def _config_of(base: str) -> dict[str, Any]:
    """What config.json of a folder here says; nothing of another base, and where it cannot be read."""
    path = Path(base).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if file.name != "config.json":
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # what is wrong with it is said by `check`
        return {}
    return values if isinstance(values, dict) else {}


def _held(base: str) -> Quantization:
    """How a recipe holds its base: in NF4, but for an export, and for a checkpoint that brings its own quantization."""
    stored = _config_of(base).get("quantization_config")
    if is_export(base):
        return Unquantized(kind="none")
    if not isinstance(stored, dict) or not (stored.get("load_in_8bit") or stored.get("load_in_4bit")):
        return FourBit()
    if stored.get("load_in_8bit"):
        return EightBit(kind="int8")
    double = bool(stored.get("bnb_4bit_use_double_quant"))
    is_nf4 = stored.get("bnb_4bit_quant_type") == "nf4"  # FP4 is bitsandbytes' default
    return FourBit(kind="nf4" if is_nf4 else "fp4", double_quantization=double)


def is_export(base: str) -> bool:
    """Whether a base is a folder that qtune has exported: quantizing it again would round away what it has learned."""
    return (Path(base).expanduser() / VERIFICATION).is_file()


def said_of_rows(look: "FirstLook", data: str, file: Path) -> list[str]:
    """What is said of rows beside a recipe that was written: a sentence each on columns that were guessed, rows that
    cannot be used, and rows that are few."""
    said = []
    if look.columns:
        taken = " and ".join(f"{theirs!r} is taken for {ours!r}" for ours, theirs in look.columns.items())
        said.append(f"{data}: {taken}; if that is wrong, change data.columns in {file}")
    if look.first_bad is not None:
        why = f"{look.first_bad.place}: {look.first_bad.message}"
        count = f"{look.bad_count:,} of {'the first ' if not look.is_whole else ''}{look.rows:,} rows cannot"
        count = count if look.usable else f"none of {look.rows:,} rows can" if look.rows > 1 else "its only row cannot"
        rest = "" if look.bad_count == 1 else f"; {shlex.join(['qtune', 'check', str(file)])} names them all"
        said.append(f"{data}: {count} be used: {why}{rest}")
        if not look.usable:
            said.append(
                f"{file}: there was no row that its epochs, rows of a step and lengths could follow from; once "
                f"{data} is mended, call init again, with --force"
            )
    if 0 < look.usable < FEW_ROWS and not look.document_bytes:
        rows = "1 row is" if look.usable == 1 else f"{look.usable} rows are"
        said.append(f"{data}: {rows} few: below some {FEW_ROWS} a model learns them by heart")
    return said


SHAPES = {
    "messages": "messages",
    "sharegpt": "conversations",
    "prompt-completion": "prompt and completion",
    "alpaca": "instruction and output",
    "question-answer": "question and answer",
    "text": "text",
}
"""Shapes of rows, by the columns that they are recognized by."""


def said_of_shape(look: "FirstLook", data: str, file: Path) -> list[str]:
    """What the rows are taken for, and what of them the recipe at `file` learns: a sentence, nothing where none can be
    used."""
    if not look.shapes:
        return []
    names = {shape for shape, _ in look.shapes}
    each = ", ".join(f"{count:,} of {SHAPES[shape]}" for shape, count in look.shapes)
    rows = f"{'' if look.is_whole else 'of the first ones '}{look.usable:,} {'row' if look.usable == 1 else 'rows'}"
    taken = f"{rows} ({each})" if len(names) > 1 else f"{rows} of {SHAPES[look.shapes[0][0]]}"
    if not look.roles:
        return [f"{data}: {taken}; every token is learned"]
    if names & {"messages", "sharegpt"}:
        taken += f" by {' and '.join(filter(None, [', '.join(look.roles[:-1]), look.roles[-1]]))}"
    least, most = look.answers
    several = most > 1
    if several:
        taken += f", {most if least == most else f'{least} to {most}'} answers in each"
    is_last_alone = load_recipe(file).recipe.data.loss_on == "last-answer"
    learned = ("the last answer of each" if is_last_alone else "every answer") if several else "the answer"
    but = " but those with weight = 0" if look.has_unweighted else ""
    texts = "; of text every token is" if look.document_bytes else ""
    return [f"{data}: {taken}; {learned}{but} is learned, what stands before it is context{texts}"]


def said_of_steps(look: "FirstLook", data: str, file: Path) -> list[str]:
    """What is said of the recipe at `file` beside its rows: a sentence each on rows that are longer than it takes, and
    on a run of few steps (`recipe.steps`) where all rows were counted."""
    recipe = load_recipe(file).recipe
    training, limit = recipe.training, recipe.data.max_length
    said = []
    if (count := look.too_long(limit)) and recipe.data.on_long_row == "error":
        rows = f"{count:,} of {look.rows:,} rows {'is' if count == 1 else 'are'} longer than data.max_length = {limit}"
        said.append(
            f"{data}: {rows}, the longest {look.longest_place} ({size_text(max(look.row_bytes))}); "
            f'data.on_long_row = "drop" leaves such rows out'
        )
    if look.is_whole and not look.document_bytes:
        share = recipe.data.validation if isinstance(recipe.data.validation, float) else 0.0
        if (few := few_steps(training, look.usable - held_out_rows(share, look.usable))) is not None:
            said.append(few)
        if training.steps is not None and look.usable:
            passes = training.steps * training.batch_size / max(1, look.usable - held_out_rows(share, look.usable))
            if passes >= MANY_PASSES:
                said.append(
                    f"{data}: training.steps = {training.steps} are {passes:,.0f} passes over so few rows; "
                    f"training.epochs in its place says how many it takes"
                )
    return said


def _require_options(wrong: Sequence[Problem], base: str | None, data: str | None) -> None:
    """What is wrong with --base and --data is said beside what is wrong already, all at once.

    Raises:
        RecipeError: with each of them.
    """
    found = list(wrong)
    if base is not None:
        try:
            _require_base(base)
        except RecipeError as error:
            found += error.problems
    if found and data is not None:  # alone, it is told with all that the recipe would have
        found += [Problem("--data", f"{show_value(data)}: {fault.message}") for fault in missing_rows(data, Path())]
    if found:
        raise RecipeError(found)


def _require_base(base: str) -> None:
    """What can be told of a base by its name and by the folder that it names; a hub id is not asked for.

    Raises:
        RecipeError: it is none, with what is meant.
    """
    path = Path(base).expanduser()
    if path.is_dir():
        # Who names no folder does not wait for what reads weights.
        from qtune.model.folder import refuse_other_folders

        try:
            refuse_other_folders(base)
        except ModelError as error:
            raise RecipeError([Problem("--base", str(problem)) for problem in error.problems]) from error
        if not (path / "config.json").is_file():
            raise RecipeError(Problem("--base", f"{base}: has no config.json, so it is no model folder"))
    elif path.is_file():
        _require_gguf(base, path)
    elif base.startswith(PREFIX):
        known = [f"{PREFIX}{name}" for name in BUILTIN_MODELS]
        if base not in known:
            raise RecipeError(Problem("--base", f"{base}: no such built-in model; {_nearest(base, known)}"))
    elif "/" not in base:
        name = base.lower()
        meant = [one for one in BUILTIN_MODELS if one == name or one.startswith(f"{name}-")]
        if meant:
            raise RecipeError(
                Problem("--base", f"{base}: is no hub id (owner/name); did you mean '{PREFIX}{meant[0]}'?")
            )


def _require_gguf(base: str, file: Path) -> None:
    """Of files, `model.base` takes GGUF ones, by their ending, and the config.json of a model folder."""
    if file.name == "config.json":
        return
    try:
        with file.open("rb") as stream:
            is_gguf = file.suffix == ".gguf" and stream.read(4) == b"GGUF"
    except OSError as error:
        raise RecipeError(Problem("--base", f"{base}: cannot be read: {error.strerror}")) from error
    if not is_gguf:
        message = "is a file, and no GGUF file; a base is a model folder, a hub id, a .gguf file or a built-in model"
        raise RecipeError(Problem("--base", f"{base}: {message}"))


def copied_recipe(
    name: str, file: Path, *, base: str | None = None, data: str | None = None, look: "FirstLook | None" = None
) -> str:
    """The text of a shipped recipe, whose data paths are right for `file`; with another model or other data.

    look: at the rows of `data`, whose columns are renamed where the first ones let that be guessed. Other data replace
    the rows of every split: those of the original have nothing to do with them. Neither has the text that a soft prompt
    of the original starts from: it then starts from rows.

    Raises:
        RecipeError: there is no such recipe, model or data.
    """
    wrong = []
    if name not in (shipped := shipped_recipes()):
        wrong.append(Problem("--from", f"{name}: no such recipe; {_nearest(name, shipped)}"))
    _require_options(wrong, base, data)
    original = check_recipe(shipped[name].read_text(encoding="utf-8"), shipped[name])
    lines, places = original.text.splitlines(), toml_lines(original.text)
    edits: dict[int, str | None] = {}
    for key in ("train", "validation", "test"):
        value = getattr(original.recipe.data, key)
        if value is None or isinstance(value, float):
            continue
        if data is None:
            for source in (value,) if isinstance(value, str) else value:
                written = _path_from(str(original.folder / source), file)
                number = places["data", key] - 1
                lines[number] = lines[number].replace(show_value(source), show_value(written), 1)
        else:
            edits[places["data", key]] = _own_rows(data, file, original.recipe.data, look) if key == "train" else None
    if data is not None and ("adapter", "text") in places:
        edits[places["adapter", "text"]] = None
        edits[places["adapter", "initialization"]] = 'initialization = "rows"'
    if base is not None:
        edits[places["model", "base"]] = f"base = {show_value(base)}"
    # From the last line to the first, so that the numbers of the others stay right.
    for line, text in sorted(edits.items(), reverse=True):
        _replace_line(lines, line - 1, text)
    return _checked("\n".join(lines) + "\n", file)


def _own_rows(data: str, file: Path, original: Data, look: "FirstLook | None") -> str:
    """The lines that take the place of the original's rows."""
    train = f"train = {show_value(_path_from(data, file))}"
    names = {} if original.columns or look is None else look.columns
    return f"{train}\ncolumns = {show_value(names)}" if names else train


def require_place(file: Path, *, force: bool) -> None:
    """What is said of --output before rows are read for it.

    Raises:
        RecipeError: there is a file of this name and no `force`, or a folder.
    """
    if (taken := place_taken(file, force=force)) is not None:
        raise RecipeError(Problem(str(file), taken))


def write_recipe(text: str, file: Path, *, force: bool) -> None:
    """Writes a recipe, over another one only with `force`.

    Raises:
        RecipeError: as `require_place`; or it cannot be written.
    """
    require_place(file, force=force)
    try:
        write_text(file, text)
    except OSError as error:
        raise RecipeError(Problem(str(file), f"cannot be written: {error.strerror}")) from error


def shipped_summaries() -> list[tuple[str, str]]:
    """Name and first comment line of each recipe that comes with qtune."""
    texts = {name: path.read_text(encoding="utf-8") for name, path in shipped_recipes().items()}
    return [(name, text.partition("\n")[0].lstrip("# ")) for name, text in texts.items()]


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe (draft 2020-12), for editors that complete and check TOML."""
    made = _without_noise(Recipe.model_json_schema())
    about = {"title": "qtune recipe", "description": "What `qtune run` trains, and how. Unknown keys are errors."}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made, **about}


def _brief_line(schema: type[Table], key: str, value: object) -> tuple[str, str]:
    """A key with its value, and how what the schema says of it begins."""
    about = " ".join((schema.model_fields[key].description or "").split())
    return f"{key} = {show_value(value)}", re.split(r"[.:;] ", about)[0].rstrip(".")


def _aligned(lines: Sequence[tuple[str, str]]) -> list[str]:
    """Lines with a comment behind each, as TOML's formatters align them."""
    width = max((len(line) for line, _ in lines), default=0)
    return [f"{line:<{width}} # {comment}" for line, comment in lines]


def _key_lines(table: str, schema: type[Table], key: str, given: dict[KeyPath, Any]) -> list[str]:
    """A key with its value and, above it, what the schema says of it."""
    field = schema.model_fields[key]
    value = given.get((table, key), field.default)
    written = _scientific(value) if key == "learning_rate" else show_value(value)
    above = about_kind(table, value) if key == "kind" else comment_lines(field.description or "")
    return [*above, f"{key} = {written}"]


def _nearest(word: str, known: Iterable[str]) -> str:
    return did_you_mean(word, known, f"known: {', '.join(known)}")


def _scientific(value: float) -> str:
    """2e-4, as papers write it."""
    mantissa, exponent = f"{value:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _path_from(data: str, file: Path) -> str:
    """`data`, as seen from here, the way the recipe at `file` has to name it: relative where they lie together."""
    if data.startswith("hub:"):
        return data
    here, folder = Path.cwd(), file.parent.absolute()
    path = Path(os.path.normpath(Path(data).expanduser().absolute()))
    together = path.is_relative_to(folder) or (path.is_relative_to(here) and folder.is_relative_to(here))
    return Path(os.path.relpath(path, folder)).as_posix() if together else path.as_posix()


def _replace_line(lines: list[str], number: int, line: str | None) -> None:
    """Replaces or removes a key's line, with the comment above it, which spoke of the old value."""
    first = number
    while lines[first - 1].startswith("#"):
        first -= 1
    lines[first : number + 1] = [] if line is None else [line]


# Which option gave a value that turns out to be wrong: the file that the problem names is not written yet.
_OPTIONS = {"model.base": "--base", "data.train": "--data"}


def _checked(text: str, file: Path) -> str:
    try:
        check_recipe(text, file)
    except RecipeError as error:
        problems = []
        for problem in error.problems:
            key = problem.message.split(" ", 1)[0].rstrip(":")
            option = _OPTIONS.get(key)
            # Who gave an option has written no key: "--data: …", not "--data: data.train = …".
            said = problem.message if option is None else problem.message.removeprefix(key).removeprefix(" = ")
            problems.append(Problem(option or problem.place, said))
        raise RecipeError(problems) from error
    return text


def _without_noise(node: Any) -> Any:
    """pydantic's schema without null, which TOML has no word for, OpenAPI's keywords, and titles that repeat keys."""
    if isinstance(node, list):
        return [_without_noise(one) for one in node]
    if not isinstance(node, dict):
        return node
    kept = {
        key: {name: _without_noise(one) for name, one in value.items()}
        if key in ("properties", "$defs")
        else _without_noise(value)
        for key, value in node.items()
        if key not in ("title", "discriminator") and (key, value) != ("default", None)
    }
    choices = [one for one in kept.get("anyOf", ()) if one != {"type": "null"}]
    if len(choices) == 1:
        return {**choices[0], **{key: value for key, value in kept.items() if key != "anyOf"}}
    return {**kept, "anyOf": choices} if choices else kept
