"""The plan of a run: every "auto" of a recipe made concrete for one device, each with its reason. Pure arithmetic."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from qtune.errors import InputError, Problem
from qtune.recipe.schema import Auto, EightBit, FourBit, KeyPath, Lora, Recipe
from qtune.sizes import size_in_bytes

if TYPE_CHECKING:
    from qtune.device.present import Device

# Tokens of one micro-batch where nothing better is known: enough to keep two cores or a small card busy.
TOKENS_PER_MICRO_BATCH = 4096

LEAST_GROUP = 4
"""Rows of a micro-batch below which its own cost, reading all weights back, is no longer small beside its rows'."""

SDPA = ("sdpa", "runs on every device")

Value = TypeVar("Value")


def why_others_take_less(names: Sequence[str], checkpointing: bool | int, kept: bool | int) -> str | None:
    """What usual ways do for which they take less memory than a recipe; None where none does.

    names: of those that do. checkpointing, kept: the recipe's `gradient_checkpointing` and `keep_dequantized`.
    """
    theirs, here, keys = [], [], []
    if checkpointing is not True:
        theirs.append("computes every layer twice")
        here.append(f"{'all' if checkpointing is False else 'some'} layers keep what they have computed")
        keys.append("training.gradient_checkpointing = true")
    if kept:
        theirs.append("reads frozen weights back for every product")
        here.append(f"those of {'all' if kept is True else 'some'} layers stay dequantized")
        keys.append("memory.keep_dequantized = false")
    if not names or not theirs:
        return None
    same = "does the same" if len(keys) == 1 else "do the same"
    whose = f"{names[0]}: " if len(names) == 1 else f"{'; '.join(names)}: each "  # a name may have a comma of its own
    return (
        f"{whose}{' and '.join(theirs)}, which takes less memory and more time; here "
        f"{' and '.join(here)}, for there is room. {' and '.join(keys)} {same}"
    )


@dataclass(frozen=True)
class Plan:
    """What one run will do on one device.

    Dtypes are torch's names ("bfloat16"). `reasons` explains each value that a rule chose, by the recipe's key path.
    """

    device: "Device"
    compute_dtype: str
    adapter_dtype: str
    attention: str
    micro_batch_size: int
    accumulation_steps: int
    gradient_checkpointing: bool | int
    """In all layers, in none, or in so many of the first."""
    optimizer: str
    learning_rate: float
    max_length: int
    embeddings: str
    """How they are kept: "device", "host", "int8" or "nf4"."""
    activations: str
    layers: str
    """"device", "host" or "disk": where the 4-bit layers wait; "sharded": a part of each with every process."""
    loss_tile_bytes: int
    lean_step: bool
    keep_dequantized: bool | int
    """The 4-bit weights of all layers, of none, or of so many of the first."""
    reasons: Mapping[KeyPath, str]
    streaming: bool = False
    """Whether the training rows are read while they are trained on; known once the rows have been looked for."""

    @property
    def together(self) -> int:
        """Micro-batches of a step that pass each layer one behind the other, before the next layer is sent for."""
        return 1 if self.layers == "device" else self.accumulation_steps

    @property
    def loss_scaling(self) -> bool:
        """fp16 gradients underflow without it; bf16 and fp32 have the range. Micikevicius et al. (arXiv:1710.03740)."""
        return self.compute_dtype == "float16"

    def with_micro_batch(self, size: int, reason: str = "asked for") -> "Plan":
        """The same effective batch in micro-batches of `size` rows; reason: why, where anybody reads it.

        Raises:
            ValueError: the batch is no whole number of them.
        """
        batch = self.micro_batch_size * self.accumulation_steps
        if batch % size:
            raise ValueError(f"a batch of {batch} rows is no whole number of micro-batches of {size}")
        reasons = {**self.reasons, ("training", "micro_batch_size"): reason}
        return replace(self, micro_batch_size=size, accumulation_steps=batch // size, reasons=reasons)

    def with_checkpointing(self, layers: bool | int, reason: str) -> "Plan":
        """The same plan with other layers computed twice."""
        reasons = {**self.reasons, ("training", "gradient_checkpointing"): reason}
        return replace(self, gradient_checkpointing=layers, reasons=reasons)

    def with_dequantized_kept(self, layers: bool | int, reason: str) -> "Plan":
        """The same plan with the weights of other layers kept."""
        reasons = {**self.reasons, ("memory", "keep_dequantized"): reason}
        return replace(self, keep_dequantized=layers, reasons=reasons)

    def with_streaming(self, reason: str) -> "Plan":
        """The same plan with rows that are streamed because a rule says so."""
        return replace(self, streaming=True, reasons={**self.reasons, ("data", "streaming"): reason})

    def with_embeddings_on_host(self, reason: str) -> "Plan":
        """The same plan with embeddings and head in host memory."""
        return replace(self, embeddings="host", reasons={**self.reasons, ("memory", "embeddings"): reason})


def make_plan(recipe: Recipe, device: "Device", attention: tuple[str, str] = SDPA, longest: int | None = None) -> Plan:
    """Decides everything that a recipe leaves to the device.

    attention: what "auto" means for the recipe's model, and why (`model.attention_rule`). longest: tokens of the
    longest row, where rows have been looked at; left out, data.max_length, which most data stay far below.
    """
    reasons: dict[KeyPath, str] = {}

    def settle(path: KeyPath, given: Value | Auto, rule: tuple[Value, str]) -> Value:
        if given != "auto":
            return given
        reasons[path] = rule[1]
        return rule[0]

    training, adapter = recipe.training, recipe.adapter
    compute_dtype = settle(
        ("quantization", "compute_dtype"), recipe.quantization.compute_dtype, compute_dtype_rule(device)
    )
    share = share_of(training.batch_size, device.processes)
    micro_batch_size = settle(
        ("training", "micro_batch_size"),
        training.micro_batch_size,
        _micro_batch(
            share,
            longest or recipe.data.max_length,
            most=_largest_group(training.batch_size, compute_dtype, device),
        ),
    )
    if micro_batch_size > share or share % micro_batch_size:
        words = f"{micro_batch_size} is no part of the {share} rows of a step that each of {device.processes} takes"
        micro_batch_size = max(size for size in whole_parts(share) if size <= micro_batch_size)
        reasons["training", "micro_batch_size"] = words
    checkpointing = _checkpointing(recipe, device)
    lean_step = settle(("training", "lean_step"), training.lean_step, _lean_step(recipe, device))
    kept = recipe.memory.keep_dequantized
    if kept is not False and (without := keeps_nothing(recipe, device, lean_step=lean_step)):
        kept, reasons["memory", "keep_dequantized"] = False, without
    float32: tuple[str, str] = ("float32", "small updates are not rounded away")
    return Plan(
        device=device,
        compute_dtype=compute_dtype,
        adapter_dtype=settle(("adapter", "dtype"), adapter.dtype, float32),
        attention=settle(("model", "attention"), recipe.model.attention, attention),
        micro_batch_size=micro_batch_size,
        accumulation_steps=share // micro_batch_size,
        gradient_checkpointing=settle(
            ("training", "gradient_checkpointing"), training.gradient_checkpointing, checkpointing
        ),
        optimizer=settle(("training", "optimizer"), training.optimizer, ("adamw", "the state of an adapter is small")),
        learning_rate=settle(("training", "learning_rate"), training.learning_rate, adapter.usual_rate),
        max_length=recipe.data.max_length,
        embeddings=settle(("memory", "embeddings"), recipe.memory.embeddings, ("device", "the fastest place")),
        activations=recipe.memory.activations,
        layers=_where_layers_are(recipe, device),
        loss_tile_bytes=size_in_bytes(recipe.memory.loss_tile, "memory.loss_tile"),
        lean_step=lean_step,
        keep_dequantized=settle(
            ("memory", "keep_dequantized"), kept, (False, "what memory is left for it was not asked")
        ),
        reasons=reasons,
    )


def whole_parts(batch: int) -> list[int]:
    """The micro-batches that a batch can be made of, ascending."""
    return [size for size in range(1, batch + 1) if batch % size == 0]


def share_of(batch_size: int, processes: int) -> int:
    """The rows of a step that each process takes.

    Raises:
        InputError: they would not all take as many.
    """
    if batch_size % processes == 0:
        return batch_size // processes
    below, above = batch_size - batch_size % processes, batch_size + processes - batch_size % processes
    sizes = f"{below} or {above}" if below else f"{above}"
    parts = [size for size in range(2, batch_size + 1) if batch_size % size == 0]
    others = f"; or start {' or '.join(map(str, parts))} processes" if parts else ""
    message = f"the rows of a step cannot be shared out evenly among {processes} processes; {sizes} could{others}"
    raise InputError(Problem(f"training.batch_size = {batch_size}", message))


def compute_dtype_rule(device: "Device") -> tuple[str, str]:
    """The dtype that a device computes fastest in without losing range, and why."""
    if device.kind == "cuda" and device.bf16:
        return "bfloat16", f"{device.name} has bfloat16 products in hardware"
    if device.kind == "cuda":
        return "float16", f"{device.name} has no bfloat16 products; float16 with loss scaling"
    if device.bf16:
        return "bfloat16", "its products were measured to be faster than float32's on this processor"
    return "float32", "bfloat16 products were measured to be no faster on this processor"


def _micro_batch(share: int, length: int, most: int) -> tuple[int, str]:
    """share: rows of a step that one process takes. most: rows at once, whatever their length."""
    room = max(1, TOKENS_PER_MICRO_BATCH // length)
    size = max(size for size in whole_parts(share) if size <= min(room, most))
    if size == most < min(room, share):
        return size, f"two groups of {size} rows of like length: less padding, and the same groups for two processes"
    return size, f"at most {TOKENS_PER_MICRO_BATCH} tokens at once, {size} x {length}"


def _largest_group(batch_size: int, compute_dtype: str, device: "Device") -> int:
    """Rows of a step that may go at once.

    On a processor in float32 products take the time, not what a micro-batch costs whatever is in it: 12 steps of the
    quickstart took 55.0 s of one thread in two groups, each padded to its own longest row, and 56.8 s in one. Then two
    processes take the groups of one, and train the same adapter to the last bit. Two rows are two groups as well, for
    the same reason: 24 steps of a soft prompt took 36.9 s and not 34.0. In bfloat16 (36 and 31 s for the first), and on
    a card, one group is the faster one.
    """
    if device.kind != "cpu" or compute_dtype != "float32" or batch_size % 2:
        return batch_size
    return batch_size // 2 if batch_size == 2 or batch_size >= 2 * LEAST_GROUP else batch_size


def _lean_step(recipe: Recipe, device: "Device") -> tuple[bool, str]:
    if device.lean_problem is not None:
        return False, f"qtune's functions do not agree with peft's layers on {device.name}: {device.lean_problem}"
    blocks = "norms and rotations as one operation each"
    if not isinstance(recipe.adapter, Lora):
        return True, f"{blocks}; {recipe.adapter.kind} has no layers of its own to compute otherwise"
    if recipe.adapter.dora:
        return True, f"{blocks}; DoRA's layers stay peft's"
    if isinstance(recipe.quantization, EightBit):
        return True, f"{blocks}; int8 layers stay peft's"
    return True, "the gradients of peft's layers to rounding, with less memory and fewer operations"


def _checkpointing(recipe: Recipe, device: "Device") -> tuple[bool | int, str]:
    if device.kind == "cpu":
        return False, "costs about a quarter of the time, and this computer's memory is not the limit"
    return True, "activations are what fills a card"


def keeps_nothing(recipe: Recipe, device: "Device", *, lean_step: bool) -> str | None:
    """Why no weights can stay dequantized; None where they can."""
    if not isinstance(recipe.quantization, FourBit):
        return "there are no 4-bit weights to dequantize"
    if _where_layers_are(recipe, device) != "device":
        return "the layers wait elsewhere, which saves memory"
    if not lean_step:
        return "the lean step alone keeps them"
    return None


def _where_layers_are(recipe: Recipe, device: "Device") -> str:
    """One process has every part."""
    is_alone = recipe.memory.layers == "sharded" and device.processes == 1
    return "device" if is_alone else recipe.memory.layers
