"""Compiles every Triton kernel for every generation of cards that qtune supports. No card is needed.

    bash tools/check_kernels.sh           # brings Triton, which PyTorch's builds without CUDA do not have

Triton's interpreter, which the tests use, takes Python that its compiler refuses; a kernel that does not compile is
replaced by PyTorch's own operations on the card, and the step is slower than it need be without failing.
"""

import itertools
import sys
from collections.abc import Iterator
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile  # noqa: A004  its name

from qtune.kernels import on_cuda

CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)
"""Turing, Ampere (two), Ada, Hopper, Blackwell (two)."""

Kernel = tuple[str, dict[str, str], dict[str, Any], int]
"""Name, types of the arguments, constants, warps."""


def kernels(kind: str) -> Iterator[Kernel]:
    """Every kernel with every constant that changes its code, for tensors of one type."""
    x, real, whole = f"*{kind}", "fp32", "i32"
    for width in (128, 4096, 5376, 16384):
        padded, warps = on_cuda.triton.next_power_of_2(width), on_cuda._warps(width)
        norm = {"x": x, "weight": x, "y": x, "rstd": "*fp32", "width": whole, "eps": real}
        yield "_rms_norm", norm, {"padded": padded}, warps
        back = {"grad": x, "x": x, "weight": x, "rstd": "*fp32", "dx": x, "width": whole}
        yield "_rms_norm_backward", back, {"padded": padded}, warps
    strides = [f"{name}_{axis}" for name in ("q", "k", "new_q", "new_k") for axis in ("batch", "head", "place")]
    sizes = ("q_heads", "k_heads", "length", "half", *strides, "angle_batch")
    turned = dict.fromkeys(("q", "k", "cos", "sin", "new_q", "new_k"), x) | dict.fromkeys(sizes, whole)
    for back, heads, half in itertools.product((False, True), ((4, 4), (32, 8), (64, 1)), (32, 64)):
        padded = {"padded_q_heads": heads[0], "padded_k_heads": heads[1], "padded_half": half}
        yield "_rotate", turned, {"back": back, **padded}, 4
    for silu in (False, True):
        constants = {"silu": silu, "piece": on_cuda.ELEMENTS}
        yield "_gated", {"gate": x, "up": x, "out": x, "count": whole}, constants, 4
        names = ("grad", "gate", "up", "d_gate", "d_up")
        yield "_gated_backward", {**dict.fromkeys(names, x), "count": whole}, constants, 4
    scored = {"logits": x, "labels": "*i64", "nll": "*fp32", "correct": "*i1", "scale": real, "cap": real}
    for slopes, capped, vocab in itertools.product((False, True), (False, True), (2048, 128256)):
        piece = min(on_cuda.VOCABULARY_BLOCK, on_cuda.triton.next_power_of_2(vocab))
        yield "_cross_entropy", scored, {"vocab": vocab, "slopes": slopes, "is_capped": capped, "piece": piece}, 16
    for capped, width in itertools.product((False, True), (300, 4096)):
        piece = on_cuda._block_piece(width)
        block = {"logits": x, "labels": "*i64", "first": whole, "width": whole, "scale": real, "cap": real}
        running = dict.fromkeys(("maximum", "total", "target"), "*fp32") | {"likeliest": "*i64"}
        constants = {"is_capped": capped, "piece": piece}
        yield "_cross_entropy_block", block | running, constants, 8
        yield "_cross_entropy_block_gradient", block | {"normalizer": "*fp32"}, constants, 8
    packed = {
        "codes": "*u8",
        "absmax": "*u8",
        **dict.fromkeys(("absmax_code", "absmax_scale", "offset", "code"), "*fp32"),
    }
    packed |= {"out": x, "count": whole, "blocks": whole}
    for block in (64, 128):
        yield "_dequantize", packed, {"bytes_each": block // 2, "some_blocks": on_cuda.QUANTIZED_BLOCKS}, 4


def problem(kernel: Kernel, capability: int) -> str | None:
    """Why a kernel does not compile for a generation of cards; None where it does."""
    name, types, constants, warps = kernel
    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(fn=getattr(on_cuda, name), signature=signature, constexprs=constants)
    try:
        compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    except Exception as error:  # whatever a compiler may say
        while error.__cause__ is not None:
            error = error.__cause__
        return str(getattr(error, "error_message", None) or error)
    return None


def main() -> None:
    """One line a card; exit code 1 where a kernel does not compile."""
    failed = 0
    for capability in CAPABILITIES:
        kinds = ("fp16", "fp32") if capability < 80 else ("bf16", "fp16", "fp32")
        tried = [(kind, kernel) for kind in kinds for kernel in kernels(kind)]
        found = [(kind, kernel, said) for kind, kernel in tried if (said := problem(kernel, capability))]
        print(
            f"compute capability {capability / 10}: {len(tried) - len(found)} of {len(tried)} kernels compile",
            flush=True,
        )
        for kind, (name, _, constants, _), said in found:
            print(f"  {name} {kind} {constants}: {said}")
        failed += len(found)
    defined = {name for name, value in vars(on_cuda).items() if isinstance(value, on_cuda.triton.JITFunction)}
    missed = defined - {name for name, *_ in kernels("fp32")} - {"_act", "_capped", "_turn"}
    if missed:
        print(f"not tried: {', '.join(sorted(missed))}")
    sys.exit(bool(failed or missed))


if __name__ == "__main__":
    main()
