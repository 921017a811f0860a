"""A folder -> the files in it that hold the rows of one split: not the other splits, and not notes beside the data."""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from qtune.data.json_stream import BrokenJson, JsonValues
from qtune.errors import DataError, Problem
from qtune.recipe.row_kinds import ROW_KINDS, TEXT_KINDS, kind_of
from qtune.recipe.text import show_value

# Names of splits, in files such as train-00000-of-00002.parquet and in folders; the hub's rules know the same ones.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}
_NAMES = {name: split for split, names in SPLITS.items() for name in names}
# What may stand behind a split's name and says no more of it: numbers of shards, a version, a hash, "data".
_BEHIND = re.compile(
    r"of|v?\d+|(?=.*\d)[0-9a-f]{8,}|(data|dataset|set|split|rows?|samples?|examples?|files?|parts?|shards?|chunks?)\d*"
)
# Files that describe data: of `datasets`, of the hub, and of people; those of the second kind where they hold no rows.
_NOTES = re.compile(
    r"(dataset_infos?|dataset_dict|state)\.json"
    r"|(readme|licen[cs]e|notice|changelog|citation|requirements|notes?|todo)([._-].*)?\.txt",
    re.IGNORECASE,
)
_NOTES_OR_ROWS = re.compile(r"(metadata|config|dataset|package|tokenizer_config)\.json", re.IGNORECASE)
LONGEST_NOTE_BYTES = 1 << 20
MOST_NAMED = 3


def files_of_folder(base: Path, name: str, split: str) -> list[Path]:
    """The files of a split, sorted; all files where the folder has no splits. `name` is the folder's in errors.

    Raises:
        DataError: the folder has splits, but not this one, or files beside them of which no name says where they
            belong; or its files are of several kinds.
    """
    splits = splits_of(base)
    if splits:
        if split not in splits:
            has = " and ".join(f"a {one}" for one in splits)
            ways = " or ".join(str(Path(name) / path.name) for paths in splits.values() for path in paths[:1])
            message = f"has {has} split and no {split} split; name what is meant, as {ways}"
            raise DataError(Problem(name, message))
        _refuse_others(base, name, splits, split)
        found: list[Path] = []
        for path in splits[split]:
            found += [path] if path.is_file() else files_of_folder(path, str(Path(name) / path.name), split)
        return found
    saved = _saved_dataset(base)
    if saved:
        return saved
    named, unclear = _named_splits(base)
    if named and any(path_split not in named for _, path_split in unclear):
        _refuse_others(base, name, named, next(iter(named)))
    files = list(_row_files(base, name, split))
    kinds = sorted({kind_of(path)[0] for path in files})
    if len(kinds) > 1:
        message = f"holds files of several kinds ({', '.join(f'.{kind}' for kind in kinds)}); name those that are meant"
        raise DataError(Problem(name, f"{message}, {_patterns(files, base, name)}"))
    return files


def _row_files(base: Path, name: str, split: str) -> Iterator[Path]:
    """All files of rows, sorted; of a folder inside that has splits, those of the one that is meant."""
    for path in sorted(base.iterdir()):
        inside = str(Path(name) / path.name)
        if path.is_file() and _holds_rows(path, base):
            yield path
        elif _is_shown_folder(path):
            yield from files_of_folder(path, inside, split) if splits_of(path) else _row_files(path, inside, split)


def _refuse_others(base: Path, name: str, splits: dict[str, list[Path]], split: str) -> None:
    """Raises a DataError that names the files of rows which are of no split: they would be left out in silence."""
    if (base / "dataset_dict.json").is_file():
        return
    whole = {path for paths in splits.values() for path in paths}
    kinds = {kind_of(path)[0] for path in whole if path.is_file()}
    others = [
        path
        for path in sorted(base.rglob("*"))
        if whole.isdisjoint([path, *path.parents])
        and _holds_rows(path, base)
        and ((kind := kind_of(path)[0]) in kinds or kind not in TEXT_KINDS)
        and (path.suffix.lower() != ".json" or _lists_rows(path))
    ]
    if others:
        names = [str(path.relative_to(base)) for path in others]
        said = ", ".join(names[:MOST_NAMED]) + (f" and {len(names) - MOST_NAMED} more" if names[MOST_NAMED:] else "")
        has = " and ".join(f"a {one}" for one in splits)
        ways = show_value([str(Path(name) / one) for one in (splits[split][0].name, names[0])])
        message = f"has {has} split, and the name of {said} says none of them; name what is meant, as {ways}"
        raise DataError(Problem(name, message))


def _patterns(files: Sequence[Path], base: Path, name: str) -> str:
    """How files of several kinds are named: those of one kind, and all of them."""
    any_file = "**/*" if any(path.parent != base for path in files) else "*"
    endings = sorted({".".join(filter(None, kind_of(path))) for path in files})
    each = [str(Path(name) / f"{any_file}.{ending}") for ending in endings]
    matched = {path for path in base.glob(any_file) if path.is_file()}
    # A pattern takes notes and files of other kinds as well, where there are such.
    whole = str(Path(name) / any_file) if matched == set(files) else show_value(each)
    return f"as {each[0]}, or all of them, as {whole}"


def reads_one_split(base: Path) -> bool:
    """Whether a folder, or one inside it, has splits of which only one is read."""
    return bool(splits_of(base)) or any(reads_one_split(path) for path in base.iterdir() if _is_shown_folder(path))


def splits_of(base: Path) -> dict[str, list[Path]]:
    """The splits of a folder with the files or folders of each; none unless there are at least two.

    A folder that `DatasetDict.save_to_disk` wrote lists them; else files and folders have a split's name.
    """
    if (base / "dataset_dict.json").is_file():
        splits = _beside(base / "dataset_dict.json", lambda values: values.get("splits", []))
        return {_NAMES.get(path.name, path.name): [path] for path in splits}
    if (base / "state.json").is_file():
        return {}  # one data set, whatever its folder is called
    named, _ = _named_splits(base)
    return named if len(named) > 1 else {}


def _named_splits(base: Path) -> tuple[dict[str, list[Path]], list[tuple[Path, str]]]:
    """The files and folders that are named for a split, by it; and those whose name has a split's word in it, each with
    this split, of which nothing tells whether it is meant so ("testing-software.jsonl").

    It is meant where no other word follows, or where the same name is there with the word of another split.
    """
    found = [
        (path, *read)
        for path in sorted(base.iterdir())
        if not path.name.startswith((".", "_")) and (path.is_dir() or _holds_rows(path, base))
        if (read := _split_in(path)) is not None
    ]
    splits_with: dict[str, set[str]] = defaultdict(set)
    for _, split, frame, _ in found:
        splits_with[frame].add(split)
    named: dict[str, list[Path]] = defaultdict(list)
    unclear = []
    for path, split, frame, is_clear in found:
        if is_clear or len(splits_with[frame]) > 1:
            named[split].append(path)
        else:
            unclear.append((path, split))
    return dict(named), unclear


def _split_in(path: Path) -> tuple[str, str, bool] | None:
    """The split that a file's or folder's name says, as the hub reads it: a word of its own in it; the name without it
    and without numbers; and whether no other word follows."""
    name = path.name.lower()
    if path.is_file():
        name = name.removesuffix("." + ".".join(filter(None, kind_of(path))))
    words = [found for found in re.finditer(r"[a-z]+", name) if found[0] in _NAMES]
    if len({_NAMES[word[0]] for word in words}) != 1:
        return None
    first, last = words[0], words[-1]
    frame = re.sub(r"\d+", "#", f"{name[: first.start()]}*{name[last.end() :]}")
    behind = filter(None, re.split(r"[^a-z0-9]+", name[last.end() :]))
    return _NAMES[first[0]], frame, all(_BEHIND.fullmatch(word) for word in behind)


def _is_shown_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not path.name.startswith((".", "_"))


def _holds_rows(path: Path, base: Path) -> bool:
    """Files of known kinds count; hidden ones and notes beside the data do not."""
    hidden = any(part.startswith((".", "_")) for part in path.relative_to(base).parts)
    kind, _ = kind_of(path)
    if not path.is_file() or hidden or kind not in ROW_KINDS or kind == "md" or _NOTES.fullmatch(path.name):
        return False
    return not _NOTES_OR_ROWS.fullmatch(path.name) or _lists_rows(path)


def _lists_rows(path: Path) -> bool:
    """Whether a JSON file begins as rows do: a list of objects, or one object after another. One alone describes."""
    try:
        with path.open("rb") as stream:
            values = JsonValues(stream, LONGEST_NOTE_BYTES)
            if values.next_character() == "[":
                values.step()
            elif values.next_character() == "{":
                values.value()
            return values.next_character(over_commas=True) == "{"
    except (OSError, BrokenJson):
        return False


def _saved_dataset(base: Path) -> list[Path]:
    """The Arrow files that `Dataset.save_to_disk` wrote, in its order; what a map() left beside them is not rows."""
    if (base / "state.json").is_file():
        return _beside(base / "state.json", lambda values: [one["filename"] for one in values.get("_data_files", [])])
    return sorted(base.glob("*.arrow")) if (base / "dataset_info.json").is_file() else []


def _beside(file: Path, names_in: Callable[[Any], list[Any]]) -> list[Path]:
    """What a file of `datasets` lists, which lies beside it.

    Raises:
        DataError: the file is damaged, or names what is not there or elsewhere.
    """
    try:
        names = list(names_in(json.loads(file.read_text(encoding="utf-8"))))
    except OSError as error:
        raise DataError(Problem(str(file), f"cannot be read: {error.strerror}")) from error
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise DataError(Problem(str(file), "is damaged: it does not list what lies beside it")) from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (file.parent / name).exists():
            raise DataError(Problem(str(file), f"names {str(name)[:200]!r}, which is not there"))
    return [file.parent / name for name in names]
