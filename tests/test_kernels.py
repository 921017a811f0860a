"""The operations `torch.ops.qtune.*` against what transformers, bitsandbytes and PyTorch compute."""

import itertools
import os
import subprocess
import sys
import types
import weakref

import bitsandbytes
import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from qtune.kernels import comparison, ops, plain
from qtune.memory.tracing.fake_tensors import RememberingMode

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Relative tolerance of each type."""


def assert_near(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    ours, theirs = ours.detach(), theirs.detach()
    assert ours.dtype == theirs.dtype
    assert float((ours.float() - theirs.float()).norm()) <= tolerance * float(theirs.float().norm())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_and_its_gradient_are_those_of_transformers(dtype):
    norm = LlamaRMSNorm(96, eps=1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight, 1.0, 0.1)
    x = torch.randn(2, 5, 96, dtype=dtype, requires_grad=True)
    expected, grad = norm(x), torch.randn(2, 5, 96, dtype=dtype)
    expected.backward(grad)
    y, rstd = torch.ops.qtune.rms_norm(x.detach(), norm.weight.detach(), 1e-5)
    assert_near(y, expected, DTYPES[dtype])
    given = grad.clone(), x.detach().clone(), norm.weight.detach(), rstd.clone()
    assert_near(torch.ops.qtune.rms_norm_backward(*given), x.grad, DTYPES[dtype])
    assert torch.equal(given[0], grad)  # what autograd has saved is as it was
    assert torch.equal(given[1], x)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rotation_and_its_gradient_are_those_of_transformers(dtype, rows):
    q, k = (torch.randn(2, 7, heads, 24, dtype=dtype).transpose(1, 2).requires_grad_() for heads in (6, 2))
    angles = torch.randn(rows, 7, 24)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    expected = apply_rotary_pos_emb(q, k, cos, sin)
    grads = [torch.randn_like(one) for one in expected]
    torch.autograd.backward(expected, grads)
    turned = torch.ops.qtune.rotate(q.detach(), k.detach(), cos, sin, False)
    back = torch.ops.qtune.rotate(*grads, cos, sin, True)
    for ours, theirs in zip((*turned, *back), (*expected, q.grad, k.grad), strict=True):
        assert ours.shape == theirs.shape
        assert_near(ours, theirs, DTYPES[dtype])


def test_a_rotation_keeps_the_layout_that_attention_reads():
    given = [torch.randn(2, 7, heads, 24).transpose(1, 2) for heads in (3, 1)]
    turned = torch.ops.qtune.rotate(*given, torch.ones(1, 7, 24), torch.zeros(1, 7, 24), False)
    for before, after in zip(given, turned, strict=True):
        assert after.stride() == before.stride()
        assert torch.equal(after, before)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gated_activation_and_both_gradients_are_those_of_autograd(dtype, activation):
    gate, up = (torch.randn(300, 250, dtype=dtype, requires_grad=True) for _ in range(2))  # more than one piece
    act = functional.silu if activation == "silu" else lambda x: functional.gelu(x, approximate="tanh")
    expected, grad = act(gate) * up, torch.randn(300, 250, dtype=dtype)
    expected.backward(grad)
    out = torch.empty_like(expected)
    torch.ops.qtune.gated(gate.detach(), up.detach(), activation, out)
    assert_near(out, expected, DTYPES[dtype])
    value, g, u = grad.clone(), gate.detach().clone(), up.detach().clone()
    torch.ops.qtune.gated_backward(value, g, u, activation, g, u)  # over gate and up themselves
    for ours, theirs in ((value, expected), (g, gate.grad), (u, up.grad)):
        assert_near(ours, theirs, DTYPES[dtype])


def exact_likelihoods(logits, labels, scale: float, cap: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihoods [rows] by PyTorch in fp64, and the gradient of their sum."""
    exact = logits.double().requires_grad_()
    scaled = exact * scale
    ruled = cap * (scaled / cap).tanh() if cap else scaled
    found = functional.cross_entropy(ruled, labels, reduction="none")
    found.sum().backward()
    return found.detach(), exact.grad


@pytest.mark.parametrize(("scale", "cap"), [(1.0, 0.0), (0.5, 0.0), (1.3, 7.0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tiles_likelihoods_and_gradient_are_those_of_pytorch(dtype, scale, cap):
    logits = (3 * torch.randn(40, 3000)).to(dtype)
    labels = torch.randint(0, 3000, (40,))
    labels[0] = logits[0].argmax()
    expected, gradient = exact_likelihoods(logits, labels, scale, cap)
    nll, correct, slope = torch.empty(40), torch.empty(40, dtype=torch.bool), logits.clone()
    torch.ops.qtune.cross_entropy(slope, labels, scale, cap, True, nll, correct)
    assert torch.allclose(nll.double(), expected, rtol=1e-4)
    assert correct[0]
    assert torch.equal(correct, logits.argmax(dim=1) == labels)
    assert_near(slope, gradient.to(dtype), DTYPES[dtype])


@pytest.mark.parametrize(("scale", "cap"), [(1.0, 0.0), (0.5, 0.0), (1.3, 7.0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_likelihoods_and_gradients_block_by_block_are_those_of_pytorch_over_the_whole_vocabulary(dtype, scale, cap):
    logits = (3 * torch.randn(40, 3000)).to(dtype)
    labels = torch.randint(0, 3000, (40,))
    labels[0] = logits[0].argmax()
    expected, gradient = exact_likelihoods(logits, labels, scale, cap)
    maximum, total, target = torch.full((40,), -torch.inf), torch.zeros(40), torch.zeros(40)
    likeliest = torch.zeros(40, dtype=torch.long)
    edges = [0, 1300, 1301, 3000]
    for start, stop in itertools.pairwise(edges):
        block = logits[:, start:stop].clone()
        torch.ops.qtune.cross_entropy_block(block, labels, start, scale, cap, maximum, total, target, likeliest)
    normalizer = maximum + total.log()
    assert torch.allclose((normalizer - target).double(), expected, rtol=1e-4)
    assert torch.equal(likeliest, logits.argmax(dim=1))
    slopes = []
    for start, stop in itertools.pairwise(edges):
        slopes.append(logits[:, start:stop].clone())
        torch.ops.qtune.cross_entropy_block_gradient(slopes[-1], labels, start, scale, cap, normalizer)
    assert_near(torch.cat(slopes, dim=1), gradient.to(dtype), DTYPES[dtype])


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_is_dequantized_as_bitsandbytes_does(dtype, kind, nested):
    weight = torch.randn(64, 320, dtype=dtype)
    packed = bitsandbytes.nn.Params4bit(weight, False, quant_type=kind, compress_statistics=nested).to("cpu")
    expected = bitsandbytes.functional.dequantize_4bit(packed, packed.quant_state)
    assert torch.equal(ops.dequantized(packed, packed.quant_state), expected)


def test_every_operation_says_what_it_returns_without_computing_it():
    mode = RememberingMode()
    real = torch.randn(2, 3, 5, 8, dtype=torch.bfloat16).transpose(1, 2)
    with mode:
        x = torch.empty(2, 3, 5, 8, dtype=torch.bfloat16).transpose(1, 2)
        cos = torch.empty(1, 5, 8, dtype=torch.bfloat16)
        y, rstd = torch.ops.qtune.rms_norm(x, cos[0, 0], 1e-5)
        turned, turned_k = torch.ops.qtune.rotate(x, x[:, :1], cos, cos, False)
        product = torch.ops.qtune.product_in(x[0, 0], x[0, 0].t(), torch.float32)
    real_y, real_rstd = torch.ops.qtune.rms_norm(real, real[0, 0, 0], 1e-5)
    real_turned, real_turned_k = torch.ops.qtune.rotate(real, real[:, :1], real[:1, 0], real[:1, 0], False)
    real_product = torch.ops.qtune.product_in(real[0, 0], real[0, 0].t(), torch.float32)
    pairs = [(y, real_y), (rstd, real_rstd), (turned, real_turned), (turned_k, real_turned_k), (product, real_product)]
    for fake, there in pairs:
        assert (fake.shape, fake.dtype, fake.stride()) == (there.shape, there.dtype, there.stride())


def test_a_kernel_is_compared_with_pytorchs_operations_in_every_type():
    own = {name: getattr(plain, name) for name in comparison.COMPARED}
    for name, function in own.items():
        for dtype in comparison.TOLERANCES:
            assert comparison.difference(name, function, dtype, "cpu") == 0, (name, dtype)


def test_a_kernel_that_is_wrong_in_one_row_differs_by_more_than_rounding():
    def wrong(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        y, rstd = plain.rms_norm(x, weight, eps)
        y[0, 0] *= 2
        return y, rstd

    def broken(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        y, rstd = plain.rms_norm(x, weight, eps)
        return y * torch.nan, rstd

    for dtype, tolerance in comparison.TOLERANCES.items():
        assert comparison.difference("rms_norm", wrong, dtype, "cpu") > tolerance
        assert comparison.difference("rms_norm", broken, dtype, "cpu") == float("inf")


def test_comparing_kernels_draws_no_random_numbers_of_the_run():
    state = torch.get_rng_state()
    comparison.difference("rotate", plain.rotate, torch.float32, "cpu")
    assert torch.equal(torch.get_rng_state(), state)


class Alive(TorchDispatchMode):
    """Bytes of what was made inside, at most at once."""

    def __init__(self, given: list) -> None:
        super().__init__()
        self.bytes = self.most = 0
        self.seen = {one.untyped_storage().data_ptr() for one in given if isinstance(one, torch.Tensor)}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()).data_ptr() not in self.seen:
                self.seen.add(place := storage.data_ptr())
                self.bytes += (size := storage.nbytes())
                weakref.finalize(storage, self.gone, place, size)
        self.most = max(self.most, self.bytes)
        return out

    def gone(self, place: int, size: int) -> None:
        self.bytes -= size
        self.seen.discard(place)


def large(name: str, dtype: torch.dtype) -> tuple[list, int]:
    """Arguments of an operation far larger than a piece, and the bytes of what it returns."""
    x, wide = torch.randn(4000, 1024, dtype=dtype), torch.randn(64, 100_000, dtype=dtype)
    rstd = torch.rand(4000, 1)
    size, labels = x.nbytes, torch.zeros(64, dtype=torch.long)
    weight = torch.empty(4096, 4096, dtype=dtype)
    packed = bitsandbytes.nn.Params4bit(weight, False, quant_type="nf4", compress_statistics=True).to("cpu")
    head = x.view(2, 2000, 16, 64).transpose(1, 2)
    angles = torch.randn(1, 2000, 64, dtype=dtype)
    return {
        "rms_norm": ([x, x[0], 1e-5], size + rstd.nbytes),
        "rms_norm_backward": ([x, x, x[0], rstd], size),
        "rotate": ([head, head, angles, angles, False], 2 * size),
        "gated": ([x, x, "silu", x.clone()], 0),
        "gated_backward": ([x.clone(), x, x, "silu", x.clone(), x.clone()], 0),
        "cross_entropy": ([wide, labels, 1.0, 2.0, True, torch.empty(64), torch.empty(64, dtype=torch.bool)], 0),
        "cross_entropy_block": (
            [wide, labels, 5, 1.0, 2.0, *(torch.ones(64) for _ in range(3)), torch.zeros(64, dtype=torch.long)],
            0,
        ),
        "cross_entropy_block_gradient": ([wide, labels, 5, 1.0, 2.0, torch.ones(64)], 0),
        "dequantize_nested": (list(plain.nested_arguments(packed, packed.quant_state)), weight.nbytes),
    }[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", comparison.COMPARED)
@pytest.mark.slow
def test_what_stands_in_for_a_kernel_takes_no_more_than_is_allowed_for(name, dtype, monkeypatch):
    monkeypatch.setattr(plain, "PIECE", plain.CARD_PIECE)
    arguments, returned = large(name, dtype)
    with Alive(arguments) as alive:
        kept = getattr(plain, name)(*arguments)
    assert alive.most - returned <= plain.SCRATCH_BYTES
    del kept


def test_the_kernels_compute_the_same_where_triton_interprets_them():
    pytest.importorskip("triton", reason="Triton comes with PyTorch for cards")
    code = (
        "import torch; from qtune.kernels import comparison, on_cuda\n"
        "for name in comparison.COMPARED:\n"
        "    for dtype, tolerance in comparison.TOLERANCES.items():\n"
        "        found = comparison.difference(name, getattr(on_cuda, name), dtype, 'cpu')\n"
        "        assert found <= tolerance, (name, dtype, found)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "TRITON_INTERPRET": "1"})


def test_a_kernel_that_is_not_there_has_its_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "qtune.kernels.on_cuda", None)
    ops.card_kernel.cache_clear()
    assert set(ops.without_kernels()) == set(comparison.COMPARED)
    ops.card_kernel.cache_clear()


def test_a_kernel_that_does_not_compile_says_what_its_compiler_found(monkeypatch):
    class CompilationError(Exception):  # as Triton's: the message is the source around the place
        error_message = None

    def refused(*_):
        inner = CompilationError("at 4:8:\ndef _capped(x):\n    return x\n        ^")
        inner.error_message = "TypeError('Inconsistent return types')"
        raise CompilationError("at 11:20:\ndef _cross_entropy(logits):") from inner

    fake = types.SimpleNamespace(**dict.fromkeys(comparison.COMPARED, None))
    monkeypatch.setitem(sys.modules, "qtune.kernels.on_cuda", fake)
    monkeypatch.setattr("qtune.kernels.on_cuda", fake, raising=False)
    monkeypatch.setattr(comparison, "difference", refused)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    ops.card_kernel.cache_clear()
    assert ops.card_kernel("cross_entropy") == "TypeError('Inconsistent return types')"
    ops.card_kernel.cache_clear()


@pytest.mark.parametrize(
    ("fails", "keeps"),
    [
        (lambda left, right: False, True),
        (lambda left, right: not left.is_contiguous(), False),
        (lambda left, right: right.stride() == (32, 1), False),
    ],
    ids=["none", "left not in order", "columns of a wider one"],
)
def test_whether_a_library_keeps_sums_is_asked_with_operands_as_a_step_has_them(monkeypatch, fails, keeps):
    ones = torch.ones

    def product(left, right, *, out_dtype):
        if fails(left, right):
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")
        return (left.to(out_dtype)) @ (right.to(out_dtype))

    monkeypatch.setattr(torch, "ones", lambda *size, device, dtype: ones(*size, dtype=dtype))
    monkeypatch.setattr(torch, "mm", product)
    assert ops._keeps_sums.__wrapped__(torch.bfloat16, torch.float32) is keeps


def test_memory_that_ran_out_says_nothing_about_a_library(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, device, dtype: ones(*size, dtype=dtype))
    monkeypatch.setattr(torch, "mm", full)
    with pytest.raises(torch.OutOfMemoryError):
        ops._keeps_sums.__wrapped__(torch.bfloat16, torch.float32)
