"""Float32 products on a processor of another maker than MKL's: oneDNN's, and when."""

import pytest
import torch

from qtune.kernels import on_cpu
from qtune.memory.tracing.fake_tensors import RememberingMode

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@pytest.fixture(params=[True, False], ids=["oneDNN", "PyTorch"])
def chosen(request, monkeypatch):
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(on_cpu, "LEAST_WORK", 1)
    monkeypatch.setattr(on_cpu, "PIECE", 70 * 130)  # more than one piece
    monkeypatch.setattr(on_cpu, "is_faster", lambda: request.param)
    return request.param


def operands(rows: int, inner: int, columns: int, dtype: torch.dtype = torch.float32):
    """Laid out as a step has them: in order, transposed, and some columns of a wider one."""
    left, right = torch.randn(rows, inner, dtype=dtype), torch.randn(inner, columns, dtype=dtype)
    wide = torch.randn(rows, inner + 16, dtype=dtype)
    yield left, right
    yield left, right.t().contiguous().t()
    yield left.t().contiguous().t(), right
    yield wide[:, :inner], right
    yield left, torch.randn(inner, columns + 16, dtype=dtype)[:, :columns]


@pytest.mark.parametrize("shape", [(100, 96, 130), (300, 64, 64), (100, 16, 130), (100, 96, 16), (1, 96, 130)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_product_is_that_of_exact_arithmetic(chosen, shape, dtype):
    near = {"rtol": 2e-2, "atol": 2e-1} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
    for left, right in operands(*shape, dtype):
        exact = left.double() @ right.double()
        bias, total = torch.randn(shape[2], dtype=dtype), torch.randn(shape[0], shape[2], dtype=dtype)
        out, half = torch.empty(2, shape[0], 2 * shape[2], dtype=dtype)[:, :, : shape[2]]
        sums = on_cpu.add_product(total.clone(), left, right)
        for ours, theirs in (
            (on_cpu.mm(left, right), exact),
            (on_cpu.mm(left, right, out=out), exact),
            (out, exact),
            (on_cpu.linear(left, right.t(), bias), exact + bias),
            (on_cpu.linear(left, right.t()), exact),
            (sums, total.double() + exact),
            (on_cpu.scaled_product(left, right, 0.5), exact / 2),
            (on_cpu.scaled_product(left, right, 0.5, out=half), exact / 2),
        ):
            assert ours.dtype is dtype
            torch.testing.assert_close(ours.double(), theirs.double(), **near)


def test_a_sum_stays_where_it_is(chosen):
    total, (left, right) = torch.zeros(100, 130), next(operands(100, 96, 130))
    assert on_cpu.add_product(total, left, right) is total


@needs_onednn
def test_what_has_no_kernel_but_the_reference_is_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(on_cpu, "is_faster", lambda: True)
    assert not on_cpu.takes(*next(operands(100, 96, 130)))
    monkeypatch.setattr(on_cpu, "LEAST_WORK", 1)
    taken = [on_cpu.takes(*pair) for pair in operands(100, 96, 130)]
    assert taken == [True, True, True, False, False]
    thin = [
        on_cpu.takes(*pair) for shape in ((100, 16, 130), (100, 96, 16), (16, 96, 130)) for pair in operands(*shape)
    ]
    assert not any(thin)


@needs_onednn
def test_tensors_without_storage_and_other_types_are_pytorchs(monkeypatch):
    monkeypatch.setattr(on_cpu, "is_faster", lambda: True)
    left, right = next(operands(300, 400, 200))
    assert on_cpu.takes(left, right)
    assert on_cpu.takes(left, torch.nn.Parameter(right))
    with torch.autocast("cpu", torch.bfloat16):
        assert not on_cpu.takes(left, right)
    assert not on_cpu.takes(left.bfloat16(), right.bfloat16())
    assert not on_cpu.takes(left.double(), right.double())
    assert not on_cpu.takes(left.to("meta"), right.to("meta"))
    with RememberingMode():
        fake = torch.empty(300, 400), torch.empty(400, 200)
        assert not on_cpu.takes(*fake)
        assert on_cpu.mm(*fake).shape == (300, 200)


@needs_onednn
@pytest.mark.parametrize(
    ("maker", "avx512", "faster"),
    [("AuthenticAMD", True, True), ("AuthenticAMD", False, False), ("GenuineIntel", True, False), ("", False, False)],
)
def test_onednn_is_faster_only_where_mkl_leaves_avx512_unused(monkeypatch, maker, avx512, faster):
    monkeypatch.setattr(on_cpu, "vendor", lambda: maker)
    monkeypatch.setattr(on_cpu, "has_avx512", lambda: avx512)
    assert on_cpu.is_faster.__wrapped__() is faster
