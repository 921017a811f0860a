"""qtune: fine-tune large language models in 4 bits on one ordinary graphics card."""

__version__ = "0.1.0"

from qtune.startup.safe_bitsandbytes import guard_bitsandbytes as _guard_bitsandbytes

_guard_bitsandbytes()
