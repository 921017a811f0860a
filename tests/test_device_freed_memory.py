"""Memory that steps on a processor free: counted in page faults, each time in a process of its own."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from qtune.device.freed_memory import SETTINGS, TUNABLES, _glibc
from qtune.training import trainer

STEPS = """
import ctypes, json, resource, sys
from contextlib import ExitStack, suppress
from types import SimpleNamespace
from qtune.device.freed_memory import freed_memory_stays

BLOCK, BLOCKS = 4 * 2**20, 40
PR_SET_THP_DISABLE = 41  # a huge page would be one fault
library = ctypes.CDLL(None)
library.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
library.malloc.restype = library.memset.restype = ctypes.c_void_p
library.malloc.argtypes = [ctypes.c_size_t]
library.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]
held = [0] * BLOCKS

def step():
    for place in range(BLOCKS):
        held[place] = library.malloc(BLOCK)
        library.memset(held[place], 1, BLOCK)
    for place in range(BLOCKS):
        library.free(held[place])

def faults():
    step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])

def way():
    return freed_memory_stays(SimpleNamespace(type=sys.argv[1]))

began = resident()
with suppress(ZeroDivisionError), way():
    with way():
        pass
    within = faults()
    1 / 0
stays = resident() - began
print(json.dumps([within, stays, faults()]))
"""
PAGES = 2 * 40 * 4 * 2**20 // 4096
"""Of two steps, where pages are as small as they get."""

has_glibc = pytest.mark.skipif(
    sys.platform != "linux" or _glibc() is None, reason="another C library keeps what is freed in its own way"
)


def counted(device: str = "cpu", **environment: str) -> list[float]:
    """[faults within, pages that are resident afterwards and were not before, faults afterwards], of `PAGES`."""
    own = {name: value for name, value in os.environ.items() if name not in (*SETTINGS, TUNABLES)}
    command = [sys.executable, "-c", STEPS, device]
    shown = subprocess.run(command, env=own | environment, capture_output=True, text=True, check=True, timeout=100)
    small = os.sysconf("SC_PAGE_SIZE") // 4096
    return [pages * small / PAGES for pages in json.loads(shown.stdout)]


@has_glibc
def test_what_a_step_frees_is_there_for_the_next_one_and_goes_back_at_the_end():
    """Also after a part within it, and where an error ends it."""
    within, stays, afterwards = counted()
    assert within < 0.05
    assert stays < 0.05
    assert afterwards > 0.8


@has_glibc
@pytest.mark.parametrize(
    ("device", "environment"),
    [
        ("cuda", {}),
        ("cpu", {"MALLOC_TRIM_THRESHOLD_": "1000000"}),
        ("cpu", {"MALLOC_MMAP_THRESHOLD_": "1000000"}),
        ("cpu", {"MALLOC_TOP_PAD_": "1000000"}),
        ("cpu", {"MALLOC_MMAP_MAX_": "1000000"}),
        ("cpu", {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1000000"}),
    ],
)
def test_for_another_device_and_where_the_user_sets_the_allocator_nothing_changes(device, environment):
    within, _, _ = counted(device, **environment)
    assert within > 0.8


def test_a_trainer_trains_within_it(monkeypatch: pytest.MonkeyPatch):
    asked: list[torch.device] = []

    def within(device: torch.device) -> None:
        asked.append(device)
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "freed_memory_stays", within)
    with pytest.raises(KeyboardInterrupt):
        trainer.QloraTrainer.train(SimpleNamespace(args=SimpleNamespace(device=torch.device("cpu"))))
    assert asked == [torch.device("cpu")]
