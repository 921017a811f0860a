"""bitsandbytes, right on every processor: the one place that knows its traps on CPUs.

`guard_bitsandbytes`, called when qtune is imported, sees to it that whoever imports bitsandbytes afterwards (qtune,
peft or transformers) gets it mended. Each trap has a probe, which says by name when a new version brings it back.
All were found in bitsandbytes 0.50.2:

    kernels from the hub   backends/cpu/ops.py: on processors with AVX-512 and bfloat16 the import asks the package
                           `kernels` for code from the hub, and warns where that is not installed (bitsandbytes#2064)
    inference packing      nn/modules.py: on the same processors the first forward in eval mode without gradients
                           repacks a weight for good (bitsandbytes#2078); `state2` is deleted, the absmax rounded to
                           bfloat16, and every later product, in training too, has no gradient
    rows of half blocks    csrc/cpu_ops.cpp: with AVX-512, dequantizing gives each row whole blocks of its own, while
                           quantizing counts them over the whole weight; a width that is no multiple of 64 comes out
                           wrong by about a quarter of its norm (bitsandbytes#2072 says how it is meant)
    one dimension          backends/cpu/ops.py: a weight of one dimension comes back with two (bitsandbytes#2047)

Beside the traps it is slow to import: it hands four functions to `torch.compile` that few processors ever call, for
which PyTorch imports its compiler (backends/default/ops.py). They are handed over when one of them is called.
"""

import functools
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from types import ModuleType
from typing import TYPE_CHECKING, Any

from qtune.errors import ModelError, Problem

if TYPE_CHECKING:
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec

    from torch import Tensor

LIBRARY = "bitsandbytes"
HUB_KERNELS = "kernels"
OPERATION = "dequantize_4bit"
BLOCK = 64
"""Weights that share an absmax, in everything that qtune quantizes."""


@dataclass(frozen=True)
class Trap:
    """Something that bitsandbytes does wrong on some processors; `probe` says what is wrong here and now, or None."""

    name: str
    upstream: str
    probe: Callable[[], str | None]


def guard_bitsandbytes() -> None:
    """Mends bitsandbytes when it is imported, or at once where it already is. Imports nothing."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    if LIBRARY in sys.modules:
        _mend(sys.modules[LIBRARY])


def require_right_kernels() -> None:
    """Refuses to compute with a bitsandbytes whose CPU kernels are wrong here.

    Raises:
        ModelError: naming the library, its version and each trap that is not avoided.
    """
    if wrong := wrong_kernels():
        raise ModelError([Problem(f"{LIBRARY} {_version()}", line) for line in wrong])


def wrong_kernels() -> list[str]:
    """What bitsandbytes does wrong on this processor in spite of us, a line each; empty where all is right."""
    return [f"{trap.name}: {said} ({trap.upstream})" for trap in TRAPS if (said := trap.probe()) is not None]


class _Finder:
    """Finds bitsandbytes as the import system does, with a loader that mends it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> "ModuleSpec | None":
        if fullname != LIBRARY:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
        return spec


class _Loader:
    """The library's own loader, followed by `_mend`."""

    def __init__(self, own: "Loader") -> None:
        self._own = own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def create_module(self, spec: "ModuleSpec") -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        with without_hub_kernels(), compiled_when_called():
            self._own.exec_module(module)
        _mend(module)


@contextmanager
def without_hub_kernels() -> Iterator[None]:
    """No import of the package `kernels` succeeds while the block runs, and nothing is said about it."""
    absent = object()
    before: Any = sys.modules.get(HUB_KERNELS, absent)
    log = logging.getLogger(f"{LIBRARY}.backends.cpu.ops")
    level = log.level
    log.setLevel(logging.ERROR)
    sys.modules[HUB_KERNELS] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        log.setLevel(level)
        if before is absent:
            del sys.modules[HUB_KERNELS]
        else:
            sys.modules[HUB_KERNELS] = before


@contextmanager
def compiled_when_called() -> Iterator[None]:
    """While the block runs, `torch.compile` takes a function and compiles it at its first call.

    A sixth of a command's start was TorchInductor's import: 0.8 of 4.9 s of a core of an AMD EPYC (Zen 5), torch 2.13.
    """
    import torch

    own: Callable[..., Any] = torch.compile
    torch.compile = functools.partial(_compiled_later, own)
    try:
        yield
    finally:
        torch.compile = own


def _compiled_later(own: Callable[..., Any], function: Callable[..., Any] | None = None, **options: Any) -> Any:
    if function is None:
        return functools.partial(_compiled_later, own, **options)
    compiled = functools.cache(lambda: own(function, **options))

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled()(*args, **kwargs)

    return call


def _mend(library: ModuleType) -> None:
    library.nn.Linear4bit.support_avx512bf16_for_cpu = _Never()
    _dequantize_as_one_row()


class _Never:
    """An attribute that is False whatever it is set to: `Linear4bit.__init__` sets it to what the processor can."""

    def __get__(self, instance: object, owner: type) -> bool:
        return False

    def __set__(self, instance: object, value: bool) -> None:
        pass


_registrations: list[Any] = []
"""torch takes a kernel back when the library object that registered it is collected."""


def _dequantize_as_one_row() -> None:
    """Puts a kernel over bitsandbytes' own for CPUs, which hands it every weight as one row.

    Blocks are counted over the flattened weight when it is quantized; of one row the kernel counts them so too. It is
    as fast: 16 to 20 ms for 4096 x 4096 either way, on two cores.
    """
    import torch

    try:
        own = torch.library.get_kernel(f"{LIBRARY}::{OPERATION}", "CPU")
    except RuntimeError:  # a build without CPU kernels; the probes will say what that means
        return

    def as_one_row(
        keys: Any, codes: "Tensor", absmax: "Tensor", block: int, kind: str, shape: Sequence[int], dtype: torch.dtype
    ) -> "Tensor":
        flat: Tensor = own.call_boxed(keys, codes, absmax, block, kind, [1, prod(shape)], dtype)
        return flat.view(shape)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
        registration = torch.library.Library(LIBRARY, "IMPL")
        registration.impl(OPERATION, as_one_row, "CPU", with_keyset=True, allow_override=True)
    _registrations.append(registration)


def _version() -> str:
    return str(getattr(sys.modules.get(LIBRARY), "__version__", ""))


# --- probes --------------------------------------------------------------------------------------------------------


def _fetched_kernels() -> str | None:
    """Only builds for processors with AVX-512 and bfloat16 have the attribute."""
    from bitsandbytes.backends.cpu import ops

    if getattr(ops, "gemm_4bit_forward_kernel", None) is not None:
        return "it computes with a kernel that it fetched from the hub; import qtune before bitsandbytes"
    return None


def _packed_for_inference() -> str | None:
    import bitsandbytes
    import torch

    layer = bitsandbytes.nn.Linear4bit(BLOCK, BLOCK, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.to("cpu").eval()
    layer.support_avx512bf16_for_cpu = True  # as on a processor that has it
    codes = layer.weight.data.clone()
    try:
        with torch.no_grad():
            layer(torch.ones(1, BLOCK))
    except (AttributeError, RuntimeError, AssertionError, NotImplementedError) as error:
        return f"a forward pass in eval mode fails with {type(error).__name__}"
    if not torch.equal(layer.weight.data, codes) or not layer.weight.quant_state.nested:
        return "a forward pass in eval mode repacks a weight, after which nothing has a gradient"
    return None


def _wrong_rows() -> str | None:
    """The largest error of NF4 on [-1, 1] is half its widest gap, 0.152 (QLoRA, arXiv:2305.14314, appendix E)."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for kind in ("nf4", "fp4"):
        for shape in ((3, BLOCK + BLOCK // 2), (BLOCK, 2 * BLOCK), (3, BLOCK // 2)):
            weight = torch.linspace(-1, 1, prod(shape)).view(shape)
            back = dequantize_4bit(*quantize_4bit(weight, quant_type=kind))
            as_one_row = dequantize_4bit(*quantize_4bit(weight.view(1, -1), quant_type=kind)).view(shape)
            if not torch.equal(back, as_one_row):
                error = float((back - weight).norm() / weight.norm())
                return f"{kind} weights of shape {list(shape)} are dequantized wrong by {error:.0%} of their norm"
    return None


def _added_dimension() -> str | None:
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    back = dequantize_4bit(*quantize_4bit(torch.ones(BLOCK), quant_type="nf4"))
    if back.shape != (BLOCK,):
        return f"a weight of shape [{BLOCK}] is dequantized to {list(back.shape)}"
    return None


TRAPS = (
    Trap("kernels from the hub", "bitsandbytes#2064", _fetched_kernels),
    Trap("inference packing", "bitsandbytes#2078", _packed_for_inference),
    Trap("rows of half blocks", "bitsandbytes#2072", _wrong_rows),
    Trap("one dimension", "bitsandbytes#2047", _added_dimension),
)
