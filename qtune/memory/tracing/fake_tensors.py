"""Tensors without storage, and what operations make of them, remembered.

A step runs the same few hundred operations on the same shapes, layer after layer. `FakeTensorMode` works out the result
of each one anew or asks its own cache, whose key alone takes longer than all of the work here.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

CPU = torch.device("cpu")
"""Where every tensor of a trace is."""
WHERE = torch.ops.prim.device.default
"""The question for a tensor's device: two of three that a trace is asked."""

_PLAIN = (
    bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Made:
    """One tensor that an operation returns."""

    argument: int | None
    """The tensor argument whose storage it has; None: its own."""
    is_argument: bool
    """Whether it is that argument itself."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, eq=False)
class Remembered:
    """What an operation returns: one tensor or none, or several of them in a tuple or a list.

    The same object each time that the operation comes with the same arguments, but for which tensors they are.
    """

    container: type[tuple[Any, ...]] | type[list[Any]] | None
    made: tuple[_Made | None, ...]


_UNKNOWN = object()
_known: dict[tuple[Any, ...], Remembered | object] = {}
"""By operation and arguments: what it returns; _UNKNOWN where that is not only a matter of shapes and types."""


Answer = Callable[[Any, Sequence[Any]], Any]
"""(operation, arguments) -> what it returns; NotImplemented where that is a matter of shapes and types."""
Record = Callable[[Any, Sequence[Any], Any, Remembered | None], None]
"""(operation, arguments, what it returned, as what it is remembered; None where it is not)."""


class RememberingMode(FakeTensorMode):
    """A `FakeTensorMode` on the CPU that works out each operation once for the same shapes, strides, types and numbers.

    An operation is remembered when it returns tensors with storages of their own, its arguments or views of them, and
    leaves its arguments' shapes alone; everything else is left to `FakeTensorMode` every time.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.cache_enabled = False  # of the two this class has the quicker one
        self._answer: Answer | None = None
        self._record: Record | None = None
        self._is_inside = False
        """Whether an operation is being worked out: what it is made of is nobody's business."""
        self._state = vars(FakeTensor(self, torch.empty(0, device="meta"), CPU))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and asking costs as much as the rest

    @contextlib.contextmanager
    def watched(self, answer: Answer, record: Record) -> Iterator[None]:
        """While the block runs the mode is on, `answer` is asked before each operation and `record` told after it."""
        self._answer, self._record = answer, record
        try:
            with self:
                yield
        finally:
            self._answer = self._record = None

    def new(self, shape: Sequence[int], dtype: torch.dtype, stride: Sequence[int] | None = None) -> FakeTensor:
        """A tensor without storage; call it while the mode is off, or from `answer`."""
        if stride is None:
            return self._faked(torch.empty(shape, dtype=dtype, device="meta"))
        return self._faked(torch.empty_strided(shape, stride, dtype=dtype, device="meta"))

    def _faked(self, plain: torch.Tensor) -> FakeTensor:
        """What `FakeTensor(self, plain, CPU)` makes, without asking everything again."""
        made: FakeTensor = torch.Tensor._make_subclass(
            FakeTensor, plain, False, dispatch_device=True, device_for_backend_keys=CPU
        )
        vars(made).update(self._state)
        return made

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is WHERE:
            return super().__torch_dispatch__(func, types, args, kwargs or {}) if self._is_inside else CPU
        if self._is_inside or self._answer is None or self._record is None:
            return self._worked_out(func, types, args, kwargs)[0]
        with torch._C.DisableTorchFunction():
            remembered: Remembered | None = None
            out = self._answer(func, args)
            if out is NotImplemented:
                out, remembered = self._worked_out(func, types, args, kwargs)
            self._record(func, args, out, remembered)
        return out

    def _worked_out(
        self, func: Any, types: Sequence[type], args: Sequence[Any], kwargs: Mapping[str, Any] | None
    ) -> tuple[Any, Remembered | None]:
        """What the operation returns, and as what it is remembered."""
        if _only_writes(func):
            return None, None
        tensors: list[FakeTensor] = []
        key = _key(func, args, kwargs, tensors)
        answer = _UNKNOWN if key is None else _known.get(key)
        if isinstance(answer, Remembered):
            made = [None if one is None else self._made(one, tensors) for one in answer.made]
            return made[0] if answer.container is None else answer.container(made), answer
        before, self._is_inside = self._is_inside, True
        try:
            out = super().__torch_dispatch__(func, types, args, kwargs or {})
        finally:
            self._is_inside = before
        if answer is None and key is not None:
            unchanged = _key(func, args, kwargs, []) == key
            answer = _known[key] = _description(out, tensors) if unchanged else _UNKNOWN
        return out, answer if isinstance(answer, Remembered) else None

    def _made(self, made: _Made, tensors: list[FakeTensor]) -> FakeTensor:
        if made.argument is None:
            return self._faked(torch.empty_strided(made.shape, made.stride, dtype=made.dtype, device="meta"))
        if made.is_argument:
            return tensors[made.argument]
        view = torch.empty(0, dtype=made.dtype, device="meta")
        view.set_(tensors[made.argument].untyped_storage(), made.offset, made.shape, made.stride)
        return self._faked(view)


@functools.cache
def _only_writes(func: Any) -> bool:
    """Whether an operation does nothing but write into lists of tensors that are there: `_foreach_add_` and its kin."""
    name: str = func.__name__.partition(".")[0]
    return name.startswith("_foreach_") and name.endswith("_") and not func._schema.returns


def _key(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None, tensors: list[FakeTensor]) -> Any:
    """Everything that the result depends on, as a tuple; None where that cannot be said. Fills `tensors`, in order."""
    parts: list[Any] = [func, torch.get_default_dtype()]
    if not _add(args, parts, tensors):
        return None
    if kwargs:
        parts.extend(kwargs)
        if not _add(kwargs.values(), parts, tensors):
            return None
    return tuple(parts) if tensors else None


def _add(values: Any, parts: list[Any], tensors: list[FakeTensor]) -> bool:
    for value in values:
        if isinstance(value, FakeTensor):
            dtype = value.dtype
            if value.constant is not None or dtype.is_complex:
                return False
            tensors.append(value)
            parts += (value.shape, value.stride(), value.storage_offset(), dtype)
        elif isinstance(value, _PLAIN):
            parts += (type(value), value)
        elif isinstance(value, (list, tuple)):
            parts += (list, len(value))
            if not _add(value, parts, tensors):
                return False
        else:
            return False
    return True


def _description(out: Any, tensors: list[FakeTensor]) -> Remembered | object:
    several = isinstance(out, (list, tuple))
    made: list[_Made | None] = []
    storages: set[int] = set()
    for one in out if several else [out]:
        if one is None:
            made.append(None)
        elif not _is_plain(one) or (found := _one(one, tensors)) is None:
            return _UNKNOWN
        else:
            made.append(found)
            if found.argument is None:
                storages.add(one.untyped_storage()._cdata)
    if len(storages) != sum(one is not None and one.argument is None for one in made):
        return _UNKNOWN  # two results with one storage between them
    return Remembered((list if isinstance(out, list) else tuple) if several else None, tuple(made))


def _is_plain(value: Any) -> bool:
    return (
        type(value) is FakeTensor
        and value.device == CPU
        and value.layout is torch.strided
        and value.constant is None
        and not value.dtype.is_complex
    )


def _one(one: FakeTensor, tensors: list[FakeTensor]) -> _Made | None:
    same = [place for place, tensor in enumerate(tensors) if tensor is one]
    storage = one.untyped_storage()
    sharing = [place for place, tensor in enumerate(tensors) if tensor.untyped_storage()._cdata == storage._cdata]
    shape, stride, offset, dtype = tuple(one.shape), one.stride(), int(one.storage_offset()), one.dtype
    if sharing and (len(sharing) > 1 or len({*sharing, *same}) > 1):
        return None  # which of them is a matter of this call
    if sharing:
        return _Made(sharing[0], bool(same), shape, stride, offset, dtype)
    elements = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if one.numel() else 0
    if offset or elements * dtype.itemsize != storage.nbytes():
        return None
    return _Made(None, False, shape, stride, 0, dtype)
