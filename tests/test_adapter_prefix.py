"""A prefix trains the same with its layers computed twice; one that starts from a text answers as if it stood there."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from export_models import tiny_base, tiny_tokenizer
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from qtune.adapter.attach import attach_adapter
from qtune.adapter.starts import Material, start_prefix
from qtune.device.present import Device
from qtune.model.checkpointed import checkpoint_all
from qtune.plan import make_plan
from qtune.recipe.parse import parse_recipe
from qtune.recipe.schema import PrefixTuning

CPU = Device("cpu", "CPU", 8 * 2**30, 6 * 2**30, bf16=False)
IDS = torch.arange(3, 35).reshape(2, 16)
MASK = torch.tensor([[1] * 16, [1] * 11 + [0] * 5])
TEXT = PrefixTuning(kind="prefix-tuning", virtual_tokens=5, initialization="text", text="You are brief.")


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "qwen3", "gpt2"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain keys, keys of which a window is kept, keys that are normalized, and a model that takes a cache from its own
    layers where it is checkpointed."""
    of_gpt2 = {"num_key_value_heads": 4, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    folder = tiny_base(
        tmp_path_factory.mktemp(request.param), request.param, **(of_gpt2 if request.param == "gpt2" else {})
    )
    tiny_tokenizer(folder)
    return folder


def attached(base: Path, adapter: PrefixTuning) -> PeftModel:
    plan = make_plan(parse_recipe({"model": {"base": "x"}, "data": {"train": "y"}}), CPU)
    torch.manual_seed(0)
    return attach_adapter(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter, plan)


@pytest.mark.parametrize("projection", [False, True])
def test_its_gradient_is_the_same_with_every_layer_computed_twice(base: Path, projection: bool) -> None:
    found = []
    for checkpointed in (False, True):
        model = attached(base, PrefixTuning(kind="prefix-tuning", virtual_tokens=4, projection=projection)).train()
        if checkpointed:
            assert checkpoint_all(model)
            assert model.is_gradient_checkpointing
        loss = model(input_ids=IDS, labels=IDS, attention_mask=MASK, use_cache=False).loss
        loss.backward()
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        found.append((loss.detach(), [weight.grad for weight in weights]))
    (loss, gradients), (again, others) = found
    torch.testing.assert_close(again, loss)
    assert gradients[0].abs().max() > 0
    for gradient, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(other, gradient)


def saved_numbers(model: PeftModel) -> int:
    """How many numbers the forward keeps for the backward, counted once for each operation that keeps them."""
    sizes: list[int] = []

    def count(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        model(input_ids=IDS, labels=IDS, attention_mask=MASK, use_cache=False)
    return sum(sizes)


def test_layers_that_are_computed_twice_keep_less(base: Path) -> None:
    kept = []
    for checkpointed in (False, True):
        model = attached(base, PrefixTuning(kind="prefix-tuning", virtual_tokens=4)).train()
        if checkpointed:
            checkpoint_all(model)
        kept.append(saved_numbers(model))
    assert kept[1] < kept[0]


@torch.no_grad()
def test_a_prefix_that_starts_from_a_text_answers_as_if_it_stood_before_every_row(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = attached(base, TEXT)
    start_prefix(model, TEXT, Material(tokenizer, Dataset.from_dict({}), 1), seed=0)
    ids = (tokenizer("You are brief.", add_special_tokens=False)["input_ids"] * 5)[:5]
    whole = torch.cat([torch.tensor([ids, ids]), IDS], dim=1)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    expected = plain(input_ids=whole).logits[:, 5:]
    for training in (False, True):
        found = model.train(training)(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
