"""README.md of an export: what it is, how to load it, and the figures that prove it."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from peft import PeftType

from qtune.control_characters import visible
from qtune.errors import RunError
from qtune.export.greedy import generation_settings, in_python
from qtune.export.llama_cpp import ADAPTER_FILE
from qtune.export.opened_run import OpenedRun
from qtune.export.serving import serving
from qtune.model.builtin import PREFIX
from qtune.run.summary import Summary, summary_of

if TYPE_CHECKING:
    from qtune.export.verification import Verification

HERE = "From inside of this folder, or with its path in the place of `.`:\n"
"""Who reads a card may have it under any name, and from anywhere."""

SNIPPET = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".", dtype="auto", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(".")
messages = [{{"role": "user", "content": "Hello"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
# The likeliest token each time, as the trained model was asked; left to itself, a model may draw.
output = model.generate(**inputs.to(model.device), max_new_tokens=200, {greedy})
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```
"""

ADAPTER_SNIPPET = """\
```python
from peft import PeftModel
{imports}{pad_import}from transformers import AutoModelForCausalLM, AutoTokenizer{config_import}

{base_note}base = AutoModelForCausalLM.from_pretrained({base}, dtype="{dtype}", device_map="auto"{quantization})
model = PeftModel.from_pretrained(base, ".")
tokenizer = AutoTokenizer.from_pretrained(".")
messages = [{{"role": "user", "content": "Hello"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
{asks}
```
"""

# peft 0.21 reads the cache that transformers prepares by the name "past_key_values", which transformers 5.24 calls
# "cache": it takes each token for the first one. A soft prompt then stands before every new token once more, and a
# prefix is handed over beside the cache and dropped for it. Each way below is right with the one and with the other.
ASKS = """\
# The likeliest token each time, as the trained model was asked; left to itself, a model may draw.
output = model.generate(**inputs.to(model.device), max_new_tokens=200, {greedy})
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""
ASKS_A_SOFT_PROMPT = """\
# The likeliest token each time, as the trained model was asked; left to itself, a model may draw.
# Without a cache: with one, peft 0.21 on transformers 5.24 repeats the soft prompt before every new token.
output = model.generate(**inputs.to(model.device), max_new_tokens=200, {greedy}, use_cache=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""
# Without a cache a prefix is no way: the ids of all tokens would be computed on top of it, on Llama with an error.
ASKS_A_PREFIX = """\
# The base is asked with the prefix as its cache: peft 0.21's own generate() loses it on transformers 5.24.
prefix = model.get_prompt(batch_size=1)
length = prefix.get_seq_length()
ids = pad(inputs["input_ids"].to(model.device), (length, 0))
mask = pad(inputs["attention_mask"].to(model.device), (length, 0), value=1)
# The likeliest token each time, as the trained model was asked; left to itself, a model may draw.
output = base.generate(input_ids=ids, attention_mask=mask, past_key_values=prefix, max_new_tokens=200, {greedy})
print(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))"""


def write_card(source: OpenedRun, folder: Path, verification: "Verification | None") -> None:
    """Writes README.md beside an exported model. Its title is the run's name: most folders are called "model"."""
    parts = [
        _front_matter(source, "transformers"),
        f"# {source.run.name}\n",
        f"{source.base_in_public} with {source.recipe.adapter.in_words} trained and merged by qtune.\n",
        HERE,
        SNIPPET.format(greedy=in_python(generation_settings(folder))),
        *_how_served(source, folder),
        *_how_asked(source),
        _how_trained(source),
        "## Is it the model that was trained?\n",
        _proof(verification),
    ]
    (folder / "README.md").write_text("\n".join(parts), encoding="utf-8")


def adapter_card(source: OpenedRun, folder: Path) -> str:
    """The card of an adapter alone, with the lines that, from inside of its folder, load it onto the base as it was
    trained."""
    quantization, config_import, words = "", "", source.recipe.adapter.in_words
    basis = source.basis
    kind = "none" if basis.is_stored else basis.kind  # what a checkpoint brings needs no word
    dtype = str(basis.load_dtype).removeprefix("torch.")
    if kind in ("nf4", "fp4"):
        config_import = ", BitsAndBytesConfig"
        quantization = (
            ", quantization_config=BitsAndBytesConfig(\n"
            f'    load_in_4bit=True, bnb_4bit_quant_type="{kind}", bnb_4bit_compute_dtype="{dtype}",\n'
            f"    bnb_4bit_use_double_quant={basis.double_quantization},\n)"
        )
    elif kind == "int8":
        config_import, quantization = (
            ", BitsAndBytesConfig",
            ", quantization_config=BitsAndBytesConfig(load_in_8bit=True)",
        )
    parts = [
        _front_matter(source, "peft"),
        f"# {words[0].upper()}{words[1:]} for {source.base_in_public}\n",
        HERE,
        ADAPTER_SNIPPET.format(
            **_loaded_from(source),
            **_asked(source),
            dtype=dtype,
            config_import=config_import,
            quantization=quantization,
        ),
        *_how_served(source, folder),
        *_how_asked(source),
        _how_trained(source),
    ]
    return "\n".join(parts)


def _asked(source: OpenedRun) -> dict[str, str]:
    """The lines that ask an adapter's model, and what they import."""
    lines, pad_import = ASKS, ""
    if source.config.peft_type == PeftType.PREFIX_TUNING:
        lines, pad_import = ASKS_A_PREFIX, "from torch.nn.functional import pad\n"
    elif source.config.is_prompt_learning:
        lines = ASKS_A_SOFT_PROMPT
    return {"asks": lines.format(greedy=in_python(generation_settings(source.base))), "pad_import": pad_import}


def _loaded_from(source: OpenedRun) -> dict[str, str]:
    """The base as Python names it, and what that takes: transformers knows nothing of a built-in model."""
    base = source.base_in_public
    if not base.startswith(PREFIX):
        note = "" if source.is_of_hub else "# The name of a folder or file: put its path here.\n"
        return {"base": json.dumps(base, ensure_ascii=False), "imports": "", "base_note": note}
    own, imported = json.dumps(base.removeprefix(PREFIX)), "from qtune.model.builtin import builtin_folder\n"
    return {"base": f"builtin_folder({own})", "imports": imported, "base_note": ""}


def _front_matter(source: OpenedRun, library: str) -> str:
    # The hub links to the base by its id; names that are none would be a broken link.
    named = f"base_model: {source.base_name}\n" if source.is_of_hub else ""
    return f"---\nlibrary_name: {library}\npipeline_tag: text-generation\n{named}tags:\n- qtune\n---\n"


def _how_served(source: OpenedRun, folder: Path) -> list[str]:
    """The commands that hold for what is in the folder, from inside of it; nothing where there are none."""
    commands = serving(source, folder, is_public=True)
    if not commands:
        return []
    lines = [f"# {one.program}{f' ({one.note})' if one.note else ''}\n{one.command}" for one in commands]
    greedy = "Each answers with the likeliest token, as the trained model was asked, unless a request says otherwise.\n"
    parts = [
        "## How it is served\n",
        greedy,
        *_what_stands_for(lines, source),
        "```sh\n" + "\n".join(lines) + "\n```\n",
    ]
    if (folder / ADAPTER_FILE).is_file():
        base = source.base_in_public
        told = f"`{ADAPTER_FILE}` holds what was trained, for llama.cpp to put on a GGUF file of `{base}`."
        if source.basis.kind != "none":
            told += (
                " Those weights are others than the ones it was trained on (see below), so that it answers otherwise; "
                "what was compared with the trained model is the merged one."
            )
        parts.append(f"{told}\n")
    return parts


def _what_stands_for(lines: list[str], source: OpenedRun) -> list[str]:
    """What is to be put in the place of a base that no command can name for everybody."""
    words, base = {word for line in lines for word in line.split()}, source.base_in_public
    told = [f"`BASE`: the path of a folder with the weights of `{base}`."] if "BASE" in words else []
    if "BASE.gguf" in words:
        told.append(
            f"`BASE.gguf`: `{base}` as a GGUF file, which llama.cpp's `convert_hf_to_gguf.py` makes of its folder."
        )
    return [" ".join(told) + "\n"] if told else []


def _how_asked(source: OpenedRun) -> list[str]:
    """What stood before the user's words in training, if anything did."""
    prompt, merges = source.recipe.data.system_prompt, source.recipe.data.system == "merge"
    if prompt is None:
        return []
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", prompt))])
    where = "into the first question" if merges else "before the first question, as the system message"
    return [
        "## How it is asked\n",
        f"Training put this text {where}. The chat template does the same for conversations without a system message, "
        "in transformers, vLLM and llama.cpp alike; with another one the model is asked what it was not trained on.\n",
        f"{fence}text\n{visible(prompt)}\n{fence}\n",
    ]


def _how_trained(source: OpenedRun) -> str:
    training, basis = source.recipe.training, source.basis
    held = "unquantized" if basis.kind == "none" else f"in {basis.kind.upper()}"
    double = " with double quantization" if basis.double_quantization else ""
    try:
        summary = summary_of(source.run)
    except RunError:  # what is exported is whole without its run's records
        summary = None
    batch = f"batch {training.batch_size}, learning rate {training.learning_rate}, seed {training.seed}"
    return (
        "## How it was trained\n\n"
        f"- base: `{source.base_in_public}`, held {held}{double}, computed in "
        f"{str(basis.compute_dtype).removeprefix('torch.')}\n"
        f"- adapter: `{source.recipe.adapter.kind}`\n"
        f"- {_steps(summary)}{batch}\n"
        f"{_losses(summary)}"
    )


def _steps(summary: Summary | None) -> str:
    """How many were taken, and after which the adapter is what is exported; nothing where no step was logged."""
    if summary is None or not summary.steps:
        return ""
    kept = "" if summary.adapter_step is None else f" (this is the state after step {summary.adapter_step:,})"
    return f"{summary.steps_taken}{kept}, "


def _losses(summary: Summary | None) -> str:
    """What was learned, as everything else of the run says it; nothing where no step was logged."""
    if summary is None or summary.losses is None:
        return ""
    return f"- training loss: {summary.losses.text}\n"


def _proof(verification: "Verification | None") -> str:
    if verification is None:
        return "Not verified: this model was not compared with the one that was trained. Nothing here was measured.\n"
    exported, bare, allowed = verification.exported, verification.bare_base, verification.limits
    verdict = "**Verified.**" if verification.verified else "**NOT VERIFIED, for the reasons below.**"
    lines = [
        f"{verdict} Loaded back and compared with the model that was trained, on {verification.rows} "
        f"{verification.rows_from} ({exported.tokens} tokens), both computed in float32.\n",
        "| | exported | bare base | limit |",
        "|---|---|---|---|",
        f"| KL divergence, nats per token | {exported.kl:.2e} | {bare.kl:.2e} | ≤ {allowed.kl:.2e} |",
        f"| same likeliest token | {exported.top1:.2%} | {bare.top1:.2%} | ≥ {allowed.top1:.1%} |",
        f"| largest logit gap | {exported.gap:.3g} | {bare.gap:.3g} | |",
        f"| perplexity (trained: {verification.perplexity['trained']:.4g}) "
        f"| {verification.perplexity['exported']:.4g} | {verification.perplexity['bare base']:.4g} | |",
        "",
        f"Limit: {allowed.reason}. Merged into the {verification.weights} weights.\n",
    ]
    for basis, cost in verification.cost.items():
        if basis == "original" and verification.weights != "dequantized":
            lines.append(
                f"Against the model that was trained, the {basis} weights cost a KL divergence of {cost.kl:.2e} and "
                f"change the likeliest token at {1 - cost.top1:.2%} of positions.\n"
            )
        elif basis == "original":
            lines.append(f"Merging into the original weights would have cost a KL divergence of {cost.kl:.2e}.\n")
    if verification.live is not None:
        lines.append(
            f"Computing with {verification.compute_dtype}, as it was trained, the model differs from this exact "
            f"self by a KL divergence of {verification.live.kl:.2e}: the noise of that precision, not of the export.\n"
        )
    lines += [f"- {failure}" for failure in verification.failures]
    return "\n".join(lines) + "\n"
