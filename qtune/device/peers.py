"""What torch.distributed says of another process of the run that has gone, as an error of ours."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from qtune.device.present import is_out_of_memory
from qtune.errors import PeerLostError, first_line

PATIENCE = timedelta(hours=12)
"""How long a process waits for another one that is there. One prepares rows, reads a base or writes a checkpoint while
the others wait; one that has died is noticed at once, by its connection."""


@contextmanager
def noticing_loss() -> Iterator[None]:
    """For every exchange with other processes.

    Raises:
        PeerLostError: another process has gone.
    """
    try:
        yield
    except RuntimeError as error:  # gloo raises it plain, NCCL as a DistBackendError
        if is_out_of_memory(error):
            raise
        raise PeerLostError(f"another process of this run has ended: {first_line(error)}") from error
