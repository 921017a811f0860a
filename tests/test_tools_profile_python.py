"""tools/profile_python.py on two layers: every way takes a step, and shares are of the whole."""

import cProfile
import pstats
import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import profile_python


def test_every_way_is_timed_and_every_second_has_a_place(monkeypatch, capsys):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # of all other tests, too
    monkeypatch.setattr(sys, "argv", ["profile_python.py", "--steps", "1", "--layers", "2"])
    profile_python.main()
    out = capsys.readouterr().out
    assert len(re.findall(r" ms +\d", out)) == 6
    for table in out.split("where the time goes")[1:]:
        lines = re.findall(r"^(\S.*?)\s+([\d.]+)%$", table, re.MULTILINE)
        shares = {place.strip(): float(share) for place, share in lines}
        assert sum(shares.values()) == pytest.approx(100, abs=1)
        assert shares.get("other files", 0) < 3, "nearly every function is somebody's"
        assert {"operations", "checkpointing", "modules and their hooks"} <= set(shares)


def test_a_layer_is_computed_twice_where_it_is_checkpointed():
    counts = {}
    for checkpointed in (True, False):
        step = profile_python.step_of(2, lean=False, checkpointed=checkpointed, autocast=True)
        profile = cProfile.Profile()
        profile.runcall(step)
        counts[checkpointed] = sum(
            calls
            for (file, _, function), (calls, *_) in pstats.Stats(profile).stats.items()
            if file.endswith("modeling_llama.py") and function == "apply_rotary_pos_emb"
        )
    assert counts == {True: 4, False: 2}
