"""What a card spends beyond the tensors that a trace counts: by parts, each with its source, apart from the trace.

The parts were measured with eleven runs on an H100 (torch 2.11, CUDA 13.0, 2026-11-27; tests/measured/h100.json), and
tests hold that their sum is never below what the card used in any of them, and at most 4 % above.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from qtune.memory.tracing.cuda import workspace_bytes
from qtune.sizes import MIB

if TYPE_CHECKING:
    from qtune.memory.tracing.cuda import Capability

CONTEXT_BYTES = 772 * MIB
"""CUDA's context and the kernels of one process, outside the allocator: what the device had in use beyond the reserved
bytes was 0.751 and 0.753 GiB in the two runs that had an H100 alone. Other generations have not been measured; cards
with fewer processors to reserve for may need less."""


LOADING_SHARE = 0.05
MOVING_SHARE = 0.0115
"""What playing the allocator does not see, as shares of the quantized weights and of what comes and goes: reading a
checkpoint leaves holes that depend on its shards, and batches are of many shapes. A small pair with which none of the
eleven runs used more than was told; the twelve of today's step on an H200 needed neither."""

Verdict = Literal["fits", "too close to say", "does not fit"]


@dataclass(frozen=True)
class Need:
    """Bytes of card memory that a step needs. On a CPU only tensors are known."""

    traced_bytes: int
    """Peak of the tensors."""
    lasting_bytes: int
    """Of these, what stays all the time."""
    context_bytes: int = 0
    """CUDA's own part of the process."""
    workspace_bytes: int = 0
    """What libraries keep inside the allocator."""
    gap_bytes: int = 0
    """What the allocator holds unused on a card with room for it; on a full card it gives most of it back."""

    @property
    def driver_bytes(self) -> int:
        """What the driver, libraries and the allocator add."""
        return self.context_bytes + self.workspace_bytes + self.gap_bytes

    @property
    def total_bytes(self) -> int:
        """What must be free on the card to be sure."""
        return self.traced_bytes + self.driver_bytes

    @property
    def least_bytes(self) -> int:
        """What must be free on the card in any case: without a single gap."""
        return self.total_bytes - self.gap_bytes

    def fits(self, free_bytes: int) -> bool:
        """Whether a card with that much free memory is surely enough."""
        return self.total_bytes <= free_bytes

    def verdict(self, free_bytes: int) -> Verdict:
        """Between what is needed in any case and what is needed to be sure, gaps decide, and nobody can say."""
        if self.fits(free_bytes):
            return "fits"
        return "too close to say" if self.least_bytes <= free_bytes else "does not fit"


def card_need(
    traced_bytes: int,
    lasting_bytes: int,
    quantized_bytes: int,
    reserved_bytes: int,
    card: Capability,
    scratch_bytes: int = 0,
) -> Need:
    """The need of a step on a card, from its trace.

    quantized_bytes: of the weights. reserved_bytes: of the allocator, played (`tracing/reserved.py`), workspaces in it.
    scratch_bytes: of operations that stand in for a kernel which the card may leave out.
    """
    workspaces = 2 * workspace_bytes(card)
    unseen = int(LOADING_SHARE * quantized_bytes + MOVING_SHARE * (traced_bytes - lasting_bytes))
    gaps = max(0, reserved_bytes - traced_bytes - workspaces) + unseen + scratch_bytes
    return Need(traced_bytes, lasting_bytes, CONTEXT_BYTES, workspaces, gaps)
