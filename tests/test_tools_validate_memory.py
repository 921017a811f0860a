"""Published measurements as steps that can be traced: what each field means, and how earlier versions held logits."""

import json
import sys
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).resolve().parent.parent / "tools"
sys.path.insert(0, str(TOOLS))

import validate_memory  # noqa: E402
from memory_record import (  # noqa: E402
    CannotBuildError,
    adapter_of,
    build_of,
    dtype_in,
    is_upcast,
    measured_gib,
    optimizer_of,
    quantity_of,
    targets_of,
)
from old_transformers import as_in  # noqa: E402

from qtune.memory.tracing import categories  # noqa: E402
from qtune.memory.tracing.trace import trace  # noqa: E402

ROWS, LENGTH, VOCAB = 2, 64, 4096
TINY = {
    "id": "tiny",
    "model": "a/llama",
    "geometry": {
        "hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "intermediate": 128, "vocab": VOCAB,
        "tied": False,
    },
    "method": "lora", "rank": 4, "target_modules": ["q_proj", "v_proj"],
    "quantization": {"type": "nf4", "double_quant": True},
    "compute_dtype": "bfloat16", "weights_dtype": "nf4 for decoder linear layers, rest bfloat16",
    "adapter_dtype": "float32", "optimizer": "adamw_torch", "batch_size": ROWS, "sequence_length": LENGTH,
    "sequence_length_exact": True, "gradient_checkpointing": True, "attention_implementation": "sdpa",
    "measured_quantity": "peak allocated", "value_gib": 1.0,
}  # fmt: skip


def traced(**changes) -> object:
    build = build_of({**TINY, **changes})
    with as_in(build.version, build.config, build.attention):
        return trace(build.config, build.model, build.step).history


SCORED = ROWS * (LENGTH - 1) * VOCAB
ALL = ROWS * LENGTH * VOCAB


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "software", "expected"),
    [
        # bf16 logits that the caller holds, their fp32 copy, the shifted fp32 copy, its log-softmax
        ("a/llama", "transformers 4.46.3", 2 * ALL + 4 * ALL + 4 * SCORED + 4 * SCORED),
        ("a/llama", "transformers 4.48.1", 2 * ALL + 4 * ALL + 4 * SCORED + 4 * SCORED),
        # fp32 logits, shifted, log-softmax
        ("a/llama", "transformers 4.45.2", 4 * ALL + 4 * SCORED + 4 * SCORED),
        ("a/mistral", "transformers 4.47.1", 4 * ALL + 4 * SCORED + 4 * SCORED),
        ("a/mistral", "transformers 4.48.1", 2 * ALL + 4 * ALL + 4 * SCORED + 4 * SCORED),
        # labels are shifted: bf16 logits, fp32, log-softmax
        ("a/llama", "transformers 4.49.0", 2 * ALL + 4 * ALL + 4 * ALL),
    ],
)
def test_each_version_holds_its_copies_of_the_logits(model, software, expected):
    history = traced(model=model, software=software)
    assert history.peak("forward").module == "loss"
    found = history.peak("forward").alive[categories.LOSS]
    assert found == pytest.approx(expected, abs=LENGTH * ROWS * 8 * 4 + 4096)  # labels and sums are small


def test_a_class_without_an_upcast_scores_in_its_own_type():
    changes = {"method": "full", "quantization": None, "weights_dtype": "bfloat16"}
    old = traced(model="gpt2", software="transformers 4.47.1", **changes).peak("forward").alive[categories.LOSS]
    assert old == pytest.approx(2 * ALL + 2 * SCORED + 2 * SCORED, abs=LENGTH * ROWS * 8 * 4 + 4096)


@pytest.mark.slow
def test_trl_copies_the_logits_for_its_accuracy_and_autocast_widens_them():
    record = {"software": "transformers 4.51.0, trl 0.14.0", "features": ["bf16 autocast"]}
    plain = traced(**record).peak("forward").bytes
    counted = traced(**{**record, "software": "transformers 4.51.0, trl 0.16.1"}).peak("forward")
    assert counted.bytes > plain
    assert traced(**{**record, "software": "transformers 4.51.0"}).peak("forward").bytes == plain


def test_experts_were_quantized_before_transformers_5():
    experts, hidden, width = 4, 64, 128
    mixtral = {"model": "a/mixtral", "geometry": {**TINY["geometry"], "experts": experts, "experts_per_token": 2}}
    old = traced(software="transformers 4.48.1", **mixtral).at(0).alive
    new = traced(software="transformers 5.2.0", **mixtral).at(0).alive
    weights = 2 * experts * 3 * hidden * width
    assert old["base weights 4-bit"] - new["base weights 4-bit"] == weights // 2
    assert new["base weights bf16"] - old["base weights bf16"] == weights * 2


@pytest.mark.slow
def test_keys_and_values_were_repeated_for_every_head():
    plain = {"gradient_checkpointing": False, "quantization": None, "weights_dtype": "bfloat16"}
    old = traced(software="transformers 4.50.0", **plain).peak("forward").bytes
    new = traced(software="transformers 4.57.0", **plain).peak("forward").bytes
    flash = traced(software="transformers 4.50.0", attention_implementation="flash_attention_2", **plain)
    assert old > new == flash.peak("forward").bytes


def test_gradients_of_earlier_micro_batches_are_alive():
    full = {"method": "full", "quantization": None, "weights_dtype": "bfloat16"}
    build = build_of({**TINY, **full})
    parameters = sum(p.numel() for p in build.model(build.config).parameters())
    more = traced(grad_accum=4, **full).peak("forward").bytes - traced(**full).peak("forward").bytes
    assert more == pytest.approx(2 * parameters, rel=0.02)


def test_what_was_reserved_is_compared_with_the_allocator_and_not_with_tensors():
    tensors, _ = validate_memory.predict(TINY)
    reserved, where = validate_memory.predict({**TINY, "measured_quantity": "peak reserved"})
    assert "allocator" in where
    assert tensors < reserved
    assert reserved * 2**9 % 1 == 0, "whole pages of 2 MiB"


@pytest.mark.parametrize(
    ("weights", "features", "upcast"),
    [
        ("nf4 for decoder linear layers, rest bfloat16", [], False),
        ("nf4 for decoder linear layers, rest float32", [], True),
        ("nf4, embeddings and norms fp32", [], True),
        ("nf4", ["prepare_model_for_kbit_training"], True),
        ("nf4", ["k-bit preparation"], True),
        ("nf4", ["k-bit preparation without upcasting the unquantized weights to fp32"], False),
        ("nf4", ["no k-bit preparation"], False),
        ("nf4", [], False),
    ],
)
def test_whether_the_rest_was_upcast_is_read_from_types_and_words(weights, features, upcast):
    assert is_upcast({"weights_dtype": weights, "features": features}) is upcast


def test_upcasting_doubles_what_is_not_quantized():
    low = traced().at(0).alive[categories.EMBEDDINGS]
    assert traced(weights_dtype="nf4, rest float32").at(0).alive[categories.EMBEDDINGS] == 2 * low == 4 * VOCAB * 64


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        ("all linear layers", "all-linear"),
        ("q,k,v,o", ["q_proj", "k_proj", "v_proj", "o_proj"]),
        ("q_proj and down_proj", ["q_proj", "down_proj"]),
        (["q", "gate"], ["q_proj", "gate_proj"]),
    ],
)
def test_targets_are_named_in_several_ways(given, expected):
    assert targets_of(given) == expected


def test_types_and_quantities():
    assert [dtype_in(t) for t in ("bfloat16", "bf16", "fp16", "float32 (inferred)", "half", "nf4", None)] == [
        torch.bfloat16, torch.bfloat16, torch.float16, torch.float32, torch.float16, None, None,
    ]  # fmt: skip
    named = {
        "peak allocated (torch max_memory_allocated)": "peak",
        "peak reserved (torch max_memory_reserved minus ~0 at start)": "peak reserved",
        "allocated after the forward pass": "after forward",
        "allocated after step": "after step",
    }
    assert {name: quantity_of({"measured_quantity": name}) for name in named} == named
    assert measured_gib({"value": 2**30, "unit": "bytes"}) == 1.0
    assert measured_gib({"value": 2048, "unit": "MiB"}) == 2.0


@pytest.mark.parametrize(
    ("name", "kind", "paged"),
    [
        ("AdamW (torch)", "torch.optim.adamw", False),
        ("paged_adamw_8bit", "bitsandbytes", True),
        ("paged_adamw_32bit", "bitsandbytes", True),
        ("lion_8bit", "bitsandbytes.optim.lion", False),
        ("sgd", "torch.optim.sgd", False),
        ("adafactor", "transformers", False),
    ],
)
def test_optimizers_are_the_named_ones(name, kind, paged):
    make, is_paged = optimizer_of({"optimizer": name})
    assert is_paged is paged
    assert type(make([torch.nn.Parameter(torch.zeros(4))])).__module__.startswith(kind)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_gpus": 2, "sharding": "FSDP"}, "2 GPUs"),
        ({"quantization": {"type": "gptq"}}, "'gptq' is not bitsandbytes'"),
        ({"model": "some/model"}, "no known architecture for the model name 'some/model'"),
        ({"geometry": None}, "geometry lacks hidden, layers, heads, intermediate, vocab"),
        (
            {"geometry": {**TINY["geometry"], "heads": 5, "head_dim": None}},
            "64 hidden units do not divide among 5 heads",
        ),
        ({"method": "vera"}, "method 'vera' is not one that qtune trains"),
        ({"method": "p-tuning"}, "p-tuning without a number of virtual tokens"),
        ({"target_modules": None}, "LoRA without target modules"),
        ({"target_modules": "attention (all of it)"}, "name no layers"),
        ({"loss": "Liger fused linear cross entropy"}, "kernels that never hold the logits"),
        ({"optimizer": "galore_adamw"}, "galore_adamw"),
        ({"measured_quantity": "nvidia-smi peak"}, "CUDA context"),
        ({"measured_quantity": "throughput"}, "measured quantity 'throughput'"),
        ({"software": "torchtune 0.5"}, "torchtune has models"),
        ({"batch_size": None}, "no batch size"),
        ({"features": ["activation offloading"]}, "offloading"),
        ({"value_gib": None}, "no measured value"),
        ({"trainable_params": 12345}, "the record says 12,345"),
    ],
)
def test_what_cannot_be_represented_is_listed_with_the_reason(changes, reason):
    result = validate_memory.compare({**TINY, **changes})
    assert result.predicted is None
    assert reason in result.skipped


def test_the_dropout_of_a_note_is_the_adapters():
    assert adapter_of({**TINY, "notes": "LoRA dropout 0.1 (keeps a mask)."}).lora_dropout == 0.1
    with pytest.raises(CannotBuildError, match="no JSON object"):
        adapter_of({**TINY, "features": ["{broken"]})


def printed(monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["validate_memory.py", *arguments])
    validate_memory.main()
    return capsys.readouterr().out


@pytest.mark.slow
def test_the_command_prints_json_for_the_chosen_records(tmp_path, monkeypatch, capsys):
    file = tmp_path / "records.json"
    file.write_text(json.dumps([TINY, {**TINY, "id": "other"}, {**TINY, "id": "refused", "method": "vera"}]))
    first, second = json.loads(printed(monkeypatch, capsys, str(file), "--json", "--only", "tiny,refused"))
    assert set(first) == {"id", "predicted_gib", "measured_gib", "error", "skipped"}
    assert (first["id"], first["skipped"]) == ("tiny", None)
    assert first["error"] == pytest.approx(first["predicted_gib"] / first["measured_gib"] - 1)
    assert (second["id"], second["predicted_gib"]) == ("refused", None)
    assert "vera" in second["skipped"]
    lines = printed(monkeypatch, capsys, str(file)).splitlines()
    assert [line.split()[0] for line in lines] == ["tiny", "other", "refused"]


def test_an_unknown_id_or_a_broken_file_is_one_message(tmp_path, monkeypatch, capsys):
    file = tmp_path / "records.json"
    file.write_text(json.dumps([TINY]))
    with pytest.raises(SystemExit, match=r"--only: .* has no record nobody\. It has: tiny"):
        printed(monkeypatch, capsys, str(file), "--only", "nobody")
    file.write_text('{"id": 1}')
    with pytest.raises(SystemExit, match='a list of objects, each with an "id", is wanted'):
        printed(monkeypatch, capsys, str(file))
    file.write_text("{")
    with pytest.raises(SystemExit, match="not a JSON list of records"):
        printed(monkeypatch, capsys, str(file))


@pytest.mark.slow
def test_the_published_records_with_exact_lengths_are_within_three_per_cent():
    exact = [r for r in validate_memory.read(TOOLS / "memory_records.json", "") if r["sequence_length_exact"]]
    assert len(exact) == 3
    for record in exact:
        result = validate_memory.compare(record)
        assert result.skipped is None
        assert abs(result.error) < 0.03, result


@pytest.mark.parametrize(
    "feature", ["Triton kernels for LoRA", "fused ops and kernels (RMSNorm, RoPE)", "foak", "fused RMSNorm"]
)
def test_fused_layers_are_left_out_in_the_words_of_the_record(feature):
    with pytest.raises(CannotBuildError, match="fused kernels keep other tensors than the model's own operations"):
        build_of({**TINY, "features": [feature]})


def test_norms_in_fp32_are_built_as_the_record_says():
    plain, widened = (build_of({**TINY, "features": words}) for words in ([], ["layer norms in fp32"]))
    assert (plain.fp32_norms, widened.fp32_norms) == (False, True)
    model = widened.model(widened.config)
    assert {p.dtype for name, p in model.named_parameters() if "norm" in name} == {torch.float32}


@pytest.mark.parametrize(("name", "kind"), [("ibm/PowerLM-3b", "granite"), ("ibm-granite/granite-3.1-2b", "granite")])
def test_granites_relatives_are_granites(name, kind):
    assert build_of({**TINY, "model": name}).config.model_type == kind


def test_a_notebook_of_one_forward_and_backward_is_measured_after_the_backward():
    assert quantity_of({"measured_quantity": "allocated after one forward and backward"}) == "after backward"
    assert quantity_of({"measured_quantity": "allocated after the forward"}) == "after forward"


@pytest.mark.slow
def test_one_length_explains_what_three_published_runs_had_reserved():
    """LoRA, p-tuning and full fine-tuning over the same rows, of which the longest batch is not published."""
    records = json.loads((TOOLS / "memory_records.json").read_text(encoding="utf-8"))
    same_rows = [record for record in records if record["id"].startswith("peft-metamath")]
    assert len(same_rows) == 3
    errors = [validate_memory.compare({**record, "sequence_length": 704}).error for record in same_rows]
    assert all(error is not None and abs(error) < 0.01 for error in errors), errors
