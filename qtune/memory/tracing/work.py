"""What the operations of a step give a device to do: launches, bytes moved, FLOPs.

The same trace that counts storages for memory counts these for time. Bytes are those of the tensors that an operation
reads and writes, as if no cache helped; a tensor that is expanded is read once. FLOPs are counted for products alone
(2 m n k), as a card's maker counts them. Operations that only look at a tensor in another way cost nothing.

Where CUDA's kernels are others than the operations of the trace (attention, 4-bit products, lists of tensors), the
counts are CUDA's, and their source is named.
"""

from __future__ import annotations

import functools
from collections import Counter
from math import prod
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from qtune.memory.tracing.ledger import LOSS_REGION

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from qtune.memory.tracing.ledger import Ledger

Kind = Literal[
    "products", "thin products", "attention", "dequantization", "elementwise", "reductions", "copies", "indexing",
    "optimizer", "host transfers", "layer transfers",
]  # fmt: skip
"""products: of large matrices. thin products: one of the three sizes is at most THIN, an adapter's rank for example.
copies: casts, layouts, concatenations. host transfers: between host and card. layer
transfers: of layers that wait elsewhere, beside what is computed."""

THIN = 256
"""Up to this size of one of its dimensions a product is bound by reading the other matrix, on any card."""


class Kernel(NamedTuple):
    """What one operation gives a device to do. A tuple, as a place is: a trace counts them a hundred thousand times."""

    op: str
    kind: Kind
    launches: int
    """Kernels that the operation starts on a CUDA card."""
    bytes: int
    """Read and written."""
    flops: int
    dtype: torch.dtype
    """In which it computes."""
    scattered: int = 0
    """Operands whose place the kernel works out one by one, because its tensors cannot be walked through as one row of
    numbers: a transposed or a broadcast one is among them."""


class Place(NamedTuple):
    """When in a step something is done."""

    phase: str
    """forward, backward, optimizer, eval."""
    part: Literal["layers", "loss"] = "layers"
    """loss: the head, the loss, and its own backward."""
    recomputed: bool = False
    """Whether gradient checkpointing does it again in the backward."""


Work = Counter[tuple[Place, Kernel]]
"""How often each kernel is launched in each part of a step."""


def place_of(ledger: Ledger) -> Place:
    """Where in the step a ledger stands."""
    is_loss = ledger.module == LOSS_REGION
    return Place(ledger.phase, "loss" if is_loss else "layers", ledger.depth > 0 and ledger.phase == "backward")


def crossing(kernel: Kernel, tensors: Sequence[torch.Tensor]) -> Kernel:
    """A copy from or to host memory, as the bus sees it; tensors: what is on the card of it, or was asked for there."""
    return kernel._replace(kind="host transfers", bytes=_size(tensors[:1]), scattered=0)


def of_one_micro_batch(work: Work, micro_batches: int) -> Work:
    """The share of one of so many that went through the layers together; they share the layers' own coming."""
    if micro_batches == 1:
        return work
    return Counter(
        {
            (place, kernel): count if kernel.kind == "layer transfers" else -(-count // micro_batches)
            for (place, kernel), count in work.items()
        }
    )


def stretched(short: Work, longer: Work, groups: int) -> Work:
    """The work of a model with `groups` more groups of layers than the short one; the longer one has one more."""
    keys = {*short, *longer}
    return Counter({key: short[key] + groups * (longer[key] - short[key]) for key in keys})


WorkRow = tuple[str, str, bool, str, str, int, int, int, str, int, int]
"""One kernel of a place as plain values, in the order of their fields, and how often it is launched."""


def rows_of(work: Work) -> list[WorkRow]:
    """Work as plain values, to be kept in a file."""
    return [
        (
            *(place.phase, place.part, place.recomputed),
            *(kernel.op, kernel.kind, kernel.launches, kernel.bytes, kernel.flops),
            *(str(kernel.dtype).removeprefix("torch."), kernel.scattered),
            count,
        )
        for (place, kernel), count in work.items()
    ]


def from_rows(rows: Sequence[Sequence[Any]]) -> Work:
    """Work from what `rows_of` gave."""
    work: Work = Counter()
    for phase, part, recomputed, op, kind, launches, moved, flops, dtype, scattered, count in rows:
        kernel = Kernel(op, kind, launches, moved, flops, getattr(torch, dtype), scattered)
        work[Place(phase, part, recomputed), kernel] += count
    return work


def work_of(func: Any, args: Sequence[Any], out: Any, *, cuda: bool = True) -> list[Kernel]:
    """The kernels of one operation, from its function, arguments and result; none where nothing is computed.

    cuda: as CUDA's kernels do it; otherwise as the CPU's.
    """
    name = _name(func)
    if name in _FREE:
        return []
    ins, outs = list(_tensors(args)), list(_tensors((out,)))
    special = _SPECIAL.get(name)
    if special is not None:
        return special(name, args, ins, outs, cuda)
    if name.startswith(("_foreach_", "_fused_")):
        return [_over_a_list(name, args, ins, outs, cuda)]
    if not outs:
        return []
    if not _is_mutable(func) and _is_view(ins, outs):
        return []
    return [_plain(name, ins, outs)]


def _plain(name: str, ins: list[torch.Tensor], outs: list[torch.Tensor]) -> Kernel:
    """An operation of one kernel that reads every input once and writes every output once.

    An operation in place has its first argument among both: it is read and written.
    """
    kind, launches = _KINDS.get(name, ("elementwise", 1))
    read = ins[1:] if name in _OVERWRITES else ins
    scattered = 0
    if kind in ("elementwise", "copies") and not _is_one_row([*read, *outs]):
        scattered = sum(outs[0].numel() for tensor in (*read, outs[0]) if tensor.numel() > 1)
        scattered = outs[0].numel() * 2 if name in _GATHERING else scattered
    return Kernel(name, kind, launches, _size(read) + _size(outs), 0, outs[0].dtype, scattered)


def _is_one_row(tensors: list[torch.Tensor]) -> bool:
    """Whether all of these tensors, single numbers aside, have their elements in the same order without gaps.

    Then TensorIterator makes one dimension of theirs, and vectorized kernels walk through it (ATen/TensorIterator.cpp,
    `coalesce_dimensions`; native/cuda/CUDALoops.cuh).
    """
    large = [tensor for tensor in tensors if tensor.numel() > 1]
    first = large[0] if large else None
    return first is None or (
        _is_dense(first)
        and all(tensor.shape == first.shape and tensor.stride() == first.stride() for tensor in large[1:])
    )


def _is_dense(tensor: torch.Tensor) -> bool:
    expected = 1
    for size, step in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda pair: pair[1]):
        if size > 1:
            if step != expected:
                return False
            expected *= size
    return True


@functools.cache
def _name(func: Any) -> str:
    """ "mm" of aten::mm.default."""
    name: str = func._schema.name
    return name.partition("::")[2]


@functools.cache
def _is_mutable(func: Any) -> bool:
    return bool(func._schema.is_mutable)


def _is_view(ins: list[torch.Tensor], outs: list[torch.Tensor]) -> bool:
    known = {tensor.untyped_storage()._cdata for tensor in ins}
    return all(tensor.untyped_storage()._cdata in known for tensor in outs)


def _tensors(values: Sequence[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _size(tensors: Sequence[torch.Tensor]) -> int:
    """Bytes of tensors, each element once however often an expanded dimension repeats it."""
    return sum(_elements(tensor) * tensor.element_size() for tensor in tensors)


def _elements(tensor: torch.Tensor) -> int:
    return prod(size for size, step in zip(tensor.shape, tensor.stride(), strict=True) if step)


# --- products -------------------------------------------------------------------------------------------------------


def _product_kernel(name: str, batch: int, m: int, n: int, k: int, nbytes: int, dtype: torch.dtype) -> Kernel:
    kind: Kind = "thin products" if min(m, n, k) <= THIN else "products"
    return Kernel(name, kind, 1, nbytes, 2 * batch * m * n * k, dtype)


_WITH_A_SUM = frozenset({"addmm", "addmm_", "addmm_fp32", "baddbmm"})
"""Products whose first argument is what they are added to."""


def _product(
    name: str, args: Sequence[Any], ins: list[torch.Tensor], outs: list[torch.Tensor], _: bool
) -> list[Kernel]:
    """mm, bmm and their kin with something added: the last two tensors are multiplied, [batch,] m, k and k, n."""
    a, b = ins[-2:] if name not in _WITH_A_SUM else ins[1:3]
    *batch, m, k = a.shape
    return [_product_kernel(name, prod(batch), m, b.shape[-1], k, _size(ins) + _size(outs[:1]), a.dtype)]


def _four_bit_product(
    name: str, args: Sequence[Any], ins: list[torch.Tensor], outs: list[torch.Tensor], cuda: bool
) -> list[Kernel]:
    """x [..., k] times a packed weight of n x k, as bitsandbytes 0.50 does it where rows are many: absmax is read back,
    then the weight, then comes a plain product (backends/cuda/ops.py, `_dequant_linear_fallback`)."""
    x, packed, shape = args[:3]
    n, k = shape
    rows = x.numel() // x.shape[-1]
    absmax, nested = args[3], args[7] if len(args) > 7 else None
    kernels = []
    constants = absmax.numel() * 4
    if nested is not None:
        blocks = nested.numel()
        kernels += [
            Kernel(
                "dequantize absmax", "dequantization", 1, blocks + 4 * absmax.numel() + 4 * blocks, 0, torch.float32
            ),
            Kernel("dequantize absmax", "dequantization", 1, 8 * blocks, 0, torch.float32),
        ]
        constants = 4 * blocks
    weight = n * k * x.element_size()
    kernels.append(Kernel("dequantize_4bit", "dequantization", 1, _size([packed]) + constants + weight, 0, x.dtype))
    kernels.append(_product_kernel(name, 1, rows, n, k, _size([x]) + weight + _size(outs), x.dtype))
    return kernels


def _product_in_int8(
    name: str, args: Sequence[Any], ins: list[torch.Tensor], outs: list[torch.Tensor], _: bool
) -> list[Kernel]:
    """Codes [..., k] times codes [n, k]; a mixed one also reads the result back from int32 (bitsandbytes/_ops.py)."""
    a, b = [tensor for tensor in ins if tensor.dtype is torch.int8][:2]
    k = a.shape[-1]
    rows, n = a.numel() // k, b.shape[0]
    found = [_product_kernel(name, 1, rows, n, k, _size([a, b]) + 4 * rows * n, torch.int8)]
    if outs[0].dtype is not torch.int32:
        moved = 4 * rows * n + _size(outs[:1])
        found.append(Kernel("int8_mm_dequant", "dequantization", 1, moved, 0, outs[0].dtype))
    return found


# --- attention ------------------------------------------------------------------------------------------------------


def _attention(
    name: str, args: Sequence[Any], ins: list[torch.Tensor], outs: list[torch.Tensor], cuda: bool
) -> list[Kernel]:
    """Two products of the forward over query, key and value [batch, heads, length, size].

    Without a mask half of the scores are left out on a card where attention is causal; with one none are (cuDNN and
    memory-efficient kernels read the mask, and do not know that it is causal). The CPU's kernel takes as long either
    way: what it leaves out it loses by smaller blocks (measured at 256 tokens, torch 2.13).
    """
    query, key = ins[:2]
    is_causal = cuda and any(arg is True for arg in args[3:6])
    flops = _score_flops(query, key, is_causal) * 2
    return [Kernel("attention", "attention", 1, _size(ins) + _size(outs[:2]), flops, query.dtype)]


def _attention_backward(
    name: str, args: Sequence[Any], ins: list[torch.Tensor], outs: list[torch.Tensor], cuda: bool
) -> list[Kernel]:
    """Five products: the scores again, and the gradients of values, probabilities, queries and keys (FlashAttention,
    arXiv:2205.14135, algorithm 4)."""
    query, key = ins[1:3]
    is_causal = cuda and any(arg is True for arg in args[6:])
    flops = _score_flops(query, key, is_causal) * 5
    return [Kernel("attention backward", "attention", 1, _size(ins) + _size(outs), flops, query.dtype)]


def _score_flops(query: torch.Tensor, key: torch.Tensor, is_causal: bool) -> int:
    batch, heads, length, size = query.shape
    return 2 * batch * heads * length * key.shape[2] * size // (2 if is_causal else 1)


# --- lists of tensors ----------------------------------------------------------------------------------------------

_TENSORS_AT_ONCE = 48
"""Tensors of one launch where two or three lists are walked through (ATen/native/cuda/MultiTensorApply.cuh,
depth_to_max_tensors: 110, 64, 48, 36, 30 for 1 to 5 lists)."""
_CHUNK, _CHUNKS_AT_ONCE = 65536, 320
"""Elements of a block of work, and blocks of one launch (the same file, kChunkSize and depth_to_max_blocks)."""


def _over_a_list(
    name: str, args: Sequence[Any], ins: list[torch.Tensor], outs: list[torch.Tensor], cuda: bool
) -> Kernel:
    first = list(args[0])
    launches = len(first)
    if cuda:
        chunks = sum(-(-tensor.numel() // _CHUNK) for tensor in first)
        launches = max(-(-len(first) // _TENSORS_AT_ONCE), -(-chunks // _CHUNKS_AT_ONCE))
    if name == "_foreach_norm":
        written = 0
    elif name.endswith("_"):
        written = _size(first)
    else:
        written = _size(outs)
    read = _size(ins) if name != "_foreach_zero_" else 0
    return Kernel(name, "optimizer", launches, read + written, 0, first[0].dtype)


# --- operations that do not touch all of their inputs once -----------------------------------------------------------


def _look_up(
    name: str, args: Sequence[Any], ins: list[torch.Tensor], outs: list[torch.Tensor], _: bool
) -> list[Kernel]:
    """Rows of a table: as many bytes are read as written, whatever the table's size."""
    return [Kernel(name, "indexing", 1, 2 * _size(outs), 0, outs[0].dtype)]


def _scattered(
    name: str, args: Sequence[Any], ins: list[torch.Tensor], outs: list[torch.Tensor], _: bool
) -> list[Kernel]:
    """Values written into places of a tensor: the rest of it is not touched."""
    return [Kernel(name, "indexing", 1, 3 * _size(ins[1:]), 0, outs[0].dtype)]


def _filled(name: str, args: Sequence[Any], ins: list[torch.Tensor], outs: list[torch.Tensor], _: bool) -> list[Kernel]:
    return [Kernel(name, "copies", 1, _size(outs), 0, outs[0].dtype)]


def _nonzero(
    name: str, args: Sequence[Any], ins: list[torch.Tensor], outs: list[torch.Tensor], _: bool
) -> list[Kernel]:
    """Counts, copies the count to the host, writes the places (ATen/native/cuda/Nonzero.cu)."""
    return [Kernel(name, "indexing", 4, 2 * _size(ins) + _size(outs), 0, torch.int64)]


def _logsumexp(
    name: str, args: Sequence[Any], ins: list[torch.Tensor], outs: list[torch.Tensor], _: bool
) -> list[Kernel]:
    """Maximum, difference, exponential in place, sum, logarithm, sum (ATen/native/ReduceOps.cpp, `logsumexp_out_impl`):
    six passes over the input's size, and eight kernels with those for infinite maxima."""
    return [Kernel(name, "reductions", 8, 6 * _size(ins), 0, ins[0].dtype)]


def _zero_padded(
    name: str, args: Sequence[Any], ins: list[torch.Tensor], outs: list[torch.Tensor], _: bool
) -> list[Kernel]:
    """Backward of a slice: zeros, and the gradient copied into them."""
    return [Kernel(name, "copies", 2, _size(outs) + 2 * _size(ins), 0, outs[0].dtype)]


# --- our own operations (qtune.kernels) ------------------------------------------------------------------------------


def _in_one_pass(
    name: str, args: Sequence[Any], ins: list[torch.Tensor], outs: list[torch.Tensor], _: bool
) -> list[Kernel]:
    """One kernel that walks through its tensors as it was written to, whatever their layout."""
    kind: Kind = "dequantization" if name == "dequantize_nested" else "elementwise"
    return [Kernel(name, kind, 1, _size(ins) + _size(outs), 0, (outs or ins)[0].dtype)]


def _gates_backward(
    name: str, args: Sequence[Any], ins: list[torch.Tensor], outs: list[torch.Tensor], _: bool
) -> list[Kernel]:
    """Three tensors are read, and three written."""
    return [Kernel(name, "elementwise", 1, 2 * _size(ins[:3]), 0, ins[0].dtype)]


def _likelihoods(
    name: str, args: Sequence[Any], ins: list[torch.Tensor], outs: list[torch.Tensor], _: bool
) -> list[Kernel]:
    """Logits are read once for the normalizer, and once more to write their gradient over them."""
    passes = 3 if any(arg is True for arg in args) else 1
    return [Kernel(name, "elementwise", 1, passes * _size(ins[:1]), 0, ins[0].dtype)]


def _block_likelihoods(
    name: str, args: Sequence[Any], ins: list[torch.Tensor], outs: list[torch.Tensor], _: bool
) -> list[Kernel]:
    """A block of logits is read, and written where it becomes their gradient."""
    passes = 2 if name.endswith("gradient") else 1
    return [Kernel(name, "elementwise", 1, passes * _size(ins[:1]), 0, ins[0].dtype)]


def _load_layer(
    name: str, args: Sequence[Any], ins: list[torch.Tensor], outs: list[torch.Tensor], _: bool
) -> list[Kernel]:
    """One copy, of so many bytes as cross the bus."""
    return [Kernel(name, "layer transfers", 1, _size(ins[:1]), 0, torch.uint8)]


_SPECIAL: dict[str, Any] = {
    "load_layer": _load_layer,
    **dict.fromkeys(("mm", "bmm", "addmm", "addmm_", "addmm_fp32", "baddbmm", "_grouped_mm", "product_in"), _product),
    "gemm_4bit": _four_bit_product,
    **dict.fromkeys(("int8_linear_matmul", "int8_mixed_scaled_mm", "int8_scaled_mm"), _product_in_int8),
    **dict.fromkeys(
        ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
         "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"), _attention,
    ),
    **dict.fromkeys(
        ("_scaled_dot_product_flash_attention_for_cpu_backward", "_scaled_dot_product_flash_attention_backward",
         "_scaled_dot_product_efficient_attention_backward", "_scaled_dot_product_cudnn_attention_backward"),
        _attention_backward,
    ),
    **dict.fromkeys(("embedding", "index", "index_select", "gather"), _look_up),
    **dict.fromkeys(("scatter_add_", "scatter_", "index_put_", "index_add_"), _scattered),
    **dict.fromkeys(
        ("zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "fill_",
         "zero_", "arange", "scalar_tensor"), _filled,
    ),
    **dict.fromkeys(("rms_norm", "rms_norm_backward", "rotate", "gated", "dequantize_nested"), _in_one_pass),
    "gated_backward": _gates_backward,
    "cross_entropy": _likelihoods,
    **dict.fromkeys(("cross_entropy_block", "cross_entropy_block_gradient"), _block_likelihoods),
    "nonzero": _nonzero,
    "logsumexp": _logsumexp,
    **dict.fromkeys(("slice_backward", "select_backward"), _zero_padded),
}  # fmt: skip
"""Operations whose work is not that of one kernel over all of their tensors."""

_FREE = frozenset(
    {
        "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "detach", "alias",
        "set_", "resize_", "_local_scalar_dense", "device", "sym_size", "sym_numel", "sym_stride", "is_same_size",
    }
)  # fmt: skip
"""Operations without a kernel of their own: reading one value is a copy of eight bytes."""

_GATHERING = frozenset({"cat", "stack"})
"""Operations whose inputs lie one behind the other in the output."""

_OVERWRITES = frozenset({"copy_"})
"""Operations whose first argument is only written."""

_KINDS: dict[str, tuple[Kind, int]] = {
    **dict.fromkeys(("_to_copy", "copy_", "clone", "cat", "stack", "repeat", "constant_pad_nd"), ("copies", 1)),
    **dict.fromkeys(
        ("sum", "mean", "amax", "amin", "max", "min", "argmax", "argmin", "_softmax", "_log_softmax", "norm",
         "var_mean", "linalg_vector_norm", "cumsum", "any", "all", "_softmax_backward_data", "native_layer_norm",
         "native_layer_norm_backward"), ("reductions", 1),
    ),
    **dict.fromkeys(("dequantize_4bit", "dequantize_blockwise"), ("dequantization", 1)),
    **dict.fromkeys(("optimizer_update_32bit", "optimizer_update_8bit_blockwise"), ("optimizer", 1)),
    "sort": ("indexing", 4),
    "embedding_dense_backward": ("indexing", 5),
}  # fmt: skip
"""Kind and launches of operations that are neither special nor elementwise."""
