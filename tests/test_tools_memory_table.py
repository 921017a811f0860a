"""The tool that makes the README's table: its models are the published ones, its cards follow from the trace."""

import importlib.metadata
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from qtune.memory.allowance import Need
from qtune.memory.tracing.bare_model import bare_model
from qtune.model.quantization import count_parameters

ROOT = Path(__file__).parent.parent
GIB = 2**30
BEGIN, END = "<!-- memory table: begin -->", "<!-- memory table: end -->"

PUBLISHED = {
    "SmolLM2 135M": 134_515_008,
    "Qwen2.5 0.5B": 494_032_768,
    "Llama 3.2 1B": 1_235_814_400,
    "Llama 3.2 3B": 3_212_749_824,
    "Mistral 7B v0.1": 7_241_732_096,
    "Llama 3.1 8B": 8_030_261_248,
    "Qwen3 14B": 14_768_307_200,
    "Llama 3.1 70B": 70_553_706_496,
}
"""Parameters as the hub counts them in each model's safetensors files."""


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("memory_table", ROOT / "tools" / "memory_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_models_have_the_published_number_of_parameters(tool: ModuleType) -> None:
    found = {}
    for model in tool.MODELS:
        network = bare_model(tool.config_of(model), torch.bfloat16, None, "sdpa")
        found[model[0]] = count_parameters(network).total
    assert PUBLISHED.items() <= found.items()
    assert len(found) >= 8


def linear_need(model: tuple, length: int) -> Need:
    """Half a GiB, and one for each 1,024 tokens."""
    return Need(GIB // 2 + length * 2**20, GIB // 2)


def test_under_each_card_stands_the_longest_row_that_fits_it(tool: ModuleType, monkeypatch) -> None:
    monkeypatch.setattr(tool, "need_of", linear_need)
    monkeypatch.setattr(tool, "time_of", lambda model: "0.25 s")
    name, sizes, time, *longest = tool.row(("a model",))
    need = linear_need((), tool.SHOWN)
    assert (name, sizes, time) == ("a model", f"2.50 + {need.driver_bytes / GIB:.2f} GiB", "0.25 s")
    for gb, told in zip(tool.CARDS, longest, strict=True):
        fitting = [length for length in tool.LENGTHS if linear_need((), length).fits(gb * GIB)]
        assert told == f"{fitting[-1]:,}"
    monkeypatch.setattr(tool, "need_of", lambda model, length: Need(90 * GIB, 0))
    assert tool.row(("a model",))[2:] == ["–"] * (1 + len(tool.CARDS)), "no time on a card that does not hold it"


def test_the_time_of_a_row_is_the_longer_of_the_cards_and_the_processors(tool: ModuleType) -> None:
    tiny = ("tiny", "llama", 64, 2, 4, 2, 16, 128, 512, True)
    assert re.fullmatch(r"0\.\d\d s\*", tool.time_of(tiny)), "kernels of nothing: the processor is the limit"
    wide = ("wide", "llama", 8192, 1, 64, 8, 128, 28672, 512, True)
    assert re.fullmatch(r"\d\.\d\d s", tool.time_of(wide))


def test_the_table_replaces_what_stands_between_the_marks_and_nothing_else(tool, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(tool, "need_of", linear_need)
    monkeypatch.setattr(tool, "time_of", lambda model: "0.25 s")
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["memory_table.py", "--write", str(readme)])
    tool.main()
    assert readme.read_text(encoding="utf-8") == f"before\n{BEGIN}\n{tool.table()}\n{END}\nafter\n"
    for library in ("torch", "transformers", "peft", "bitsandbytes"):
        assert f"{library} {importlib.metadata.version(library)}" in readme.read_text(encoding="utf-8")


def test_a_file_without_the_marks_is_left_alone_and_says_what_is_missing(tool, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(tool, "need_of", linear_need)
    readme = tmp_path / "README.md"
    readme.write_text("nothing", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["memory_table.py", "--write", str(readme)])
    with pytest.raises(SystemExit, match="has no place for the table"):
        tool.main()
    assert readme.read_text(encoding="utf-8") == "nothing"


@pytest.mark.parametrize(
    ("name", "page"),
    [
        ("memory table", "README.md"),
        ("time table", "docs/time.md"),
        ("step table", "docs/time.md"),
        ("goal table", "docs/time.md"),
        ("streamed table", "docs/time.md"),
    ],
)
def test_each_table_has_its_marks_in_one_page(name: str, page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text.count(f"<!-- {name}: begin -->") == text.count(f"<!-- {name}: end -->") == 1
