"""Batched generation equals one prompt at a time, which equals peft's own forward pass, for every kind of adapter."""

from typing import Any

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
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from qtune.model.builtin import builtin_folder
from qtune.run.metrics import CUT
from qtune.tuned.generate import (
    ENDLESS,
    Ends,
    Sampling,
    batches_of,
    find_ends,
    generate,
    loop_at_end,
    positions_left,
    stream,
    within_reach,
)
from qtune.tuned.generate import _Pieces as Pieces
from qtune.tuned.questions import answer_text
from qtune.tuned.vocabulary import decoded

VOCABULARY, PAD = 96, 0
NEVER = Ends(stop=(), pad=PAD)

ADAPTERS = {
    "lora": lambda: LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"),
    "ia3": lambda: IA3Config(task_type="CAUSAL_LM"),
    "p-tuning-mlp": lambda: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=32),
    "p-tuning-lstm": lambda: PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=32, encoder_reparameterization_type="LSTM"
    ),
    "prompt-tuning": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "prefix-tuning": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "prefix-tuning-projected": lambda: PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=32
    ),
}


def tiny_llama() -> LlamaForCausalLM:
    """Two layers with large random weights: every prompt has an answer of its own."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def adapted(kind: str) -> PeftModel:
    """The tiny model with an adapter whose every weight was moved, so that it changes what is generated."""
    model = get_peft_model(tiny_llama(), ADAPTERS[kind]())
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5 * torch.randn_like(parameter))
    return model.eval()


def some_prompts() -> list[list[int]]:
    """Nine prompts of very different length; the pad id is a normal token in some."""
    torch.manual_seed(2)
    return [torch.randint(0, VOCABULARY, (length,)).tolist() for length in (1, 17, 4, 9, 2, 30, 11, 4, 23)]


@torch.no_grad()
def by_forward(model, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding by the model's forward pass on the whole text each time: no cache, no padding, no generate()."""
    ids = list(prompt)
    for _ in range(count):
        batch = torch.tensor([ids])
        ids.append(int(model(input_ids=batch, attention_mask=torch.ones_like(batch)).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_batch_gives_what_the_adapters_own_forward_gives(kind):
    model, prompts = adapted(kind), some_prompts()
    together = generate(model, prompts, [8] * len(prompts), NEVER)
    assert together == [by_forward(model, prompt, 8) for prompt in prompts]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_batch_size_changes_nothing(kind):
    model, prompts = adapted(kind), some_prompts()
    together = generate(model, prompts, [8] * len(prompts), NEVER)
    assert together == generate(model, prompts, [8] * len(prompts), NEVER, batch_tokens=60)
    assert together == [generate(model, [prompt], [8], NEVER)[0] for prompt in prompts]


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_disabled_adapter_gives_the_base_models_answers(kind):
    model, prompts = adapted(kind), some_prompts()
    base = tiny_llama()
    expected = [by_forward(base, prompt, 8) for prompt in prompts]
    with model.disable_adapter():
        assert generate(model, prompts, [8] * len(prompts), NEVER) == expected
    assert generate(model, prompts, [8] * len(prompts), NEVER) != expected
    assert generate(base, prompts, [8] * len(prompts), NEVER) == expected


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_model_is_left_as_it_was(kind):
    model = adapted(kind).train()
    model.get_base_model().generation_config.temperature = 0.6
    generate(model, some_prompts()[:2], [2, 2], NEVER)
    assert model.training
    assert model.get_base_model().generation_config.temperature == 0.6


def test_an_answer_ends_before_its_first_stop_token_and_does_not_disturb_the_others():
    model, prompts = adapted("lora"), some_prompts()
    free = generate(model, prompts, [8] * len(prompts), NEVER)
    stop = free[0][3]
    ended = generate(model, prompts, [8] * len(prompts), Ends(stop=(stop,), pad=PAD))
    assert ended == [ids[: ids.index(stop)] if stop in ids else ids for ids in free]
    assert len(ended[0]) == free[0].index(stop)


def test_each_row_has_its_own_limit():
    model, prompts = adapted("lora"), some_prompts()
    free = generate(model, prompts, [8] * len(prompts), NEVER)
    limits = [1 + row % 8 for row in range(len(prompts))]
    assert generate(model, prompts, limits, NEVER) == [ids[:limit] for ids, limit in zip(free, limits, strict=True)]


def test_progress_counts_every_row_once():
    counts = []
    generate(adapted("lora"), some_prompts(), [1] * 9, NEVER, batch_tokens=60, on_rows=counts.append)
    assert counts == [5, 2, 1, 1]


def test_progress_is_told_with_each_token_and_changes_no_answer():
    model, prompts, counts = adapted("lora"), some_prompts(), []
    limits = [8] * len(prompts)
    told = generate(model, prompts, limits, NEVER, batch_tokens=60, on_rows=counts.append)
    assert told == generate(model, prompts, limits, NEVER, batch_tokens=60)
    batches = len(batches_of([(len(prompt), 8) for prompt in prompts], 60))
    assert len(counts) == 8 * batches
    assert sum(counts) == pytest.approx(len(prompts))


def test_progress_of_an_answer_that_ends_early_comes_to_its_end():
    model, prompts, counts = adapted("lora"), some_prompts()[:1], []
    (free,) = generate(model, prompts, [8], NEVER)
    generate(model, prompts, [8], Ends((free[2],), 0), on_rows=counts.append)
    assert len(counts) < 8
    assert sum(counts) == pytest.approx(1)


def test_batches_are_bounded_by_what_their_cache_holds():
    """Rows 1 and 3 together would hold 2 x (20 + 10) positions; a row that is too long by itself goes alone."""
    lengths = [(500, 1), (10, 10), (2, 3), (20, 5)]
    assert batches_of(lengths, 50) == [[2, 1], [3], [0]]
    assert batches_of(lengths, 60) == [[2, 1], [3], [0]]
    assert batches_of(lengths, 90) == [[2, 1, 3], [0]]
    assert batches_of([], 90) == []


def test_sampling_depends_on_the_seed_and_leaves_the_random_state_alone():
    model, prompts = adapted("p-tuning-mlp"), some_prompts()[:4]
    torch.manual_seed(5)
    expected_next = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = (
        generate(model, prompts, [12] * 4, NEVER, Sampling(temperature=1.0, top_p=0.9, seed=seed)) for seed in (1, 1, 2)
    )
    assert one == same != other
    assert torch.equal(torch.rand(3), expected_next)


def test_a_nearly_cold_temperature_is_greedy():
    model, prompts = adapted("lora"), some_prompts()
    cold = generate(model, prompts, [8] * 9, NEVER, Sampling(temperature=1e-4))
    assert cold == generate(model, prompts, [8] * 9, NEVER)


def test_sampling_defaults_of_the_model_do_not_reach_a_greedy_call():
    model, prompts = adapted("lora"), some_prompts()
    expected = generate(model, prompts, [8] * 9, NEVER)
    own = model.get_base_model().generation_config
    own.do_sample, own.temperature, own.top_k, own.repetition_penalty = True, 5.0, 3, 1.9
    assert generate(model, prompts, [8] * 9, NEVER) == expected


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(builtin_folder("smollm2-135m-instruct"))


def test_the_ends_are_the_templates_end_of_turn_and_the_models_own(tokenizer):
    model = tiny_llama()
    model.generation_config.eos_token_id = [7, 9]
    assert find_ends(model, tokenizer) == Ends(stop=(2, 7, 9), pad=2)
    model.generation_config.eos_token_id = None
    assert tokenizer.convert_ids_to_tokens(list(find_ends(model, tokenizer).stop)) == ["<|im_end|>"]


def test_streamed_pieces_are_the_answers_text(tokenizer):
    """A vocabulary of the real size: the pieces, put together, are the decoded answer of the batched call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.5,
    )
    model = get_peft_model(LlamaForCausalLM(config), ADAPTERS["prompt-tuning"]()).eval()
    prompt = tokenizer("Say something.").input_ids
    pieces: list[str] = []
    ids = list(stream(model, tokenizer, prompt, 20, Ends((2,), 2), pieces.append).ids)
    assert len(pieces) > 1
    assert "".join(pieces) == tokenizer.decode(ids)
    assert [ids] == generate(model, [prompt], [20], Ends((2,), 2))


def test_of_a_character_that_an_answer_is_cut_in_nothing_is_shown(tokenizer):
    ids = tokenizer("So far 🦥", add_special_tokens=False).input_ids
    assert tokenizer.decode(ids[:-1]).endswith("\ufffd"), "several tokens make the character"
    cut, whole = (decoded(tokenizer, ids[:-1], is_whole=value) for value in (False, True))
    assert (cut.strip(), decoded(tokenizer, ids, is_whole=False)) == ("So far", "So far 🦥")
    assert whole == tokenizer.decode(ids[:-1]), "what a model says of itself stays to be seen"
    assert answer_text(tokenizer, ids[:-1], is_whole=False) == f"So far{CUT}"
    pieces: list[str] = []
    shown = Pieces(tokenizer, pieces.append)
    shown.put(torch.tensor([1]))  # the prompt
    for token in ids[:-1]:
        shown.put(torch.tensor([token]))
    shown.end()
    assert "".join(pieces) == cut


def test_no_batch_goes_on_beyond_the_positions_of_a_row_in_it() -> None:
    lengths = [(100, 28), (120, 8), (20, 28)]
    assert batches_of(lengths, 10_000) == [[2, 0, 1]]
    assert batches_of(lengths, 10_000, reach=128) == [[2, 0], [1]]


@pytest.mark.parametrize("soft", [0, 4])
def test_learned_positions_are_never_read_beyond_their_end(soft: int) -> None:
    """GPT-2's table has 32 rows here: a torch.embedding outside of it raises."""
    config = GPT2Config(n_positions=32, vocab_size=50, n_embd=16, n_layer=1, n_head=2)
    model: Any = GPT2LMHeadModel(config)
    if soft:
        model = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=soft))
    reach = positions_left(model)
    assert reach == 32 - soft
    prompts = [[5] * length for length in (3, 20, reach - 1)]
    limits = [within_reach(24, len(prompt), reach) for prompt in prompts]
    assert limits == [24, min(24, reach - 20), 1]
    made = generate(model, prompts, limits, Ends((), 0))
    assert [len(ids) for ids in made] == limits
    assert within_reach(24, reach, reach) < 1
    assert within_reach(24, 1000, None) == 24


def test_a_passage_that_ends_an_answer_again_and_again_is_found_and_a_list_is_not() -> None:
    assert loop_at_end([9, 8, *([1, 2, 3] * 12)]) == [1, 2, 3]
    assert loop_at_end([7] * 40) == [7]
    assert loop_at_end([*range(30), *range(30), *range(30)]) == [*range(30)]
    assert loop_at_end([1, 2, 3] * 3) == ()  # too little to say
    assert loop_at_end([*range(200)]) == ()
    assert loop_at_end([number for place in range(40) for number in (5, 6, place)]) == ()
    assert loop_at_end([]) == ()


def test_a_streamed_answer_in_a_circle_is_stopped_and_no_other(tokenizer) -> None:
    """All logits are alike, so that the likeliest token is the first one, for ever; one that is drawn is another."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    torch.nn.init.zeros_(model.lm_head.weight)
    prompt, none = tokenizer("Say something.").input_ids, Ends((), 2)
    circling = stream(model, tokenizer, prompt, 300, none, lambda _: None)
    assert (len(circling.ids), circling.is_whole) == (128, False)
    assert loop_at_end(circling.ids) == (0,)
    drawn = stream(model, tokenizer, prompt, 300, none, lambda _: None, Sampling(temperature=1.0))
    assert len(drawn.ids) == 300
    assert [len(ids) for ids in generate(model, [prompt], [300], none)] == [300], "what is compared is whole"


def test_a_circle_takes_as_many_times_as_tokens() -> None:
    dashes, lines = [7] * 100, [*range(30)] * 6
    assert (loop_at_end(dashes), loop_at_end(dashes, *ENDLESS)) == ([7], ())
    assert (loop_at_end(lines), loop_at_end(lines, *ENDLESS)) == ([*range(30)], ())
    assert loop_at_end([*range(30)] * 8, *ENDLESS) == [*range(30)]
