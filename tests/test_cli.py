"""The command: instant help for every verb, one exit code for each way to end, errors before anything heavy."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
import typer.rich_utils
from conftest import WriteRecipe, run_qtune
from typer.testing import CliRunner

from qtune import __version__, cli
from qtune.errors import GateError, InputError, Interrupted, Problem
from qtune.export.conflicts import CONFLICTS
from qtune.recipe.shipped import shipped_recipes
from qtune.run.drift import KINDS, USING
from qtune.verbs import OTHER_NAMES, Verbs, _options

HEAVY = ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets")
VERBS = sorted(command.name or command.callback.__name__ for command in cli.app.registered_commands)

# Runs the command as `qtune ARGUMENTS` would, several times, and prints as JSON how each ended.
SCRIPT = f"""
import contextlib, io, json, sys
from qtune.cli import main
ended = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["qtune", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
    heavy = [name for name in {HEAVY!r} if name in sys.modules]
    ended.append([code, out.getvalue(), err.getvalue(), heavy])
print(json.dumps(ended))
"""


def ends(*calls: list[str]) -> list[tuple[int, str, str, list[str]]]:
    """(exit code, stdout, stderr, heavy modules that were imported) of calls in one fresh process."""
    root = str(Path(cli.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(calls)],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": root},
    )  # fmt: skip
    return [tuple(one) for one in json.loads(done.stdout)]


def test_help_has_the_verbs_in_the_order_of_the_readme() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    shown = CliRunner().invoke(cli.app, ["--help"]).output
    verbs = re.findall(r"(?m)^│ ([a-z]+) ", shown)
    assert sorted(verbs) == VERBS
    assert verbs == re.findall(r"(?m)^\| `qtune ([a-z]+)", readme)
    assert re.findall(r"(?m)^╭─ (\w+) ─", shown) == ["Options", "Prepare", "Train", "Try", "Use", "Runs"]


def test_every_verb_answers_help_without_the_heavy_libraries() -> None:
    assert {"run", "eval", "chat", "export", "doctor"} <= set(VERBS)
    answers = ends(["--help"], ["-h"], ["--version"], *([verb, "--help"] for verb in VERBS))
    for code, out, err, heavy in answers:
        assert (code, err, heavy) == (0, "", [])
        assert out
    overview = answers[0][1]
    assert all(re.search(rf"^│ {verb} ", overview, re.MULTILINE) for verb in VERBS)
    ends_of_words = re.sub(r"\s+", " ", overview)
    assert "0 done · 1 the work failed · 2 the input is wrong · 130 interrupted, state saved · 141" in ends_of_words
    assert answers[2][1] == f"qtune {__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_and_argument_of_a_verb_is_explained(verb: str) -> None:
    command = typer.main.get_command(cli.app).get_command(None, verb)
    assert command.help
    assert {parameter.name: bool(parameter.help) for parameter in command.params if parameter.name != "help"} == {
        parameter.name: True for parameter in command.params if parameter.name != "help"
    }


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("verb", VERBS)
def test_help_fills_its_lines_at_any_width(verb: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(typer.rich_utils, "MAX_WIDTH", width)
    shown = CliRunner().invoke(cli.app, [verb, "--help"]).output
    prose = shown[: shown.index("╭")].split("\n", 2)[2]  # behind the usage
    lines = [line.strip() for line in prose.splitlines()]
    for line, following in itertools.pairwise(lines):
        word = following.partition(" ")[0]
        # rich leaves a column free on both sides.
        assert not line or not word or len(line) + 1 + len(word) > width - 2, f"{line!r} has room for {word!r}"


@pytest.mark.parametrize("verb", VERBS)
def test_no_option_s_name_is_cut_in_help_at_80_columns(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(typer.rich_utils, "MAX_WIDTH", 80)
    words = CliRunner().invoke(cli.app, [verb, "--help"]).output.split()
    options = _options(typer.main.get_command(cli.app).get_command(None, verb))
    assert set(options) <= {part for word in words for part in word.split(",")}


@pytest.mark.parametrize(
    ("verb", "compared"), [("run", KINDS), ("eval", (*USING, "rows")), ("compare", (*USING, "rows")),
                           ("export", USING), ("chat", USING)]
)  # fmt: skip
def test_the_drifts_that_help_names_are_those_that_the_verb_compares(verb: str, compared: tuple[str, ...]) -> None:
    options = typer.main.get_command(cli.app).get_command(None, verb).params
    told = next(option.help for option in options if "--accept-drift" in option.opts)
    listed = told.partition(": ")[2].partition(", as --accept-drift ")
    assert set(re.split(", | or ", listed[0])) == set(compared)
    assert listed[2].partition(".")[0] in compared


def test_a_wrong_recipe_is_refused_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    recipe = tmp_path / "bad.toml"
    recipe.write_text('[model]\nbase = "org/model"\n[data]\ntrain = "none.jsonl"\n[adapter]\nrnak = 8\n')
    ((code, out, err, heavy), missing, change) = ends(
        ["run", str(recipe)],
        ["run", str(tmp_path / "none.toml")],
        ["run", str(recipe), "--set", "adapter.alhpa=1"],
    )
    assert (code, out, heavy) == (2, "", [])
    assert err == (
        f'error: {recipe}:4: data.train = "none.jsonl": no such file or folder in {tmp_path}\n'
        f"{recipe}:6: adapter.rnak = 8: no such key in [adapter]; did you mean 'rank'?\n"
    )
    assert missing[0] == 2
    assert missing[2].startswith(f"error: {tmp_path}/none.toml: no such file, nor a recipe that comes with qtune (")
    assert "--set: adapter.alhpa = 1: no such key in [adapter]; did you mean 'alpha'?" in change[2]
    assert change[3] == missing[3] == []


@pytest.mark.parametrize("verb", ["check", "profile", "fit"])
def test_verbs_that_only_look_refuse_a_wrong_recipe_as_early(verb: str, tmp_path: Path) -> None:
    recipe = tmp_path / "bad.toml"
    recipe.write_text('[model]\nbase = "org/model"\n[data]\ntrain = "none.jsonl"\n[adapter]\nrnak = 8\n')
    for code, out, err, heavy in ends([verb, str(recipe)], [verb, str(tmp_path / "none.toml")]):
        assert (code, out, heavy) == (2, "", [])
        assert err.startswith("error: ")


@pytest.fixture
def stopped(write_recipe: WriteRecipe, tmp_path: Path) -> Path:
    """A run's folder without an adapter."""
    folder = tmp_path / "runs" / "stopped"
    folder.mkdir(parents=True)
    (folder / "resolved.toml").write_text(write_recipe().read_text())
    return folder


def test_what_is_no_run_or_has_no_adapter_is_refused_before_anything_heavy_is_imported(
    stopped: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    finished = [[verb, str(stopped)] for verb in ("eval", "chat", "export")] + [["compare", str(stopped), str(stopped)]]
    others = [["eval", str(empty)], ["export", str(empty)], ["export", "--verify-only", str(empty)]]
    others += [["chat", str(empty)], ["chat", str(empty / "none")], ["chat", "builtin:none"]]
    others += [["export", "--verify-only", str(stopped / "none")]]
    answers = ends(*finished, *others)
    assert [(code, out, heavy) for code, out, _, heavy in answers] == [(2, "", [])] * len(answers)
    for _, _, err, _ in answers[: len(finished)]:
        assert err == f"error: {stopped}: has no adapter yet; finish it with: qtune run --resume {stopped}\n"
    named = [err for _, _, err, _ in answers[len(finished) :]]
    assert named == [
        f"error: {empty}: is not a run: it has no resolved.toml\n",
        f"error: {empty}: is not a run: it has no resolved.toml\n",
        f"error: {empty}: is not inside a run; name the run: qtune export RUN --verify-only DIR\n",
        f"error: {empty}: is neither a run (it has no resolved.toml) nor a model (no config.json)\n",
        f"error: {empty}/none: no such folder\n",
        "error: builtin:none: no such built-in model; there is builtin:smollm2-135m-instruct\n",
        f"error: {stopped}/none: no such folder; --verify-only names one that was exported before\n",
    ]


@pytest.mark.parametrize(
    ("made", "options"), [("model", []), ("adapter-export", ["--adapter-only"]), ("own", ["--output", "own"])]
)
def test_an_export_that_is_there_is_refused_before_anything_heavy_is_imported(
    made: str, options: list[str], stopped: Path
) -> None:
    (stopped / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (stopped / "adapter" / name).touch()
    there = stopped / made
    there.mkdir()
    given = [str(there) if word == made else word for word in options]
    ((code, out, err, heavy),) = ends(["export", str(stopped), *given])
    assert (code, out, heavy) == (2, "", [])
    assert err == f"error: {there}: is there already; another --output, or --force to replace it\n"


def test_a_card_or_a_size_that_is_none_is_refused_before_anything_heavy_is_imported() -> None:
    cards = [["--vram", "lots"], ["--gpu", "RTX 9999"]]
    answers = ends(*([verb, "quickstart", *card] for verb in ("fit", "profile") for card in cards))
    for (code, out, err, heavy), (option, value) in zip(answers, cards * 2, strict=True):
        assert (code, out, heavy) == (2, "", [])
        assert err.startswith(f"error: {option}: {value!r} is not ")


def test_where_no_run_can_be_written_is_told_before_anything_heavy_is_imported(
    write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    recipe, place = str(write_recipe()), f"output.directory={tmp_path}/file"
    unwritable, unknown = ends(["run", recipe, "--set", place], ["run", recipe, "--allow", "nonsense"])
    assert (unwritable[0], unwritable[1], unwritable[3]) == (2, "", [])
    assert unwritable[2].startswith(f"error: --set: output.directory: {tmp_path}/file cannot be written: ")
    assert (unknown[0], unknown[1], unknown[3]) == (2, "", [])
    assert unknown[2].startswith("error: --allow nonsense: no finding that can be waived: ")


def test_a_base_that_cannot_be_had_is_told_before_anything_heavy_is_imported() -> None:
    ((code, out, err, heavy),) = ends(["run", "llama_lora"])
    assert (code, out, heavy) == (2, "", [])
    recipe = shipped_recipes()["llama_lora"]
    line = recipe.read_text().splitlines().index('base = "meta-llama/Llama-3.2-3B-Instruct"') + 1
    assert err.startswith(
        f'error: {recipe}:{line}: model.base = "meta-llama/Llama-3.2-3B-Instruct": is not on this computer, and '
        "HF_HUB_OFFLINE is set; "
    )
    assert 'a local folder, a GGUF file or "builtin:' in err


def test_python_dash_m_is_the_same_command(tmp_path: Path) -> None:
    shown = run_qtune("--version")
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, f"qtune {__version__}\n", "")
    folder = tmp_path / "pictures" / "holidays"
    folder.mkdir(parents=True)
    refused = run_qtune("run", "--resume", folder)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == f"error: {folder}: is not a run: it has no resolved.toml\n"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError([Problem("a:1", "x"), Problem("b:2", "y")]), 2, "error: a:1: x\nb:2: y\n"),
        (GateError("the data would train the wrong thing"), 1, "error: the data would train the wrong thing\n"),
        (Interrupted("stopped at step 3"), 130, "stopped at step 3\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=["input", "work", "interrupted", "ctrl-c"],
)
def test_each_way_to_end_has_its_exit_code(
    error: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: str) -> None:
        raise error

    monkeypatch.setattr("qtune.recipe.shipped.find_recipe", fail)
    monkeypatch.setattr(sys, "argv", ["qtune", "run", "quickstart"])
    monkeypatch.setattr(cli, "quiet_libraries", lambda: None)
    monkeypatch.setattr(cli, "use_expandable_segments", lambda: None)
    monkeypatch.setattr(cli, "let_waiting_threads_sleep", lambda: None)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == code
    if message:
        assert capsys.readouterr() == ("", message)


def test_what_an_experiment_tracker_refuses_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tracking: dict[str, Any] = {"__name__": cli.TRACKING}
    exec("def setup(*_):\n    raise ValueError('No API key configured.\\nUse a login.')", tracking)
    monkeypatch.setattr("qtune.recipe.shipped.find_recipe", tracking["setup"])
    monkeypatch.setattr(sys, "argv", ["qtune", "run", "quickstart"])
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace())
    for name in ("quiet_libraries", "use_expandable_segments", "let_waiting_threads_sleep"):
        monkeypatch.setattr(cli, name, lambda: None)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    told = "error: training.trackers: No API key configured; without it: --set 'training.trackers=[]'\n"
    assert capsys.readouterr() == ("", told)


@pytest.mark.slow
def test_trackers_are_called_where_their_errors_are_looked_for() -> None:
    from transformers.integrations import MLflowCallback, TensorBoardCallback, TrackioCallback, WandbCallback

    callbacks = (MLflowCallback, TensorBoardCallback, TrackioCallback, WandbCallback)
    assert {callback.__module__ for callback in callbacks} == {cli.TRACKING}


def test_an_error_that_nobody_meant_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: str) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("qtune.recipe.shipped.find_recipe", fail)
    monkeypatch.setattr(sys, "argv", ["qtune", "run", "quickstart"])
    monkeypatch.setattr(cli, "quiet_libraries", lambda: None)
    monkeypatch.setattr(cli, "use_expandable_segments", lambda: None)
    monkeypatch.setattr(cli, "let_waiting_threads_sleep", lambda: None)
    with pytest.raises(ZeroDivisionError):
        cli.main()


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["eval", "runs/x", "--test", "rows.jsonl"], "--data"),
        (["eval", "runs/x", "--samples", "5"], "--rows"),
        (["init", "--model", "org/model"], "--base"),
        (["init", "--dataset", "rows.jsonl"], "--data"),
        (["init", "--out", "a.toml"], "--output"),
        (["fit", "a.toml", "--memory", "8GB"], "--vram"),
        (["profile", "a.toml", "--card", "RTX 3060"], "--gpu"),
        (["export", "runs/x", "--quantize", "q8_0"], "--gguf"),
        (["export", "runs/x", "--overwrite"], "--force"),
    ],
)
def test_an_option_by_another_tool_s_name_is_answered_with_ours(words: list[str], meant: str) -> None:
    ((code, out, err, _),) = ends(words)
    option = next(word for word in words if word.startswith("--"))
    assert (code, out) == (2, "")
    assert err == f"error: qtune {words[0]} {option}: no such option; did you mean '{meant}'?\n"


def test_no_other_name_stands_for_one_of_our_own_options() -> None:
    command = typer.main.get_command(cli.app)
    assert isinstance(command, Verbs)
    for verb in command.commands.values():
        assert not {one for one in _options(verb) if OTHER_NAMES.get(one) in _options(verb)} - {"--limit"}


def test_a_mistyped_option_is_an_error_of_the_input() -> None:
    (code, out, err, _), no_verb = ends(["run", "quickstart", "--resum"], ["trian", "quickstart"])
    assert (code, out) == (2, "")
    assert err == "error: qtune run --resum: no such option; did you mean '--resume'?\n"
    assert no_verb[0] == 2
    assert no_verb[2] == "error: qtune trian: no such verb; here that is: qtune run\n"


USAGE = {
    "run": "qtune run: RECIPE|RUN is missing: a recipe, or with --resume a run's folder",
    "run x --seeds few": "qtune run --seeds few: should be a valid integer",
    "run x --seeds=0": "qtune run --seeds 0: should be greater than or equal to 1",
    "run a.toml b.toml": "qtune run b.toml: one argument too many; did you mean: qtune run a.toml",
    "run a.toml training.steps=9": "qtune run training.steps=9: one argument too many; did you mean: qtune run a.toml "
    "--set training.steps=9",
    "run a.toml --resume b": "qtune run b: one argument too many; did you mean: qtune run a.toml --resume",
    "init --base m --data rows.csv mine.toml": "qtune init mine.toml: one argument too many; did you mean: qtune init "
    "--base m --data rows.csv --output mine.toml",
    "fit a.toml 8GiB": "qtune fit 8GiB: one argument too many; did you mean: qtune fit a.toml --vram 8GiB",
    "profile a.toml RTX": "qtune profile RTX: one argument too many; did you mean: qtune profile a.toml --gpu RTX",
    "eval runs/x 10": "qtune eval 10: one argument too many; did you mean: qtune eval runs/x --rows 10",
    "eval runs/x --rows 9 10": "qtune eval 10: one argument too many; did you mean: qtune eval runs/x --rows 9",
    "export runs/x q8_0": "qtune export q8_0: one argument too many; did you mean: qtune export runs/x --gguf q8_0",
    "export runs/x out": "qtune export out: one argument too many; did you mean: qtune export runs/x --output out",
    "chat runs/x is it": "qtune chat is it: one argument too many; did you mean: qtune chat runs/x --prompt 'is it'",
    "list a b": "qtune list b: one argument too many; did you mean: qtune list a",
    "export runs/x --gguf f32": "qtune export --gguf f32: must be f16, bf16 or q8_0, as --gguf f16",
    "export runs/x --dtype": "qtune export --dtype: its value is missing: float16 or bfloat16, as --dtype float16",
    "eval runs/x --data none.jsonl": "qtune eval --data none.jsonl: path 'none.jsonl' does not exist",
    "compare runs/x": "qtune compare: one run is examined with qtune eval; name two or more",
    "--zzz": "qtune --zzz: no such option; its options: --version, --install-completion, --show-completion",
    "list --zzz": "qtune list --zzz: no such option; its options: --json",
    "frobnicate": "qtune frobnicate: no such verb; the verbs: "
    + ", ".join(typer.main.get_command(cli.app).list_commands(None)),  # type: ignore[attr-defined]
}


def test_every_usage_error_is_one_sentence_with_the_verb_what_was_found_and_what_would_be_right() -> None:
    answers = ends(*(words.split() for words in USAGE))
    assert [(code, out, err, heavy) for code, out, err, heavy in answers] == [
        (2, "", f"error: {said}\n", []) for said in USAGE.values()
    ]


def test_without_a_verb_there_is_help() -> None:
    ((code, out, _, heavy),) = ends([])
    assert (code, heavy) == (2, [])
    assert "Write a commented recipe" in out


def test_an_option_of_another_verb_is_named_as_such() -> None:
    answers = ends(
        ["run", "quickstart", "--vram", "8GiB"],
        ["check", "--vram=8GiB", "quickstart"],
        ["run", "quickstart", "--gpu", "RTX 3060"],
        ["chat", "builtin:none", "--prompt", "--vram"],
    )
    assert [(code, out, heavy) for code, out, _, heavy in answers] == [(2, "", [])] * 4
    run, check, card, asked = (err for _, _, err, _ in answers)
    both = "belongs to qtune profile and qtune fit"
    for verb, err in (("run", run), ("check", check)):
        wanted = f"for qtune {verb} the recipe has it as a key: --set memory.budget=8GiB"
        assert err == f"error: qtune {verb} --vram: {both}; {wanted}\n"
    assert card == f"error: qtune run --gpu: {both}\n"
    assert "belongs to" not in asked  # there it is what the model is asked


@pytest.mark.slow
def test_rows_in_the_place_of_a_recipe_and_a_recipe_in_the_place_of_a_run_are_named(
    write_recipe: WriteRecipe, rows_file: Path, stopped: Path
) -> None:
    recipe = write_recipe("recipe")
    new, known = ends(["check", str(rows_file)], ["eval", str(recipe)])
    assert new[2] == (
        f"error: {rows_file}: these are rows, not a recipe; qtune init --base MODEL --data {rows_file} writes a recipe "
        "for them\n"
    )
    assert known[2] == f"error: {recipe}: is a recipe, and has no run yet: qtune run {recipe}\n"
    stopped.rename(stopped.with_name("recipe"))
    (one,) = ends(["eval", str(recipe)])
    assert one[2] == f"error: {recipe}: is a recipe; its run is {stopped.parent}/recipe\n"
    second = stopped.with_name("recipe-2")
    second.mkdir()
    (second / "resolved.toml").touch()
    several, file, talk = ends(["export", str(recipe)], ["eval", str(rows_file)], ["chat", str(recipe)])
    assert talk == several
    assert several[2] == f"error: {recipe}: is a recipe; its runs: {stopped.parent}/recipe, {second}\n"
    assert file[2] == f"error: {rows_file}: is a file; a run is a folder, as runs/quickstart\n"
    assert all((code, out, heavy) == (2, "", []) for code, out, _, heavy in (new, known, one, several, file))


OPTIONS = {
    "--base original": ["--base", "original"],
    "--verify-only": ["--verify-only", "model"],
    "--push-to-hub": ["--push-to-hub", "me/model"],
    "--gguf": ["--gguf", "f16"],
    "--output": ["--output", "x"],
    "--base": ["--base", "dequantized"],
    "--dtype": ["--dtype", "float16"],  # also where it is what the default would be
}


@pytest.mark.parametrize(
    ("option", "other", "reason"),
    [(option, other, why) for option, others in CONFLICTS.items() for other, why in others.items()],
)
def test_an_export_refuses_options_of_which_one_would_be_ignored(option: str, other: str, reason: str) -> None:
    written = [part for name in (option, other) for part in OPTIONS.get(name, [name])]
    asked = CliRunner().invoke(cli.app, ["export", "run", *written])
    assert isinstance(asked.exception, InputError)
    assert f"{option}: not together with {other}: {reason}" in str(asked.exception).splitlines()


def test_every_option_that_verify_only_ignores_is_in_the_table() -> None:
    command = typer.main.get_command(cli.app).commands["export"]  # type: ignore[attr-defined]
    names = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
    own = {"run", "--verify-only", "--accept-drift", "--trust-remote-code", "--help", "-h", "-o"}
    assert names - own == set(CONFLICTS["--verify-only"])


@pytest.mark.parametrize(
    "option", [["--allow", "x"], ["--memory-snapshot"], ["--hash-weights"], ["--set", "a.b=1"], ["--seeds", "3"]]
)
def test_a_proof_refuses_options_that_it_would_ignore(option: list[str], tmp_path: Path) -> None:
    asked = CliRunner().invoke(cli.app, ["run", str(tmp_path), "--resume", "--prove", *option])
    assert asked.exit_code == 2
    assert "--prove repeats what was done, and goes with no --set" in re.sub(r"[\s│]+", " ", asked.output)


@pytest.mark.parametrize("asked", [["recipe.toml", "--resume", "--prove"], [".", "--prove"]])
def test_a_proof_of_no_run_is_answered_with_its_command(asked: list[str]) -> None:
    answer = CliRunner().invoke(cli.app, ["run", *asked])
    assert answer.exit_code == 2
    assert "--prove wants a run's folder: qtune run --resume runs/NAME --prove" in re.sub(r"[\s│]+", " ", answer.output)


def test_a_new_run_that_starts_from_none_refuses_to_accept_drift() -> None:
    asked = CliRunner().invoke(cli.app, ["run", "quickstart", "--accept-drift", "weights"])
    assert asked.exit_code == 2
    assert "--accept-drift goes with --resume, or with a recipe whose adapter.start_from" in re.sub(
        r"[\s│]+", " ", asked.output
    )


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_the_switch_for_whole_hashes_reaches_the_run(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resumed: bool, given: bool
) -> None:
    from qtune.training import train

    asked: list[bool] = []
    for name in ("run", "resume"):
        monkeypatch.setattr(train, name, lambda *_, whole_weights, **__: asked.append(whole_weights))
    monkeypatch.setattr("qtune.commands.run._end_run", lambda run_dir: None)
    (tmp_path / "stopped").mkdir()
    (tmp_path / "stopped" / "resolved.toml").touch()
    target = ["--resume", str(tmp_path / "stopped")] if resumed else [str(write_recipe())]
    CliRunner().invoke(cli.app, ["run", *target, *(["--hash-weights"] if given else [])], catch_exceptions=False)
    assert asked == [given]


def test_consent_given_with_verify_only_is_for_the_run_around_the_folder(
    write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qtune.export import export as stage

    folder = tmp_path / "run" / "model"
    folder.mkdir(parents=True)
    (tmp_path / "run" / "resolved.toml").write_text(write_recipe().read_text())
    (tmp_path / "run" / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "run" / "adapter" / name).touch()
    agreed: list[Path] = []
    monkeypatch.setattr("qtune.commands.export.agree", lambda run_dir: agreed.append(run_dir.path))
    monkeypatch.setattr(stage, "verify_only", lambda folder, run, *_, **__: run.path)
    done = CliRunner().invoke(
        cli.app, ["export", "--verify-only", str(folder), "--trust-remote-code"], catch_exceptions=False
    )
    assert done.output.strip() == str(tmp_path / "run")
    assert len(agreed) == 1
    assert agreed == [tmp_path / "run"]


def test_a_verb_that_shares_no_work_refuses_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    refused = run_qtune("list")
    assert refused.returncode == 2
    said = "error: WORLD_SIZE: only qtune run shares its work out; start this without a launcher\n"
    assert refused.stderr == said
