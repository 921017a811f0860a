"""A table that stands in a page of the documents between two marks, printed or put there."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path


def print_or_write(what: str, name: str, table: Callable[[], str]) -> None:
    """The command of a script that makes a table: prints it, or with --write FILE puts it where the file has its marks.

    what: what the script does, for --help. name: of the table, in its marks.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--write", type=Path, help=f"replace what stands between {begin} and {end} in this file")
    target = parser.parse_args().write
    if target is None:
        print(table())
        return
    before, found_begin, rest = target.read_text(encoding="utf-8").partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        sys.exit(f"{target} has no place for the table: put {begin} and {end} where it belongs")
    target.write_text(f"{before}{begin}\n{table()}\n{end}{after}", encoding="utf-8")
