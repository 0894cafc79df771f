"""Whether an op runs its Triton kernels or its definition in plain PyTorch: `use_triton` tells, `set_kernels` switches.

Kernels run on CUDA, and on CPU tensors under `TRITON_INTERPRET=1`. Triton reads this variable when a kernel is defined:
set it before the first import. All modules import without Triton.
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
except ImportError:  # stand-ins for the names that kernel definitions use; no kernel is called then

    def _undecorated(fn=None, **options):
        return (lambda f: f) if fn is None else fn

    triton = SimpleNamespace(jit=_undecorated)
    tl = SimpleNamespace(constexpr=object)

HAS_TRITON = not isinstance(triton, SimpleNamespace)
INTERPRET = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"

Choice = Literal["auto", "triton", "reference"]
_choice: Choice = "auto"


def set_kernels(choice: Choice) -> None:
    """Choose what all ops of this process run: `auto` (see `use_triton`), `triton`, or `reference` (the definitions).

    Raises:
        ValueError: an unknown choice, or `triton` on a machine where no kernel can run.
    """
    global _choice
    if choice not in ("auto", "triton", "reference"):
        raise ValueError(f"kernels: expected 'auto', 'triton' or 'reference', got {choice!r}")
    if choice == "triton" and not (HAS_TRITON and (INTERPRET or torch.cuda.is_available())):
        raise ValueError("kernels: 'triton' needs Triton and a CUDA GPU, or TRITON_INTERPRET=1 set before the start")
    _choice = choice


@contextmanager
def kernels(choice: Choice) -> Iterator[None]:
    """`set_kernels` within a with block; afterwards the earlier choice is back."""
    before = _choice
    set_kernels(choice)
    try:
        yield
    finally:
        set_kernels(before)


def use_triton(x: Tensor) -> bool:
    """Whether an op on x runs its Triton kernels: x is bf16, fp16 or fp32, and Triton runs on its device."""
    return runs_triton(x.device) and x.dtype in (torch.bfloat16, torch.float16, torch.float32)


def runs_triton(device: torch.device) -> bool:
    """Whether Triton kernels run on tensors of this device: on CUDA or interpreted, and not switched off.

    CPU tensors that stand for those of a GPU count as on CUDA (see `stands_for_gpu`).
    """
    if _choice == "reference" or not HAS_TRITON:
        return False
    return device.type == "cuda" or INTERPRET or stands_for_gpu()


_cpu_paths = True


@contextmanager
def cpu_paths(on: bool) -> Iterator[None]:
    """With `on` False, tensors on the CPU take the GPU's path: to count what a step does on a GPU, without one."""
    global _cpu_paths
    before, _cpu_paths = _cpu_paths, on
    try:
        yield
    finally:
        _cpu_paths = before


def use_cpu_path(x: Tensor) -> bool:
    """Whether an op on x runs an implementation made for the CPU."""
    return x.device.type == "cpu" and _cpu_paths


def stands_for_gpu() -> bool:
    """Whether CPU tensors stand for those of a GPU: within `cpu_paths(False)` under a FakeTensorMode.

    They have no data and nothing is computed, so ops without a CPU kernel may be called.
    """
    if _cpu_paths or torch.compiler.is_compiling():
        return False
    return fake_mode() is not None


def fake_mode() -> object | None:
    """The FakeTensorMode in force, whose tensors have no data; None if there is none."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)


def untraced(function):
    """Make torch.compile call a function of constants at compile time and keep its result as a constant.

    Like `torch.compiler.assume_constant_result`, which imports Dynamo and so costs seconds at start-up.
    """
    function._dynamo_marked_constant = True
    return function


@untraced
def multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors of a GPU; for other devices 132, those of an H100."""
    return _multiprocessors(device)


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def products_dtype(x: Tensor) -> torch.dtype:
    """The type in which linear layers compute with x: autocast's for an fp32 x under autocast, else x's own."""
    device = x.device.type
    casts = x.dtype == torch.float32 and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if casts else x.dtype


def is_fake(x: Tensor) -> bool:
    """Whether x has no data, only a shape and a type."""
    return isinstance(x, FakeTensor)


def sees_dispatch() -> bool:
    """Whether something observes the ops that run: torch.compile, or a dispatch mode that fakes, counts or records."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
