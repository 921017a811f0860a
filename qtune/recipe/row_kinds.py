"""Kinds of files that hold rows, read off a file's name."""

from pathlib import Path

ROW_KINDS = ("jsonl", "ndjson", "json", "csv", "tsv", "parquet", "arrow", "feather", "txt", "md")
TEXT_KINDS = ("txt", "md")
"""Whose name alone does not tell that rows are in them."""
LINE_KINDS = ("jsonl", "ndjson")
"""A row a line."""
STREAMED_KINDS = (*LINE_KINDS, "parquet")
"""Which can be read in blocks from any place."""
COMPRESSIONS = ("gz", "bz2", "xz", "zst")


def kind_of(path: Path) -> tuple[str, str]:
    """(kind, compression) as the name's endings say; compression is "" for none, and the kind need not be known."""
    *_, last_but_one, last = ["", "", *path.name.lower().split(".")]
    return (last_but_one, last) if last in COMPRESSIONS else (last, "")
