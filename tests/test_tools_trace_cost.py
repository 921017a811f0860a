"""What tools/trace_cost.py is told has an effect, or is refused in a sentence."""

import argparse
import sys
from pathlib import Path

import pytest
from conftest import WriteRecipe

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import trace_cost


def asked(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["trace_cost.py", *words])
    trace_cost.main()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--set", "memory.embeddings=int8"], "--set changes a recipe; name one with --recipe"),
        (["--rows", "0"], "--rows must be 1 at least"),
        (["--rows", "-3"], "--rows must be 1 at least"),
        (["--length", "0"], "--length must be 1 at least"),
        (["--rows", "1", "--length", "8", "--scored", "9"], "1 x 8 tokens have no more than 8 to score"),
        (["--gpu", "nope"], "trace_cost: --gpu"),
        (["--recipe", "nowhere.toml"], "trace_cost: nowhere.toml"),
        (["--config", "."], "trace_cost: "),
        (["--keep-dequantized", "99999"], "trace_cost: memory.keep_dequantized"),
    ],
)
def test_what_cannot_be_traced_is_said_in_a_sentence(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        asked(monkeypatch, *words)
    assert said in f"{ended.value} {capsys.readouterr().err}"
    assert ended.value.code not in (0, None)


def test_the_ways_of_a_step_are_those_of_a_recipe_as_well(write_recipe: WriteRecipe) -> None:
    options = argparse.Namespace(
        recipe=write_recipe(), set=[], rows=None, length=64, no_checkpointing=True, keep_dequantized=3
    )
    _, recipe = trace_cost.subject(options)
    assert recipe.training.gradient_checkpointing is False
    assert recipe.memory.keep_dequantized == 3
