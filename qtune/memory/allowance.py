"""What a card spends beyond the tensors that a trace counts: stated with its source, and kept apart from the trace."""

from __future__ import annotations

from dataclasses import dataclass

from qtune.startup.allocator import has_expandable_segments

MIB = 2**20

CONTEXT_BYTES = 512 * MIB
"""CUDA context and kernels of one PyTorch process, outside the allocator. Since CUDA loads kernels lazily about 300 MiB
(PyTorch issue 107667); what bitsandbytes, attention and cuBLAS load comes on top, so half a GiB is taken."""

CUBLAS_BYTES = 33 * MIB
"""cuBLAS workspace inside the allocator: 8.125 MiB for each of two handles before Hopper, 32 MiB from Hopper on
(PyTorch docs, "CUDA semantics", cuBLAS workspaces). The larger is taken."""

SEGMENTS_BYTES = 128 * MIB
EXPANDABLE_SHARE = 0.01
FIXED_SHARE = 0.18
"""What the caching allocator must hold beyond the tensors: SEGMENTS_BYTES for pages and segments that are partly used,
and a share of what comes and goes for gaps, far larger where segments cannot grow. Both bound what
tools/simulate_allocator.py finds over steps of changing length, of models from 0.1B to 8B, and over published runs."""


def allowance(moving_bytes: int, expandable: bool) -> int:
    """Bytes that the allocator must hold unused for tensors of `moving_bytes` that come and go."""
    return SEGMENTS_BYTES + int((EXPANDABLE_SHARE if expandable else FIXED_SHARE) * moving_bytes)


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
        moving = self.traced_bytes - self.lasting_bytes
        return CONTEXT_BYTES + CUBLAS_BYTES + allowance(moving, has_expandable_segments())

    @property
    def total_bytes(self) -> int:
        """What must be free on the card."""
        return self.traced_bytes + self.driver_bytes

    def fits(self, free_bytes: int) -> bool:
        """Whether a card with that much free memory is enough."""
        return self.total_bytes <= free_bytes


def in_words() -> str:
    """What `Need.driver_bytes` is made of, in words."""
    share = EXPANDABLE_SHARE if has_expandable_segments() else FIXED_SHARE
    return (
        f"allowance: context {CONTEXT_BYTES // MIB} MiB, cuBLAS {CUBLAS_BYTES // MIB}, "
        f"segments {SEGMENTS_BYTES // MIB} and {share:.0%} of what comes and goes"
    )
