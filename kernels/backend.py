"""Whether an op runs its Triton kernels or its definition in plain PyTorch: one predicate, one switch.

Kernels run on CUDA, and on CPU tensors under `TRITON_INTERPRET=1`, which Triton reads when a kernel is defined: set it
before the first import. Everything here imports without Triton, on a laptop.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import SimpleNamespace
from typing import Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

try:
    import triton
    import triton.language as tl
except ImportError:  # the names that a kernel's definition needs; it is never called

    def _undecorated(fn=None, **options):
        return (lambda f: f) if fn is None else fn

    triton = SimpleNamespace(jit=_undecorated)
    tl = SimpleNamespace(constexpr=object)

HAS_TRITON = not isinstance(triton, SimpleNamespace)
INTERPRET = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"

Choice = Literal["auto", "triton", "reference"]
_choice: Choice = "auto"


def set_kernels(choice: Choice) -> None:
    """Choose for every op of this process: `auto` (see `use_triton`), `triton`, or `reference`, the definitions.

    Raises:
        ValueError: another choice, or `triton` where no kernel can run.
    """
    global _choice
    if choice not in ("auto", "triton", "reference"):
        raise ValueError(f"kernels: expected 'auto', 'triton' or 'reference', got {choice!r}")
    if choice == "triton" and not (HAS_TRITON and (INTERPRET or torch.cuda.is_available())):
        raise ValueError("kernels: 'triton' needs Triton and a CUDA GPU, or TRITON_INTERPRET=1 set before the start")
    _choice = choice


@contextmanager
def kernels(choice: Choice) -> Iterator[None]:
    """`set_kernels` for the length of a with block."""
    before = _choice
    set_kernels(choice)
    try:
        yield
    finally:
        set_kernels(before)


def use_triton(x: Tensor) -> bool:
    """Whether an op on x runs its Triton kernels: x on CUDA, interpreted, or as if on CUDA, of at most 32 bits; fp64
    never does."""
    return runs_triton(x.device) and x.dtype in (torch.bfloat16, torch.float16, torch.float32)


def runs_triton(device: torch.device) -> bool:
    """Whether Triton kernels run on tensors of this device, and are not switched off."""
    if _choice == "reference" or not HAS_TRITON:
        return False
    return device.type == "cuda" or INTERPRET or stands_for_gpu()


_cpu_paths = True


@contextmanager
def cpu_paths(on: bool) -> Iterator[None]:
    """Off, tensors on the CPU take the path of those on a GPU: to count what a GPU's step does where there is none."""
    global _cpu_paths
    before, _cpu_paths = _cpu_paths, on
    try:
        yield
    finally:
        _cpu_paths = before


def use_cpu_path(x: Tensor) -> bool:
    """Whether an op on x takes an implementation made for the CPU."""
    return x.device.type == "cpu" and _cpu_paths


def stands_for_gpu() -> bool:
    """Whether tensors on the CPU stand for those of a GPU and have no data: within `cpu_paths(False)` under a
    FakeTensorMode. Nothing is computed then, so that what has no kernel for the CPU may be called."""
    if _cpu_paths or torch.compiler.is_compiling():
        return False
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def untraced(function):
    """Make torch.compile call a function of constants, and take what it returns for a constant.

    As `torch.compiler.assume_constant_result`, which imports Dynamo for it: seconds of a start.
    """
    function._dynamo_marked_constant = True
    return function


@untraced
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a GPU has; for what stands for one, those of an H100."""
    return _multiprocessors(device)


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def products_dtype(x: Tensor) -> torch.dtype:
    """In which type linear layers take x: autocast's for fp32, else x's own."""
    device = x.device.type
    casts = x.dtype == torch.float32 and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if casts else x.dtype


def is_fake(x: Tensor) -> bool:
    """Whether x has no data, only a shape and a type."""
    return isinstance(x, FakeTensor)


def sees_dispatch() -> bool:
    """Whether somebody looks at the ops that run: a compiler, or a mode that fakes, counts or records them."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
