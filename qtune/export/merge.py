"""Base checkpoint + adapter -> merged tensors, one at a time."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from qtune.errors import ExportError, Problem, RunError
from qtune.export.adapter_weights import AdapterWeights, Update, updated
from qtune.export.basis import Basis, as_stored, as_trained
from qtune.export.layout import Layout
from qtune.export.rounding import rounded_stochastically
from qtune.export.shards import SHARD_BYTES, Planned, plan_shards, write_shards
from qtune.model.checkpoint import Checkpoint
from qtune.model.packed import is_statistic, read_statistics, statistics_of, unpacked_shape

# Which weights the adapter is added to: those that training saw, or those of the base checkpoint.
Weights = Literal["dequantized", "original"]


@dataclass(frozen=True)
class Merge:
    """Everything a merge depends on, decided before the first tensor is read."""

    base: Checkpoint
    layout: Layout
    adapter: AdapterWeights
    basis: Basis
    weights: Weights
    dtype: torch.dtype
    tensors: tuple[Planned, ...] = field(default=())
    sources: dict[str, str] = field(default_factory=dict)
    """Output name -> name in the base checkpoint."""
    targets: dict[str, str] = field(default_factory=dict)
    """Output name -> parameter of the model."""
    unties: bool = False
    """Whether the head becomes a tensor of its own, because the adapter changed only one of the tied two."""
    vocabulary: int | None = None
    """Rows of the embedding, where the adapter brings a resized one."""

    @property
    def nbytes(self) -> int:
        """Bytes of the merged weights."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def config_changes(self) -> dict[str, Any]:
        """Keys of config.json that the merged weights change."""
        changes: dict[str, Any] = {"tie_word_embeddings": False} if self.unties else {}
        if self.vocabulary is not None:
            changes["vocab_size"] = self.vocabulary
        return changes


def plan_merge(
    base: Checkpoint, layout: Layout, adapter: AdapterWeights, basis: Basis, weights: Weights, dtype: torch.dtype
) -> Merge:
    """Decides name, shape and origin of every output tensor.

    Raises RunError, naming everything that is in the way: adapter tensors without a place in the base, changes to
    parameters that the checkpoint does not hold as one tensor, a resized embedding whose head was not resized.
    """
    merge = Merge(base, layout, adapter, basis, weights, dtype)
    sources = {name: name for name in base.tensors if not is_statistic(name, base.tensors)}
    targets = {name: layout.parameters.get(name, name) for name in sources}
    unties = _unties(layout, adapter)
    head = layout.output_embedding
    if unties and head is not None and head not in targets.values():
        embedding = next(name for name, parameter in targets.items() if parameter == layout.tied[head])
        sources[head], targets[head] = embedding, head
    problems = list(_obstacles(merge, set(targets.values())))
    if problems:
        raise RunError(problems)
    tensors = tuple(
        Planned(name, _output_dtype(merge, name, targets[name]), _output_shape(merge, source, targets[name]))
        for name, source in sources.items()
    )
    vocabulary = next(
        (
            tensor.shape[0]
            for tensor in tensors
            if targets[tensor.name] == layout.input_embedding
            and tensor.shape[0] != base.tensors[sources[tensor.name]].shape[0]
        ),
        None,
    )
    return Merge(
        base, layout, adapter, basis, weights, dtype, tensors, sources, targets, unties=unties, vocabulary=vocabulary
    )


def write_merge(
    merge: Merge, folder: Path, advance: Callable[[int], None], shard_bytes: int = SHARD_BYTES
) -> list[Path]:
    """Writes the merged weights as safetensors shards; `advance` is told the bytes of every tensor written.

    Raises ExportError when a value does not fit the output dtype.
    """

    def produce(planned: Planned) -> torch.Tensor:
        result = merged_tensor(merge, planned)
        advance(planned.nbytes)
        return result

    return write_shards(folder, plan_shards(merge.tensors, shard_bytes), produce)


def merged_tensor(merge: Merge, planned: Planned) -> torch.Tensor:
    """One output tensor: the base's values, the adapter's change in fp32, one rounding to the output dtype."""
    parameter = merge.targets[planned.name]
    stored = merge.base.read_finite(merge.sources[planned.name])
    values = base_values(merge, merge.sources[planned.name], parameter, stored)
    update = _update_for(merge, parameter)
    if update is not None:
        # What was read is mapped from the checkpoint; what was made of it is ours to change.
        coarse = update.is_everywhere and values.element_size() < 4
        values = updated(values, update, transposed=parameter in merge.layout.transposed, in_place=values is not stored)
        if coarse and planned.dtype.itemsize < 4:
            values = rounded_stochastically(values, planned.dtype, planned.name)
    rounded = values.to(planned.dtype)
    if planned.dtype == torch.float16:
        _refuse_overflow(planned.name, values, rounded)
    return rounded


def base_values(merge: Merge, source: str, parameter: str, stored: torch.Tensor) -> torch.Tensor:
    """The frozen values of a parameter on the chosen basis, in the orientation of the checkpoint.

    `stored` is what the checkpoint holds under `source`; it is returned as it is where nothing is to be done.
    """
    if statistics := read_statistics(source, merge.base):
        values = as_stored(stored, statistics, merge.basis.compute_dtype)
        return values.T if parameter in merge.layout.transposed else values
    if merge.weights == "original" or not stored.is_floating_point():
        return stored
    if parameter not in merge.layout.quantized or merge.basis.kind == "none":
        # fp32 holds every 16-bit value: casting there and back would only cost memory.
        unchanged = parameter in merge.layout.kept_in_fp32 or merge.basis.load_dtype == torch.float32
        return stored if unchanged else stored.to(merge.basis.load_dtype)
    if parameter in merge.layout.transposed:
        return as_trained(stored.T, merge.basis).T
    return as_trained(stored, merge.basis)


def _update_for(merge: Merge, parameter: str) -> Update | None:
    """The adapter's change of a parameter; a head that stays tied takes the embedding's."""
    if parameter in merge.adapter.updates:
        return merge.adapter.updates[parameter]
    if not merge.unties and parameter in merge.layout.tied:
        return merge.adapter.updates.get(merge.layout.tied[parameter])
    return None


def _refuse_overflow(name: str, values: torch.Tensor, rounded: torch.Tensor) -> None:
    if not rounded.numel():
        return
    # One pass, without a mask as large as the tensor; a NaN is passed on.
    low, high = (bound.item() for bound in rounded.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        largest = values.abs().max().item()
        raise ExportError(
            f"{name}: its largest value {largest:.4g} does not fit float16 (65504); export with --dtype bfloat16"
        )


def _output_dtype(merge: Merge, name: str, parameter: str) -> torch.dtype:
    stored = merge.base.tensors[name].dtype if name in merge.base.tensors else merge.dtype
    if statistics_of(name, merge.base.tensors):
        return merge.dtype
    if not stored.is_floating_point:
        return stored
    return torch.float32 if parameter in merge.layout.kept_in_fp32 else merge.dtype


def _output_shape(merge: Merge, source: str, parameter: str) -> tuple[int, ...]:
    update = _update_for(merge, parameter)
    shape = _unpacked_shape(merge, source, parameter)
    if update is None:
        return shape
    if update.replacement is not None:
        shape = tuple(update.replacement.shape)
    new = update.mean_rows + (0 if update.appended is None else len(update.appended))
    return (shape[0] + new, *shape[1:])


def _obstacles(merge: Merge, present: set[str]) -> Iterable[Problem]:
    folder = str(merge.base.folder)
    for parameter, update in merge.adapter.updates.items():
        tied_to = merge.layout.tied.get(parameter)
        if parameter in merge.layout.converted:
            yield Problem(folder, f"stores {parameter} in pieces; an adapter on it cannot be merged")
        elif parameter not in present and tied_to not in present and not (update.row_scale is not None):
            yield Problem(folder, f"has no {parameter}, which the adapter changes; is it the base of this adapter?")
        elif (trained := _factor_shape(update)) and (stored := _shape_of(merge, parameter)) and trained != stored:
            yield Problem(folder, f"{parameter} is {list(stored)}, the adapter was trained for {list(trained)}")
    if merge.weights == "dequantized" and merge.basis.kind != "none":
        for parameter in sorted(merge.layout.converted & merge.layout.quantized):
            yield Problem(folder, f"stores {parameter} in pieces; it cannot be quantized as training did")
    if merge.weights == "original" and any(is_statistic(name, merge.base.tensors) for name in merge.base.tensors):
        yield Problem(folder, "holds quantized weights; there are no original ones to merge into, leave out --base")
    yield from _vocabulary_mismatch(merge)


def _factor_shape(update: Update) -> tuple[int, ...] | None:
    return None if update.factors is None else (update.factors[1].shape[0], update.factors[0].shape[1])


def _shape_of(merge: Merge, parameter: str) -> tuple[int, ...] | None:
    """A parameter's shape as [out, in]; None where the checkpoint has no tensor of its own for it."""
    name = merge.layout.stored_as(parameter)
    if name is None:
        return None
    shape = _unpacked_shape(merge, name, parameter)
    return shape[::-1] if parameter in merge.layout.transposed else shape


def _unpacked_shape(merge: Merge, source: str, parameter: str) -> tuple[int, ...]:
    """A parameter's shape in the orientation of the checkpoint; bitsandbytes stores a Conv1D's weight as [out, in]."""
    shape = unpacked_shape(source, merge.base)
    turned = parameter in merge.layout.transposed and statistics_of(source, merge.base.tensors)
    return shape[::-1] if turned else shape


def _vocabulary_mismatch(merge: Merge) -> Iterable[Problem]:
    layout, updates = merge.layout, merge.adapter.updates
    embedding = updates.get(layout.input_embedding, Update()).replacement
    name = layout.stored_as(layout.output_embedding or "")
    head = updates.get(layout.output_embedding or "", Update()).replacement
    if embedding is None or name is None:
        return
    rows = len(head) if head is not None else unpacked_shape(name, merge.base)[0]
    if rows != len(embedding):
        yield Problem(
            str(merge.base.folder), f"the adapter has {len(embedding)} embedding rows, the head {rows}; save both"
        )


def _unties(layout: Layout, adapter: AdapterWeights) -> bool:
    """Whether training changed only one of two tied parameters, so that they are no longer equal."""
    head = layout.output_embedding
    if head is None or head not in layout.tied or adapter.head == "as the embedding":
        return False
    return adapter.head == "on its own" or bool({head, layout.tied[head]} & adapter.updates.keys())
