"""How the threads of one operation wait for each other on a processor: briefly spinning, then asleep.

PyTorch's wheels for Linux bring GCC's OpenMP library. A thread of its that is done spins up to 300,000 times for the
others (GNU libgomp manual, GOMP_SPINCOUNT), which is right on cores that nobody else uses. Where another program has
one of them, the thread that is waited for does not run while the waiting one spins its share of time away, in every
operation. The library itself spins 1,000 times where it has more threads than cores, for the same reason, but it counts
its own threads alone. What both cost is in NOTES.md. Read from the environment before torch is imported.
"""

import os

SPINS = ("GOMP_SPINCOUNT", "1000")
WAITING = ("OMP_WAIT_POLICY", SPINS[0])
"""By these a user says how threads wait."""


def let_waiting_threads_sleep() -> None:
    """Asks for it, unless the environment says anything about how threads wait."""
    if not any(os.environ.get(name) for name in WAITING):
        os.environ[SPINS[0]] = SPINS[1]
