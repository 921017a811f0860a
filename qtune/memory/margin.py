"""What a card spends beyond the tensors that a trace counts: stated with its source, and kept apart from the trace."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20

CONTEXT_BYTES = 512 * MIB
"""CUDA context, kernels and cuBLAS handles of one PyTorch process. PyTorch's own documentation names no figure; users
report 300 to 600 MiB by card and version. The upper half is taken, because too little is what hurts."""

CUBLAS_BYTES = 33 * MIB
"""cuBLAS workspace inside the allocator: 8.125 MiB for each of two handles before Hopper, 32 MiB from Hopper on
(PyTorch docs, "CUDA semantics", cuBLAS workspaces). The larger is taken."""

FRAGMENTATION = 0.08
"""Share of what comes and goes that the caching allocator holds without using it. Not derived: a cautious allowance
for unsplit blocks of up to 20 MiB (c10/cuda/CUDACachingAllocator.h, kLargeBuffer) and for rows of changing length."""


@dataclass(frozen=True)
class Need:
    """Bytes of card memory that a step needs."""

    traced_bytes: int
    """Peak of the tensors."""
    lasting_bytes: int
    """Of these, what stays all the time: it is allocated once and does not fragment."""

    @property
    def driver_bytes(self) -> int:
        """What the driver and the allocator add."""
        return CONTEXT_BYTES + CUBLAS_BYTES + int(FRAGMENTATION * (self.traced_bytes - self.lasting_bytes))

    @property
    def total_bytes(self) -> int:
        """What must be free on the card."""
        return self.traced_bytes + self.driver_bytes

    def fits(self, free_bytes: int) -> bool:
        """Whether a card with that much free memory is enough."""
        return self.total_bytes <= free_bytes
