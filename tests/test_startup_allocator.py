"""The allocator's settings in the environment, before torch reads them."""

import sys

import pytest

from qtune.startup.allocator import VARIABLES, has_expandable_segments, use_expandable_segments


def test_segments_expand_on_linux_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    use_expandable_segments()
    assert not has_expandable_segments()
    monkeypatch.setattr(sys, "platform", "linux")
    use_expandable_segments()
    assert has_expandable_segments()


@pytest.mark.parametrize("name", VARIABLES)
def test_the_users_own_settings_stay(monkeypatch, name):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv(name, "max_split_size_mb:128")
    use_expandable_segments()
    assert not has_expandable_segments()
    monkeypatch.setenv(name, "max_split_size_mb:128, expandable_segments:True")
    assert has_expandable_segments()
