"""The commands that come next, each on a line of its own with what it does: a line can be pasted as it is."""

import shlex
from collections.abc import Sequence


def commands_text(commands: Sequence[tuple[Sequence[str], str]]) -> str:
    """commands: the words of each, and what it does."""
    written = [(shlex.join(words), does) for words, does in commands]
    width = max(len(command) for command, _ in written)
    return "\n".join(f"  {command:<{width}}  # {does}" for command, does in written)
