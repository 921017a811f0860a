"""Embeddings, head and activations in host memory: the same numbers, and the card really goes without them."""

import contextlib
import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_memory_trace import CARD, CPU, executed, recipe_with
from test_memory_trace import tiny as tiny_config
from test_model_loss import some_batch, tiny
from transformers import AutoModelForCausalLM

from qtune.adapter.attach import attach_adapter
from qtune.device.present import Device
from qtune.errors import ModelError
from qtune.export.export import Options, export_run
from qtune.memory.predict import Longest, predict
from qtune.memory.tracing import categories
from qtune.memory.tracing.history import History
from qtune.memory.tracing.ledger import LOSS_REGION
from qtune.model import stored_rows
from qtune.model.host import activations_on_host, store_embeddings
from qtune.model.load import load_base
from qtune.model.loss import install_loss, loss_agrees
from qtune.model.quantization import count_parameters
from qtune.model.stored_rows import host_weight
from qtune.plan import make_plan
from qtune.recipe.file import load_recipe
from qtune.recipe.schema import EightBit, FourBit, Model, Unquantized
from qtune.run.folder import RunDir
from qtune.training.train import resume, run
from qtune.tuned.evaluate import evaluate

FAMILIES = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "gemma2": {},  # caps its logits
    "gemma3_text": {"head_dim": 8},  # scales its embeddings, and ties them
    "phi": {},  # the head has a bias
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
}


def frozen(family: str):
    return tiny(family.partition(",")[0], **FAMILIES[family]).requires_grad_(False)


ADAPTERS = {
    "lora": {"kind": "lora", "rank": 4},
    "p-tuning": {"kind": "p-tuning", "virtual_tokens": 3},
    "prompt-tuning": {"kind": "prompt-tuning", "virtual_tokens": 3, "initialization": "vocabulary"},
    "prefix-tuning": {"kind": "prefix-tuning", "virtual_tokens": 3},
}


def adapted(family: str, adapter: str, *, on_host: bool):
    network = frozen(family)
    if on_host:
        store_embeddings(network, "host", "cpu")
    recipe = recipe_with(adapter=ADAPTERS[adapter])
    torch.manual_seed(0)
    model = attach_adapter(network, recipe.adapter, make_plan(recipe, CPU))
    install_loss(network, tile_bytes=4 * 96 * 5)
    return model


def loss_and_gradients(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids, labels = some_batch()
    output = model(input_ids=ids, labels=labels)
    (output.loss / output.scored).backward()
    return output.loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# --- embeddings and head -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("family", ["llama", "llama, tied", "gemma2"])
def test_loss_and_gradients_are_those_of_weights_on_the_device(family: str, adapter: str) -> None:
    expected, gradients = loss_and_gradients(adapted(family, adapter, on_host=False))
    loss, ours = loss_and_gradients(adapted(family, adapter, on_host=True))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-5)
    assert ours.keys() == gradients.keys() != set()
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_answers_and_the_check_before_training_are_as_before(family: str, monkeypatch) -> None:
    monkeypatch.setattr(stored_rows, "BLOCK_BYTES", 7 * 32 * 4)  # 96 tokens in blocks of 7
    model = frozen(family).eval()
    ids, _ = some_batch()
    logits, answer = model(input_ids=ids).logits, model.generate(ids[:1], max_new_tokens=6, do_sample=False)
    store_embeddings(model, "host", "cpu")
    torch.testing.assert_close(model(input_ids=ids).logits, logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.generate(ids[:1], max_new_tokens=6, do_sample=False), answer)
    assert loss_agrees(model, ids[:1])


def test_a_head_that_is_kept_whole_still_has_a_gradient_through_its_blocks(monkeypatch) -> None:
    monkeypatch.setattr(stored_rows, "BLOCK_BYTES", 7 * 32 * 4)
    gradients = []
    for on_host in (False, True):
        model = adapted("phi", "lora", on_host=on_host)
        install_loss(model.get_base_model(), tiled=False)
        gradients.append(loss_and_gradients(model)[1])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", ["llama", "llama, tied"])
def test_what_stays_on_the_device_is_one_number(family: str) -> None:
    model = frozen(family)
    before = count_parameters(model)
    weights = model.get_input_embeddings().weight, model.lm_head.weight
    store_embeddings(model, "host", "cpu")
    for module, weight in zip((model.get_input_embeddings(), model.lm_head), weights, strict=True):
        assert module.weight.untyped_storage().nbytes() == 4
        assert (module.weight.shape, module.weight.dtype) == (weight.shape, weight.dtype)
        assert module.weight.isnan().all()  # whoever multiplies with it notices
        assert torch.equal(host_weight(module), weight)
    tied = host_weight(model.lm_head) is host_weight(model.get_input_embeddings())
    assert tied == ("tied" in family)
    assert count_parameters(model) == before


@pytest.mark.parametrize("quantization", [FourBit(), EightBit(kind="int8"), Unquantized(kind="none")])
@pytest.mark.parametrize("tied", [False, True])
def test_a_card_never_holds_them_even_while_loading(tied: bool, quantization, tmp_path, monkeypatch) -> None:
    AutoModelForCausalLM.from_config(tiny_config(tie_word_embeddings=tied)).save_pretrained(tmp_path)
    given = Model(base=str(tmp_path))
    quantization = quantization.model_copy(update={"minimum_share": 0.0})
    recipe = recipe_with(memory={"embeddings": "host"})
    # Two names for one device stand for a card and its host: transformers takes them for two places.
    plan = replace(make_plan(recipe, CARD), compute_dtype="bfloat16")
    places = []
    monkeypatch.setattr(Device, "torch_name", property(lambda self: "cpu:0"))
    loader = AutoModelForCausalLM.from_pretrained

    def spy(*args, **options):
        places.append(options["device_map"])
        return loader(*args, **options)

    monkeypatch.setattr("qtune.model.load.AutoModelForCausalLM.from_pretrained", spy)
    network = load_base(given, quantization, plan)
    assert places == [{"": "cpu:0", "model.embed_tokens": "cpu", "lm_head": "cpu"}]
    assert not any(hasattr(module, "_hf_hook") for module in network.modules())
    plain = loader(tmp_path, dtype=torch.bfloat16)
    for module, weight in ((network.model.embed_tokens, plain.model.embed_tokens), (network.lm_head, plain.lm_head)):
        assert torch.equal(host_weight(module), weight.weight)
        assert host_weight(module).dtype == torch.bfloat16


def test_the_host_keeps_its_weights_when_a_model_is_moved() -> None:
    model = frozen("llama")
    store_embeddings(model, "host", "cpu")
    model.to("meta")
    assert model.device.type == "meta"
    assert host_weight(model.lm_head).device.type == "cpu"


def test_an_adapter_on_the_embeddings_is_refused() -> None:
    recipe = recipe_with(adapter={"kind": "lora", "target_modules": ["embed_tokens", "q_proj"]})
    network = frozen("llama")
    store_embeddings(network, "host", "cpu")
    with pytest.raises(ModelError, match=r'memory.embeddings: the adapter trains embed_tokens, .* "device"'):
        attach_adapter(network, recipe.adapter, make_plan(recipe, CPU))


# --- activations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("adapter", ["lora", "p-tuning"])
def test_gradients_are_bit_for_bit_those_without(adapter: str, checkpointing: bool) -> None:
    left: list[torch.Size] = []
    came: list[torch.Size] = []

    def gradients(around) -> list[torch.Tensor]:
        model = adapted("llama", adapter, on_host=False)
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        ids, labels = some_batch()
        with around(model):
            loss = model(input_ids=ids, labels=labels).loss
        assert not came
        loss.backward()
        assert not set(left) & {p.shape for p in model.parameters() if p.dim() == 2 and not p.requires_grad}
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    def on_host(model):
        return activations_on_host(
            model, lambda host: left.append(host.shape), lambda back: came.append(back.shape), smallest_bytes=0
        )

    plain = gradients(lambda model: contextlib.nullcontext())
    assert not left
    ours = gradients(on_host)
    hidden = torch.Size((3, 14 + (3 if adapter == "p-tuning" else 0), 32))
    assert left.count(hidden) == came.count(hidden) >= 3  # one input for each layer, and the last norm's
    assert all(torch.equal(one, other) for one, other in zip(plain, ours, strict=True))


def test_small_tensors_and_weights_stay_where_they_are() -> None:
    layer = torch.nn.Linear(8, 8)
    left: list[torch.Tensor] = []
    for rows, expected in ((4, 0), (5, 1)):
        left.clear()
        with activations_on_host(layer, left.append, smallest_bytes=5 * 8 * 4):
            layer(torch.ones(rows, 8)).sum().backward()
        assert len(left) == expected


# --- what a trace says of it ---------------------------------------------------------------------------------------

VOCABULARY, HIDDEN, LENGTH = 4096, 64, 128
ONE_TENSOR = VOCABULARY * HIDDEN * 2
"""Bytes of the embeddings, or of the head, in bfloat16."""


def traced(tied: bool = False, **memory) -> History:
    config = tiny_config(layers=1, vocab_size=VOCABULARY, tie_word_embeddings=tied)
    recipe = recipe_with(memory=memory, training={"gradient_checkpointing": True})
    return predict(config, recipe, make_plan(recipe, CARD), Longest(LENGTH, equal=True)).history


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_host_embeddings_leave_the_card_and_come_to_it_block_by_block(tied: bool) -> None:
    device, host = traced(tied, embeddings="device"), traced(tied, embeddings="host", loss_tile="1MiB")
    weights = ONE_TENSOR if tied else 2 * ONE_TENSOR
    stand_ins = 512 if tied else 1024  # one number each, rounded up
    at_rest = [sum(history.at(0).alive.values()) for history in (device, host)]
    assert at_rest[0] - at_rest[1] == weights - stand_ins
    assert host.host_at_rest == host.host == weights
    # In the loss: 1 MiB of bf16 logits for 2 * 127 positions are 2064 tokens, and so many rows of the head came along.
    rows = 2**20 // (2 * 2 * (LENGTH - 1))
    blocks = [label.op for label in host.labels if label.module == LOSS_REGION and label.op == "_to_copy.default"]
    assert len(blocks) >= 2 * -(-VOCABULARY // rows)
    tick = max(
        (tick for tick, label in enumerate(host.labels) if label.phase == "forward" and label.module == LOSS_REGION),
        key=lambda tick: host.at(tick).alive[categories.LOSS],
    )
    tokens = 2 * (LENGTH - 1)
    block, logits = rows * HIDDEN * 2, tokens * rows
    # The hidden states that are scored, their gradient in fp32 and what a block adds to it; a block, and its logits.
    assert host.at(tick).alive[categories.LOSS] == pytest.approx(
        tokens * HIDDEN * (2 + 4 + 2) + block + logits * 2, rel=0.1
    )


@pytest.mark.slow
def test_host_activations_leave_no_layers_input_on_the_card_however_deep_the_model() -> None:
    recipe = recipe_with(memory={"activations": "host"}, training={"gradient_checkpointing": True})
    kept, waiting = {}, {}
    for layers in (2, 3, 10):
        found = predict(tiny_config(layers=layers), recipe, make_plan(recipe, CARD), Longest(4096, equal=True))
        assert found.layers_executed == layers  # for a card the allocator is played with every layer
        history = found.history
        first = next(tick for tick, label in enumerate(history.labels) if label.phase == "backward")
        kept[layers], waiting[layers] = history.at(first).alive[categories.CHECKPOINTED], history.host
    hidden = 2 * 4096 * 64 * 2  # rows x length x hidden x bf16
    assert kept[2] == kept[3] == kept[10]
    assert waiting[10] - waiting[3] == 7 * (waiting[3] - waiting[2]) == 7 * hidden


@pytest.mark.parametrize("tied", [False, True])
def test_traced_bytes_are_the_executed_ones(tmp_path, tied: bool, monkeypatch) -> None:
    """On a CPU host memory is the device's: nothing is saved there, and both sides must say so."""
    config = tiny_config(layers=2, tie_word_embeddings=tied)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    every = functools.partial(activations_on_host, smallest_bytes=0)
    monkeypatch.setattr("qtune.memory.tracing.step.activations_on_host", every)
    memory = {"embeddings": "host", "activations": "host"}
    recipe = recipe_with(memory=memory, training={"gradient_checkpointing": True})
    plan, longest = make_plan(recipe, CPU), Longest(128, equal=True)
    real, expected = executed(str(tmp_path), recipe, plan, longest), predict(config, recipe, plan, longest).history
    assert expected.host == 0
    for phase in ("forward", "backward", "optimizer"):
        assert expected.peak(phase).bytes == pytest.approx(real.peak(phase).bytes, rel=0.01), phase


# --- a run ---------------------------------------------------------------------------------------------------------


def losses(run: RunDir) -> list[float]:
    records = map(json.loads, run.metrics_file.read_text().splitlines())
    return [record[key] for record in records for key in ("loss", "eval_loss") if key in record]


def ended(recipe_file: Path, *changes: str) -> RunDir:
    return run(load_recipe(recipe_file, changes))


HOST = ('memory.embeddings="host"', 'memory.activations="host"', 'memory.loss_tile="1MiB"')


@pytest.mark.slow
def test_a_run_with_everything_on_the_host_is_the_same_run_and_its_export_the_same_model(write_recipe, monkeypatch):
    left: list[torch.Tensor] = []
    every = functools.partial(activations_on_host, left=left.append, smallest_bytes=0)
    monkeypatch.setattr("qtune.training.trainer.activations_on_host", every)
    recipe = write_recipe(training="batch_size = 4\nsteps = 4\ngradient_checkpointing = true\ncheckpoint_every = 2")
    plain = ended(recipe)
    assert not left
    on_host = ended(recipe, *HOST)
    assert len(left) >= 2 * 4  # two layers, four steps
    assert losses(on_host) == pytest.approx(losses(plain), rel=1e-5)
    assert 'embeddings = "host"' in on_host.resolved_file.read_text()

    # Stopped after the first checkpoint: it goes on as it would have.
    shutil.rmtree(on_host.adapter)
    shutil.rmtree(on_host.checkpoints / "checkpoint-4")
    whole = losses(on_host)
    resume(on_host)
    assert losses(on_host) == pytest.approx(whole, rel=1e-6)

    scores = [evaluate(one, rows=2, max_new_tokens=4) for one in (plain, on_host)]
    assert scores[1].tuned.loss == pytest.approx(scores[0].tuned.loss, rel=1e-5)
    assert scores[1].comparisons == scores[0].comparisons
    models = [export_run(one, Options(verify=True)) for one in (plain, on_host)]
    weights = [load_file(model / "model.safetensors") for model in models]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-4, msg=name)
