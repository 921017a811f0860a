"""The register of what is borrowed from libraries without being promised by them: private names, patched functions,
overridden private methods, arithmetic that is copied. Each entry has a probe, which fails with the library's name and
the files that rely on it: whoever raises a version bound reads here what broke, before a number is silently wrong.

A private name that is used and not registered fails as well (at the end of this file).
"""

import ast
import importlib
import importlib.metadata
import inspect
import re
import socket
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import bitsandbytes as bnb
import datasets
import peft
import pytest
import tomlkit
import torch
import transformers
from tomlkit.items import Comment, Null
from torch import nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, Trainer, TrainerState, TrainingArguments

import qtune
from qtune.memory.tracing.fake_tensors import RememberingMode
from qtune.network import offline_datasets
from qtune.startup.safe_bitsandbytes import wrong_kernels

PACKAGE = Path(qtune.__file__).parent


class Borrowed(NamedTuple):
    """Names of a library that are used in `files` of this package, and what must hold of them."""

    library: str
    names: tuple[str, ...]
    files: tuple[str, ...]
    probe: Callable[[], None]


REGISTER: list[Borrowed] = []


def borrowed(library: str, *names: str, files: tuple[str, ...]) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Registers the function below as the probe of these names."""

    def register(probe: Callable[[], None]) -> Callable[[], None]:
        REGISTER.append(Borrowed(library, names, files, probe))
        return probe

    return register


def tiny_config(**changes: Any) -> LlamaConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 1}
    return LlamaConfig(**{**sizes, "vocab_size": 32, **changes})


def tiny_llama() -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(tiny_config())


def parameters_of(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


# --- torch ---------------------------------------------------------------------------------------------------------


@borrowed("torch", "_linear_pointwise", files=("kernels/on_cpu.py",))
def _() -> None:
    left, right = torch.randn(70, 80), torch.randn(80, 90)
    for operands in ((left, right), (left, right.t().contiguous().t()), (left.t().contiguous().t(), right)):
        found = torch.ops.mkldnn._linear_pointwise.default(operands[0], operands[1].t(), None, "none", [], "")
        torch.testing.assert_close(found, left @ right, rtol=1e-5, atol=1e-4)


@borrowed(
    "torch", "torch._subclasses.fake_tensor.FakeTensorMode", "torch._subclasses.fake_tensor.FakeTensor", "_C",
    "_should_skip_dynamo", "_schema", "device",
    files=("memory/tracing/fake_tensors.py", "memory/tracing/bare_model.py", "memory/tracing/work.py"),
)  # fmt: skip
def fake_tensors_compute_shapes_and_types() -> None:
    """No public way: tensors without storage are `torch._subclasses`, whatever builds on them."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def results(mode: FakeTensorMode) -> list[tuple[Any, ...]]:
        with mode:
            x = torch.empty(4, 6, requires_grad=True)
            y = (x.T @ torch.empty(4, 5)).relu().view(3, 10)
            y.sum().backward()
        return [(tuple(t.shape), t.stride(), t.dtype, t.device) for t in (x, y, x.grad)]

    assert FakeTensorMode().cache_enabled in (True, False)
    remembering = RememberingMode()
    with remembering.watched(lambda func, args: NotImplemented, lambda func, args, out, remembered: None):
        pass
    assert results(remembering) == results(FakeTensorMode(allow_non_fake_inputs=True))
    assert FakeTensorMode._should_skip_dynamo() in (True, False)
    assert torch.ops.aten._foreach_add_.List._schema.returns == []
    assert torch.ops.prim.device.default.__name__ == "device.default"


@borrowed("torch", "_version", "_foreach_copy_", files=("adapter/products.py", "model/kept_weights.py"))
def a_tensor_counts_its_changes_and_many_are_copied_at_once() -> None:
    """Not all of them: a fused optimizer's step is not counted, so the copies are renewed at every forward as well."""
    parameters = [nn.Parameter(torch.randn(2, 2)) for _ in range(2)]
    before = [parameter._version for parameter in parameters]
    with torch.no_grad():
        parameters[0].mul_(2)
    assert parameters[0]._version > before[0]
    assert parameters[1]._version == before[1]
    low = [torch.empty(2, 2, dtype=torch.bfloat16) for _ in parameters]
    torch._foreach_copy_(low, [parameter.detach() for parameter in parameters])
    assert all(torch.equal(one, parameter.bfloat16()) for one, parameter in zip(low, parameters, strict=True))


@borrowed("torch", "_make_subclass", files=("memory/tracing/fake_tensors.py",))
def a_fake_tensor_made_by_hand_is_one_made_by_its_class() -> None:
    from torch._subclasses.fake_tensor import FakeTensor

    mode, cpu = RememberingMode(), torch.device("cpu")
    ours, theirs = mode.new((2, 3), torch.float32), FakeTensor(mode, torch.empty(2, 3, device="meta"), cpu)
    assert vars(ours).keys() == vars(theirs).keys()
    assert (ours.device, ours.dtype, ours.shape) == (theirs.device, theirs.dtype, theirs.shape)
    assert ours.fake_mode is theirs.fake_mode


@borrowed(
    "torch", "_cdata",
    files=(
        "memory/tracing/fake_tensors.py", "memory/tracing/ledger.py", "memory/tracing/work.py", "model/host.py",
        "model/kept_weights.py",
    ),
)  # fmt: skip
def a_storage_has_an_address_that_its_views_share() -> None:
    """The public `data_ptr()` is refused by storages without memory."""
    for x in (torch.empty(4), RememberingMode().new((4,), torch.float32)):
        assert x.untyped_storage()._cdata == x.view(2, 2).untyped_storage()._cdata
        assert x.untyped_storage()._cdata != x.clone().untyped_storage()._cdata


@borrowed("torch", "torch.utils._python_dispatch.TorchDispatchMode", files=("memory/tracing/ledger.py",))
def a_dispatch_mode_sees_every_operation_of_the_backward_too() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func.__name__)
            return func(*args, **(kwargs or {}))

    x = torch.ones(3, requires_grad=True)
    with Watch():
        (x * 2).sum().backward()
    assert [name for name in seen if name.startswith("mul")] == ["mul.Tensor", "mul.Tensor"]


@borrowed("torch", "_engine_run_backward", files=("memory/tracing/cuda.py",))
def the_engine_can_be_started_with_a_mode_on() -> None:
    """No public way: every public backward suspends the mode whose handler calls it."""
    x = torch.ones(3, requires_grad=True)
    loss = (x * x).sum()
    torch.autograd.graph._engine_run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )
    assert x.grad is not None
    assert x.grad.tolist() == [2, 2, 2]


@borrowed("torch", "_local_scalar_dense", "_grouped_mm", "lift_fresh", "nonzero", files=("memory/tracing/answers.py",))
def questions_for_values_have_the_names_that_are_answered() -> None:
    for name in ("_local_scalar_dense", "_grouped_mm", "lift_fresh", "nonzero"):
        assert getattr(torch.ops.aten, name).default.__name__ == f"{name.removeprefix('aten.')}.default"
    assert [argument.name for argument in torch.ops.aten._grouped_mm.default._schema.arguments][:3] == [
        "self", "mat2", "offs",
    ]  # fmt: skip


@borrowed("torch", "_record_memory_history", "_dump_snapshot", files=("memory/measured/snapshot.py",))
def the_allocators_history_can_be_kept() -> None:
    """PyTorch's documentation gives these private names as the way ("Understanding CUDA Memory Usage")."""
    assert {"enabled", "stacks", "max_entries"} <= set(parameters_of(torch.cuda.memory._record_memory_history))
    assert parameters_of(torch.cuda.memory._dump_snapshot)[0] == "filename"


@borrowed(
    "torch", "_parameters", "_buffers",
    files=(
        "memory/tracing/bare_model.py", "memory/tracing/layers.py", "memory/savings.py", "model/host.py",
        "export/verify/streamed.py", "export/verify/exact.py",
    ),
)  # fmt: skip
def a_module_looks_its_tensors_up_in_these_dictionaries() -> None:
    layer = nn.Linear(2, 2, bias=False)
    layer.register_buffer("scale", torch.ones(1))
    other, scale = nn.Parameter(torch.zeros(2, 2)), torch.zeros(1)
    layer._parameters["weight"], layer._buffers["scale"] = other, scale
    assert layer.weight is other
    assert layer.scale is scale


@borrowed("torch", "_sleep", files=("timing/measure.py",))
def a_card_can_be_kept_waiting_for_some_cycles() -> None:
    """No public way: without it the processor's launches would be measured in place of the card's kernels."""
    assert callable(torch.cuda._sleep)


@borrowed("torch", "_scaled_dot_product_attention_math", files=("memory/tracing/cuda.py",))
def plain_attention_can_be_asked_for_and_returns_its_weights() -> None:
    """The public choice of a kernel is a global setting, and gives the weights away to nobody."""
    q, k = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    out, weights = torch.ops.aten._scaled_dot_product_attention_math(q, k, k, is_causal=True, enable_gqa=True)
    expected = nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, expected)
    assert weights.shape == (1, 4, 3, 3)


@borrowed(
    "transformers", "_can_use_grouped_mm", "bitsandbytes.autograd._functions", "MatMul8bitFp", "MatMul8bitLt",
    files=("memory/tracing/device_state.py",),
)  # fmt: skip
def questions_about_the_device_are_asked_by_these_names() -> None:
    from bitsandbytes.autograd import _functions
    from transformers.integrations import moe

    assert len(parameters_of(moe._can_use_grouped_mm)) == 3
    assert {"MatMul8bitFp", "MatMul8bitLt"} <= set(vars(_functions))
    assert "MatMul8bitFp" in inspect.getsource(_functions.matmul)


# --- transformers --------------------------------------------------------------------------------------------------


@borrowed("transformers", "ImmutableSandboxedEnvironment", files=("data/bounds.py",))
def templates_are_compiled_in_the_environment_of_this_name() -> None:
    """No public way to give `apply_chat_template` an environment of one's own."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    from qtune.data.bounds import BoundedEnvironment

    _compile_jinja_template.cache_clear()
    assert isinstance(_compile_jinja_template("{{ messages }}").environment, BoundedEnvironment)


@borrowed("transformers", "accelerate_dispatch", files=("model/load.py",))
def loading_to_two_places_calls_the_function_that_is_replaced() -> None:
    """No public way: a device_map with two places always comes with accelerate's hooks."""
    assert callable(transformers.modeling_utils.accelerate_dispatch)
    assert "accelerate_dispatch(" in inspect.getsource(transformers.PreTrainedModel.from_pretrained)


@borrowed("transformers", "find_packed_sequence_indices", files=("memory/tracing/trace.py",))
def packed_rows_are_looked_for_by_the_function_that_is_replaced() -> None:
    from transformers import masking_utils

    assert parameters_of(masking_utils.find_packed_sequence_indices) == ["position_ids"]
    assert inspect.getsource(masking_utils).count("find_packed_sequence_indices(") == 2  # defined once, called once


@borrowed(
    "transformers", "rename_source_key", "WeightConverter", "WeightRenaming", "get_model_conversion_mapping",
    files=("export/layout.py",),
)  # fmt: skip
def names_of_a_checkpoint_are_mapped_by_these() -> None:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    model = tiny_llama()
    assert all(isinstance(entry, (WeightConverter, WeightRenaming)) for entry in get_model_conversion_mapping(model))
    targets = model.state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    assert rename_source_key(name, [], [], model.base_model_prefix, targets) == (name, None)
    assert rename_source_key(name.removeprefix("model."), [], [], model.base_model_prefix, targets) == (name, None)


@borrowed(
    "transformers", "convert_and_load_state_dict_in_model", "LoadStateDictConfig", "get_model_conversion_mapping",
    "mark_tied_weights_as_initialized", "tie_weights", "_adjust_missing_and_unexpected_keys",
    files=("model/completeness.py",),
)  # fmt: skip
def a_checkpoint_is_loaded_without_its_storage_and_reported() -> None:
    """No public way: `from_pretrained` on the meta device reads the weights, and tells of a first misfit alone."""
    from transformers import modeling_utils

    with torch.device("meta"):
        tied = LlamaForCausalLM(tiny_config(tie_word_embeddings=True))
    stored = {name: torch.empty(tensor.shape, device="meta") for name, tensor in tied.state_dict().items()}
    del stored["lm_head.weight"], stored["model.norm.weight"]
    stored["odd"] = torch.empty(1, device="meta")
    settings = modeling_utils.LoadStateDictConfig(device_map={"": "meta"}, ignore_mismatched_sizes=True)
    report, _ = modeling_utils.convert_and_load_state_dict_in_model(tied, stored, settings, None)
    tied.mark_tied_weights_as_initialized(report)
    tied.tie_weights(missing_keys=report.missing_keys, recompute_mapping=False)
    tied._adjust_missing_and_unexpected_keys(report)
    assert (report.missing_keys, report.unexpected_keys) == ({"model.norm.weight"}, {"odd"})
    source = inspect.getsource(modeling_utils.PreTrainedModel._finalize_model_loading)
    steps = ("mark_tied_weights_as_initialized", "tie_weights(missing_keys", "_adjust_missing_and_unexpected_keys")
    assert [source.index(step) for step in steps] == sorted(source.index(step) for step in steps)


@borrowed("transformers", "_materialize_copy", "core_model_loading", files=("model/weights.py",))
def every_weight_passes_here_when_it_is_read() -> None:
    from transformers import core_model_loading

    assert parameters_of(core_model_loading._materialize_copy) == ["tensor", "device", "dtype"]
    assert "_materialize_copy(tensor, device, dtype)" in inspect.getsource(core_model_loading.spawn_materialize)


@borrowed(
    "transformers", "param_needs_quantization", "preprocess_model", "postprocess_model", "local_torch_dtype",
    files=("export/layout.py", "memory/tracing/bare_model.py"),
)  # fmt: skip
def a_quantizer_replaces_the_layers_before_weights_are_there() -> None:
    from transformers.modeling_utils import local_torch_dtype
    from transformers.quantizers.auto import AutoHfQuantizer

    model = tiny_llama()
    quantizer = AutoHfQuantizer.from_config(BitsAndBytesConfig(load_in_4bit=True), pre_quantized=False)
    with local_torch_dtype(torch.bfloat16):
        assert torch.get_default_dtype() is torch.bfloat16
        quantizer.preprocess_model(model, dtype=torch.bfloat16, device_map=None)
    quantized = {name for name, _ in model.named_parameters() if quantizer.param_needs_quantization(model, name)}
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert quantized == linear
    assert len(linear) == 7
    quantizer.postprocess_model(model)


@borrowed("transformers", "_get_dtype_plan", files=("model/kept_precision.py",))
def a_model_says_what_it_keeps_in_fp32() -> None:
    with torch.device("meta"):
        llama = LlamaForCausalLM(tiny_config())
        glm = transformers.AutoModelForCausalLM.from_config(
            transformers.DeepseekV3Config(
                hidden_size=64,
                intermediate_size=64,
                moe_intermediate_size=32,
                num_hidden_layers=1,
                vocab_size=32,
                num_attention_heads=2,
                n_routed_experts=4,
                num_experts_per_tok=2,
                n_group=1,
                topk_group=1,
            )
        )
    assert llama._get_dtype_plan(torch.float16) == {}
    kept = glm._get_dtype_plan(torch.float16)
    assert kept
    assert set(kept.values()) == {torch.float32}


OVERRIDDEN = {
    "_get_train_sampler": ["self", "train_dataset"],
    "get_batch_samples": ["self", "epoch_iterator", "num_batches", "device"],
    "_run_epoch": [
        "self",
        "model",
        "epoch",
        "train_dataloader",
        "steps_in_epoch",
        "num_update_steps_per_epoch",
        "trial",
        "ignore_keys_for_eval",
        "start_time",
        "resume_from_checkpoint",
        "epochs_trained",
        "steps_trained_in_current_epoch",
    ],
    "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
    "training_step": ["self", "model", "inputs", "num_items_in_batch"],
    "evaluate": ["self", "eval_dataset", "ignore_keys", "metric_key_prefix"],
    "log": ["self", "logs", "start_time"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_save": ["self", "output_dir", "state_dict"],
    "floating_point_ops": ["self", "inputs"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_save_optimizer_and_scheduler": ["self", "output_dir"],
    "_save_scaler": ["self", "output_dir"],
    "_save_rng_state": ["self", "output_dir"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "_load_scaler": ["self", "checkpoint"],
    "_load_rng_state": ["self", "checkpoint"],
    "_get_grad_norm": ["self", "model", "grad_norm"],
    "_clip_grad_norm": ["self", "model"],
}


@borrowed("transformers", *OVERRIDDEN, files=("training/trainer.py",))
def the_trainer_has_the_methods_that_are_overridden() -> None:
    for name, parameters in OVERRIDDEN.items():
        assert parameters_of(getattr(Trainer, name)) == parameters, name
    loop = inspect.getsource(Trainer)
    assert loop.index("self._clip_grad_norm(") < loop.index("self._get_grad_norm("), "the norm is that after clipping"
    assert loop.index("self._get_grad_norm(") < loop.index("self.optimizer.step()"), "a gradient is dropped in between"
    assert loop.index("if args.eval_on_start:") < loop.index("self._run_epoch("), (
        "an evaluation may end a run before it"
    )
    parts = ("optimizer_and_scheduler", "scaler", "rng_state")
    states = [f"_{way}_{part}" for way in ("save", "load") for part in parts]
    others = ("_save", "_save_checkpoint", "floating_point_ops", "get_batch_samples")
    for name in ("_get_train_sampler", "_load_from_checkpoint", *others, *states):
        assert re.search(rf"self\.{name}\b", loop), f"{name} is used by nobody"


@borrowed(
    "transformers", "_get_output_dir", "_prepare_inputs", "compute_loss_context_manager", "model_wrapped",
    "model_accepts_loss_kwargs", "callback_handler",
    files=("training/trainer.py",),
)  # fmt: skip
def the_trainer_has_what_the_step_asks_of_it() -> None:
    assert parameters_of(Trainer._get_output_dir) == ["self", "trial"]
    assert parameters_of(Trainer._prepare_inputs) == ["self", "inputs"]
    assert parameters_of(Trainer.compute_loss_context_manager) == ["self"]
    made = inspect.getsource(Trainer.__init__)
    for name in ("model_wrapped", "model_accepts_loss_kwargs", "callback_handler"):
        assert f"self.{name} = " in made


@borrowed("torch", "_last_lr", files=("training/callbacks.py",))
def a_schedule_keeps_its_peak_and_the_rate_that_it_gave_last() -> None:
    """No public way to change the peak of a schedule that a checkpoint has brought back."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert (schedule.base_lrs, schedule._last_lr) == ([1e-2], [5e-3])
    assert optimizer.param_groups[0]["initial_lr"] == 1e-2


@borrowed("transformers", "_n_gpu", files=("training/build.py",))
def the_number_of_cards_can_be_set() -> None:
    """The public way is an environment variable, which must be set before CUDA begins."""
    arguments = TrainingArguments(output_dir="unused", use_cpu=True, report_to="none")
    arguments._n_gpu = 7
    assert arguments.n_gpu == 7


@borrowed("transformers", "grad_norm", "learning_rate", files=("training/callbacks.py",))
def records_have_the_keys_that_are_read() -> None:
    said = inspect.getsource(Trainer._maybe_log_save_evaluate)
    for key in ("loss", "grad_norm", "learning_rate"):
        assert f'logs["{key}"]' in said


@borrowed("transformers", "compute_steps", files=("training/callbacks.py",))
def intervals_are_computed_again_from_the_arguments() -> None:
    state = TrainerState(max_steps=10, logging_steps=3)
    arguments = TrainingArguments(output_dir="unused", logging_steps=5, use_cpu=True, report_to="none")
    state.compute_steps(arguments, state.max_steps)
    assert state.logging_steps == 5


@borrowed("transformers", "TRAINER_STATE_NAME", files=("training/trainer.py", "training/checkpoints.py"))
def a_checkpoints_state_has_a_name() -> None:
    from transformers.trainer import TRAINER_STATE_NAME

    assert "TRAINER_STATE_NAME" in inspect.getsource(Trainer._save_checkpoint)
    assert TRAINER_STATE_NAME == "trainer_state.json"


@borrowed("transformers", "_supports_sdpa", files=("model/load.py",))
def a_class_says_whether_it_can_be_given_sdpa() -> None:
    """The public way is to build the model and to catch what it raises."""
    assert LlamaForCausalLM._supports_sdpa is True
    assert transformers.BloomForCausalLM._supports_sdpa is False


@borrowed("transformers", "_init_weights", files=("export/verify/streamed.py",))
def a_module_without_weights_can_have_its_buffers_computed() -> None:
    real, empty = LlamaForCausalLM(tiny_config()), tiny_llama()
    name = "model.rotary_emb"
    module = empty.get_submodule(name)
    module._buffers["inv_freq"] = torch.empty_like(module.inv_freq, device="cpu")
    empty._init_weights(module)
    assert torch.equal(module.inv_freq, real.get_submodule(name).inv_freq)


@borrowed("transformers", "all_tied_weights_keys", files=("export/layout.py",))
def a_model_lists_what_is_tied() -> None:
    with torch.device("meta"):
        tied = LlamaForCausalLM(tiny_config(tie_word_embeddings=True))
    assert dict(tied.all_tied_weights_keys) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert dict(tiny_llama().all_tied_weights_keys) == {}


@borrowed("transformers", "get_parameter_names", "get_decay_parameter_names", files=("memory/tracing/step.py",))
def the_copied_rule_of_weight_decay_is_the_trainers() -> None:
    from qtune.memory.tracing.step import parameter_groups

    model = LlamaForCausalLM(tiny_config(attention_bias=True))
    trainer = object.__new__(Trainer)
    decayed = set(trainer.get_decay_parameter_names(model))
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    ours = {named[id(parameter)] for group in parameter_groups(model) if group.get("weight_decay", 1) != 0
            for parameter in group["params"]}  # fmt: skip
    assert ours == decayed or {named[id(p)] for p in parameter_groups(model)[0]["params"]} == decayed


@borrowed("transformers", "_commit_hash", files=("training/depends.py",))
def a_configuration_keeps_the_commit_that_it_came_from() -> None:
    from transformers import configuration_utils, utils

    assert "_commit_hash" in inspect.getsource(configuration_utils)
    assert "commit_hash" in inspect.getsource(utils.hub)


@borrowed("transformers", "_name_or_path", files=("memory/tracing/bare_model.py",))
def a_configuration_knows_where_it_came_from() -> None:
    config = tiny_config()
    config.name_or_path = "somewhere"
    assert config._name_or_path == "somewhere"


@borrowed("transformers", "PRETOKENIZE_REGEX", "QWEN2_SPLIT", files=("export/gguf/vocabulary.py",))
def the_split_of_qwen2_is_the_one_that_is_recognized() -> None:
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    from qtune.export.gguf.vocabulary import QWEN2_SPLIT

    assert QWEN2_SPLIT == PRETOKENIZE_REGEX


# --- trl -----------------------------------------------------------------------------------------------------------


@borrowed("trl", "create_model_card", files=("training/trainer.py",))
def a_checkpoint_gets_its_card_from_the_method_that_is_overridden() -> None:
    from trl import SFTTrainer

    assert "self.create_model_card(" in inspect.getsource(SFTTrainer._save_checkpoint)
    assert SFTTrainer._save_checkpoint is not Trainer._save_checkpoint


@borrowed("trl", "cast_adapter", files=("training/trainer.py",))
def the_constructor_makes_adapters_on_four_bits_bfloat16_and_nothing_does_later() -> None:
    """What `cast_adapter` undoes after it. Where this fails because the first is gone, that line can go."""
    from trl import SFTTrainer

    casting = {
        name for name, method in vars(SFTTrainer).items()
        if inspect.isfunction(method) and "torch.bfloat16" in inspect.getsource(method)
    }  # fmt: skip
    assert casting == {"__init__"}


# --- peft ----------------------------------------------------------------------------------------------------------


def adapted(config: peft.PeftConfig) -> peft.PeftModel:
    return peft.get_peft_model(LlamaForCausalLM(tiny_config()), config)


@borrowed("peft", "create_or_update_model_card", files=("adapter/state.py",))
def saving_asks_the_model_for_a_card() -> None:
    """Not to have one is no parameter."""
    assert "self.create_or_update_model_card(" in inspect.getsource(peft.PeftModel.save_pretrained)
    assert parameters_of(peft.PeftModel.create_or_update_model_card) == ["self", "output_dir"]


@borrowed("peft", "_adapters_disabled", files=("tuned/generate.py",))
def a_soft_prompt_says_whether_it_is_off() -> None:
    """`get_model_status` is for adapters inside layers and refuses soft prompts."""
    model = adapted(peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert getattr(model, "_adapters_disabled", False) is False
    with model.disable_adapter():
        assert model._adapters_disabled is True
    assert model._adapters_disabled is False


@borrowed(
    "peft", "prompt_encoder", "prompt_tokens",
    files=(
        "adapter/starts.py", "adapter/prompt_encoder.py", "adapter/prefix.py", "memory/tracing/bare_model.py",
    ),
)  # fmt: skip
def the_vectors_of_a_soft_prompt_are_in_its_encoder() -> None:
    model = adapted(peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert model.prompt_encoder[model.active_adapter].embedding.weight.shape == (2, 64)
    assert [tokens.tolist() for tokens in model.prompt_tokens.values()] == [[0, 1]]


@borrowed("peft", "mlp_head", "lstm_head", "get_prompt_embedding_to_save", files=("adapter/prompt_encoder.py",))
def a_prompt_encoder_may_be_replaced_by_one_of_the_same_parts() -> None:
    """What computes the vectors is called for them in training and in saving, and nothing else of it is."""
    model = adapted(peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=8))
    made = model.prompt_encoder[model.active_adapter]
    assert isinstance(made.mlp_head[-1], nn.Linear)

    class Doubled(nn.Module):
        embedding = made.embedding

        def forward(self, indices: torch.Tensor) -> torch.Tensor:
            return 2 * self.embedding(indices)

    model.prompt_encoder[model.active_adapter] = Doubled()
    assert torch.equal(model.get_prompt(1)[0], 2 * made.embedding.weight)
    assert torch.equal(model.get_prompt_embedding_to_save(model.active_adapter), 2 * made.embedding.weight)


@borrowed("transformers", "_can_checkpoint_with_cache", files=("adapter/prefix.py",))
def a_layer_that_is_computed_twice_may_keep_a_cache_that_is_only_read() -> None:
    layers = importlib.import_module("transformers.modeling_layers")
    assert layers.GradientCheckpointingLayer._can_checkpoint_with_cache is False
    assert "_can_checkpoint_with_cache" in inspect.getsource(layers.GradientCheckpointingLayer.__init_subclass__)


@borrowed("peft", "get_pattern_key", files=("export/adapter_weights.py",))
def patterns_of_ranks_match_as_they_are_merged() -> None:
    from peft.utils.other import get_pattern_key

    assert get_pattern_key(["q_proj"], "model.layers.0.self_attn.q_proj") == "q_proj"
    assert get_pattern_key(["v_proj"], "model.layers.0.self_attn.q_proj") == "model.layers.0.self_attn.q_proj"


@borrowed("peft", "Params4bit", files=("memory/tracing/bare_model.py",))
def a_packed_weight_is_recognized_by_the_name_of_its_class() -> None:
    source = inspect.getsource(importlib.import_module("peft.utils.integrations"))
    assert '"Params4bit"' in source
    assert '__name__ == "Params4bit"' in inspect.getsource(importlib.import_module("peft.peft_model"))


# --- bitsandbytes --------------------------------------------------------------------------------------------------


@borrowed(
    "bitsandbytes", "QuantState", "state2", "offset",
    files=("memory/tracing/bare_model.py", "memory/tracing/adoption.py", "export/basis.py"),
)  # fmt: skip
def a_quantized_weights_state_has_the_parts_that_are_counted() -> None:
    _, state = bnb.functional.quantize_4bit(torch.randn(64, 64), quant_type="nf4", compress_statistics=True)
    assert set(parameters_of(type(state))) >= {
        "absmax", "shape", "code", "blocksize", "quant_type", "dtype", "offset", "state2",
    }  # fmt: skip
    assert (state.absmax.dtype, state.absmax.shape) == (torch.uint8, (64,))
    assert (state.state2.absmax.dtype, state.state2.blocksize) == (torch.float32, 256)
    assert state.nested
    assert state.offset.shape == ()


@borrowed("bitsandbytes", "SCB", "CB", files=("memory/tracing/bare_model.py", "memory/tracing/adoption.py"))
def an_int8_weight_carries_its_row_scales() -> None:
    weight = bnb.nn.Int8Params(torch.zeros(3, 4, dtype=torch.int8), requires_grad=False, SCB=torch.ones(3))
    assert weight.SCB.tolist() == [1, 1, 1]
    assert hasattr(weight, "CB")
    assert hasattr(weight, "has_fp16_weights")


@borrowed(
    "bitsandbytes", "quantize_4bit", "dequantize_4bit", "dequantize_blockwise", "int8_vectorwise_quant",
    "int8_mixed_scaled_mm", "gemm_4bit",
    files=("memory/tracing/bare_model.py", "memory/tracing/answers.py", "memory/tracing/cuda.py", "export/basis.py"),
)  # fmt: skip
def operations_have_the_arguments_that_are_given_and_read() -> None:
    arguments = {
        "quantize_4bit": ["A", "blocksize", "quant_type", "quant_storage"],
        "dequantize_4bit": ["A", "absmax", "blocksize", "quant_type", "shape", "dtype"],
        "dequantize_blockwise": ["A", "absmax", "code", "blocksize", "dtype"],
        "int8_vectorwise_quant": ["A", "threshold"],
        "int8_mixed_scaled_mm": ["A", "CA", "CB"],
        "gemm_4bit": ["A", "B", "shapeB", "absmax", "blocksize", "quant_type", "bias", "absmax_8bit"],
    }
    for name, expected in arguments.items():
        schema = getattr(torch.ops.bitsandbytes, name).default._schema
        assert [argument.name for argument in schema.arguments][: len(expected)] == expected, name


@borrowed("bitsandbytes", "support_avx512bf16_for_cpu", files=("startup/safe_bitsandbytes.py",))
def its_traps_on_cpus_are_avoided() -> None:
    """Each has a probe of its own there, which `qtune doctor` asks too."""
    assert wrong_kernels() == []
    assert bnb.nn.Linear4bit(64, 64).support_avx512bf16_for_cpu is False


@borrowed("torch", "compile", files=("startup/safe_bitsandbytes.py",))
def bitsandbytes_hands_functions_over_that_are_compiled_when_they_are_called() -> None:
    """Public, and replaced while bitsandbytes is imported, which asks for nothing that is there only afterwards."""
    assert "torch.compile(fn, **compile_kwargs)" in inspect.getsource(bnb.backends.default.ops._try_torch_compile)
    assert torch.compile.__module__ == "torch", "torch has its own back"


@borrowed("bitsandbytes", "_four_bit_round_trip", files=("export/basis.py",))
def the_copied_arithmetic_of_four_bits_is_the_librarys() -> None:
    from qtune.export.basis import Basis, as_trained

    torch.manual_seed(0)
    weight = torch.randn(128, 64)
    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            codes, state = bnb.functional.quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
            expected = bnb.functional.dequantize_4bit(codes, state)
            basis = Basis(kind, nested, torch.float32, torch.float32)
            assert torch.equal(as_trained(weight, basis), expected), (kind, nested)


# --- datasets, tomlkit ---------------------------------------------------------------------------------------------


@borrowed("datasets", "HF_HUB_OFFLINE", files=("network.py",))
def datasets_ask_nobody_once_they_are_told_to_be_offline() -> None:
    """No public way after the import; the variable itself is documented."""
    before = socket.socket.connect
    try:
        socket.socket.connect = None  # type: ignore[assignment, method-assign]
        with offline_datasets():
            assert datasets.config.HF_HUB_OFFLINE
            with pytest.raises(ConnectionError, match="OfflineModeIsEnabled"):
                datasets.load_dataset("nobody/has-this")
    finally:
        socket.socket.connect = before  # type: ignore[method-assign]


@borrowed("datasets", "_fingerprint", files=("data/packing.py", "data/sources.py"))
def a_dataset_has_a_fingerprint_of_its_contents() -> None:
    one = datasets.Dataset.from_dict({"text": ["a", "b"]})
    assert isinstance(one._fingerprint, str)
    assert one._fingerprint != one.select([0])._fingerprint


@borrowed("tomlkit", "_insert_after", "body", "trivia", files=("recipe/text.py", "run/resolved.py"))
def a_table_gives_away_its_lines_and_takes_one_in_between() -> None:
    """No public way: a key is added at the end of a table, behind the blank line that ends it."""
    document = tomlkit.parse("[a]\none = 1  # why\n\n[b]\n")
    table = document["a"]
    keys = [(key.key, item.trivia.comment) for key, item in table.value.body if key is not None]
    assert keys == [("one", "# why")]
    table.value._insert_after("one", "two", tomlkit.item(2))
    assert tomlkit.dumps(document) == "[a]\none = 1  # why\ntwo = 2\n\n[b]\n"
    document = tomlkit.parse("[a]\n# about\n# one\none = 1\ntwo = 2\n")
    body = document["a"].value.body
    assert [isinstance(item, Comment) for _, item in body] == [True, True, False, False]
    body[1] = (None, Null())
    document["a"].remove("one")
    assert tomlkit.dumps(document) == "[a]\n# about\ntwo = 2\n"


# --- the probes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", REGISTER, ids=lambda entry: f"{entry.library}-{entry.probe.__name__}")
def test_what_is_borrowed_is_still_as_it_was(entry: Borrowed) -> None:
    try:
        entry.probe()
    except Exception as error:
        version = importlib.metadata.version(entry.library)
        files = ", ".join(f"qtune/{file}" for file in entry.files)
        pytest.fail(
            f"{entry.library} {version}: {', '.join(entry.names)}: {type(error).__name__}: {error}; used in {files}",
            pytrace=False,
        )


@pytest.mark.parametrize("entry", REGISTER, ids=lambda entry: f"{entry.library}-{entry.probe.__name__}")
def test_every_file_that_is_registered_uses_one_of_the_names(entry: Borrowed) -> None:
    for file in entry.files:
        text = (PACKAGE / file).read_text(encoding="utf-8")
        assert any(re.search(rf"\b{re.escape(name.rpartition('.')[2])}\b", text) for name in entry.names), file


# --- is the register complete? -------------------------------------------------------------------------------------


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_uses(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Private names that a file takes from elsewhere: imports, attributes of what is not its own, getattr."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    own |= {
        node.attr for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own(node.value)
    }  # fmt: skip
    own |= {node.target.id for node in ast.walk(tree) if isinstance(node, ast.AnnAssign) and is_name(node.target)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not str(node.module).startswith(("qtune", "__")):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            names = []
        yield from ((name, node.lineno) for name in names if any(map(is_private, name.split("."))))
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            at_home = is_own(node.value) or (isinstance(node.value, ast.Name) and node.value.id in own)
            if not at_home or node.attr not in own:
                yield node.attr, node.lineno
        if isinstance(node, ast.Call) and is_name(node.func) and node.func.id in ("getattr", "setattr", "hasattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(name.value):
                yield name.value, node.lineno


def is_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Name)


def is_own(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def replaced(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Attributes of imported libraries that a file assigns to."""
    imported = {
        (alias.asname or alias.name).partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        or (isinstance(node, ast.ImportFrom) and not str(node.module).startswith("qtune"))
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Attribute) and is_name(target.value) and target.value.id in imported:
                    yield target.attr, node.lineno


FILES = sorted(PACKAGE.rglob("*.py"))
OWN_MARKS = {"_qtune_original_forward"}
"""Attributes that we hang on objects of a library ourselves."""
DOCUMENTED = {"_exit", "_replace"}
"""Public names that begin with an underscore: os._exit and a named tuple's _replace are in Python's own reference."""


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_every_private_name_that_is_used_is_registered(file: Path) -> None:
    here = str(file.relative_to(PACKAGE))
    known = {name for entry in REGISTER if here in entry.files for name in entry.names} | OWN_MARKS | DOCUMENTED
    tree = ast.parse(file.read_text(encoding="utf-8"))
    missing = [f"{here}:{line} {name}" for name, line in [*private_uses(tree), *replaced(tree)] if name not in known]
    assert missing == []


def classes_of_ours() -> Iterator[type]:
    for file in FILES:
        if file.name not in ("__main__.py", "__init__.py"):
            name = ".".join(("qtune", *file.relative_to(PACKAGE).with_suffix("").parts))
            if name == "qtune.kernels.on_cuda" and find_spec("triton") is None:
                continue  # it comes with PyTorch for cards; the file has functions alone
            module = importlib.import_module(name)
            yield from (one for one in vars(module).values() if isinstance(one, type) and one.__module__ == name)


def test_every_private_method_of_a_library_that_is_overridden_is_registered() -> None:
    known = {name for entry in REGISTER for name in entry.names}
    missing = [
        f"{one.__module__}.{one.__name__}.{name}"
        for one in classes_of_ours()
        for name, value in vars(one).items()
        if is_private(name) and name not in known and getattr(value, "__module__", None) == one.__module__
        for base in one.__mro__[1:]
        if not base.__module__.startswith("qtune") and name in vars(base)
    ]
    assert missing == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import torch._dynamo\n", ["torch._dynamo"]),
        ("from torch._C import x\n", ["torch._C.x"]),
        ("model._private()\n", ["_private"]),
        ("getattr(model, '_private', None)\n", ["_private"]),
        ("class A:\n    def _mine(self):\n        return self._mine() or A._mine\n", []),
        ("def look(self):\n    return self._parameters\n", ["_parameters"]),
        ("from qtune.x import _mine\n", []),
    ],
)
def test_private_uses_are_found_however_they_are_written(text: str, found: list[str]) -> None:
    assert [name for name, _ in private_uses(ast.parse(text))] == found


def test_a_patched_library_is_found() -> None:
    tree = ast.parse("import torch\nfrom transformers import masking_utils\ntorch.compile = masking_utils.f = None\n")
    assert [name for name, _ in replaced(tree)] == ["compile", "f"]
