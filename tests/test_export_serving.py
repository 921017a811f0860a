"""The commands that serve an export: for what is in the folder alone, as a shell reads them."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from export_models import tiny_run
from transformers import AutoConfig, PretrainedConfig

from qtune.export.export import Options, export_run
from qtune.export.opened_run import open_for_export
from qtune.export.serving import context_in_llama_cpp, context_of, serving
from qtune.recipe.file import check_recipe
from qtune.recipe.schema import Recipe
from qtune.run.folder import RunDir

# peft 0.21.2 asks transformers 5.23 for the name that it is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

LORA = 'kind = "lora"\nrank = 4'


def commands(run: RunDir, folder: Path) -> list[list[str]]:
    return [shlex.split(one.command) for one in serving(open_for_export(run), folder)]


def after(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


def test_an_export_with_gguf_ends_with_commands_whose_files_are_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny_run(tmp_path)
    folder = export_run(run, Options(gguf="f16", verify=False, output=tmp_path / "it's mine" / "model"))
    vllm, merged, adapted, ollama = commands(run, folder)
    assert vllm[:3] == ["vllm", "serve", str(folder)]
    # The tiny model reaches no further than 256 tokens.
    assert after(vllm, "--max-model-len") == after(merged, "-c") == after(adapted, "-c") == "256"
    assert after(merged, "-m") == str(folder / "run-f16.gguf")
    assert after(adapted, "-m") == "BASE.gguf"
    assert after(adapted, "--lora") == str(folder / "adapter.gguf")
    named = [after(merged, "-m"), after(adapted, "--lora"), after(adapted, "--chat-template-file"), after(ollama, "-f")]
    assert all(Path(name).is_file() for name in named)
    assert ollama == ["ollama", "create", "run", "-f", str(folder / "Modelfile"), "&&", "ollama", "run", "run"]
    said = capsys.readouterr().err
    assert all(one.command in said for one in serving(open_for_export(run), folder))
    card = (folder / "README.md").read_text()
    assert "From inside of this folder, or with its path in the place of `.`:" in card
    assert "llama-server -m run-f16.gguf" in card
    greedy = """--override-generation-config '{"temperature": 0}'"""
    assert f"vllm serve . --served-model-name run --max-model-len 256 {greedy}\n" in card
    assert "llama-server -m BASE.gguf --lora adapter.gguf" in card


USES = {
    "merged": (Options(verify=False), ["here", "transformers", "vLLM", "llama.cpp, Ollama"]),
    "with a GGUF file": (
        Options(verify=False, gguf="q8_0"),
        ["here", "transformers", "vLLM", "llama.cpp", "llama.cpp", "Ollama"],
    ),
    "adapter alone": (Options(adapter_only=True), ["transformers, peft", "vLLM", "llama.cpp, Ollama"]),
}


@pytest.mark.parametrize("kind", USES)
def test_an_export_ends_with_every_program_that_loads_what_was_exported(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, (options, programs) = tiny_run(tmp_path), USES[kind]
    folder = export_run(run, options)
    said = capsys.readouterr().err.partition("use it with one of")[2].partition(":\n")[2].splitlines()
    assert [line.strip().partition(": ")[0].rstrip(":") for line in said] == programs
    assert "```python" in (folder / "README.md").read_text()
    if kind == "merged":
        (line,) = (line for line in said if "transformers:" in line)
        program, switch, code = shlex.split(line.partition("transformers:")[2])
        assert (program, switch) == ("python", "-c")
        capsys.readouterr()
        exec(code.replace("max_new_tokens=200", "max_new_tokens=3"), {})
        assert capsys.readouterr().out
    if kind == "adapter alone":
        assert f"the lines in {folder / 'README.md'}, from inside" in "\n".join(said)
    if programs[-1] == "llama.cpp, Ollama":
        command = said[-1].rpartition("written by: ")[2]
        again = " --force" if kind == "merged" else ""
        assert command == f"qtune export {run.path} --gguf q8_0{again}"


def test_a_plain_export_is_served_by_vllm_alone_and_a_soft_prompt_has_no_adapter_to_load(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, 'kind = "p-tuning"\nvirtual_tokens = 3')
    plain = export_run(run, Options(verify=False))
    assert [words[0] for words in commands(run, plain)] == ["vllm"]
    with_gguf = export_run(run, Options(verify=False, force=True, gguf="q8_0"))
    assert [words[0] for words in commands(run, with_gguf)] == ["vllm", "llama-server", "ollama"]
    assert not any("--lora" in words for words in commands(run, with_gguf))


@pytest.mark.parametrize(
    ("adapter", "quantization", "expected"),
    [
        (LORA, 'kind = "nf4"', "8 bitsandbytes"),
        (f"{LORA}0", 'kind = "nf4"', "64 bitsandbytes"),
        # vLLM quantizes to NF4 with double quantization, and to nothing else.
        (LORA, 'kind = "nf4"\ndouble_quantization = false', "8 none"),
        (LORA, 'kind = "fp4"', "8 none"),
        (f"{LORA}\ndora = true", 'kind = "nf4"', None),
        ('kind = "ia3"', 'kind = "nf4"', None),
        ('kind = "prefix-tuning"\nvirtual_tokens = 3', 'kind = "nf4"', None),
    ],
)
def test_an_adapter_alone_is_served_where_vllm_can_load_it(
    adapter: str, quantization: str, expected: str | None, tmp_path: Path
) -> None:
    run = tiny_run(tmp_path, adapter, quantization=f'{quantization}\ncompute_dtype = "float32"\nminimum_share = 0.0')
    folder = export_run(run, Options(adapter_only=True))
    found = commands(run, folder)
    card = (folder / "README.md").read_text()
    assert ("## How it is served" in card) is (expected is not None)
    if expected is None:
        assert found == []
        return
    assert "From inside of this folder, or with its path in the place of `.`:" in card
    assert (
        '# The name of a folder or file: put its path here.\nbase = AutoModelForCausalLM.from_pretrained("base"' in card
    )
    [words] = found
    rank, held = expected.split()
    assert after(words, "--max-lora-rank") == rank
    assert (after(words, "--quantization") if "--quantization" in words else "none") == held
    assert after(words, "--lora-modules") == f"run={folder}"
    assert Path(after(words, "--chat-template")).is_file()
    assert words[:3] == ["vllm", "serve", str(tmp_path / "base")]


def recipe_with(max_length: int, adapter: str = LORA) -> Recipe:
    text = f'[model]\nbase = "a/b"\n[adapter]\n{adapter}\n[data]\ntrain = "hub:a/b"\nmax_length = {max_length}\n'
    return check_recipe(text, Path("recipe.toml")).recipe


def model_with(reach: int, window: int | None = None) -> PretrainedConfig:
    return AutoConfig.for_model("mistral", max_position_embeddings=reach, sliding_window=window)


@pytest.mark.parametrize(
    ("reach", "max_length", "expected"),
    [(2048, 512, 2048), (131_072, 512, 8192), (131_072, 16_384, 32_768), (20_000, 16_384, 20_000)],
)
def test_as_much_is_held_as_rows_and_model_ask_for(reach: int, max_length: int, expected: int) -> None:
    assert context_of(model_with(reach), recipe_with(max_length)) == expected


def test_virtual_tokens_take_their_part_of_the_context_and_an_ignored_window_bounds_it() -> None:
    soft = recipe_with(8192, 'kind = "prompt-tuning"\nvirtual_tokens = 20')
    assert context_of(model_with(131_072), soft) == 2 * 8192 + 20
    assert context_in_llama_cpp(model_with(131_072, window=4096), soft) == 4096
    assert context_of(model_with(131_072, window=4096), soft) == 2 * 8192 + 20


def test_a_card_names_no_folder_of_this_computer_and_the_terminal_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny_run(tmp_path)
    alone = export_run(run, Options(adapter_only=True))
    assert f"vllm serve {tmp_path / 'base'}" in capsys.readouterr().err
    whole = export_run(run, Options(gguf="f16", verify=False))
    for folder in (alone, whole):
        card = (folder / "README.md").read_text()
        assert str(tmp_path) not in card
        assert "base" in card
    card = (alone / "README.md").read_text()
    assert "vllm serve BASE " in card
    assert "`BASE`: the path of a folder with the weights of `base`." in card
    assert "`BASE.gguf`: `base` as a GGUF file, which llama.cpp's" in (whole / "README.md").read_text()


def test_a_base_in_the_home_is_found_and_is_no_id_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_for_export(tiny_run(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    named = source.recipe.model_copy(update={"model": source.recipe.model.model_copy(update={"base": "~/base"})})
    at_home = replace(source, recipe=named)
    assert (at_home.is_of_hub, at_home.base_in_public) == (False, "base")
    hub = source.recipe.model_copy(update={"model": source.recipe.model.model_copy(update={"base": "a/b"})})
    assert (replace(source, recipe=hub).is_of_hub, replace(source, recipe=hub).base_in_public) == (True, "a/b")


def test_loftq_has_no_file_for_an_unquantized_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_run(tmp_path)
    text = run.resolved_file.read_text()
    run.write_text(run.resolved_file, text.replace("rank = 4", 'rank = 4\ninitialization = "loftq"'))
    folder = export_run(run, Options(gguf="f16", verify=False))
    assert not (folder / "adapter.gguf").exists()
    assert "LoftQ starts at the error of the base's quantization" in capsys.readouterr().err


def test_a_base_that_vllm_does_not_quantize_as_training_did_is_said(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, quantization='kind = "fp4"\ncompute_dtype = "float32"\nminimum_share = 0.0')
    folder = export_run(run, Options(adapter_only=True))
    assert "trained on FP4" in (folder / "README.md").read_text()
