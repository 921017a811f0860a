"""Memory that steps on a processor free: counted in page faults, each in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

from qtune.device.freed_memory import SETTINGS, TUNABLES, _glibc

STEPS = """
import contextlib, ctypes, json, resource, sys
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

def faults(way):
    with way:
        step()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        step()
        step()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])

outside = faults(contextlib.nullcontext())
began = resident()
inside = faults(freed_memory_stays(SimpleNamespace(type=sys.argv[1])))
print(json.dumps([outside, inside, resident() - began]))
"""
PAGES = 2 * 40 * 4 * 2**20 // os.sysconf("SC_PAGE_SIZE")
"""Of two steps."""

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or _glibc() is None, reason="another C library keeps what is freed in its own way"
)


def counted(device: str = "cpu", **environment: str) -> list[int]:
    """[faults outside, faults inside, pages that are resident afterwards and were not before]"""
    own = {name: value for name, value in os.environ.items() if name not in (*SETTINGS, TUNABLES)}
    command = [sys.executable, "-c", STEPS, device]
    shown = subprocess.run(command, env=own | environment, capture_output=True, text=True, check=True)
    found: list[int] = json.loads(shown.stdout)
    return found


def test_what_a_step_frees_is_there_for_the_next_one_and_goes_back_at_the_end():
    outside, inside, stays = counted()
    assert outside > 0.8 * PAGES
    assert inside < 0.05 * PAGES
    assert stays < 0.05 * PAGES


@pytest.mark.parametrize(
    ("device", "environment"),
    [
        ("cuda", {}),
        ("cpu", {"MALLOC_TRIM_THRESHOLD_": "1000000"}),
        ("cpu", {"MALLOC_MMAP_THRESHOLD_": "1000000"}),
        ("cpu", {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1000000"}),
    ],
)
def test_for_another_device_and_where_the_user_sets_the_allocator_nothing_changes(device, environment):
    _, inside, _ = counted(device, **environment)
    assert inside > 0.8 * PAGES
