"""The ledger writes down each storage once, from birth to death, with the allocator's rounding."""

import torch

from qtune.memory.tracing.adoption import adopt_gradients, adopt_optimizer
from qtune.memory.tracing.categories import GRADIENTS, OPTIMIZER
from qtune.memory.tracing.history import history_of
from qtune.memory.tracing.ledger import Ledger, follow_modules

KIB = 1024


def test_sizes_are_rounded_up_to_512_bytes():
    ledger = Ledger()
    with ledger:
        kept = [torch.empty(1), torch.empty(128), torch.empty(129)]
    assert [life.size for life in ledger.lives] == [512, 512, 1024]
    assert len(kept) == 3


def test_a_view_is_not_a_second_storage():
    ledger = Ledger()
    with ledger:
        matrix = torch.empty(256, 256)
        views = [matrix.t(), matrix[1:], matrix.view(-1), matrix.detach()]
    assert ledger.live_bytes == 256 * KIB
    assert len(ledger.lives) == 1
    assert len(views) == 4


def test_a_storage_dies_with_its_last_view():
    ledger = Ledger()
    with ledger:
        view = torch.empty(256, 256)[1:]
        assert ledger.live_bytes == 256 * KIB
        del view
        assert ledger.live_bytes == 0


def test_the_peak_is_where_a_count_by_hand_puts_it():
    ledger = Ledger()
    with ledger:
        ledger.enter("forward")
        a = torch.zeros(256 * KIB, dtype=torch.uint8)
        b = torch.zeros(128 * KIB, dtype=torch.uint8)
        ledger.enter("backward")
        c = a + b[:1].expand_as(a)  # a, b, c: 256 + 128 + 256
        del a, b
        ledger.enter("optimizer")
        d = c[:1].clone()
    history = history_of(ledger, checkpointing=False)
    assert history.peak("forward").bytes == 384 * KIB
    assert history.peak("backward").bytes == 640 * KIB
    assert history.peak("optimizer").bytes == 256 * KIB + 512
    overall = history.peak()
    assert (overall.bytes, overall.phase, overall.op) == (640 * KIB, "backward", "add.Tensor")
    assert sum(overall.alive.values()) == overall.bytes
    assert d.numel() == 1


def test_adamw_keeps_two_moments_of_the_parameter_and_a_step_count():
    layer = torch.nn.Linear(64, 64, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters(), foreach=False)
    ledger = Ledger()
    with ledger:
        layer(torch.ones(1, 64)).sum().backward()
        adopt_gradients(ledger, layer.parameters())
        optimizer.step()
        adopt_optimizer(ledger, optimizer)
    sizes = {name: sum(life.size for life in ledger.lives if life.category == name) for name in (GRADIENTS, OPTIMIZER)}
    assert sizes == {GRADIENTS: 16 * KIB, OPTIMIZER: 32 * KIB + 512}


class Backboned(torch.nn.Module):
    """Two layers under the names by which a causal LM is known."""

    base_model_prefix = "model"

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        self.lm_head = torch.nn.Linear(8, 32)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.lm_head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.model(x)).float().logsumexp(-1).sum()


def test_storages_know_their_module_forward_and_backward():
    model, ledger = Backboned(), Ledger()
    handles = follow_modules(ledger, model)
    with ledger:
        ledger.enter("forward")
        loss = model(torch.ones(4, 8))
        ledger.enter("backward")
        loss.backward()
    for handle in handles:
        handle.remove()
    where = [(life.phase, life.module) for life in ledger.lives if life.op in ("addmm.default", "mm.default")]
    assert where[:3] == [("forward", "model.0"), ("forward", "model.1"), ("forward", "loss")]
    assert ("backward", "loss") in where
    assert ("backward", "model.1") in where
    assert ("backward", "model.0") in where
