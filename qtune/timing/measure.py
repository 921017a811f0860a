"""Rates measured on the device that is here, by doing what a training step does, a few seconds of each.

Products, adapters' products, attention, reading NF4 back, walking through tensors: in the shapes of a 7B model's layer
on a card, in smaller ones on a CPU. What the processor takes for a launch is the time of a whole step of a model so
small that computing it takes next to nothing, over the launches that its trace counts: with peft's layers, whose
kernels are PyTorch's and bitsandbytes', and with the lean step, which has kernels of its own beside them.
"""

from __future__ import annotations

import datetime
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import bitsandbytes
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from qtune.adapter.attach import attach_adapter
from qtune.adapter.lean import install_lean_step
from qtune.device.rates import Rates
from qtune.kernels import on_cpu
from qtune.memory.predict import Longest, predict, training_step
from qtune.memory.tracing.step import parameter_groups, prepare, trained
from qtune.model.load import load_base
from qtune.model.loss import install_loss
from qtune.plan import make_plan
from qtune.recipe.parse import parse_recipe
from qtune.recipe.schema import Recipe
from qtune.timing.known import beside_here
from qtune.timing.price import Cost, cost_by, training_part

if TYPE_CHECKING:
    from qtune.device.present import Device
    from qtune.memory.tracing.work import Work


@dataclass(frozen=True)
class Shapes:
    """Sizes at which a device is measured."""

    tokens: int
    hidden: int
    intermediate: int
    heads: int
    head_size: int
    rows: int
    length: int
    """Of the attention's rows."""
    seconds: float
    """Spent on each measurement, so that a card is as warm as in training."""


CARD = Shapes(8192, 4096, 14336, 32, 128, rows=4, length=2048, seconds=0.6)
CPU = Shapes(512, 576, 1536, 9, 64, rows=2, length=256, seconds=0.6)
RANK = 16
WAITING_CYCLES = 10**8
"""Of a card's clock: tens of milliseconds, longer than launching a few hundred kernels takes."""
TINY_LAYERS, TINY_TOKENS = 8, 1600
"""More tokens than bitsandbytes gives to its fused kernels, which a 7B model's step does not meet either."""


Clock = Callable[[], float]
"""Seconds."""


def measured_rates(device: Device, clock: Clock = time.perf_counter) -> Rates:
    """What `device`, which must be here, does in a second. Takes about ten seconds.

    clock: `time.process_time` leaves out what other programs do meanwhile, on a CPU with one thread.
    """
    place = torch.device(device.torch_name)
    shapes = CARD if device.kind == "cuda" else CPU
    dtype = torch.bfloat16 if device.bf16 else torch.float16 if device.kind == "cuda" else torch.float32
    here = _Measured(place, shapes, dtype, clock)
    # Products in a 16-bit type that a device only emulates would take minutes, and no plan computes in it.
    low = ["bfloat16", "float16"] if device.bf16 and here.is_card else [str(dtype).removeprefix("torch.")]
    products = {name: here.products(getattr(torch, name)) for name in dict.fromkeys([*low, "float32"])}
    date = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    rates = Rates(
        kind="measured",
        source=f"{device.name}: measured by qtune doctor on {date} with torch {torch.__version__}",
        products={**products, "int8": products[low[0]]},
        attention=here.attention(),
        moved=here.moved(),
        copied=here.copied(),
        thin=here.thin(),
        dequantized=here.dequantized(),
        scattered=here.scattered(),
        kernel_seconds=here.kernel(),
        host_link=here.host_link(),
        launch_seconds=0.0,
        own_launch_seconds=0.0,
        is_own_processor=device.kind == "cpu",
        beside=beside_here(),
    )
    return _with_launches(rates, device, clock)


class _Measured:
    """One device at work."""

    def __init__(self, place: torch.device, shapes: Shapes, dtype: torch.dtype, clock: Clock) -> None:
        self.place, self.shapes, self.dtype, self.clock = place, shapes, dtype, clock
        self.is_card = place.type == "cuda"

    def products(self, dtype: torch.dtype) -> float:
        """FLOPs per second of a layer's products, as a step multiplies: forward, and the gradient of their input."""
        s = self.shapes
        work: list[Callable[[], Any]] = []
        flops = 0
        for out, inner in ((s.intermediate, s.hidden), (s.hidden, s.intermediate), (s.hidden, s.hidden)):
            weight, x = self._random((out, inner), dtype), self._random((s.tokens, inner), dtype)
            slope = self._random((s.tokens, out), dtype)
            work += [lambda x=x, w=weight: on_cpu.linear(x, w), lambda g=slope, w=weight: on_cpu.mm(g, w)]  # type: ignore[misc]
            flops += 4 * s.tokens * out * inner
        return flops / self._seconds(lambda: [one() for one in work])

    def thin(self) -> float:
        """Bytes per second of an adapter's products: down to its rank and up again, and their gradients."""
        s = self.shapes
        x, low = self._random((s.tokens, s.hidden)), self._random((s.tokens, RANK))
        down, up = self._random((RANK, s.hidden)), self._random((s.hidden, RANK))
        pairs = [(x, down.t()), (low, up.t()), (x, up), (x.t(), low), (low.t(), x), (low, down)]
        nbytes = sum(_bytes(a) + _bytes(b) + a.shape[0] * b.shape[1] * a.element_size() for a, b in pairs)
        return nbytes / self._seconds(lambda: [a @ b for a, b in pairs])

    def attention(self) -> float:
        """FLOPs per second, forward and backward, with a mask as rows of unequal length have it."""
        s = self.shapes
        query, key, value = (self._random((s.rows, s.heads, s.length, s.head_size)).requires_grad_() for _ in range(3))
        mask = torch.ones(s.length, s.length, dtype=torch.bool, device=self.place).tril()
        slope = self._random(query.shape)

        def work() -> None:
            out = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            torch.autograd.grad(out, (query, key, value), slope)

        flops = 7 * 2 * s.rows * s.heads * s.length**2 * s.head_size
        return flops / self._seconds(work)

    def moved(self) -> float:
        """Bytes per second of a sum and an activation, each into a new tensor, as a layer has them."""
        a, b = (self._random((self.shapes.tokens, self.shapes.intermediate)) for _ in range(2))
        return 5 * _bytes(a) / self._seconds(lambda: (a + b, functional.silu(a)))

    def copied(self) -> float:
        """Bytes per second of a cast to a wider or narrower type."""
        a = self._random((self.shapes.tokens, self.shapes.intermediate))
        other = torch.float32 if self.dtype is not torch.float32 else torch.bfloat16
        return (_bytes(a) + _bytes(a.to(other))) / self._seconds(lambda: a.to(other))

    def scattered(self) -> float:
        """Operands per second of the product of a transposed tensor and a broadcast one, as in rotary embeddings."""
        s = self.shapes
        x = self._random((s.rows, s.length, s.heads, s.head_size)).transpose(1, 2)
        angles = self._random((1, 1, s.length, s.head_size))
        return 3 * x.numel() / self._seconds(lambda: x * angles)

    def dequantized(self) -> float:
        """Bytes per second of reading an NF4 weight back; codes, an absmax in fp32 for each 64 and the result."""
        weight = self._random((self.shapes.intermediate, self.shapes.hidden))
        codes, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        nbytes = _bytes(codes) + 4 * weight.numel() // 64 + _bytes(weight)
        return nbytes / self._seconds(lambda: bitsandbytes.functional.dequantize_4bit(codes, state))

    def kernel(self) -> float:
        """Seconds of the smallest kernel, one after the other: they are launched while the card waits, or launching
        would be measured; on a CPU nothing."""
        if not self.is_card:
            return 0.0
        count, one = 500, torch.ones(1, device=self.place)
        took = []
        for _ in range(5):
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(WAITING_CYCLES)
            began.record()
            for _ in range(count):
                one.add_(1)
            ended.record()
            torch.cuda.synchronize()
            took.append(1e-3 * began.elapsed_time(ended) / count)
        return min(took)

    def host_link(self) -> float:
        """Bytes per second from pinned host memory; on a CPU it is the same memory."""
        if not self.is_card:
            return self.moved()
        host = torch.empty(2**28, dtype=torch.uint8).pin_memory()
        return _bytes(host) / self._seconds(lambda: host.to(self.place, non_blocking=True))

    def _random(self, shape: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.randn(shape, device=self.place).mul_(0.02).to(dtype or self.dtype)

    def _seconds(self, work: Callable[[], Any]) -> float:
        """Seconds of `work`: on a card the median of stretches that together take `shapes.seconds`, for it slows down
        as it warms; on a CPU the shortest, for other work on the computer only makes them longer."""
        for _ in range(3):
            work()
        _wait_for(self.place)
        took: list[float] = []
        began = time.perf_counter()
        repeats = 1
        while time.perf_counter() - began < self.shapes.seconds or len(took) < 3:
            start = self.clock()
            for _ in range(repeats):
                work()
            _wait_for(self.place)
            took.append((self.clock() - start) / repeats)
            repeats = max(1, min(1000, int(self.shapes.seconds / 10 / took[-1])))
        return statistics.median(took) if self.is_card else min(took)


def _with_launches(rates: Rates, device: Device, clock: Clock) -> Rates:
    """With the processor's time for a launch of PyTorch's kernels, and of qtune's own."""
    plain = _launching(rates, _Tiny(device, lean=False), clock)
    rates = replace(rates, launch_seconds=plain.seconds / plain.launches)
    lean = _Tiny(device, lean=True)
    if not lean.plan.lean_step:
        return replace(rates, own_launch_seconds=rates.launch_seconds)
    found = _launching(rates, lean, clock)
    others = (found.launches - found.own_launches) * rates.launch_seconds
    # On a CPU they are PyTorch's own operations, and may even be fewer of them.
    return replace(rates, own_launch_seconds=max(found.seconds - others, 0.0) / found.own_launches)


def _launching(rates: Rates, tiny: _Tiny, clock: Clock) -> Cost:
    """What launching a tiny step takes, as its seconds: the whole step, less what a CPU is known to compute in it; on a
    card computing is hidden behind the launches."""
    total = sum(cost_by(training_part(tiny.work()), rates, lambda place, kernel: None).values(), Cost())
    computing = total.seconds if rates.is_own_processor else 0.0
    return replace(total, seconds=max(tiny.step_seconds(clock) - computing, 0.0))


class _Tiny:
    """The step of a recipe for a model whose products take next to no time."""

    def __init__(self, device: Device, *, lean: bool) -> None:
        recipe = parse_recipe(
            {
                "model": {"base": "tiny"},
                "data": {"train": "rows.jsonl", "max_length": TINY_TOKENS if device.kind == "cuda" else 16},
                "training": {
                    "batch_size": 1,
                    "micro_batch_size": 1,
                    "gradient_checkpointing": True,
                    "lean_step": "auto" if lean else False,
                },
            }
        )
        assert isinstance(recipe, Recipe)
        self.place = torch.device(device.torch_name)
        self.config = LlamaConfig(
            vocab_size=512,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=TINY_LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        self.plan = make_plan(recipe, device)
        self.longest = Longest(recipe.data.max_length, equal=True)
        with tempfile.TemporaryDirectory() as folder:
            LlamaForCausalLM(self.config).save_pretrained(folder)
            self.recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"base": folder})})
            base = load_base(self.recipe.model, self.recipe.quantization, self.plan)
        self.model: Any = attach_adapter(base, self.recipe.adapter, self.plan)
        if self.plan.lean_step:
            install_lean_step(self.model, getattr(torch, self.plan.compute_dtype))
        install_loss(self.model.get_base_model(), tile_bytes=self.plan.loss_tile_bytes)
        self.step = training_step(self.recipe, self.plan, self.longest)
        prepare(self.model, self.step)

    def step_seconds(self, clock: Clock, counted: int = 5, uncounted: int = 3) -> float:
        """The shortest of a few steps: other work on the computer only makes them longer."""
        step, parameters = self.step, trained(self.model)
        assert step.optimizer is not None
        optimizer = step.optimizer(parameter_groups(self.model))
        batch = {name: tensor.to(self.place) for name, tensor in step.batch.tensors().items()}
        computing = torch.autocast(self.place.type, step.autocast, enabled=step.autocast is not None)
        took = []
        for _ in range(counted + uncounted):
            _wait_for(self.place)
            start = clock()
            with computing:
                loss = step.loss(self.model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            _wait_for(self.place)
            took.append(clock() - start)
        return min(took[uncounted:])

    def work(self) -> Work:
        """What the same step gives the device to do, by its trace."""
        return predict(self.config, self.recipe, self.plan, self.longest, plays_allocator=False).work


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _wait_for(place: torch.device) -> None:
    if place.type == "cuda":
        torch.cuda.synchronize()
