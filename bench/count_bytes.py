"""Count the memory traffic of Triton kernels and of PyTorch's own ops on a CPU.

- `record` runs code under Triton's interpreter and notes each launch, its arguments, and each address it touches.
  TRITON_INTERPRET=1 must be set before triton is imported (see `interpreted`).
- `TorchBytes` sums the bytes that PyTorch's ops read and write.
"""

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from umd.train.step_counts import FREE, moved

SECTOR = 32  # bytes: the smallest transfer of a GPU's memory


@dataclass(frozen=True)
class Argument:
    """An argument of a launch: a plain value, or the properties of a tensor that decide how Triton compiles."""

    name: str
    value: Any = None
    dtype: str | None = None  # of a tensor, e.g. "bfloat16"
    shape: tuple[int, ...] = ()
    aligned: bool = False  # its address is divisible by 16
    storage_bytes: int = 0


@dataclass(frozen=True)
class Counts:
    """Bytes of one launch."""

    asked: int  # requested by all programs, repeats included
    unique: int  # in distinct sectors; a sector both read and written counts twice
    touched: int  # distinct bytes; a byte both read and written counts twice
    float_atomics: int


@dataclass(frozen=True)
class Launch:
    kernel: str  # package.module:name
    grid: tuple[int, ...]
    arguments: tuple[Argument, ...]
    options: dict[str, Any]  # num_warps and the like
    counts: Counts | None  # None: the interpreter cannot run it
    error: str = ""


@contextmanager
def interpreted(on: bool) -> Iterator[None]:
    """Set or unset TRITON_INTERPRET for the processes that start inside the block."""
    before = os.environ.pop("TRITON_INTERPRET", None)
    if on:
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield
    finally:
        os.environ.pop("TRITON_INTERPRET", None)
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before


def _distinct(values: np.ndarray) -> np.ndarray:
    """np.unique by sorting. np.unique itself hashes, several times slower here."""
    values = np.sort(values)
    return values[np.diff(values, prepend=values[:1] - 1) != 0]


class _Traffic:
    """Addresses that one launch touches, as [(itemsize, addresses)], for loads and for stores."""

    def __init__(self) -> None:
        self.loads: list[tuple[int, np.ndarray]] = []
        self.stores: list[tuple[int, np.ndarray]] = []
        self.float_atomics = 0

    def counts(self) -> Counts:
        asked = unique = touched = 0
        for accesses in (self.loads, self.stores):
            sectors = []
            for size in {size for size, _ in accesses}:
                addresses = np.concatenate([a for s, a in accesses if s == size])
                asked += size * len(addresses)
                distinct = _distinct(addresses)
                touched += size * len(distinct)
                sectors.append(_distinct(distinct // SECTOR))
            unique += SECTOR * len(_distinct(np.concatenate(sectors))) if sectors else 0
        return Counts(asked, unique, touched, self.float_atomics)


@contextmanager
def record(*, tolerate: bool = False) -> Iterator[list[Launch]]:
    """Collect the launches that run inside the block.

    tolerate: note a kernel that the interpreter cannot run with its error, and leave its outputs unwritten.
    """
    from triton.runtime.errors import InterpreterError
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    launches: list[Launch] = []
    traffic = _Traffic()
    run = GridExecutor.__call__
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    atomic, compare = InterpreterBuilder.create_atomic_rmw, InterpreterBuilder.create_atomic_cas

    def active(pointers, mask) -> tuple[int, np.ndarray]:
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        return size, pointers.data[np.broadcast_to(mask.data.astype(bool), pointers.data.shape)]

    def counted_load(builder, pointers, mask, *rest):
        traffic.loads.append(active(pointers, mask))
        return load(builder, pointers, mask, *rest)

    def counted_store(builder, pointers, value, mask, *rest):
        traffic.stores.append(active(pointers, mask))
        return store(builder, pointers, value, mask, *rest)

    def counted_atomic(builder, operation, pointers, value, mask, *rest):
        access = active(pointers, mask)
        traffic.loads.append(access)
        traffic.stores.append(access)
        traffic.float_atomics += len(access[1]) if value.dtype.scalar.is_floating() else 0
        return atomic(builder, operation, pointers, value, mask, *rest)

    def counted_compare(builder, pointers, *rest):
        access = pointers.get_element_ty().primitive_bitwidth // 8, pointers.data.ravel()
        traffic.loads.append(access)
        traffic.stores.append(access)
        return compare(builder, pointers, *rest)

    def recorded_run(executor, *args, **kwargs):
        nonlocal traffic
        traffic = _Traffic()
        names = executor.arg_names
        options = {name: value for name, value in kwargs.items() if name not in names}
        given = dict(zip(names, args, strict=False)) | {n: v for n, v in kwargs.items() if n in names}
        error = ""
        try:
            # The interpreter's own copies are no traffic, and numpy shall not warn where a GPU would be silent.
            with _disable_current_modes(), np.errstate(all="ignore"):
                run(executor, *args, **kwargs)
        except InterpreterError as failure:
            if not tolerate:
                raise
            error = str(failure)
        grid = executor.grid
        if callable(grid):
            defaults = {n: p.default for n, p in inspect.signature(executor.fn).parameters.items()}
            grid = grid(defaults | given)
        launches.append(
            Launch(
                kernel=f"{executor.fn.__module__}:{executor.fn.__qualname__}",
                grid=tuple(int(n) for n in grid),
                arguments=tuple(_argument(name, value) for name, value in given.items()),
                options=options,
                counts=None if error else traffic.counts(),
                error=error,
            )
        )

    replaced = {"create_masked_load": counted_load, "create_masked_store": counted_store}
    replaced |= {"create_atomic_rmw": counted_atomic, "create_atomic_cas": counted_compare}
    originals = {name: getattr(InterpreterBuilder, name) for name in replaced}
    try:
        GridExecutor.__call__ = recorded_run
        for name, method in replaced.items():
            setattr(InterpreterBuilder, name, method)
        yield launches
    finally:
        GridExecutor.__call__ = run
        for name, method in originals.items():
            setattr(InterpreterBuilder, name, method)


def _argument(name: str, value: Any) -> Argument:
    if not isinstance(value, Tensor):
        return Argument(name, value=getattr(value, "value", value))  # a constexpr holds its value
    return Argument(
        name,
        dtype=str(value.dtype).removeprefix("torch."),
        shape=tuple(value.shape),
        aligned=value.data_ptr() % 16 == 0,
        storage_bytes=value.untyped_storage().nbytes(),
    )


class TorchBytes(TorchDispatchMode):
    """Sum the bytes that PyTorch's ops read and write.

    Each tensor of an op counts once. Views and allocations count nothing. Our own ops (`umd::`) count as the ops that
    run inside them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "umd":
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        out = func(*args, **kwargs)
        if not func.is_view and func.overloadpacket.__name__ not in FREE:
            self.total += moved(func, args, kwargs, out)
        return out
