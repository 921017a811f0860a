"""A soft prompt becomes a plain model: new rows of the vocabulary, and a chat template that begins with them."""

import json
from pathlib import Path

import pytest
import torch
from export_models import tiny_run
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from qtune.data.conversation import Conversation
from qtune.export.export import Options, export_run
from qtune.export.verify.rows import rendered_ids
from qtune.run.folder import RunDir
from qtune.tuned.load import load_run

# peft 0.21.2 asks transformers 5.23 for the name that it is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

P_TUNING = 'kind = "p-tuning"\nvirtual_tokens = 5'
RESIDUAL = 'kind = "p-tuning"\nvirtual_tokens = 5\nresidual = true\ninitialization = "vocabulary"'
RESIDUAL_PROMPT = (
    'kind = "prompt-tuning"\nvirtual_tokens = 3\nresidual = true\ninitialization = "text"\ntext = "Be brief."'
)
PROMPT_TUNING = 'kind = "prompt-tuning"\nvirtual_tokens = 3'
USER = ({"role": "user", "content": "Name a colour."},)
CONVERSATIONS = {
    "one turn": USER,
    "system": ({"role": "system", "content": "You are brief."}, *USER),
    "several turns": (*USER, {"role": "assistant", "content": "Blue."}, {"role": "user", "content": "Another."}),
}


def loaded(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(
        folder
    )


def live_logits(run: RunDir, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return load_run(run).model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -ids.shape[1] :]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("adapter", "tied", "family"),
    [
        *((P_TUNING, True, family) for family in ("llama", "gemma2", "gemma3_text", "qwen3")),
        *((PROMPT_TUNING, False, family) for family in ("llama", "gemma2", "gemma3_text", "qwen3")),
        (RESIDUAL, True, "llama"),
        (RESIDUAL, True, "gemma3_text"),
        (RESIDUAL_PROMPT, False, "llama"),
    ],
)
def test_logits_equal_the_live_model_s_within_rounding(adapter: str, tied: bool, family: str, tmp_path: Path) -> None:
    run = tiny_run(tmp_path, adapter, family=family, tie_word_embeddings=tied)
    model, tokenizer = loaded(export_run(run, Options()))
    text = tokenizer.apply_chat_template(list(USER), add_generation_prompt=True, return_dict=True, return_tensors="pt")
    virtual = tokenizer.convert_tokens_to_ids("<|qtune_0|>")
    count = int((text["input_ids"] >= virtual).sum())
    assert text["input_ids"][0, :count].tolist() == list(range(virtual, virtual + count))
    with torch.inference_mode():
        found = model(**text).logits[0, count:, : run_vocabulary(run)]
    expected = live_logits(run, text["input_ids"][:, count:])
    assert (found - expected).abs().max() < 5e-3 * expected.abs().max()
    assert json.loads((run.path / "model" / "verify.json").read_text())["verified"] is True


def run_vocabulary(run: RunDir) -> int:
    return int(json.loads((run.path.parent / "base" / "config.json").read_text())["vocab_size"])


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("asks", [False, True], ids=["no generation prompt", "generation prompt"])
def test_every_conversation_begins_with_the_prompt_once(name: str, asks: bool, tmp_path: Path) -> None:
    run = tiny_run(tmp_path, PROMPT_TUNING, data='chat_template = "chatml"')
    folder = export_run(run, Options(verify=False))
    before = AutoTokenizer.from_pretrained(tmp_path / "base")
    after = AutoTokenizer.from_pretrained(folder)
    messages = list(CONVERSATIONS[name])
    expected = before.apply_chat_template(messages, add_generation_prompt=asks, return_dict=True)["input_ids"]
    found = after.apply_chat_template(messages, add_generation_prompt=asks, return_dict=True)["input_ids"]
    virtual = [after.convert_tokens_to_ids(f"<|qtune_{index}|>") for index in range(3)]
    assert found == [*virtual, *expected]


def test_the_prompt_stands_before_the_beginning_of_text_as_in_training(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, PROMPT_TUNING, data='chat_template = "plain"')
    tokenizer = AutoTokenizer.from_pretrained(export_run(run, Options()))
    text = tokenizer.apply_chat_template(list(USER), tokenize=False)
    assert text == "<|qtune_0|><|qtune_1|><|qtune_2|><s>Name a colour."


def test_padded_batches_answer_as_single_rows_do(tmp_path: Path) -> None:
    model, tokenizer = loaded(export_run(tiny_run(tmp_path, P_TUNING), Options(verify=False)))
    tokenizer.padding_side = "left"
    asked = [[{"role": "user", "content": text}] for text in ("Name a colour.", "What is the capital of France?")]
    settings = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    batch = tokenizer.apply_chat_template(asked, padding=True, **settings)
    together = model.generate(**batch, max_new_tokens=8, do_sample=False)[:, batch["input_ids"].shape[1] :]
    for row, question in zip(together, asked, strict=True):
        single = tokenizer.apply_chat_template(question, **settings)
        alone = model.generate(**single, max_new_tokens=8, do_sample=False)[0, single["input_ids"].shape[1] :]
        assert row[: len(alone)].tolist() == alone.tolist()


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_virtual_tokens_are_never_the_likeliest_and_change_no_other_logit(tied: bool, tmp_path: Path) -> None:
    """Their logit is the mean of the others, whatever the hidden state is."""
    run = tiny_run(tmp_path, P_TUNING, tie_word_embeddings=tied)
    folder = export_run(run, Options(verify=False))
    model, _ = loaded(folder)
    vocabulary = run_vocabulary(run)
    head = model.get_output_embeddings().weight
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    assert torch.equal(head[:vocabulary], base.get_output_embeddings().weight.half().float())
    hidden = torch.randn(200, head.shape[1]) * 10
    logits = hidden @ head.T
    assert torch.allclose(logits[:, vocabulary], logits[:, :vocabulary].mean(-1), atol=0.05)
    assert (logits.argmax(-1) < vocabulary).all()
    assert model.generation_config.suppress_tokens == list(range(vocabulary, vocabulary + 5))


def test_rows_that_a_padded_vocabulary_has_to_spare_are_used(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, P_TUNING, vocab_size=384, tie_word_embeddings=True)
    folder = export_run(run, Options())
    config = json.loads((folder / "config.json").read_text())
    tokens = len(AutoTokenizer.from_pretrained(tmp_path / "base"))
    assert config["vocab_size"] == 384
    assert config["qtune_soft_prompt"]["ids"] == list(range(tokens, tokens + 5))


def test_the_config_says_what_was_done(tmp_path: Path) -> None:
    folder = export_run(tiny_run(tmp_path, PROMPT_TUNING, tie_word_embeddings=True), Options(verify=False))
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["vocab_size"] == 323
    assert config["qtune_soft_prompt"] == {
        "tokens": ["<|qtune_0|>", "<|qtune_1|>", "<|qtune_2|>"],
        "ids": [320, 321, 322],
        "head": "the head is not tied: its rows for these tokens are the mean of all rows, so that their logit is the "
        "mean logit, never the largest, and the logits of all other tokens are unchanged",
    }


def test_decoding_hides_the_prompt(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(export_run(tiny_run(tmp_path, PROMPT_TUNING), Options(verify=False)))
    conversation = Conversation(({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}))
    ids = rendered_ids(tokenizer, tokenizer.chat_template, conversation, generation_prompt=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nHi\nassistant\nHello\n"
