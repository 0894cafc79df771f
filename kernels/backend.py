"""Whether an op runs its Triton kernels or its definition in plain PyTorch: one predicate, one switch.

Kernels run on CUDA, and on CPU tensors under `TRITON_INTERPRET=1`, which Triton reads when a kernel is defined: set it
before the first import. Everything here imports without Triton, on a laptop.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Literal

import torch
from torch import Tensor

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
    """Whether an op on x runs its Triton kernels: x on CUDA or interpreted, of at most 32 bits; fp64 never does."""
    if _choice == "reference" or not HAS_TRITON:
        return False
    return (x.is_cuda or INTERPRET) and x.dtype in (torch.bfloat16, torch.float16, torch.float32)


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


def triton_op(name: str):
    """Register `umd::name`. Inductor sees through it on a GPU; interpreted kernels cannot be traced: it is opaque."""
    register = torch.library.custom_op if INTERPRET else torch.library.triton_op
    return register(f"umd::{name}", mutates_args=())


def wrap_triton(kernel):
    """`wrap_triton(kernel)[grid](...)`: how a `triton_op` launches. By this name torch finds the source to hash."""
    return kernel if INTERPRET else torch.library.wrap_triton(kernel)
