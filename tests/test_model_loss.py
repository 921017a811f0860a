"""The tiled loss is torch's cross-entropy, for every family's head, and never holds the logits."""

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qtune.model import loss as module
from qtune.model.host import store_embeddings
from qtune.model.loss import (
    IGNORED,
    LogitRule,
    install_loss,
    logit_rule,
    loss_agrees,
    scored_positions,
    tiled_cross_entropy,
)
from qtune.model.stored_rows import HostRows

ROWS, HIDDEN, VOCABULARY = 13, 6, 11
RULES = {
    "plain": LogitRule(),
    "cap": LogitRule(cap=2.5),
    "scale": LogitRule(scale=0.37),
    "cap and scale": LogitRule(scale=1.7, cap=1.5),
}


def in_five_tiles(hidden, weight, bias, labels, rule: LogitRule):
    """13 rows in tiles of 3: the last one is not full."""
    return tiled_cross_entropy(hidden, weight, bias, labels, rule, tile_bytes=3 * 4 * VOCABULARY)[:2]


def in_four_blocks(hidden, weight, bias, labels, rule: LogitRule):
    """11 tokens of the vocabulary in blocks of 3, as a head in host memory comes: the last one is not full."""
    return tiled_cross_entropy(hidden, HostRows(weight), bias, labels, rule, tile_bytes=3 * 4 * ROWS)[:2]


def some_tensors(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, dtype=dtype, generator=generator)
    weight = torch.randn(VOCABULARY, HIDDEN, dtype=dtype, generator=generator)
    bias = torch.randn(VOCABULARY, dtype=dtype, generator=generator)
    labels = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    return hidden, weight, bias, labels


def plain_cross_entropy(hidden, weight, bias, labels, rule: LogitRule):
    """What the tiled loss stands for, by torch's own functions."""
    logits = rule.scale * functional.linear(hidden, weight, bias)
    if rule.cap is not None:
        logits = rule.cap * torch.tanh(logits / rule.cap)
    return functional.cross_entropy(logits, labels, reduction="sum"), (logits.argmax(dim=1) == labels).sum()


@pytest.mark.parametrize("has_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_loss_and_gradients_are_those_of_cross_entropy(dtype: torch.dtype, rule: LogitRule, has_bias: bool) -> None:
    *inputs, labels = some_tensors(dtype)
    tolerance = {"rtol": 1e-10, "atol": 1e-13} if dtype is torch.float64 else {"rtol": 2e-5, "atol": 1e-5}
    results = []
    for function in (in_five_tiles, plain_cross_entropy):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        hidden, weight, bias = leaves
        value, correct = function(hidden, weight, bias if has_bias else None, labels, rule)
        # Not 1: the gradient that comes from above must reach every tile.
        (0.3 * value).backward()
        results.append([value.detach(), correct, *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    assert len(results[0]) == (5 if has_bias else 4)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("has_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_a_head_that_comes_in_blocks_gives_the_same_loss_and_gradient(rule: LogitRule, has_bias: bool) -> None:
    hidden, weight, bias, labels = some_tensors()
    results = []
    for function in (in_four_blocks, plain_cross_entropy):
        leaf = hidden.clone().requires_grad_()
        value, correct = function(leaf, weight, bias if has_bias else None, labels, rule)
        (0.3 * value).backward()
        results.append([value.detach(), correct, leaf.grad])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)
    leaf = hidden.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda it: in_four_blocks(it, weight, bias, labels, rule)[0], (leaf,))


def test_logits_far_apart_do_not_overflow_between_blocks() -> None:
    hidden = torch.tensor([[1.0], [-1.0]])
    weight = torch.tensor([[-500.0], [0.0], [500.0], [100.0]])
    labels = torch.tensor([2, 2])
    ours = tiled_cross_entropy(hidden, HostRows(weight), None, labels, tile_bytes=8)
    assert [float(part) for part in ours[:2]] == [1000.0, 1.0]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("trained", ["hidden", "weight", "bias", "all"])
def test_gradients_are_the_slopes_of_the_loss_whatever_is_trained(rule: LogitRule, trained: str) -> None:
    hidden, weight, bias, labels = some_tensors()
    names = {"hidden": hidden, "weight": weight, "bias": bias}
    for name, tensor in names.items():
        tensor.requires_grad_(trained in (name, "all"))

    def value(*tensors: torch.Tensor) -> torch.Tensor:
        return in_five_tiles(*tensors, labels, rule)[0]

    assert torch.autograd.gradcheck(value, (hidden, weight, bias))


def test_16_bit_hidden_states_are_scored_in_fp32() -> None:
    hidden, weight, bias, labels = (
        tensor.bfloat16() if tensor.is_floating_point() else tensor for tensor in some_tensors()
    )
    value = tiled_cross_entropy(hidden, weight, bias, labels)[0]
    assert value.dtype == torch.float32
    exact = functional.cross_entropy(functional.linear(hidden, weight, bias).float(), labels, reduction="sum")
    torch.testing.assert_close(value, exact)


@pytest.mark.parametrize("stored", [lambda weight: weight, HostRows], ids=["tensor", "on the host"])
def test_nothing_to_score_is_no_loss(stored) -> None:
    hidden, weight, bias, _ = some_tensors()
    hidden = hidden[:0].requires_grad_()
    value, correct, losses = tiled_cross_entropy(hidden, stored(weight), bias, torch.zeros(0, dtype=torch.long))
    value.backward()
    assert (value.item(), int(correct), len(losses), hidden.grad.shape) == (0.0, 0, 0, (0, HIDDEN))


def test_a_position_is_scored_if_the_next_token_is_and_rows_do_not_run_into_each_other() -> None:
    labels = torch.tensor([[5, IGNORED, 7, IGNORED], [8, IGNORED, IGNORED, 9]])
    # Row 0: position 1 predicts 7; its own first label has nothing before it. Row 1: position 2 predicts 9; the label 8
    # at its start is not predicted by the end of row 0.
    assert scored_positions(labels).tolist() == [1, 6]


class LargestTensor(TorchDispatchMode):
    """The most elements that any tensor has that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def test_no_tensor_is_larger_than_a_tile_of_logits() -> None:
    rows, hidden_size, vocabulary = 512, 8, 1000
    hidden = torch.randn(rows, hidden_size, requires_grad=True)
    weight, labels = torch.randn(vocabulary, hidden_size), torch.randint(0, vocabulary, (rows,))
    with LargestTensor() as seen:
        tiled_cross_entropy(hidden, weight, None, labels, tile_bytes=16 * 4 * vocabulary)[0].backward()
    assert hidden.grad is not None
    assert seen.elements == 16 * vocabulary
    with LargestTensor() as seen:
        tiled_cross_entropy(hidden, HostRows(weight), None, labels, tile_bytes=20 * 4 * rows)[0].backward()
    assert seen.elements == 20 * rows
    with LargestTensor() as seen:
        plain_cross_entropy(hidden, weight, None, labels, LogitRule())[0].backward()
    assert seen.elements == rows * vocabulary


# --- in models -----------------------------------------------------------------------------------------------------

FAMILIES = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 0.5, "head_dim": 8},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.25},
    "phi": {},  # the head has a bias
    "qwen2": {"tie_word_embeddings": True},
}


def tiny(family: str, **changes) -> PreTrainedModel:
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 96,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.3,
    }
    config = AutoConfig.for_model(family, **{**shape, **FAMILIES.get(family, {}), **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def some_batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 96, (3, 14), generator=generator)
    labels = ids.where(torch.rand(3, 14, generator=generator) < 0.5, IGNORED)
    return ids, labels


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_loss_and_gradients_are_its_own(family: str) -> None:
    ids, labels = some_batch()
    reference = tiny(family)
    expected = reference(input_ids=ids, labels=labels).loss
    expected.backward()

    model = tiny(family)
    install_loss(model)
    output = model(input_ids=ids, labels=labels)
    (output.loss / output.scored).backward()

    assert output.scored == int((labels[:, 1:] != IGNORED).sum())
    torch.testing.assert_close(output.loss / output.scored, expected, rtol=1e-5, atol=1e-6)
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_check_before_training_lets_every_known_family_pass(family: str) -> None:
    assert loss_agrees(tiny(family), some_batch()[0][:1])


def test_without_labels_a_model_is_as_it_was_and_keeps_its_signature() -> None:
    model = tiny("llama").eval()
    ids, _ = some_batch()
    before = model(input_ids=ids).logits
    install_loss(model)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert model.generate(ids[:1], max_new_tokens=2, do_sample=False).shape == (1, 16)


def test_a_head_that_does_more_than_we_know_is_found_and_still_trains_on_its_own_logits() -> None:
    model = tiny("llama")
    own = model.forward

    def forward(*args, **kwargs):
        output = own(*args, **kwargs)
        output.logits = 1.1 * output.logits
        return output

    model.forward = forward
    ids, labels = some_batch()
    assert not loss_agrees(model, ids[:1])

    install_loss(model, tiled=False)
    logits = model(input_ids=ids).logits
    expected = functional.cross_entropy(
        logits[:, :-1].reshape(-1, 96), labels[:, 1:].reshape(-1), ignore_index=IGNORED, reduction="sum"
    )
    output = model(input_ids=ids, labels=labels)
    torch.testing.assert_close(output.loss, expected)
    assert output.scored == int((labels[:, 1:] != IGNORED).sum())


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere"])
def test_a_familys_rule_that_is_forgotten_is_found(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = {"gemma2": LogitRule(cap=0.5), "granite": LogitRule(scale=1 / 3), "cohere": LogitRule(scale=0.25)}
    assert logit_rule(tiny(family).config) == rules[family]
    monkeypatch.setattr(module, "logit_rule", lambda config: LogitRule())
    assert not loss_agrees(tiny(family), some_batch()[0][:1])


def test_a_head_in_4_bits_is_no_head_for_tiles() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = tiny("llama")
    head = bnb.nn.Linear4bit(32, 96, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    head.weight = bnb.nn.Params4bit(model.lm_head.weight.data.clone(), quant_type="nf4", requires_grad=False)
    model.lm_head = head.to("cpu")
    ids, labels = some_batch()
    assert not loss_agrees(model, ids[:1])
    install_loss(model, tiled=False)
    assert torch.isfinite(model(input_ids=ids, labels=labels).loss)


@pytest.mark.parametrize("way", ["tiled", "streamed", "untiled"])
def test_without_gradients_every_row_has_its_own_loss(way: str) -> None:
    """Each row alone, by torch's own cross-entropy; a row of which nothing is scored has none."""
    model = tiny("llama").eval()
    ids, labels = some_batch()
    labels[1] = IGNORED
    with torch.no_grad():
        by_hand = [
            functional.cross_entropy(logits[0, :-1], of_row[1:], ignore_index=IGNORED, reduction="sum")
            for logits, of_row in zip([model(input_ids=row[None]).logits for row in ids], labels, strict=True)
        ]
        if way == "streamed":
            store_embeddings(model, "host", "cpu")
        install_loss(model, tiled=way != "untiled", tile_bytes=5 * 4 * 96)
        output = model(input_ids=ids, labels=labels)
    torch.testing.assert_close(output.row_losses, torch.stack(by_hand))
    assert output.row_losses[1] == 0
    assert output.row_scored.tolist() == [int((row[1:] != IGNORED).sum()) for row in labels]
    assert model(input_ids=ids, labels=labels).row_losses is None
