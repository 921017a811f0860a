"""Where what can be made again is kept: built-in models, dequantized GGUF files, encoded rows, predictions."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """QTUNE_CACHE, else XDG_CACHE_HOME/qtune, else ~/.cache/qtune."""
    if own := os.environ.get("QTUNE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "qtune"
