"""torch.compile is asked when its function is first called."""

import pytest
import torch
from conftest import run_warm

from qtune.startup.late_compile import compiling_late


def test_nothing_is_compiled_before_the_first_call_and_then_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def compile_now(model, **options):
        asked.append(options)
        return lambda number: 10 * model(number)

    monkeypatch.setattr(torch, "compile", compile_now)
    with compiling_late():
        plain = torch.compile(lambda number: number + 1)

        @torch.compile(dynamic=False)
        def decorated(number: int) -> int:
            return number + 2

    assert torch.compile is compile_now
    assert asked == []
    assert [plain(1), plain(2), decorated(1), decorated(2)] == [20, 30, 30, 40]
    assert asked == [{}, {"dynamic": False}]
    assert decorated.__name__ == "decorated"


def test_torch_compile_comes_back_where_an_import_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    own = torch.compile
    with pytest.raises(ImportError), compiling_late():
        raise ImportError
    assert torch.compile is own


@pytest.mark.slow
def test_no_verb_imports_pytorchs_compiler() -> None:
    asked = "import sys\nprint({'torch._inductor.compile_fx', 'bitsandbytes'} & sys.modules.keys())"
    assert run_warm(asked).stdout == "{'bitsandbytes'}\n"
