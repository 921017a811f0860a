"""torch.compile, asked when its function is first called: for a library that compiles on being imported.

bitsandbytes 0.50.2 (backends/default/ops.py) hands four functions to torch.compile as it is imported. They stand in
where a device has no kernel, and qtune rarely calls one; asking imports PyTorch's compiler, 540 modules, which took
0.77 s of the 3.8 s of a core that all libraries take (AMD Zen 5).
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def compiling_late() -> Iterator[None]:
    """While the block runs, torch.compile gives a function that is compiled on its first call."""
    import torch

    own: Any = torch.compile

    def compile_late(model: Callable[..., Any] | None = None, **options: Any) -> Any:
        if model is None:
            return functools.partial(compile_late, **options)
        compiled = functools.cache(lambda: own(model, **options))

        @functools.wraps(model)
        def called(*arguments: Any, **named: Any) -> Any:
            return compiled()(*arguments, **named)

        return called

    torch.compile = compile_late
    try:
        yield
    finally:
        torch.compile = own
