"""An exported folder -> the files that llama.cpp and Ollama take, proven against the folder."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from qtune import console
from qtune.data.conversation import Conversation
from qtune.errors import VerificationError
from qtune.export.adapter_weights import open_adapter
from qtune.export.gguf.adapter import NoGgufAdapter, gguf_adapter, write_gguf_adapter
from qtune.export.gguf.file import GgufType, gguf_vocabulary, write_gguf
from qtune.export.gguf.modelfile import NoModelfile, modelfile_for, write_modelfile
from qtune.export.gguf.verify import verify_gguf
from qtune.export.greedy import generation_settings
from qtune.export.llama_cpp import ADAPTER_FILE, ignored_window
from qtune.export.opened_run import OpenedRun
from qtune.export.output import UNVERIFIED
from qtune.export.serving import context_in_llama_cpp, starts_from_error
from qtune.export.staged import refuse_small_disk
from qtune.export.verification import add_gguf
from qtune.export.verify.rows import CheckedRow, probes
from qtune.manifest import add_to_seal
from qtune.model.load import load_config
from qtune.recipe.schema import Data, Recipe
from qtune.sizes import MIB, size_text


def hand_over(
    folder: Path, name: str, kind: GgufType, recipe: Recipe, rows: Sequence[CheckedRow], virtual: Sequence[int]
) -> Path:
    """Writes NAME-KIND.gguf into an exported folder, and a Modelfile where the template allows one; returns the file.

    Raises:
        ModelError: the model has no GGUF here. ExportError: a value does not fit.
        VerificationError: what is read back is not what was written; verify.json keeps the figures.
    """
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    refuse_small_disk(folder, weights)
    file = folder / f"{name}-{kind}.gguf"
    with console.progress(f"writing {file.name} (MiB)", round(weights / MIB)) as bar:
        write_gguf(folder, file, kind, lambda nbytes: bar.advance(nbytes / MIB))
    proof = verify_gguf(folder, file, kind, rows, virtual)
    add_gguf(folder, proof)
    closeness = proof.closeness
    console.out(f"{file.name}: KL divergence {closeness.kl:.2e}, same likeliest token {closeness.top1:.2%} (read back)")
    if proof.failures:
        kept = file.rename(file.with_name(f"{file.name}{UNVERIFIED}"))  # which no program loads by mistake
        message = f"is not the exported model: {'; '.join(proof.failures)}; it is kept as {kept.name}"
        raise VerificationError(f"{file}: {message}, and {folder} is what it was; another --gguf rounds otherwise")
    config = AutoConfig.from_pretrained(folder)
    add_to_seal(folder, [file])
    if window := ignored_window(config):
        console.say(
            f"llama.cpp does not apply this model's sliding window: beyond {window} tokens it answers otherwise"
        )
    _write_modelfile(folder, file, config, recipe, rows)
    return file


def hand_over_adapter(source: OpenedRun, folder: Path) -> None:
    """Writes adapter.gguf beside the merged GGUF file, or says why there is none; one of before is not left there."""
    (folder / ADAPTER_FILE).unlink(missing_ok=True)
    if source.recipe.adapter.export == "bake":
        console.say(
            f"no {ADAPTER_FILE} for llama.cpp's --lora: a soft prompt is no change of weights; the merged file has it"
        )
        return
    if starts_from_error(source):
        console.say(
            f"no {ADAPTER_FILE} for llama.cpp's --lora: LoftQ starts at the error of the base's quantization, which a "
            "GGUF file of the base does not have; the merged file has it"
        )
        return
    made = gguf_adapter(open_adapter(source.adapter), load_config(source.recipe.model), source.base_name)
    if isinstance(made, NoGgufAdapter):
        console.say(f"no {ADAPTER_FILE} for llama.cpp's --lora: {made.reason}; the merged file has it")
        return
    file = write_gguf_adapter(made, folder / ADAPTER_FILE, source.run.name)
    add_to_seal(folder, [file])
    console.out(f"{file.name}: {size_text(file.stat().st_size)}, for llama.cpp's --lora on a GGUF file of the base")
    if source.basis.kind != "none":
        held = source.basis.kind.upper()
        console.say(f"it was trained on {held} weights, and answers otherwise on others: the merged file was compared")


def as_asked(conversation: Conversation, data: Data) -> Conversation:
    """A row whose question was merged with the recipe's system prompt, with the two apart again: as Ollama is asked."""
    prompt, (first, *others) = data.system_prompt, conversation.messages
    opening = f"{prompt}\n\n"
    if prompt is None or data.system != "merge" or not str(first.get("content")).startswith(opening):
        return conversation
    apart = ({"role": "system", "content": prompt}, {**first, "content": first["content"].removeprefix(opening)})
    return replace(conversation, messages=(*apart, *others))


def _write_modelfile(
    folder: Path, file: Path, config: PretrainedConfig, recipe: Recipe, rows: Sequence[CheckedRow]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vocabulary = gguf_vocabulary(folder, config, tokenizer)
    made = modelfile_for(
        tokenizer,
        [as_asked(conversation, recipe.data) for conversation in probes(rows)],
        system=recipe.data.system_prompt,
        adds_bos=vocabulary.adds_bos,
        context=context_in_llama_cpp(config, recipe),
        generation=generation_settings(folder),
    )
    if isinstance(made, NoModelfile):
        console.say(f"no Modelfile for Ollama: {made.reason}")
    else:
        add_to_seal(folder, [write_modelfile(folder, made, file.name)])
