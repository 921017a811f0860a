"""What the allocator takes for a step, counted by hand: tensors as large as segments of their own."""

import pytest

from qtune.memory.tracing import categories
from qtune.memory.tracing.caching_allocator import FixedSegments
from qtune.memory.tracing.ledger import STILL_ALIVE, Life
from qtune.memory.tracing.reserved import StepLives, reserved_bytes
from qtune.sizes import MIB

WORKSPACE = 32 * MIB


def life(size: int, born: int, died: int, phase: str, category: str = "") -> Life:
    return Life(size * MIB, born, died, "made", phase, "", category)


def step(activations: int) -> StepLives:
    """Weights of 100 MiB, a gradient and a state of 40 each, and an update with 60 of its own."""
    body = [
        life(100, 0, STILL_ALIVE, "static"),
        life(40, 1, STILL_ALIVE, "first step", categories.OPTIMIZER),
        life(activations, 2, 3, "forward"),
        life(40, 3, 3, "backward", categories.GRADIENTS),
    ]
    update = [
        life(100, 0, STILL_ALIVE, "static"),
        life(40, 1, STILL_ALIVE, "first step", categories.OPTIMIZER),
        life(60, 2, 2, "optimizer"),
    ]
    return StepLives(body, update)


def test_gradients_are_there_during_the_update() -> None:
    # 100 + 40 + 40 + 60 and two workspaces; the activations' 20 lie in a segment that nothing else fits into.
    assert reserved_bytes([step(20)] * 3, WORKSPACE, FixedSegments()) == (240 + 20) * MIB + 2 * WORKSPACE


def test_the_state_comes_in_the_first_update_beside_the_gradients() -> None:
    # With 200 of activations, which are free by then: state and update find their place in them.
    assert reserved_bytes([step(200)], WORKSPACE, FixedSegments()) == (100 + 200 + 40) * MIB + 2 * WORKSPACE


@pytest.mark.parametrize(("empties_cache", "update"), [(False, 60), (True, 0)])
def test_what_is_handed_back_after_a_step_is_not_there_for_the_next(empties_cache: bool, update: int) -> None:
    # The first step takes 60, where the state moves in, 40 for the gradient and 60 for the update; the second one's 200
    # fit nowhere, and its gradient and its update find a place.
    found = reserved_bytes([step(60), step(200)], WORKSPACE, FixedSegments(), empties_cache=empties_cache)
    assert found == (100 + 60 + 40 + update + 200) * MIB + 2 * WORKSPACE
