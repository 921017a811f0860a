"""Batches: the same steps as plain shuffling with less padding, and packed rows that cannot see each other."""

import warnings
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config

from qtune.data.batches import StepSampler, padding_share
from qtune.data.collate import PackedCollator, PaddedCollator, collator_for
from qtune.data.masks import IGNORED
from qtune.data.packing import best_fit, pack
from qtune.recipe.faults import Fault, Faulty
from qtune.recipe.parse import parse_recipe

VOCABULARY = 50
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen2 with a sliding window": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "mistral with a sliding window": MistralConfig(**SIZES, sliding_window=4),
    "gemma3, local and global layers": Gemma3TextConfig(
        **SIZES, head_dim=8, sliding_window=4, sliding_window_pattern=2
    ),
}


def some_rows(lengths, seed=0):
    """Rows of random ids whose first tokens are a prompt."""
    generator = np.random.default_rng(seed)
    rows = []
    for length in lengths:
        ids = generator.integers(1, VOCABULARY, length).tolist()
        prompt = int(generator.integers(1, length))
        rows.append({"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:], "length": length})
    return rows


def lora_model(config, attention="sdpa"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start, which would hide A's gradients
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def loss_and_gradients(model, batch):
    """Summed loss over the scored tokens, and the gradient of each trained parameter."""
    model.zero_grad()
    labels = batch.pop("labels")
    logits = model(**batch).logits
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_packed_loss_and_gradients_equal_those_of_single_rows(config, attention, tmp_path):
    rows = some_rows([9, 14, 5, 11, 20, 3, 7])
    packed = list(pack(Dataset.from_list(rows), 24, tmp_path))
    assert len(packed) == 3
    model = lora_model(config, attention)
    packed_loss, packed_gradients = loss_and_gradients(model, PackedCollator(0)(packed))
    loss, gradients = 0.0, {}
    for row in rows:
        one, parts = loss_and_gradients(model, PaddedCollator(0)([row]))
        loss += one
        gradients = {name: gradients.get(name, 0) + part for name, part in parts.items()}
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(packed_gradients[name], gradient, rtol=1e-4, atol=1e-5)


def test_documents_would_see_each_other_under_an_attention_mask(tmp_path):
    """What the collator avoids: the test above would fail with the mask that padding needs."""
    rows = some_rows([9, 14, 5, 11, 20, 3, 7])
    batch = PackedCollator(0)(list(pack(Dataset.from_list(rows), 24, tmp_path)))
    model = lora_model(CONFIGS["llama"])
    apart, _ = loss_and_gradients(model, dict(batch))
    together, _ = loss_and_gradients(model, {**batch, "attention_mask": torch.ones_like(batch["input_ids"])})
    assert together != pytest.approx(apart, rel=1e-3)


def test_a_row_that_is_flattened_with_others_is_as_apart_from_them(tmp_path):
    rows = list(pack(Dataset.from_list(some_rows([9, 14, 5, 11, 20, 3, 7])), 24, tmp_path))
    model = lora_model(CONFIGS["llama"])
    loss, _ = loss_and_gradients(model, PackedCollator(0)(rows))
    flat = PackedCollator(0, flatten=True)(rows)
    assert flat["input_ids"].shape == (1, sum(len(row["input_ids"]) for row in rows))
    assert loss_and_gradients(model, flat)[0] == pytest.approx(loss, rel=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or find_spec("flash_attn") is None, reason="needs a CUDA card and flash-attn"
)
def test_flash_attention_keeps_the_documents_of_a_flat_row_apart(tmp_path):
    rows = some_rows([9, 14, 5, 11, 20, 3, 7])
    model = lora_model(CONFIGS["llama"], "flash_attention_2").to("cuda", torch.bfloat16)
    collate = PackedCollator(0, flatten=True)

    def loss_of(some):
        batch = {key: value.cuda() if torch.is_tensor(value) else value for key, value in collate(some).items()}
        return loss_and_gradients(model, batch)[0]

    packed = loss_of(list(pack(Dataset.from_list(rows), 24, tmp_path)))
    assert packed == pytest.approx(sum(loss_of([row]) for row in rows), rel=0.01)


def test_a_soft_prompt_in_packed_rows_would_be_wrong_without_an_error(tmp_path):
    """Why the recipe refuses the pair: peft drops the positions and puts the virtual tokens once before each row."""
    rows = some_rows([9, 14])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    model = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # peft's only sign: "Position ids are not supported for parameter efficient tuning"
        batch = PackedCollator(0)(list(pack(Dataset.from_list(rows), 24, tmp_path)))
        labels = torch.cat([torch.full((1, 4), IGNORED), batch.pop("labels")], dim=1)
        logits = model(**batch).logits
    packed = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum").item()
    single = 0.0
    for row in rows:
        one = PaddedCollator(0)([row])
        logits = model(input_ids=one["input_ids"], attention_mask=one["attention_mask"]).logits[:, 4:]
        single += cross_entropy(logits[:, :-1].flatten(0, 1), one["labels"][:, 1:].flatten(), reduction="sum").item()
    assert packed != pytest.approx(single, rel=1e-3)


@pytest.mark.parametrize("kind", ["p-tuning", "prompt-tuning", "prefix-tuning"])
def test_packing_is_refused_for_soft_prompts_with_the_reason(kind):
    tables = {"model": {"base": "x"}, "adapter": {"kind": kind}, "data": {"train": "x", "packing": True}}
    with pytest.raises(Faulty) as refused:
        parse_recipe(tables)
    assert refused.value.faults == (
        Fault(
            ("data", "packing"),
            "a soft prompt stands once before each packed row, so only its first document would see it, and peft drops "
            f"the positions that keep documents apart; not with {kind}",
        ),
    )


def test_positions_restart_at_each_document_and_padding_is_one_of_its_own():
    rows = [
        {"input_ids": [5, 6, 7, 8, 9], "labels": [IGNORED, 6, IGNORED, 8, 9], "seq_lengths": [2, 3]},
        {"input_ids": [5, 6], "labels": [IGNORED, 6], "seq_lengths": [2]},
    ]
    batch = PackedCollator(pad_id=1)(rows)
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 1, 0, 1, 2]]
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [5, 6, 1, 1, 1]]
    assert batch["labels"][1].tolist() == [IGNORED, 6] + [IGNORED] * 3
    assert "attention_mask" not in batch


def test_the_first_token_of_a_packed_document_is_not_scored(tmp_path):
    (row,) = pack(Dataset.from_list([{"input_ids": [1, 2], "labels": [1, 2], "length": 2}] * 2), 4, tmp_path)
    assert row["labels"] == [IGNORED, 2, IGNORED, 2]
    assert row["seq_lengths"] == [2, 2]


def test_padding_is_right_masked_by_length_and_never_scored():
    rows = [{"input_ids": [7, 2, 2], "labels": [IGNORED, 2, 2]}, {"input_ids": [7], "labels": [7]}]
    batch = PaddedCollator(pad_id=2)(rows)
    assert batch["input_ids"].tolist() == [[7, 2, 2], [7, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 2, 2], [7, IGNORED, IGNORED]]


def test_flash_attention_gets_one_flat_row():
    assert collator_for(packed=True, pad_id=0, attention="flash_attention_2") == PackedCollator(0, flatten=True)
    assert collator_for(packed=True, pad_id=0, attention="sdpa") == PackedCollator(0)
    assert collator_for(packed=False, pad_id=0, attention="sdpa") == PaddedCollator(0)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=60))
def test_best_fit_puts_every_row_into_one_group_that_holds_it(lengths):
    groups = best_fit(lengths, 100)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in group) <= 100 for group in groups)
    # A row opens a group only when it fits nowhere, so at most one group is half empty.
    assert sum(sum(lengths[index] for index in group) <= 50 for group in groups) <= 1


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=100), st.integers(1, 16), st.integers(0, 5))
def test_grouping_by_length_leaves_every_step_its_rows(lengths, batch_size, epoch):
    sampler = StepSampler(lengths, batch_size, seed=7)
    sampler.set_epoch(epoch)
    order = list(sampler)
    shuffled = np.random.default_rng((7, epoch)).permutation(len(lengths)).tolist()
    for start in range(0, len(lengths), batch_size):
        step = order[start : start + batch_size]
        assert sorted(step) == sorted(shuffled[start : start + batch_size])
        assert [lengths[row] for row in step] == sorted((lengths[row] for row in step), reverse=True)


def test_the_order_is_that_of_seed_and_epoch():
    lengths = np.arange(1, 101)
    one, other = StepSampler(lengths, 8, seed=1), StepSampler(lengths, 8, seed=1)
    assert list(one) == list(one) == list(other)
    one.set_epoch(1)
    assert list(one) != list(other)
    other.set_epoch(1)
    assert list(one) == list(other) != list(StepSampler(lengths, 8, seed=2))


def test_the_loader_that_training_uses_gives_each_epoch_its_own_order():
    lengths = list(range(1, 33))
    loader = DataLoader(lengths, batch_size=4, sampler=StepSampler(lengths, 8, seed=1))
    prepared = Accelerator(cpu=True).prepare(loader)
    epochs = []
    for epoch in (0, 1, 0):
        prepared.set_epoch(epoch)
        epochs.append(torch.cat(list(prepared)).tolist())
    assert epochs[0] == epochs[2] != epochs[1]
    expected = StepSampler(lengths, 8, seed=1)
    assert epochs[0] == [lengths[row] for row in expected]


def test_padding_share_is_what_the_collator_pads():
    lengths = np.random.default_rng(0).integers(1, 200, 64)
    sampler = StepSampler(lengths, 16, seed=0)
    rows = [{"input_ids": [1] * lengths[row], "labels": [1] * lengths[row]} for row in sampler]
    masks = [PaddedCollator(0)(rows[start : start + 4])["attention_mask"] for start in range(0, 64, 4)]
    padded = sum(mask.numel() - int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    assert padding_share(lengths[list(sampler)], 4) == pytest.approx(padded)
    assert padded < padding_share(lengths[np.random.default_rng(0).permutation(64)], 4) / 2
