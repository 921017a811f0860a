"""Embeddings and head in 8 or 4 bits: the model is the one with the weights that are read back, in fewer bytes."""

import json
import shutil

import bitsandbytes.functional as bnb
import pytest
import torch
from export_models import tiny_base, tiny_tokenizer
from test_memory_trace import CARD, CPU, executed, recipe_with
from test_memory_trace import tiny as tiny_config
from test_model_loss import some_batch, tiny
from transformers import AutoModelForCausalLM

from qtune.adapter.attach import attach_adapter
from qtune.errors import ModelError
from qtune.export.export import Options, export_run
from qtune.memory.predict import Longest, predict
from qtune.memory.tracing import categories
from qtune.model import stored_rows
from qtune.model.host import store_embeddings
from qtune.model.loss import install_loss, loss_agrees
from qtune.model.stored_rows import CompressedRows
from qtune.plan import make_plan
from qtune.recipe.file import load_recipe
from qtune.training import build
from qtune.training.train import resume, run
from qtune.tuned.evaluate import evaluate

KINDS = ("int8", "nf4")
DEVICE = torch.device("cpu")
FAMILIES = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "gemma2": {},  # caps its logits
    "gemma3_text": {"head_dim": 16},  # scales its embeddings, and ties them
    "phi": {},  # the head has a bias
}
ADAPTERS = {
    "lora": {"kind": "lora", "rank": 4},
    "p-tuning": {"kind": "p-tuning", "virtual_tokens": 3},
    "prompt-tuning": {"kind": "prompt-tuning", "virtual_tokens": 3, "initialization": "vocabulary"},
    "prefix-tuning": {"kind": "prefix-tuning", "virtual_tokens": 3},
}


def weights(rows: int = 50, width: int = 128, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).mul(0.05).to(dtype)


def read_back(rows: CompressedRows) -> torch.Tensor:
    return rows.block(0, rows.shape[0], DEVICE)


def network_of(family: str, kind: str | None, *, compressed: bool):
    """A tiny model with compressed tables; or its twin, with plain tables of the numbers that are read back."""
    model = tiny(family.partition(",")[0], hidden_size=64, **FAMILIES[family]).requires_grad_(False)
    if compressed:
        store_embeddings(model, kind, "cpu")
    else:
        for table in {id(one): one for one in (model.get_input_embeddings().weight, model.lm_head.weight)}.values():
            table.data = read_back(CompressedRows(table.data, kind, DEVICE))
    return model


# --- the rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_4_bit_rows_are_those_of_bitsandbytes(dtype: torch.dtype) -> None:
    weight = weights(dtype=dtype)
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
    assert torch.equal(read_back(CompressedRows(weight, "nf4", DEVICE)), bnb.dequantize_4bit(codes, state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_8_bit_rows_are_off_by_half_a_step_of_their_block_at_most(dtype: torch.dtype) -> None:
    weight = weights(dtype=dtype)
    weight[3, :64] = 0  # a pad token's row
    weight[4, 70] = 3.0  # an outlier spoils its own block alone
    read = read_back(CompressedRows(weight, "int8", DEVICE)).float()
    steps = weight.float().view(50, -1, 64).abs().amax(dim=2, keepdim=True) / 127
    rounding = torch.finfo(dtype).eps * weight.float().abs().view(50, -1, 64)
    assert ((read - weight.float()).abs().view(50, -1, 64) <= 0.5001 * steps + rounding).all()
    assert torch.equal(read[3, :64], torch.zeros(64))


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8.5), ("nf4", 4.5)])
def test_blocks_and_single_rows_are_the_same_numbers_in_so_many_bits(kind: str, bits: float, monkeypatch) -> None:
    monkeypatch.setattr(stored_rows, "BLOCK_BYTES", 7 * 128 * 2)  # 50 rows in blocks of 7
    rows = CompressedRows(weights(), kind, DEVICE)
    assert sum(tensor.nbytes for tensor in rows.tensors()) * 8 == bits * rows.shape.numel()
    whole = read_back(rows)
    monkeypatch.undo()
    assert torch.equal(read_back(CompressedRows(weights(), kind, DEVICE)), whole)
    assert torch.equal(rows.block(11, 23, DEVICE), whole[11:23])
    ids = torch.tensor([[3, 49, 3], [0, 12, 7]])
    assert torch.equal(rows.look_up(ids), whole[ids])
    assert (whole.dtype, whole.shape) == (rows.dtype, rows.shape)


# --- the model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("family", ["llama", "llama, tied", "gemma2"])
def test_loss_and_gradients_are_those_of_the_weights_that_are_read_back(family: str, adapter: str, kind: str) -> None:
    found = []
    for compressed in (False, True):
        network = network_of(family, kind, compressed=compressed)
        recipe = recipe_with(adapter=ADAPTERS[adapter])
        torch.manual_seed(0)
        model = attach_adapter(network, recipe.adapter, make_plan(recipe, CPU))
        install_loss(network, tile_bytes=4 * 96 * 5)
        ids, labels = some_batch()
        output = model(input_ids=ids, labels=labels)
        (output.loss / output.scored).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((output.loss.detach(), gradients))
    (expected, theirs), (loss, ours) = found
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-5)
    assert ours.keys() == theirs.keys() != set()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_answers_are_those_of_the_weights_that_are_read_back(family: str, kind: str, monkeypatch) -> None:
    monkeypatch.setattr(stored_rows, "BLOCK_BYTES", 7 * 64 * 4)  # 96 tokens in blocks of 7
    plain, model = (network_of(family, kind, compressed=compressed).eval() for compressed in (False, True))
    ids, _ = some_batch()
    torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    answers = [one.generate(ids[:1], max_new_tokens=6, do_sample=False) for one in (plain, model)]
    assert torch.equal(*answers)
    assert loss_agrees(model, ids[:1])


def test_rows_that_are_no_whole_blocks_are_refused_before_anything_is_loaded(
    write_recipe, tmp_path, monkeypatch
) -> None:
    base = tiny_base(tmp_path / "narrow", hidden_size=96)
    tiny_tokenizer(base)
    monkeypatch.setattr(build, "load_base", lambda *_: pytest.fail("weights were read"))
    recipe = load_recipe(write_recipe(), ['memory.embeddings="nf4"', f"model.base={base}"])
    with pytest.raises(ModelError, match=r'embeddings: "nf4" stores blocks of 64 numbers, and a row has 96; use'):
        run(recipe)


def test_an_adapter_on_compressed_embeddings_is_refused() -> None:
    network = network_of("llama", "int8", compressed=True)
    recipe = recipe_with(adapter={"kind": "lora", "target_modules": ["embed_tokens", "q_proj"]})
    with pytest.raises(ModelError, match=r"trains embed_tokens, which \[memory\] embeddings compresses"):
        attach_adapter(network, recipe.adapter, make_plan(recipe, CPU))


# --- what a trace says of it ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_traced_bytes_are_the_executed_ones(tmp_path, tied: bool, kind: str) -> None:
    config = tiny_config(layers=2, vocab_size=2048, tie_word_embeddings=tied)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    recipe = recipe_with(memory={"embeddings": kind}, quantization={"minimum_share": 0.0})
    plan, longest = make_plan(recipe, CPU), Longest(128, equal=True)
    real, expected = executed(str(tmp_path), recipe, plan, longest), predict(config, recipe, plan, longest).history
    for phase in ("forward", "backward", "optimizer"):
        assert expected.peak(phase).bytes == pytest.approx(real.peak(phase).bytes, rel=0.01), phase
    tables = expected.at(0).alive[categories.EMBEDDINGS] + expected.at(0).alive.get(categories.HEAD, 0)
    bits = {"int8": 8.5, "nf4": 4.5}[kind]
    assert tables == pytest.approx((1 if tied else 2) * 2048 * 64 * bits / 8, rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_a_card_holds_the_compressed_tables_and_no_others(kind: str) -> None:
    found = {}
    for how in ("device", kind):
        recipe = recipe_with(memory={"embeddings": how})
        config = tiny_config(layers=1, vocab_size=4096)
        history = predict(config, recipe, make_plan(recipe, CARD), Longest(128, equal=True)).history
        found[how] = history.at(0).alive
        assert history.host_at_rest == 0
    names = (categories.EMBEDDINGS, categories.HEAD)
    whole, small = (sum(found[how].get(name, 0) for name in names) for how in ("device", kind))
    assert small / whole == pytest.approx({"int8": 8.5, "nf4": 4.5}[kind] / 16, rel=0.02)


# --- a run ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_resumed_evaluated_and_exported_as_any_other(kind: str, write_recipe) -> None:
    training = "batch_size = 4\nsteps = 4\ncheckpoint_every = 2"
    recipe = load_recipe(write_recipe(training=training), [f'memory.embeddings="{kind}"'])
    done = run(recipe)

    def losses() -> list[float]:
        records = map(json.loads, done.metrics_file.read_text().splitlines())
        return [record["loss"] for record in records if "loss" in record]

    whole = losses()
    shutil.rmtree(done.adapter)
    shutil.rmtree(done.checkpoints / "checkpoint-4")
    resume(done)
    assert losses() == whole
    assert evaluate(done, rows=2, max_new_tokens=4).tuned.loss > 0
    export_run(done, Options(verify=True))
