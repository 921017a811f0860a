"""Ways of a faster step that qtune does not take, beside its own, on a CUDA card: what they would give.

    python tools/bench_other_ways.py [--shape 1x2048] [--ways eager graph compiled liger trl] [--steps 5] [--small]

Forward, backward, clipping and update of one micro-batch of full rows, on random weights of one geometry
(Llama-3.1-8B's unless --small), each way in turn on a card of its own making. Printed are the median of seconds, the
allocator's peak, what came before the first step (compiling, capturing), and the loss of the first steps, which tells
whether the way computes the same.

    eager      qtune's own step, every layer computed twice      kept       the same, nothing computed twice
    graph      eager, forward and backward captured once in a    keptgraph  kept, captured likewise
               CUDA graph and replayed for each step
    compiled   peft's layers, each decoder layer through torch.compile
    trl        TRL's SFTTrainer as its plain script makes it     liger      the same with use_liger_kernel = True
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_card
import torch
from bench_card import EIGHT_B, SMALL, compute_dtype, parts, random_model, synchronize

from qtune.adapter.lean import install_lean_step
from qtune.memory.predict import optimizer_of
from qtune.model.loss import tiled_cross_entropy

Take = Callable[[], torch.Tensor]
"""Forward and backward; the mean loss."""


def main() -> None:
    """Measures one way after the other; one that fails says why, and the next one is tried."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="1x2048")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--steps", type=int, default=5, help="counted steps of each, after three that are not")
    parser.add_argument("--small", action="store_true", help="a small model, to see that the script runs")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows, length = map(int, options.shape.split("x"))
    found: dict[str, Any] = {"device": bench_card.present_device().name, "shape": options.shape}
    for way in options.ways:
        try:
            found[way] = WAYS[way](SMALL if options.small else EIGHT_B, rows, length, options.steps)
        except Exception as error:  # whatever a compiler or a capture says is the result
            found[way] = f"{type(error).__name__}: {str(error)[:600]}"
        print(f"{options.shape} {way}: {json.dumps(found[way])}", flush=True)
        free()
        if options.out:
            options.out.write_text(json.dumps(found, indent=1))


def free() -> None:
    """Gives back what the last way held."""
    torch._dynamo.reset()
    bench_card.free()


def model_for(geometry: dict[str, int], rows: int, length: int, *, kept: bool = False, lean: bool = True) -> Any:
    """A model to train, with its plan."""
    recipe, plan = parts(rows, length, compute_dtype(), "kept" if kept else "qtune")
    model = random_model(geometry, recipe, plan)
    model.train()
    if not kept:
        # What a dropout draws would be kept for the second computation; there is none, and a graph cannot ask.
        model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        model.enable_input_require_grads()
    if lean:
        install_lean_step(model, compute_dtype())
    return model, plan


def forward_and_backward(model: Any, ids: torch.Tensor, tile_bytes: int, dtype: torch.dtype | None = None) -> Take:
    """Every token of `ids` but the first of a row is scored."""
    base, head = model.get_base_model(), model.get_base_model().get_output_embeddings()
    labels = ids[:, 1:].flatten().clone()
    kind, dtype = ids.device.type, dtype or compute_dtype()

    def take() -> torch.Tensor:
        # A graph must hold the casts that autocast would remember from before it.
        with torch.autocast(kind, dtype, enabled=dtype is not torch.float32, cache_enabled=False):
            hidden = base.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
            loss, _, _ = tiled_cross_entropy(hidden, head.weight, None, labels, tile_bytes=tile_bytes)
            loss = loss / len(labels)
        loss.backward()
        return loss.detach()

    return take


def own(
    geometry: dict[str, int],
    rows: int,
    length: int,
    steps: int,
    *,
    kept: bool = False,
    captured: bool = False,
    compiled: bool = False,
) -> dict[str, Any]:
    """A step of qtune's functions or of peft's, eager, captured or compiled."""
    model, plan = model_for(geometry, rows, length, kept=kept, lean=not compiled)
    torch.manual_seed(1)
    ids = torch.randint(3, geometry["vocab_size"], (rows, length), device=model.device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer_of(plan)(trained)
    if compiled:
        for layer in model.get_base_model().model.layers:
            layer.forward = torch.compile(layer.forward)
    began = time.perf_counter()
    take = forward_and_backward(model, ids, plan.loss_tile_bytes)
    if captured:
        take = capture(take, trained)
    else:
        take()
    for parameter in trained:
        parameter.grad.zero_()
    synchronize()
    before = time.perf_counter() - began

    def step() -> torch.Tensor:
        loss = take()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return loss

    return measured(step, rows * length, steps) | {"seconds_before": round(before, 2)}


def capture(take: Take, trained: list[torch.nn.Parameter]) -> Take:
    """Forward and backward as one CUDA graph; gradients stay where they are."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            take()
    torch.cuda.current_stream().wait_stream(side)
    for parameter in trained:
        parameter.grad.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = take()

    def replay() -> torch.Tensor:
        graph.replay()
        return loss

    return replay


def trl(geometry: dict[str, int], rows: int, length: int, steps: int, *, liger: bool = False) -> dict[str, Any]:
    """TRL's trainer; `liger`: with Liger Kernel's functions, which its own option installs."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        trainer = bench_card.trl(geometry, rows, length, folder, use_liger_kernel=liger)
        before = time.perf_counter() - began
        batch = next(iter(trainer.get_train_dataloader()))

        def step() -> torch.Tensor:
            loss = trainer.training_step(trainer.model, dict(batch), batch["labels"][:, 1:].ne(-100).sum())
            torch.nn.utils.clip_grad_norm_([p for p in trainer.model.parameters() if p.requires_grad], 1.0)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            return loss

        return measured(step, rows * length, steps) | {"seconds_before": round(before, 2)}


def measured(step: Callable[[], torch.Tensor], tokens: int, steps: int) -> dict[str, Any]:
    """Median seconds of a step until the card has done it, and the peak of the counted ones."""
    seconds, losses = [], []
    for number in range(3 + steps):
        if number == 3 and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        synchronize()
        began = time.perf_counter()
        loss = step()
        synchronize()
        seconds.append(time.perf_counter() - began)
        losses.append(round(float(loss), 4))
    median = statistics.median(seconds[3:])
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {
        "seconds": round(median, 4), "first": round(seconds[0], 2), "tokens_per_second": round(tokens / median),
        "peak_gib": round(peak / 2**30, 3), "losses": losses[:4],
    }  # fmt: skip


def _own(**how: bool) -> Callable[..., dict[str, Any]]:
    return lambda *arguments: own(*arguments, **how)


WAYS: dict[str, Callable[..., dict[str, Any]]] = {
    "eager": _own(),
    "graph": _own(captured=True),
    "kept": _own(kept=True),
    "keptgraph": _own(kept=True, captured=True),
    "trl": trl,
    "liger": lambda *arguments: trl(*arguments, liger=True),
    "compiled": _own(compiled=True),
}


if __name__ == "__main__":
    main()
