"""verify.json: what an exported folder says of its own proof."""

from pathlib import Path

from qtune.export.model_files import write_json

# The proof beside the weights; a folder without one, or that was killed on the way to it, is not verified.
VERIFICATION = "verify.json"


def mark_unverified(folder: Path, reason: str) -> None:
    """Notes in a folder that nothing was proven about it."""
    write_json(folder / VERIFICATION, {"verified": False, "failures": [reason]})
