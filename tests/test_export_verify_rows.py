"""Exports are checked on rows that were held out, spread over all; a run without such rows gets general ones."""

from pathlib import Path

import pytest
from export_models import QUESTIONS, tiny_run

from qtune.export.opened_run import open_for_export
from qtune.export.verify.rows import GENERAL, probes, rows_for

# peft 0.21.2 asks transformers 5.23 for the name that it is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def test_rows_are_the_validation_rows_of_the_run(tmp_path: Path) -> None:
    source = open_for_export(tiny_run(tmp_path))
    found = rows_for(source)
    assert found.origin == f"of {len(QUESTIONS) // 2} validation rows"
    assert len(found.rows) == len(QUESTIONS) // 2
    assert len(rows_for(source, 5).rows) == 5
    assert rows_for(source, 5).origin == found.origin
    for row in found.rows:
        answer = source.tokenizer.decode([label for label in row.labels if label != -100])
        assert row.conversation is not None
        assert answer == f"{row.conversation.answer}<|im_end|>"


def test_what_several_rows_say_is_compared_once(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    file = tmp_path / "rows.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines * 3))
    found = rows_for(open_for_export(run), 2 * len(lines))
    said = [row.conversation.to_json() for row in found.rows if row.conversation]
    assert len(said) == len(set(said)) > 1
    assert found.origin.endswith(" validation rows, each text once"), "eval asks more of them"


def test_a_run_without_held_out_rows_is_checked_on_general_conversations(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    text = run.resolved_file.read_text().replace("validation = 0.5", "validation = 0.0")
    run.write_text(run.resolved_file, text)
    found = rows_for(open_for_export(run))
    assert found.origin == "general conversations (the run has no held-out rows)"
    assert [row.conversation.answer for row in found.rows if row.conversation] == [answer for _, answer in GENERAL]


def test_probes_have_several_turns_and_a_system_text() -> None:
    roles = [[message["role"] for message in conversation.messages] for conversation in probes([])]
    assert ["user", "assistant", "user", "assistant"] in roles
    assert ["system", "user", "assistant", "user", "assistant"] in roles
