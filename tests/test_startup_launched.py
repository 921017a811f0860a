"""What a launcher has said in the environment."""

import pytest

from qtune.startup.launched import Launched, forget_launcher, own_card, said_in

TORCHRUN = {
    "WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1",
}  # fmt: skip


def test_a_process_is_known_by_the_variables_of_torchrun() -> None:
    assert said_in(TORCHRUN) == Launched(rank=3, processes=4, local_rank=1, local_processes=2)
    assert said_in({}) == said_in({"WORLD_SIZE": "1", "RANK": "0"}) == Launched()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"MASTER_PORT": None}, "WORLD_SIZE: 4 processes, and no MASTER_PORT: start them with qtune run RECIPE"),
        ({"RANK": None, "MASTER_ADDR": None}, "and no RANK and MASTER_ADDR"),
        ({"RANK": "4"}, "RANK: 4 of WORLD_SIZE = 4; ranks are counted from 0"),
        (
            {"ACCELERATE_USE_FSDP": "true"},
            "ACCELERATE_USE_FSDP: accelerate 1.15 leaves 4-bit weights out of",
        ),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true"},
            "start without it: with --set memory.layers=sharded each process has a part",
        ),
        ({"WORLD_SIZE": "two"}, "a launcher sets them to whole numbers"),
    ],
)
def test_what_a_launcher_cannot_have_meant_is_said(change: dict[str, str | None], said: str) -> None:
    environment = {name: value for name, value in {**TORCHRUN, **change}.items() if value is not None}
    assert said in str(said_in(environment))


def test_accelerate_sees_one_process_once_the_others_are_met() -> None:
    environment = dict(TORCHRUN)
    forget_launcher(environment)
    assert said_in(environment) == Launched()
    assert "LOCAL_RANK" not in environment


@pytest.mark.parametrize(
    ("visible", "cards", "local_rank", "chosen"),
    [
        (None, 4, 2, "2"),
        ("4,6", 8, 1, "6"),
        ("GPU-aa, GPU-bb", 8, 1, "GPU-bb"),
        ("5", 8, 3, "5"),  # Slurm has given each process its own
        (None, 0, 1, None),
        ("", 8, 1, None),  # somebody wants none
    ],
)
def test_each_process_has_a_card_of_its_own(
    visible: str | None, cards: int, local_rank: int, chosen: str | None
) -> None:
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert own_card(environment, local_rank, cards) == chosen
