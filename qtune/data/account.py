"""What of a row found no use, and what was decided about it on the way: nothing of a row is lost in silence."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Account:
    """Kept while a row is read.

    `unused` are the names of columns and keys that nothing reads, as "label" or "messages[].id". `notes` are kinds of
    finding (`findings.KINDS`) that reading the row has led to.
    """

    unused: dict[str, None] = field(default_factory=dict)
    notes: set[str] = field(default_factory=set)

    def rest(self, value: Mapping[str, Any], taken: Iterable[str], prefix: str = "") -> None:
        """Names the keys of `value` that are not among `taken` and hold something."""
        known = set(taken)
        for key, held in value.items():
            if key not in known and holds_something(held):
                self.unused[f"{prefix}{key or '(no name)'}"] = None


def holds_something(value: object) -> bool:
    """Whether a value says anything: tables fill what a row lacks with null, empty texts and empty lists."""
    return not (value is None or (isinstance(value, (str, list, dict)) and not value))
