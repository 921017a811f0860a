"""A base that bitsandbytes has quantized before is exported as training held it, whatever the recipe says of it."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from export_models import SKIPPED, packed_base, tiny_base, tiny_run
from test_memory_trace import recipe_with

from qtune.device.present import Device, present_device
from qtune.errors import InputError, OutOfMemory
from qtune.export.adapter_weights import AdapterWeights
from qtune.export.export import Options, export_run
from qtune.export.gguf.verify import refuse_small_memory
from qtune.export.layout import layout_of, open_base
from qtune.export.merge import base_values, plan_merge
from qtune.export.opened_run import open_for_export
from qtune.export.serving import serving
from qtune.export.verify.exact import four_bit_values, int8_values
from qtune.export.verify.rows import rows_for
from qtune.export.verify.verify import verify
from qtune.model.checkpoint import Checkpoint
from qtune.model.kept_weights import weight_of
from qtune.model.load import _refuse_too_large, load_base
from qtune.plan import make_plan
from qtune.recipe.schema import FourBit, Model
from qtune.run.folder import RunDir

# peft 0.21.2 asks transformers 5.23 for the name that it is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

BASES: dict[str, tuple[str, ...]] = {
    "nf4": ("nf4", "float32"),
    "nf4, one module in 16 bits": ("nf4", "float32", SKIPPED),
    "nf4, computed in another type": ("nf4", "bfloat16"),
    "fp4, one module in 16 bits": ("fp4", "float16", SKIPPED),
    "int8": ("int8", "float32"),
    "int8, one module in 16 bits": ("int8", "float32", SKIPPED),
}


@pytest.fixture(scope="module", params=BASES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """The recipe says NF4 of each of them."""
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):
        return tiny_run(tmp_path_factory.mktemp("packed"), packed=BASES[request.param])


def test_a_packed_base_is_exported_and_proven_from_memory_and_from_the_disk(run: RunDir) -> None:
    source = open_for_export(run)
    folder = export_run(run, Options(verify=False))
    rows = rows_for(source)
    whole, streamed = (verify(source, folder, rows, streamed=is_streamed) for is_streamed in (False, True))
    assert (whole.failures, streamed.failures) == ((), ())
    assert whole.bare_base.kl > 0.01, "the adapter changes nothing; this test would prove nothing"
    assert streamed.bare_base.kl == pytest.approx(whole.bare_base.kl, rel=1e-3)
    for verification in (whole, streamed):
        assert verification.exported.kl < 1e-5


def test_merged_weights_are_what_the_layers_of_the_run_multiply_with(run: RunDir) -> None:
    source = open_for_export(run)
    plan = make_plan(source.recipe, present_device())
    live = load_base(source.recipe.model, source.recipe.quantization, plan)
    checkpoint, network = open_base(source.base)
    layout = layout_of(network, list(checkpoint.tensors))
    nothing = AdapterWeights({}, "as the embedding")
    merge = plan_merge(checkpoint, layout, nothing, source.basis, "dequantized", torch.float32)
    quantized = set()
    for name, module in live.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        weight = f"{name}.weight"
        expected = module.weight
        if isinstance(module, Linear4bit | Linear8bitLt):
            quantized.add(weight)
            expected = four_bit_values(module) if isinstance(module, Linear4bit) else int8_values(module)
        values = base_values(merge, weight, weight, checkpoint.read(weight))
        assert torch.equal(values.float(), expected.float()), weight
    assert layout.quantized == quantized
    assert {one.name for one in merge.tensors} == set(layout.parameters)
    assert {one.dtype for one in merge.tensors} == {torch.float32}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_packed_gpt2_whose_weights_lie_the_other_way_is_exported_and_proven(kind: str, tmp_path: Path) -> None:
    shape = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 160}
    adapter = 'kind = "lora"\nrank = 4\ntarget_modules = ["c_attn", "c_fc", "c_proj"]'
    run = tiny_run(tmp_path, adapter, family="gpt2", packed=(kind, "float32"), **shape)
    source = open_for_export(run)
    folder = export_run(run, Options(verify=False))
    for is_streamed in (False, True):
        verification = verify(source, folder, rows_for(source), streamed=is_streamed)
        assert verification.failures == ()
        assert verification.exported.kl < 1e-5 < 0.01 < verification.bare_base.kl


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (Options(weights="original"), "to merge into, leave out --base"),
        (Options(compare_bases=True), "to compare with, leave out --compare-bases"),
    ],
)
def test_original_weights_that_there_are_not_are_refused_before_anything_is_written(
    asked: Options, said: str, run: RunDir
) -> None:
    source = open_for_export(run)
    before = set(run.path.iterdir())
    with pytest.raises(InputError) as refused:
        export_run(run, replace(asked, output=run.path / "other"))
    whole = f"{source.base}: holds quantized weights; there are no original ones {said}"
    assert [str(problem) for problem in refused.value.problems] == [whole]
    assert set(run.path.iterdir()) == before


def test_an_adapter_s_card_and_commands_load_a_packed_base_as_it_is(run: RunDir) -> None:
    source = open_for_export(run)
    folder = export_run(run, Options(adapter_only=True, force=True))
    card = (folder / "README.md").read_text()
    assert 'AutoModelForCausalLM.from_pretrained("base", dtype="float32", device_map="auto")' in card
    assert "BitsAndBytesConfig" not in card
    vllm = next(one for one in serving(source, folder) if one.program == "vLLM")
    assert "--quantization" not in vllm.command
    assert vllm.note == ""


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16", "float16"])
def test_a_gradient_reads_a_weight_back_as_the_product_did(compute_dtype: str, tmp_path: Path) -> None:
    base = packed_base(tiny_base(tmp_path / "plain"), tmp_path / "packed", "nf4", compute_dtype)
    quantization = FourBit(compute_dtype="float32", minimum_share=0.0)
    recipe = recipe_with(quantization=quantization.model_dump(), model={"base": str(base)})
    network = load_base(recipe.model, quantization, make_plan(recipe, present_device()))
    layer = network.model.layers[0].mlp.up_proj
    assert torch.equal(weight_of(layer, layer.compute_dtype), four_bit_values(layer))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_memory_is_asked_for_what_a_packed_base_takes(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its GGUF file as many numbers as a plain one's; loaded as it is, its packed weights no more than their bytes."""
    plain = tiny_base(tmp_path / "plain")
    packed = packed_base(plain, tmp_path / "packed", kind)
    numbers = sum(math.prod(tensor.shape) for tensor in Checkpoint.open(plain).tensors.values())
    for free, base in ((8 * numbers, plain), (8 * numbers, packed)):
        monkeypatch.setattr("qtune.export.gguf.verify._free_memory", lambda free=free: free)
        refuse_small_memory(base)
        monkeypatch.setattr("qtune.export.gguf.verify._free_memory", lambda free=free: free - 1)
        with pytest.raises(InputError, match=r"^--gguf: "):
            refuse_small_memory(base)
    stored = sum(tensor.nbytes for tensor in Checkpoint.open(packed).tensors.values())
    roomy = Device("cuda", "a card", 2**30, stored, bf16=True, capability=(8, 6))
    _refuse_too_large(Model(base=str(packed)), roomy, torch.bfloat16)
    with pytest.raises(OutOfMemory):
        _refuse_too_large(Model(base=str(packed)), replace(roomy, free_bytes=stored // 2), torch.bfloat16)
