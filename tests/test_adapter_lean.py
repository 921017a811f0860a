"""The lean step gives peft's loss and every gradient of peft's, keeps less, and leaves everything else peft's."""

import contextlib
import copy
from dataclasses import dataclass
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from peft.utils import get_peft_model_state_dict
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from qtune.adapter import lean_check
from qtune.adapter.lean import adapter_copies, copies_of, install_lean_step
from qtune.adapter.products import Stack
from qtune.device.present import present_device
from qtune.model.checkpointed import checkpoint_first
from qtune.plan import make_plan
from qtune.recipe.parse import parse_recipe

pytestmark = pytest.mark.slow

HIDDEN, INTERMEDIATE, LAYERS, LENGTH = 64, 192, 2, 60
WIDTHS = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS, "vocab_size": 128,
          "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model and its adapter."""

    quantized: str | None = "nf4"
    nested: bool = True
    family: str = "llama"
    config: tuple[tuple[str, Any], ...] = ()
    lora: tuple[tuple[str, Any], ...] = ()


def network(case: Case, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(case.family, **WIDTHS | dict(case.config)), dtype=dtype
    )
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    if case.quantized:
        for module in list(made.modules()):
            for name, child in list(module.named_children()):
                if type(child) is torch.nn.Linear and name != "lm_head":
                    setattr(module, name, packed(child, case, dtype))
        made.is_loaded_in_4bit = case.quantized != "int8"
        made.is_loaded_in_8bit = case.quantized == "int8"
    return made.requires_grad_(False)


def packed(child: torch.nn.Linear, case: Case, dtype: torch.dtype) -> torch.nn.Module:
    shape = child.in_features, child.out_features, child.bias is not None
    if case.quantized == "int8":
        made = bitsandbytes.nn.Linear8bitLt(*shape, has_fp16_weights=False)
        made.weight = bitsandbytes.nn.Int8Params(child.weight.data, requires_grad=False, has_fp16_weights=False)
    else:
        made = bitsandbytes.nn.Linear4bit(*shape, compute_dtype=dtype)
        made.weight = bitsandbytes.nn.Params4bit(
            child.weight.data, False, quant_type=case.quantized, compress_statistics=case.nested, module=made
        )
    made.bias = child.bias
    made.support_avx512bf16_for_cpu = False
    return made.to("cpu")


def adapted(case: Case, dtype: torch.dtype = torch.float32, *, lean: bool, recompute: bool | int = False) -> PeftModel:
    given = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | dict(case.lora)
    model = get_peft_model(network(case, dtype), LoraConfig(task_type="CAUSAL_LM", **given))
    return readied(model, dtype, lean=lean, recompute=recompute)


def readied(model: PeftModel, dtype: torch.dtype, *, lean: bool, recompute: bool | int) -> PeftModel:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    model.train()
    if recompute:
        model.activation_checkpointing_enable({"use_reentrant": False})
        checkpoint_first(model, recompute)
        model.enable_input_require_grads()
    if lean:
        install_lean_step(model, dtype, tile_bytes=0)  # as many tiles as there can be
    return model


def ids(rows: int = 3) -> torch.Tensor:
    return torch.randint(1, 128, (rows, LENGTH), generator=torch.Generator().manual_seed(5))


def trained(
    model: PeftModel, dtype: torch.dtype = torch.float32, micro_batches: int = 2
) -> tuple[float, dict[str, Any]]:
    """The last loss and every gradient after some micro-batches."""
    for number in range(micro_batches):
        torch.manual_seed(number)  # dropout
        with torch.autocast("cpu", dtype) if dtype is not torch.float32 else contextlib.nullcontext():
            loss = model(input_ids=ids(), labels=ids(), use_cache=False).loss
        loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of any gradient."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[n].float() - theirs[n].float()).norm() / theirs[n].float().norm()) for n in theirs)


VARIANTS = {
    "nested nf4": Case(),
    "plain nf4": Case(nested=False),
    "nested fp4": Case(quantized="fp4"),
    "unquantized": Case(quantized=None),
    "rslora": Case(lora=(("use_rslora", True),)),
    "dropout": Case(lora=(("lora_dropout", 0.2),)),
    "biases": Case(config=(("attention_bias", True), ("mlp_bias", True))),
    "some layers": Case(lora=(("target_modules", ["q_proj", "v_proj", "down_proj"]),)),
    "attention alone": Case(lora=(("target_modules", ["q_proj", "k_proj", "v_proj", "o_proj"]),)),
    "unequal ranks and scales": Case(lora=(("rank_pattern", {"k_proj": 2}), ("alpha_pattern", {"up_proj": 3}))),
    "trained norms": Case(lora=(("modules_to_save", ["input_layernorm"]),)),
    "embeddings and head": Case(lora=(("target_modules", ["q_proj", "up_proj", "embed_tokens", "lm_head"]),)),
    "tied embeddings": Case(config=(("tie_word_embeddings", True),)),
    "layers by a pattern": Case(lora=(("target_modules", r".*\.1\..*(k_proj|gate_proj|up_proj)"),)),
    "last layers": Case(lora=(("target_modules", ["v_proj", "up_proj", "gate_proj"]), ("layers_to_transform", [1]))),
    "biases of the base trained": Case(config=(("attention_bias", True),), lora=(("bias", "lora_only"),)),
    "qwen2": Case(family="qwen2"),
    "qwen3": Case(family="qwen3"),
    "mistral": Case(family="mistral"),
    "gemma2": Case(family="gemma2"),
    "phi3": Case(family="phi3"),
    "olmo2": Case(family="olmo2"),
}


@pytest.mark.parametrize("recompute", [False, True, 1], ids=["kept", "recomputed", "one layer recomputed"])
@pytest.mark.parametrize("case", VARIANTS.values(), ids=VARIANTS)
def test_loss_and_every_gradient_are_pefts(case, recompute):
    theirs, expected = trained(adapted(case, lean=False))
    ours, found = trained(adapted(case, lean=True, recompute=recompute))  # 180 rows: three tiles of the MLP
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert distance(found, expected) < 2e-5


WITHOUT_CHANCE = {name: case for name, case in VARIANTS.items() if name != "dropout"}


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_the_gradients_are_as_near_to_the_exact_ones_as_pefts(dtype, recompute):
    ours, theirs = from_the_exact_ones(Case(), dtype, recompute)
    assert ours <= 1.2 * theirs


@pytest.mark.slow
@pytest.mark.parametrize("case", WITHOUT_CHANCE.values(), ids=WITHOUT_CHANCE)
def test_in_bfloat16_this_holds_for_every_variant(case):
    ours, theirs = from_the_exact_ones(case, torch.bfloat16, recompute=True)
    assert ours <= 1.2 * theirs


def from_the_exact_ones(case: Case, dtype: torch.dtype, recompute: bool) -> tuple[float, float]:
    """Squared distance of our gradients, and of peft's, from those of the same weights in fp32."""
    exact = network(case, dtype)
    for module in list(exact.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, bitsandbytes.nn.Linear4bit):
                plain = torch.nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
                weight = bitsandbytes.functional.dequantize_4bit(child.weight, child.weight.quant_state)
                plain.weight = torch.nn.Parameter(weight, requires_grad=False)
                plain.bias = child.bias
                setattr(module, name, plain)
    exact = exact.float()
    exact.is_loaded_in_4bit = False
    given = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | dict(case.lora)
    peft = get_peft_model(exact, LoraConfig(task_type="CAUSAL_LM", **given))
    _, truth = trained(readied(peft, torch.float32, lean=False, recompute=False))
    _, theirs = trained(adapted(case, dtype, lean=False), dtype)
    _, ours = trained(adapted(case, dtype, lean=True, recompute=recompute), dtype)
    near, far = (sum(float((found[n] - truth[n]).square().sum()) for n in truth) for found in (ours, theirs))
    return near, far


OTHER_ADAPTERS = {
    "p-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prefix-tuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prompt-tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "ia3": IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


@pytest.mark.parametrize("config", OTHER_ADAPTERS.values(), ids=OTHER_ADAPTERS)
def test_the_blocks_of_a_model_with_another_adapter_give_the_same_gradients(config):
    def found(*, lean: bool) -> tuple[float, dict[str, Any]]:
        torch.manual_seed(3)
        model = get_peft_model(network(Case(), torch.float32), copy.deepcopy(config))
        readied(model, torch.float32, lean=lean, recompute=False)
        loss = model(input_ids=ids(), labels=ids()).loss
        loss.backward()
        return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    (theirs, expected), (ours, gradients) = found(lean=False), found(lean=True)
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert distance(gradients, expected) < 2e-5


LEFT = {
    "dora": Case(lora=(("use_dora", True),)),
    "int8": Case(quantized="int8"),
    "biases in the update": Case(
        quantized=None, lora=(("lora_bias", True),), config=(("attention_bias", True), ("mlp_bias", True))
    ),
}


@pytest.mark.parametrize("case", LEFT.values(), ids=LEFT)
def test_what_is_not_taken_over_stays_pefts(case):
    model = adapted(case, lean=True)
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    assert layers
    assert not any("forward" in vars(layer) for layer in layers)
    assert not adapter_copies(model)
    theirs, expected = trained(adapted(case, lean=False))
    ours, found = trained(model)
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert distance(found, expected) < 2e-5


def test_calls_without_gradients_and_without_the_adapter_are_pefts_bit_for_bit():
    plain, lean = adapted(Case(), lean=False), adapted(Case(), lean=True)
    outputs = []
    for model in (plain, lean):
        model.eval()
        with torch.no_grad():
            written = model.generate(input_ids=ids()[:, :8], max_new_tokens=6, do_sample=False)
            on = model(input_ids=ids()).logits
            with model.disable_adapter():
                off = model(input_ids=ids()).logits
        outputs.append((written, on, off))
    for ours, theirs in zip(*outputs, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_gradients_an_mlp_of_many_rows_is_pefts_to_rounding_and_holds_no_more_than_a_tile(dtype):
    plain, lean = adapted(Case(), dtype, lean=False), adapted(Case(), dtype, lean=True)
    x = torch.randn(3, 500, HIDDEN, dtype=dtype)
    widest = []

    class Widest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **kwargs or {})
            if isinstance(out, torch.Tensor) and out.shape[-1] == INTERMEDIATE and "empty" not in func.__name__:
                widest.append(out.numel() // INTERMEDIATE)
            return out

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        expected = plain.get_base_model().model.layers[0].mlp(x)
        with Widest():
            found = lean.get_base_model().model.layers[0].mlp(x)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert float((found - expected).norm()) <= (1e-6 if dtype is torch.float32 else 1e-2) * float(expected.norm())
    assert max(widest) <= 2 * HIDDEN


def test_a_merged_model_is_pefts():
    plain, lean = (adapted(Case(quantized=None), lean=lean) for lean in (False, True))
    for model in (plain, lean):
        model.merge_adapter()
    with torch.no_grad():
        assert torch.equal(lean(input_ids=ids()).logits, plain(input_ids=ids()).logits)
    lean.unmerge_adapter()
    _, expected = trained(adapted(Case(quantized=None), lean=False))
    assert distance(trained(lean)[1], expected) < 1e-4  # merging and taking back rounds the weights


def test_the_adapters_names_and_values_in_a_file_stay_pefts():
    plain, lean = adapted(Case(), lean=False), adapted(Case(), lean=True)
    trained(lean)
    ours, theirs = get_peft_model_state_dict(lean), get_peft_model_state_dict(plain)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert list(lean.state_dict()) == list(plain.state_dict())


def test_an_adapter_that_has_changed_since_the_last_step_is_read_anew():
    changed, fresh = adapted(Case(), torch.bfloat16, lean=True), adapted(Case(), torch.bfloat16, lean=True)
    trained(changed, torch.bfloat16)
    for model in (changed, fresh):
        model.zero_grad()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora" in name:
                    parameter.mul_(1.5)
    assert trained(changed, torch.bfloat16)[0] == trained(fresh, torch.bfloat16)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_step_of_a_fused_optimizer_is_seen_by_the_next_forward(dtype):
    model = adapted(Case(), dtype, lean=True)
    trained(model, dtype)
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True).step()
    fresh = adapted(Case(), dtype, lean=True)
    values = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in fresh.named_parameters():
            parameter.copy_(values[name])
    model.zero_grad()
    (ours, gradients), (expected, theirs) = trained(model, dtype), trained(fresh, dtype)
    assert ours == expected
    assert distance(gradients, theirs) == 0


def test_layers_that_are_given_an_input_each_see_the_step_of_a_fused_optimizer():
    def apart() -> PeftModel:
        model = adapted(Case(), torch.bfloat16, lean=True)
        for layer in model.get_base_model().model.layers:
            for name in ("k_proj", "v_proj"):
                module = getattr(layer.self_attn, name)
                module.forward = lambda x, original=module.forward: original(x.clone())
        return model

    model, fresh = apart(), apart()
    trained(model, torch.bfloat16)
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True).step()
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), fresh.parameters(), strict=True):
            if theirs.requires_grad:
                theirs.copy_(ours)
    model.zero_grad()
    assert trained(model, torch.bfloat16)[0] == trained(fresh, torch.bfloat16)[0]


def test_a_layer_that_is_called_alone_sees_a_step_that_no_count_of_changes_shows():
    model = adapted(Case(), torch.bfloat16, lean=True)
    trained(model, torch.bfloat16)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
    optimizer.step()
    for copies in copies_of(model):
        copies.forget()
    layer = model.get_base_model().model.layers[0].self_attn.o_proj
    x = torch.randn(1, 5, HIDDEN, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        ours = layer(x)
        with torch.no_grad():
            theirs = layer(x)
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.05)


def test_memory_that_runs_out_while_copies_are_made_leaves_none_that_counts_as_new(monkeypatch):
    model = adapted(Case(), torch.bfloat16, lean=True)
    stack = copies_of(model)[0].stacks[0]
    stack.up_to_date(torch.bfloat16)
    with torch.no_grad():
        stack.layers[0].b.add_(1)

    def fails(*_):
        raise torch.OutOfMemoryError

    copy_all = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", fails)
    with pytest.raises(torch.OutOfMemoryError):
        stack.up_to_date(torch.bfloat16)
    monkeypatch.setattr(torch, "_foreach_copy_", copy_all)
    stack.up_to_date(torch.bfloat16)
    assert torch.equal(stack.weights.b[0], stack.layers[0].b.bfloat16())


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_a_gradient_of_a_gradient_is_an_error(recompute):
    model = adapted(Case(), lean=True, recompute=recompute)
    layer = model.get_base_model().model.layers[0]
    for module in (layer.self_attn.o_proj, layer.mlp, layer.input_layernorm):
        x = torch.randn(1, 5, HIDDEN, requires_grad=True)
        (slope,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            slope.sum().backward()


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_an_adapter_changed_between_forward_and_backward_is_an_error(recompute):
    model = adapted(Case(), lean=True, recompute=recompute)
    loss = model(input_ids=ids(), labels=ids(), use_cache=False).loss
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "down_proj.lora_A" in name:
                parameter.add_(1)
    with pytest.raises(RuntimeError, match="changed between the forward and the backward"):
        loss.backward()


class Count(TorchDispatchMode):
    """How often each operation ran, and how often it read a given storage."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}
        self.reads: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.partition(".")[0]
        self.calls[name] = self.calls.get(name, 0) + 1
        if name == "dequantize_nested":
            self.reads[args[0].data_ptr()] = self.reads.get(args[0].data_ptr(), 0) + 1
        return func(*args, **kwargs or {})


def test_a_checkpointed_layer_multiplies_with_down_once_forward_and_once_backward():
    model = adapted(Case(), lean=True, recompute=True)
    with Count() as count:
        model(input_ids=ids(1), labels=ids(1), use_cache=False).loss.backward()
    layer = model.get_base_model().model.layers[1]
    reads = {
        name: count.reads[module.base_layer.weight.data_ptr()]
        for parent in (layer.self_attn, layer.mlp)
        for name, module in parent.named_children()
        if hasattr(module, "base_layer")
    }
    thrice = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"), 3)
    assert reads == {**thrice, "down_proj": 2}


def test_queries_and_keys_are_turned_by_one_kernel_in_each_pass():
    model = adapted(Case(), lean=True)
    with Count() as count:
        model(input_ids=ids(1), labels=ids(1), use_cache=False).loss.backward()
    assert count.calls["rotate"] == 2 * model.config.num_hidden_layers


def test_an_input_that_several_layers_read_is_saved_once_and_gate_and_up_alone_beside_it():
    model = adapted(Case(), lean=True)
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    mlp = model.get_base_model().model.layers[0].mlp
    x = torch.randn(1, LENGTH, HIDDEN, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mlp(x)
    inner = LENGTH * 2 * 4
    assert sorted(saved.values()) == sorted(
        4 * size for size in (inner, LENGTH * HIDDEN, LENGTH * INTERMEDIATE, LENGTH * INTERMEDIATE)
    )


def test_under_checkpointing_an_mlp_saves_its_input_alone():
    model = adapted(Case(), lean=True, recompute=True)
    sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    mlp = model.get_base_model().model.layers[0].mlp
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mlp(torch.randn(1, LENGTH, HIDDEN, requires_grad=True))
    assert sizes == [LENGTH * HIDDEN]


def test_a_lean_step_takes_less_than_half_of_pefts_launches():
    nothing = {"view", "t", "transpose", "detach", "slice", "expand", "unsqueeze", "_unsafe_view", "alias", "select",
               "empty", "new_empty", "empty_like"}  # fmt: skip
    several = {"gemm_4bit": 4}  # absmax, its offset, the weight, the product
    launches = []
    for lean in (False, True):
        model = adapted(Case(), torch.bfloat16, lean=lean, recompute=True)
        with Count() as count, torch.autocast("cpu", torch.bfloat16):
            model(input_ids=ids(1), labels=ids(1), use_cache=False).loss.backward()
        launches.append(sum(several.get(name, 1) * n for name, n in count.calls.items() if name not in nothing))
    assert launches[1] < launches[0] / 2


@pytest.mark.parametrize("dtype", lean_check.TOLERANCES)
def test_the_check_on_a_card_passes_what_is_right_and_draws_nothing_of_the_runs(dtype):
    state = torch.get_rng_state()
    assert lean_check.lean_difference("cpu", dtype) <= lean_check.TOLERANCES[dtype]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_device_where_gradients_differ_trains_with_pefts_layers_and_says_why(monkeypatch):
    def differs(*_):
        return 0.3

    monkeypatch.setattr(lean_check, "lean_difference", differs)
    lean_check.lean_problem.cache_clear()
    tables = {"model": {"base": "org/model"}, "data": {"train": "rows.jsonl"}}
    recipe = parse_recipe(tables)
    device = lean_check.examined(present_device(), recipe)
    lean_check.lean_problem.cache_clear()
    plan = make_plan(recipe, device)
    assert not plan.lean_step
    assert plan.reasons["training", "lean_step"] == (
        f"qtune's functions do not agree with peft's layers on {device.name}: gradients differ by 3.0e-01"
    )
    asked = parse_recipe(tables | {"training": {"lean_step": False}})
    assert lean_check.examined(present_device(), asked).lean_problem is None
    assert not make_plan(asked, present_device()).lean_step


@pytest.mark.parametrize("dtype", lean_check.TOLERANCES)
def test_the_check_on_a_card_finds_one_wrong_gradient(dtype, monkeypatch):
    right = Stack.weight_gradients

    def wrong(self, x, u, grads, du):
        d_a, *d_b = right(self, x, u, grads, du)
        return [d_a, *(gradient * 1.2 for gradient in d_b)]

    monkeypatch.setattr(Stack, "weight_gradients", wrong)
    assert lean_check.lean_difference("cpu", dtype) > lean_check.TOLERANCES[dtype]


def test_what_one_layer_computed_for_the_others_is_let_go_of_when_the_module_fails():
    model = adapted(Case(), lean=True)
    attention = model.get_base_model().model.layers[0].self_attn
    attention.o_proj.forward = lambda x: 1 / 0
    for name in ("k_proj", "v_proj"):
        original = getattr(attention, name).forward
        getattr(attention, name).forward = lambda x, original=original: original(
            x.clone()
        )  # nobody comes for what waits
    with pytest.raises(ZeroDivisionError):
        trained(model)
    shared = next(stack for copies in copies_of(model) for stack in copies.stacks if len(stack.layers) == 3)
    assert shared is not None
    cells = [cell.cell_contents for cell in attention.forward.__func__.__closure__]
    waiting = next(cell for cell in cells if hasattr(cell, "forget"))
    assert not waiting._waiting
    assert waiting._input is None


@pytest.mark.parametrize("error", [AttributeError("no such thing"), TypeError("takes 2"), ImportError("no compiler")])
def test_whatever_the_check_on_a_card_fails_with_is_a_reason_to_take_pefts_layers(monkeypatch, error):
    def fails(*_):
        raise error

    monkeypatch.setattr(lean_check, "lean_difference", fails)
    assert lean_check.lean_problem.__wrapped__("cpu", torch.float32) == str(error)


def test_memory_that_runs_out_in_the_check_on_a_card_is_no_reason(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(lean_check, "lean_difference", full)
    with pytest.raises(torch.OutOfMemoryError):
        lean_check.lean_problem.__wrapped__("cpu", torch.float32)
