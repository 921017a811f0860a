"""A folder -> the files in it that hold the rows of one split: not the other splits, and not notes beside the data."""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qtune.errors import DataError, Problem
from qtune.recipe.row_kinds import ROW_KINDS, kind_of
from qtune.recipe.text import show_value

# Names of splits, in files such as train-00000-of-00002.parquet and in folders; the hub's rules know the same ones.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}
_NAMES = {name: split for split, names in SPLITS.items() for name in names}
# Files that describe data: of `datasets`, of the hub, and of people.
_NOTES = re.compile(
    r"(dataset_infos?|dataset_dict|state|metadata|config|dataset|package|tokenizer_config)\.json"
    r"|(readme|licen[cs]e|notice|changelog|citation|requirements|notes?|todo)([._-].*)?\.txt",
    re.IGNORECASE,
)


def files_of_folder(base: Path, name: str, split: str) -> list[Path]:
    """The files of a split, sorted; all files where the folder has no splits. `name` is the folder's in errors.

    Raises:
        DataError: the folder has splits, but not this one, or its files are of several kinds.
    """
    splits = splits_of(base)
    if splits:
        if split not in splits:
            has = " and ".join(f"a {one}" for one in splits)
            ways = " or ".join(str(Path(name) / path.name) for paths in splits.values() for path in paths[:1])
            message = f"has {has} split and no {split} split; name what is meant, as {ways}"
            raise DataError(Problem(name, message))
        found: list[Path] = []
        for path in splits[split]:
            found += [path] if path.is_file() else files_of_folder(path, str(Path(name) / path.name), split)
        return found
    saved = _saved_dataset(base)
    if saved:
        return saved
    files = sorted(path for path in base.rglob("*") if _holds_rows(path, base))
    kinds = sorted({kind_of(path)[0] for path in files})
    if len(kinds) > 1:
        message = f"holds files of several kinds ({', '.join(f'.{kind}' for kind in kinds)}); name those that are meant"
        raise DataError(Problem(name, f"{message}, {_patterns(files, base, name)}"))
    return files


def _patterns(files: Sequence[Path], base: Path, name: str) -> str:
    """How files of several kinds are named: those of one kind, and all of them."""
    any_file = "**/*" if any(path.parent != base for path in files) else "*"
    endings = sorted({".".join(filter(None, kind_of(path))) for path in files})
    each = [str(Path(name) / f"{any_file}.{ending}") for ending in endings]
    matched = {path for path in base.glob(any_file) if path.is_file()}
    # A pattern takes notes and files of other kinds as well, where there are such.
    whole = str(Path(name) / any_file) if matched == set(files) else show_value(each)
    return f"as {each[0]}, or all of them, as {whole}"


def splits_of(base: Path) -> dict[str, list[Path]]:
    """The splits of a folder with the files or folders of each; none unless there are at least two.

    A folder that `DatasetDict.save_to_disk` wrote lists them; else files and folders have a split's name.
    """
    if (base / "dataset_dict.json").is_file():
        splits = _beside(base / "dataset_dict.json", lambda values: values.get("splits", []))
        return {_NAMES.get(path.name, path.name): [path] for path in splits}
    if (base / "state.json").is_file():
        return {}  # one data set, whatever its folder is called
    named: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(base.iterdir()):
        split = _split_in(path.name)
        if split and not path.name.startswith((".", "_")) and (path.is_dir() or _holds_rows(path, base)):
            named[split].append(path)
    return dict(named) if len(named) > 1 else {}


def _split_in(name: str) -> str | None:
    """The split that a file's or folder's name says, as the hub reads it: a word of its own in it."""
    words = re.split(r"[^a-z]+", name.lower())
    found = {_NAMES[word] for word in words if word in _NAMES}
    return found.pop() if len(found) == 1 else None


def _holds_rows(path: Path, base: Path) -> bool:
    """Files of known kinds count; hidden ones and notes beside the data do not."""
    hidden = any(part.startswith((".", "_")) for part in path.relative_to(base).parts)
    kind, _ = kind_of(path)
    return path.is_file() and not hidden and kind in ROW_KINDS and kind != "md" and not _NOTES.fullmatch(path.name)


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
