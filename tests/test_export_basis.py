"""The basis of a merge is bit for bit what a live bitsandbytes layer multiplies with."""

from typing import Literal

import bitsandbytes as bnb
import pytest
import torch

from qtune.export.basis import PIECE, Basis, as_stored, as_trained

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def live_layer(
    weight: torch.Tensor, kind: str, double: bool, load: torch.dtype, compute: torch.dtype
) -> bnb.nn.Linear4bit:
    rows, columns = weight.shape
    layer = bnb.nn.Linear4bit(
        columns, rows, bias=False, compute_dtype=compute, quant_type=kind, compress_statistics=double, device="meta"
    )
    layer.weight = bnb.nn.Params4bit(
        weight.to(load), requires_grad=False, quant_type=kind, compress_statistics=double, module=layer
    ).to("cpu")
    return layer


def multiplied_with(layer: bnb.nn.Linear4bit, columns: int) -> torch.Tensor:
    """The weight that a layer's product used: its answer to the identity, which no rounding of sums can touch."""
    with torch.inference_mode():
        return layer(torch.eye(columns, dtype=layer.compute_dtype)).T


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True], ids=["plain", "double quantization"])
@pytest.mark.parametrize("load", DTYPES)
@pytest.mark.parametrize("compute", DTYPES)
def test_4_bit_values_are_those_of_a_live_layer(
    kind: Literal["nf4", "fp4"], double: bool, load: torch.dtype, compute: torch.dtype
) -> None:
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(1)) * 0.02
    layer = live_layer(weight, kind, double, load, compute)
    ours = as_trained(weight, Basis(kind, double, load, compute))
    assert ours.dtype == compute
    assert torch.equal(ours, multiplied_with(layer, 128))


@pytest.mark.parametrize("shape", [(PIECE // 64 + 64, 72), (70, 66), (3, 40), (130, 1)])
def test_pieces_make_no_difference(shape: tuple[int, int]) -> None:
    """Shapes above one piece, with rows that no block divides, smaller than a block, odd."""
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    codes, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True, blocksize=64)
    whole = bnb.functional.dequantize_4bit(codes, state)
    assert torch.equal(as_trained(weight, Basis("nf4", True, torch.bfloat16, torch.bfloat16)), whole)


def test_int8_values_are_those_that_bitsandbytes_stores() -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(4))
    stored = bnb.nn.Int8Params(weight, requires_grad=False).to("cpu")
    expected = stored.CB.float() * stored.SCB.view(-1, 1) / 127
    ours = as_trained(weight, Basis("int8", False, torch.float32, torch.float32))
    assert torch.allclose(ours, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("double", [False, True])
def test_weights_stored_in_4_bits_come_out_as_the_layer_that_reads_them_uses_them(double: bool) -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(5))
    codes, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=double, blocksize=64)
    statistics = {name.removeprefix("weight."): value for name, value in state.as_dict(packed=True).items()}
    expected = bnb.functional.dequantize_4bit(codes, state)
    assert torch.equal(as_stored(codes, statistics, torch.float32), expected)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_number_on_a_bound_goes_where_bitsandbytes_puts_it(kind: Literal["nf4", "fp4"]) -> None:
    """The midpoints between two values, and the numbers next to them on both sides, each in a block with a 1."""
    values = bnb.functional.get_4bit_type(kind, device="cpu").unique()
    bounds = (values[:-1] + values[1:]) / 2
    numbers = torch.cat([bounds, bounds.nextafter(torch.tensor(2.0)), bounds.nextafter(torch.tensor(-2.0))])
    weight = torch.ones(len(numbers), 64)
    weight[:, 1:] = numbers.unsqueeze(1)
    codes, state = bnb.functional.quantize_4bit(weight, quant_type=kind, compress_statistics=False, blocksize=64)
    ours = as_trained(weight, Basis(kind, False, torch.float32, torch.float32))
    assert torch.equal(ours, bnb.functional.dequantize_4bit(codes, state))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_values_are_those_of_a_card(kind: Literal["nf4", "fp4"], dtype: torch.dtype) -> None:
    weight = (torch.randn(512, 1024, generator=torch.Generator().manual_seed(6)) * 0.02).to(dtype)
    codes, state = bnb.functional.quantize_4bit(weight.cuda(), quant_type=kind, compress_statistics=True, blocksize=64)
    expected = bnb.functional.dequantize_4bit(codes, state).cpu()
    assert torch.equal(as_trained(weight, Basis(kind, True, dtype, dtype)), expected)
