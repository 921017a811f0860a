"""PyTorch's CUDA allocator with expandable segments: one growing range of memory, where fixed segments leave gaps.

What that is worth is simulated by tools/simulate_allocator.py. Read from the environment before torch is imported.
"""

import os
import sys

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""The allocator's settings and their older name (PyTorch docs, "CUDA environment variables")."""


def use_expandable_segments() -> None:
    """Asks for them on Linux, where PyTorch has them, unless the environment says anything about the allocator."""
    if sys.platform == "linux" and not any(os.environ.get(name) for name in VARIABLES):
        os.environ[VARIABLES[0]] = "expandable_segments:True"


def has_expandable_segments() -> bool:
    """Whether the environment asks for them."""
    return any("expandable_segments:true" in os.environ.get(name, "").lower().replace(" ", "") for name in VARIABLES)
