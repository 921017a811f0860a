"""bitsandbytes computes right on every processor; what only AVX-512 does is provoked by switching its flag."""

import os
import subprocess
import sys

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, get_4bit_type, quantize_4bit
from torch._subclasses import FakeTensorMode
from warm import Server

from qtune.errors import ModelError
from qtune.startup import safe_bitsandbytes
from qtune.startup.safe_bitsandbytes import (
    compiled_when_called,
    require_right_kernels,
    without_hub_kernels,
    wrong_kernels,
)

# Whole blocks of 64 in each row; rows that begin within a block; rows of less than one; a last block that is not full.
SHAPES = [(64, 128), (64, 160), (3, 96), (3, 32), (5, 50), (7, 2), (1, 96), (160, 64)]

BEFORE = Server(
    "import torch, transformers.modeling_utils\n"
    "assert not {'bitsandbytes', 'qtune', 'torch._inductor.compile_fx'} & sys.modules.keys()"
)


def by_hand(weight: torch.Tensor, kind: str, dtype: torch.dtype) -> torch.Tensor:
    """What a weight is after quantizing: a value of the code book times its block's absmax, blocks counted flat."""
    codes, state = quantize_4bit(weight, quant_type=kind)
    pairs = codes.view(-1)
    numbers = torch.stack([pairs >> 4, pairs & 15], 1).view(-1)[: weight.numel()].long()
    absmax = state.absmax.repeat_interleave(64)[: weight.numel()]
    return (get_4bit_type(kind, device="cpu")[numbers] * absmax).to(dtype).view(weight.shape)


def layer(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> bnb.nn.Linear4bit:
    torch.manual_seed(0)
    made = bnb.nn.Linear4bit(columns, rows, bias=False, compute_dtype=dtype, quant_type="nf4")
    return made.to(dtype).to("cpu").requires_grad_(False)


def test_nothing_is_wrong_here():
    assert wrong_kernels() == []
    require_right_kernels()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights_of_every_width_are_dequantized_to_the_values_of_their_codes(shape, kind, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    codes, state = quantize_4bit(weight, quant_type=kind)
    assert torch.equal(dequantize_4bit(codes, state), by_hand(weight, kind, dtype))


def test_a_weight_of_one_dimension_keeps_it():
    weight = torch.linspace(-1, 1, 64)
    assert dequantize_4bit(*quantize_4bit(weight, quant_type="nf4")).shape == (64,)


def test_tracing_sees_the_shape_that_training_sees():
    codes, state = quantize_4bit(torch.ones(3, 96), quant_type="nf4")
    with FakeTensorMode() as mode:
        found = torch.ops.bitsandbytes.dequantize_4bit(
            mode.from_tensor(codes), mode.from_tensor(state.absmax), 64, "nf4", [3, 96], torch.bfloat16
        )
    assert (tuple(found.shape), found.dtype) == ((3, 96), torch.bfloat16)


@pytest.mark.parametrize("columns", [128, 160])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_evaluation_before_training_leaves_weights_and_gradients_as_they_were(columns, dtype):
    """As on a processor with AVX-512 and bfloat16, where bitsandbytes 0.50 would repack the weight for good."""
    frozen = layer(64, columns, dtype)
    frozen.support_avx512bf16_for_cpu = True
    codes = frozen.weight.data.clone()
    with torch.no_grad():
        frozen.eval()(torch.ones(2, columns, dtype=dtype))
    assert torch.equal(frozen.weight.data, codes)
    assert frozen.weight.quant_state.nested
    inputs = torch.ones(2, columns, dtype=dtype, requires_grad=True)
    frozen.train()(inputs).sum().backward()
    expected = torch.ones(2, 64, dtype=dtype) @ dequantize_4bit(frozen.weight.data, frozen.weight.quant_state)
    assert torch.equal(inputs.grad, expected)


def test_evaluating_and_training_multiply_with_the_same_values():
    frozen = layer(64, 160)
    inputs = torch.randn(4, 160)
    with torch.no_grad():
        evaluated = frozen.eval()(inputs)
    assert torch.equal(evaluated, frozen.train()(inputs.requires_grad_()))


def test_a_kernel_that_is_wrong_is_refused_with_library_version_and_upstream_issue(monkeypatch):
    right = bnb.functional.dequantize_4bit

    def by_rows(codes, state):
        """As the AVX-512 kernel of 0.50.2: each row begins a block of its own."""
        found = right(codes, state)
        return found if state.shape[-1] % 64 == 0 else found.roll(1, 0)

    monkeypatch.setattr(bnb.functional, "dequantize_4bit", by_rows)
    (line,) = wrong_kernels()
    assert line.startswith("rows of half blocks: nf4 weights of shape [3, 96] are dequantized wrong by ")
    assert line.endswith("% of their norm (bitsandbytes#2072)")
    with pytest.raises(ModelError) as caught:
        require_right_kernels()
    assert str(caught.value) == f"bitsandbytes {bnb.__version__}: {line}"


def test_a_version_that_packs_in_spite_of_us_is_named(monkeypatch):
    monkeypatch.setattr(bnb.nn.Linear4bit, "support_avx512bf16_for_cpu", True)
    (line,) = wrong_kernels()
    assert line.startswith("inference packing: a forward pass in eval mode ")
    assert line.endswith("(bitsandbytes#2078)")


def test_a_kernel_that_came_from_the_hub_is_named(monkeypatch):
    monkeypatch.setattr(bnb.backends.cpu.ops, "gemm_4bit_forward_kernel", object(), raising=False)
    (line,) = wrong_kernels()
    assert line.startswith("kernels from the hub: it computes with a kernel that it fetched from the hub")


def test_the_package_kernels_cannot_be_imported_while_bitsandbytes_is(tmp_path, monkeypatch):
    (tmp_path / "kernels.py").write_text("loaded = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    with without_hub_kernels(), pytest.raises(ImportError):
        import kernels
    import kernels

    assert kernels.loaded
    with without_hub_kernels(), pytest.raises(ImportError):
        from kernels import loaded  # noqa: F401
    assert sys.modules["kernels"] is kernels


@pytest.mark.parametrize("options", [{}, {"dynamic": False}], ids=["plain", "with options"])
def test_what_is_compiled_while_bitsandbytes_is_imported_is_compiled_once_and_when_it_is_called(options, monkeypatch):
    compiled = []

    def compile_now(function, **asked):
        compiled.append((function, asked))
        return lambda value: ("compiled", function(value))

    def twice(value):
        """Twice as much."""
        return 2 * value

    monkeypatch.setattr(torch, "compile", compile_now)
    with compiled_when_called():
        directly, decorated = torch.compile(twice, **options), torch.compile(**options)(twice)
    assert torch.compile is compile_now
    assert (directly.__doc__, compiled) == ("Twice as much.", [])
    assert [directly(2), directly(3), decorated(4)] == [("compiled", 4), ("compiled", 6), ("compiled", 8)]
    assert compiled == [(twice, options)] * 2


def test_torch_compiles_at_once_again_where_the_import_fails():
    own = torch.compile
    with pytest.raises(ImportError), compiled_when_called():
        raise ImportError("a library that bitsandbytes needs")
    assert torch.compile is own


@pytest.mark.slow
@pytest.mark.parametrize("first", ["peft", "transformers.integrations.bitsandbytes", "qtune.doctor", "bitsandbytes"])
def test_whoever_imports_bitsandbytes_gets_it_mended_and_nothing_is_fetched_or_said(first, tmp_path):
    (tmp_path / "kernels.py").write_text(f"def get_kernel(*_, **__):\n    open({str(tmp_path / 'asked')!r}, 'w')\n")
    program = (
        f"import qtune, {first}, bitsandbytes\n"
        "from qtune.startup.safe_bitsandbytes import wrong_kernels\n"
        "print(wrong_kernels(), 'torch._inductor.compile_fx' in sys.modules)"
    )
    search = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n"
    assert BEFORE.start(search + program).communicate() == ("[] False\n", ""), "PyTorch's compiler need not be imported"
    assert not (tmp_path / "asked").exists()


@pytest.mark.slow
def test_a_bitsandbytes_that_was_imported_before_qtune_is_mended_too():
    program = (
        "import bitsandbytes, qtune\n"
        "from qtune.startup.safe_bitsandbytes import TRAPS\n"
        "print([trap.name for trap in TRAPS if trap.probe()])"
    )
    # What it fetched on its own way in is out of our hands; here there is nothing to fetch from.
    assert BEFORE.start(program).communicate()[0] == "[]\n"


@pytest.mark.slow
def test_the_traps_are_still_there_without_us():
    """Fails when a new bitsandbytes has mended them: then `startup/safe_bitsandbytes.py` can go, trap by trap."""
    program = (
        "import bitsandbytes as bnb, torch\n"
        "from bitsandbytes.functional import dequantize_4bit, quantize_4bit\n"
        "wide = torch.linspace(-1, 1, 64 * 96).view(64, 96)\n"
        "error = (dequantize_4bit(*quantize_4bit(wide, quant_type='nf4')) - wide).abs().max()\n"
        "layer = bnb.nn.Linear4bit(64, 64, quant_type='nf4')\n"
        "print(torch.backends.cpu.get_cpu_capability(), float(error) > 0.1, layer.support_avx512bf16_for_cpu,\n"
        "      dequantize_4bit(*quantize_4bit(torch.ones(64))).dim())"
    )
    unguarded = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=unguarded)
    capability, rows_wrong, packs, dimensions = done.stdout.split()
    assert dimensions == "2", "bitsandbytes mended #2047: a weight of one dimension"
    if capability == "AVX512":
        assert rows_wrong == "True", "bitsandbytes mended its AVX-512 kernel: rows of half blocks"
    if capability != "AVX512" and packs == "1":
        pytest.fail("bitsandbytes packs for inference on processors without AVX-512, too")


def test_guarding_twice_is_guarding_once():
    before = list(sys.meta_path)
    safe_bitsandbytes.guard_bitsandbytes()
    assert sys.meta_path == before
