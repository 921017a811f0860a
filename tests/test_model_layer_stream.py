"""Layers that wait elsewhere: the resident model's loss and every gradient, few loads, the same run."""

import contextlib
import copy
import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import EVERYTHING
from peft import LoraConfig, PromptEncoderConfig, get_peft_model
from safetensors.torch import load_file
from test_adapter_lean import Case, distance, network, readied
from test_memory_trace import CARD, CPU, executed, recipe_with
from test_memory_trace import tiny as tiny_config
from transformers import AutoConfig, AutoModelForCausalLM

from qtune.adapter.attach import attach_adapter
from qtune.errors import ModelError
from qtune.export.export import Options, export_run
from qtune.memory import predict as prediction
from qtune.memory.predict import Longest, predict, training_step
from qtune.memory.tracing import categories
from qtune.memory.tracing.trace import trace
from qtune.model import layer_stream
from qtune.model.layer_major import layer_by_layer, layers_stand_alone
from qtune.model.layer_stream import packed_weight, stream_layers, stream_of
from qtune.model.load import attention_rule, load_base
from qtune.plan import make_plan
from qtune.recipe.file import load_recipe
from qtune.run.folder import RunDir
from qtune.training import rehearsal, trainer
from qtune.training.train import resume, run
from qtune.training.trainer import QloraTrainer
from qtune.tuned.evaluate import evaluate

pytestmark = pytest.mark.slow

LAYERS = 5
CASE = Case(
    config=(("num_hidden_layers", LAYERS), ("hidden_size", 128), ("intermediate_size", 320), ("attention_bias", True))
)

PEFT = {
    "lora": LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules="all-linear"),
    "p-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=32),
}


def model_with(where: str, adapter: str = "lora", case: Case = CASE, dtype=torch.float32, lean=True, recompute=True):
    base = network(case, dtype)
    if where != "device":
        stream_layers(base, where, "cpu")
    torch.manual_seed(3)
    return readied(get_peft_model(base, copy.deepcopy(PEFT[adapter])), dtype, lean=lean, recompute=recompute)


def batches(count: int = 3, vocabulary: int = 128) -> list[torch.Tensor]:
    """Micro-batches of unequal length."""
    made = torch.Generator().manual_seed(5)
    return [torch.randint(1, vocabulary, (2, 30 + 7 * number), generator=made) for number in range(count)]


def autocast(dtype):
    return contextlib.nullcontext() if dtype is torch.float32 else torch.autocast("cpu", dtype)


def stepped(model, *, together: bool, dtype=torch.float32, rows=None) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of a step of some micro-batches."""

    def forward(ids) -> Callable[[], torch.Tensor]:
        return lambda: model(input_ids=ids, labels=ids, use_cache=False).loss

    forwards = [forward(ids) for ids in rows or batches()]
    if together:
        with autocast(dtype):
            loss = torch.stack(layer_by_layer(model, forwards)).sum()
        loss.backward()
    else:
        losses = []
        for one in forwards:
            with autocast(dtype):
                losses.append(one())
            losses[-1].backward()
        loss = torch.stack(losses).sum()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "together"])
@pytest.mark.parametrize("recompute", [False, 2, True])
@pytest.mark.parametrize("lean", [False, True], ids=["peft", "lean"])
@pytest.mark.parametrize("adapter", PEFT)
def test_the_loss_and_every_gradient_are_the_resident_models(adapter: str, lean: bool, recompute, together: bool):
    expected, gradients = stepped(model_with("device", adapter, lean=lean, recompute=recompute), together=False)
    loss, found = stepped(model_with("host", adapter, lean=lean, recompute=recompute), together=together)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert distance(found, gradients) < 1e-6


@pytest.mark.parametrize("adapter", PEFT)
def test_so_are_those_of_layers_on_disk_in_bfloat16(adapter: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("QTUNE_CACHE", str(tmp_path))
    dtype = torch.bfloat16
    expected, gradients = stepped(model_with("device", adapter, dtype=dtype), together=False, dtype=dtype)
    loss, found = stepped(model_with("disk", adapter, dtype=dtype), together=True, dtype=dtype)
    assert loss == pytest.approx(expected, rel=1e-3)
    assert distance(found, gradients) < 0.02  # bitsandbytes adds biases elsewhere
    assert not list((tmp_path / "layers").iterdir())  # the file goes with the process


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["lora", "p-tuning"] if EVERYTHING else ["lora"])
def test_so_are_those_of_the_built_in_model(adapter: str) -> None:
    table = {"lora": {"kind": "lora", "rank": 8}, "p-tuning": {"kind": "p-tuning", "virtual_tokens": 4}}[adapter]
    found = []
    for where in ("device", "host"):
        recipe = recipe_with(
            model={"base": "builtin:smollm2-135m-instruct"},
            adapter=table,
            memory={"layers": where},
            training={"gradient_checkpointing": True},
        )
        plan = make_plan(recipe, CPU)
        torch.manual_seed(1)
        model = attach_adapter(load_base(recipe.model, recipe.quantization, plan), recipe.adapter, plan)
        model = readied(model, torch.float32, lean=True, recompute=True)
        rows = [ids[:, :24] for ids in batches(2, vocabulary=49152)]
        found.append(stepped(model, together=where == "host", rows=rows))
    (expected, gradients), (loss, ours) = found
    assert loss == pytest.approx(expected, rel=1e-6)
    assert distance(ours, gradients) < 1e-5


def test_a_weight_that_is_kept_from_the_forward_would_be_another_layers(monkeypatch) -> None:
    """What bitsandbytes' own function does (bitsandbytes#2034): the loss is right, the gradients are not."""

    class Keeping(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, module):
            ctx.kept = packed_weight(module)
            return torch.nn.functional.linear(x, layer_stream.dequantized(*ctx.kept).to(x.dtype), module.bias)

        @staticmethod
        def backward(ctx, grad):
            return grad @ layer_stream.dequantized(*ctx.kept).to(grad.dtype), None

    expected, gradients = stepped(model_with("device", lean=False, recompute=False), together=False)
    monkeypatch.setattr(layer_stream, "_Product", Keeping)
    loss, found = stepped(model_with("host", lean=False, recompute=False), together=False)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert distance(found, gradients) > 0.1


@pytest.mark.parametrize("micro_batches", [1, 2, 6])
def test_layers_come_twice_a_step_however_many_micro_batches_it_has(micro_batches: int) -> None:
    model = model_with("host")
    stepped(model, together=True, rows=batches(micro_batches))
    first = stream_of(model).loads
    stepped(model, together=True, rows=batches(micro_batches))
    # Of two blocks one holds the last layer, or the first, when the direction turns, and the other its neighbour.
    assert first == LAYERS + LAYERS - 2
    assert stream_of(model).loads - first == 2 * (LAYERS - 2)


def test_no_more_than_two_layers_are_on_the_device() -> None:
    model = model_with("host")
    stream = stream_of(model)
    largest = max(home.numel() for home in stream.homes)
    assert [block.numel() for block in stream.blocks] == [largest, largest]
    held = {block.data_ptr() for block in stream.blocks}
    for number in (0, 3, 4, 1):
        codes, state = stream.read(number, 0)
        assert codes.untyped_storage().data_ptr() in held
        assert state.absmax.untyped_storage().data_ptr() in held
        weight = stream.layers[number][0].module.weight
        assert torch.equal(codes, weight)
        assert torch.equal(state.absmax, weight.quant_state.absmax)


def test_answers_and_logits_are_the_resident_models() -> None:
    ids, logits, answers = batches(1)[0], [], []
    for where in ("device", "host"):
        model = model_with(where).eval()
        logits.append(model(input_ids=ids).logits)
        answers.append(model.generate(input_ids=ids[:1], max_new_tokens=8, do_sample=False))
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(*answers)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3_text", "mixtral", "phi3", "olmo2"])
def test_layers_of_many_families_can_be_computed_one_by_one(family: str) -> None:
    config = {"mixtral": (("num_local_experts", 2),)}.get(family, ())
    assert layers_stand_alone(network(Case(family=family, config=config), torch.float32), batches(1)[0])


def test_layers_that_read_what_another_one_left_are_found_out() -> None:
    base = network(CASE, torch.float32)
    first, second = base.model.layers[:2]
    left = []

    def leaves(hidden, *args, **kwargs):
        left.append(hidden)
        return type(first).forward(first, hidden, *args, **kwargs)

    def reads(hidden, *args, **kwargs):
        return type(second).forward(second, hidden + left[-1].mean(), *args, **kwargs)

    first.forward, second.forward = leaves, reads
    assert layers_stand_alone(base, batches(1)[0])  # two times the same rows leave the same

    def counts(hidden, *args, **kwargs):
        return type(second).forward(second, hidden + len(left), *args, **kwargs)

    second.forward = counts
    assert not layers_stand_alone(base, batches(1)[0])


def broken_apart(base, error: Exception) -> None:
    """A model that takes its last layer's answer apart, which a stand-in's cannot be: the error comes from there."""
    last, count = base.model.layers[-1], len(base.model.layers)

    def check(*_):
        if any(found is last for found in base.model.layers) or len(base.model.layers) != count:
            return
        raise error

    base.model.norm.register_forward_pre_hook(check)
    base.model.rotary_emb.register_forward_pre_hook(check)


@pytest.mark.parametrize("error", [ValueError("not enough values to unpack"), AssertionError()])
def test_whatever_a_models_code_does_to_a_stand_in_says_that_its_layers_cannot(error: Exception) -> None:
    base = network(CASE, torch.float32)
    broken_apart(base, error)
    assert not layers_stand_alone(base, batches(1)[0])
    assert type(base.model.layers[-1]).__name__ == "LlamaDecoderLayer", "its own layers are in their places again"


def test_memory_that_runs_out_while_it_is_asked_says_nothing_of_the_model() -> None:
    base = network(CASE, torch.float32)
    broken_apart(base, torch.OutOfMemoryError("no room"))
    with pytest.raises(torch.OutOfMemoryError):
        layers_stand_alone(base, batches(1)[0])


def test_logits_that_are_no_numbers_say_nothing_of_the_layers() -> None:
    base = network(CASE, torch.float32)
    torch.nn.init.constant_(base.model.norm.weight, float("nan"))
    assert layers_stand_alone(base, batches(1)[0])


def test_what_is_no_four_bit_layer_is_refused() -> None:
    with pytest.raises(ModelError, match=r"memory\.layers: the layers of LlamaForCausalLM are not in 4 bits"):
        stream_layers(network(Case(quantized=None), torch.float32), "host", "cpu")


@pytest.mark.parametrize(
    ("tables", "reason"),
    [
        ({"quantization": {"kind": "int8"}}, "only 4-bit layers wait in another place, and these are int8"),
        ({"adapter": {"kind": "lora", "dora": True}}, "DoRA reads the base's weights beside their products"),
    ],
)
def test_a_recipe_that_reads_weights_otherwise_is_refused(tables, reason: str) -> None:
    with pytest.raises(Exception, match=reason):
        recipe_with(memory={"layers": "host"}, **tables)


# --- what a trace says of it ---------------------------------------------------------------------------------------


def traced(depth: int = 6, batch: int = 1, card=CARD, **memory):
    recipe = recipe_with(
        memory=memory, training={"gradient_checkpointing": True, "batch_size": batch, "micro_batch_size": 1}
    )
    plan = make_plan(recipe, card)
    return predict(
        tiny_config(layers=depth, hidden_size=256, intermediate_size=512), recipe, plan, Longest(128, equal=True)
    )


def test_a_card_holds_two_layers_however_deep_the_model_is() -> None:
    weights = {}
    for layers in (4, 8):
        history = traced(layers, layers="host").history
        weights[layers] = history.at(0).alive[categories.WEIGHTS_4BIT]
    assert weights[4] == weights[8] > 0
    resident = traced(8, layers="device").history.at(0).alive[categories.WEIGHTS_4BIT]
    # absmax travels with the codes; each weight begins at a multiple of 256 bytes
    assert weights[8] == pytest.approx(2 / 8 * resident, rel=0.1)


def test_layers_cross_the_bus_once_for_all_micro_batches_of_a_step() -> None:
    crossed = {}
    for batch in (1, 4):
        work = traced(6, batch, layers="host").work
        loads = {place: count for (place, kernel), count in work.items() if kernel.kind == "layer transfers"}
        crossed[batch] = sum(count for place, count in loads.items() if place.phase in ("forward", "backward"))
    assert crossed[1] == crossed[4] == 2 * (6 - 2)


def test_the_rest_of_a_steps_work_is_one_micro_batchs() -> None:
    def products(batch: int) -> int:
        work = traced(6, batch, layers="host").work
        return sum(
            count * kernel.flops
            for (place, kernel), count in work.items()
            if place.phase == "forward" and kernel.kind in ("products", "thin products")
        )

    assert products(1) == products(4)


ATTENTION = {"hidden_size": 64, "vocab_size": 128, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
APART = {
    "bloom": {**ATTENTION, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "vocab_size": 128},
    "bamba": {
        **ATTENTION, **HEADS, "intermediate_size": 128, "num_hidden_layers": 2, "attn_layer_indices": [1],
        "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16,
    },
}  # fmt: skip
"""Families whose code takes a layer's answer apart, or goes through its layers otherwise."""


@pytest.mark.parametrize("family", APART)
def test_a_family_whose_layers_do_not_stand_alone_is_traced_as_it_runs(family: str) -> None:
    """One micro-batch after the other, the gradients of the earlier ones waiting: as with any step of several."""
    config = AutoConfig.for_model(family, **APART[family])
    training = {"gradient_checkpointing": False, "batch_size": 3, "micro_batch_size": 1}
    recipe = recipe_with(memory={"layers": "host"}, training=training, quantization={"minimum_share": 0.0})
    plan, longest = make_plan(recipe, CPU, attention_rule(config)), Longest(16, equal=True)
    step = training_step(recipe, plan, longest)
    assert step.micro_batches == 3
    found = predict(config, recipe, plan, longest, plays_allocator=False).history
    build = functools.partial(prediction.build, recipe=recipe, plan=plan)
    expected = trace(config, build, replace(step, micro_batches=1, accumulates=True), card=None).history
    for phase in ("forward", "backward"):
        assert found.peak(phase).bytes == expected.peak(phase).bytes


def test_a_forward_that_fails_on_tensors_without_storage_is_one_sentence(monkeypatch) -> None:
    def fails(*arguments, **options):
        raise ValueError("too many values to unpack (expected 2)")

    monkeypatch.setattr(prediction, "trace", fails)
    with pytest.raises(ModelError, match=r"a step of llama cannot be traced .*: too many values to unpack"):
        traced()


@pytest.mark.parametrize("where", ["host", "disk"])
@pytest.mark.parametrize("batch", [1, 3])
def test_traced_bytes_are_the_executed_ones(where: str, batch: int, tmp_path, monkeypatch) -> None:
    """On a CPU the host is the device, and a file is nobody's memory."""
    monkeypatch.setenv("QTUNE_CACHE", str(tmp_path / "cache"))
    config = tiny_config(layers=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    training = {"gradient_checkpointing": True, "batch_size": batch, "micro_batch_size": 1}
    recipe = recipe_with(memory={"layers": where}, training=training)
    plan, longest = make_plan(recipe, CPU), Longest(128, equal=True)
    real, found = executed(str(tmp_path), recipe, plan, longest), predict(config, recipe, plan, longest)
    for phase in ("forward", "backward", "optimizer"):
        assert found.history.peak(phase).bytes == pytest.approx(real.peak(phase).bytes, rel=0.01), phase


# --- a run ---------------------------------------------------------------------------------------------------------


def losses(run_dir: RunDir) -> list[float]:
    records = map(json.loads, run_dir.metrics_file.read_text().splitlines())
    return [record[key] for record in records for key in ("loss", "eval_loss") if key in record]


def ended(recipe_file, *changes: str) -> RunDir:
    return run(load_recipe(recipe_file, changes))


@pytest.mark.slow
@pytest.mark.parametrize("where", ["host", "disk"])
def test_a_run_is_the_same_run_goes_on_as_it_would_have_and_exports_the_same_model(where: str, write_recipe) -> None:
    recipe = write_recipe(training="batch_size = 4\nmicro_batch_size = 1\nsteps = 4\ncheckpoint_every = 2")
    plain = ended(recipe)
    streamed = ended(recipe, f'memory.layers="{where}"')
    assert losses(streamed) == pytest.approx(losses(plain), rel=1e-5)
    assert f'layers = "{where}"' in streamed.resolved_file.read_text()

    # Stopped after the first checkpoint: it goes on as it would have.
    shutil.rmtree(streamed.adapter)
    shutil.rmtree(streamed.checkpoints / "checkpoint-4")
    whole = losses(streamed)
    resume(streamed)
    assert losses(streamed) == whole

    scores = [evaluate(one, rows=2, max_new_tokens=4) for one in (plain, streamed)]
    assert scores[1].tuned.loss == pytest.approx(scores[0].tuned.loss, rel=1e-5)
    assert scores[1].comparisons == scores[0].comparisons
    models = [export_run(one, Options(verify=True)) for one in (plain, streamed)]
    weights = [load_file(model / "model.safetensors") for model in models]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
def test_a_rehearsal_takes_all_micro_batches_of_a_step(write_recipe, monkeypatch) -> None:
    groups = []
    original = QloraTrainer.compute_loss

    def counting(self, model, inputs, *args, **kwargs):
        groups.append(len(inputs.get("micro_batches", [inputs])))
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(QloraTrainer, "compute_loss", counting)
    recipe = write_recipe(training="batch_size = 4\nmicro_batch_size = 2\nsteps = 1\nrehearse = true")
    ended(recipe, 'memory.layers="host"')
    assert groups == [2, 2]


def rehearsed_losses(monkeypatch) -> list[float]:
    """The losses that a rehearsal's step comes to, in order; filled while one runs."""
    found: list[float] = []
    original = rehearsal._step

    def watching(trainer, *args):
        inner = trainer.training_step

        def training_step(*arguments):
            loss = inner(*arguments)
            found.append(float(loss))
            return loss

        monkeypatch.setattr(trainer, "training_step", training_step)
        optimizer = original(trainer, *args)
        monkeypatch.setattr(trainer, "training_step", inner)
        return optimizer

    monkeypatch.setattr(rehearsal, "_step", watching)
    return found


def test_a_rehearsal_of_all_micro_batches_has_the_mean_loss_of_one(write_recipe, monkeypatch) -> None:
    """In float16 a multiple of it may be more than the type holds."""
    recipe = write_recipe(training="batch_size = 4\nmicro_batch_size = 1\nsteps = 1\nrehearse = true")
    found = rehearsed_losses(monkeypatch)
    ended(recipe, 'memory.layers="host"')
    waiting, together = found[:-1], found[-1]
    assert waiting == [0.0] * 3
    ended(recipe)
    assert together == pytest.approx(found[-1], rel=1e-5)


def test_where_layers_do_not_stand_alone_a_rehearsal_takes_one_micro_batch(write_recipe, monkeypatch) -> None:
    recipe = write_recipe(training="batch_size = 4\nmicro_batch_size = 1\nsteps = 1\nrehearse = true")
    monkeypatch.setattr(trainer, "layers_stand_alone", lambda model, ids: False)
    found = rehearsed_losses(monkeypatch)
    ended(recipe, 'memory.layers="host"')
    assert len(found) == 1


def test_memory_that_ran_out_in_a_rehearsal_does_not_part_the_micro_batches_of_the_run(
    write_recipe, monkeypatch
) -> None:
    """A run that is resumed without that would sum its gradients in another order."""
    recipe = write_recipe(training="batch_size = 4\nmicro_batch_size = 2\nsteps = 1\nrehearse = true")
    groups = []
    original = QloraTrainer.compute_loss

    def full_once(self, model, inputs, *args, **kwargs):
        groups.append(len(inputs.get("micro_batches", [inputs])))
        if len(groups) == 1:
            raise torch.OutOfMemoryError("no room")
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(QloraTrainer, "compute_loss", full_once)
    ended(recipe, 'memory.layers="host"')
    assert groups == [2, 1, 1, 2]


def test_memory_that_runs_out_in_the_check_sends_micro_batches_one_by_one(write_recipe, monkeypatch, capsys) -> None:
    recipe = write_recipe(training="batch_size = 4\nmicro_batch_size = 2\nsteps = 1")

    def full(model, ids):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(trainer, "layers_stand_alone", full)
    streamed = ended(recipe, 'memory.layers="host"')
    assert losses(streamed)
    said = capsys.readouterr().err
    assert "out of memory: each micro-batch sends for all layers anew" in said
    assert "depend on one another" not in said


def test_where_all_micro_batches_together_are_too_many_they_go_one_by_one(write_recipe, monkeypatch) -> None:
    recipe = write_recipe(training="batch_size = 4\nmicro_batch_size = 2\nsteps = 2")
    plain = ended(recipe)
    groups = []
    original = QloraTrainer.compute_loss

    def full(self, model, inputs, *args, **kwargs):
        if "micro_batches" in inputs:
            groups.append(len(inputs["micro_batches"]))
            raise torch.OutOfMemoryError("no room")
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(QloraTrainer, "compute_loss", full)
    streamed = ended(recipe, 'memory.layers="host"')
    assert groups == [2]
    assert losses(streamed) == pytest.approx(losses(plain), rel=1e-5)
