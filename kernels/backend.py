"""Whether an op runs its Triton kernels or its definition in plain PyTorch: one predicate, one switch.

Kernels run on CUDA, and on CPU tensors under `TRITON_INTERPRET=1`, which Triton reads when a kernel is defined: set it
before the first import. Everything here imports without Triton, on a laptop.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Literal

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


def is_fake(x: Tensor) -> bool:
    """Whether x has no data, only a shape and a type."""
    return isinstance(x, FakeTensor)


def sees_dispatch() -> bool:
    """Whether somebody looks at the ops that run: a compiler, or a mode that fakes, counts or records them."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


class Op:
    """An op of Triton kernels, called in one of two ways.

    Who looks at the ops (`sees_dispatch`) gets `library`, registered as `umd::name`: Inductor sees through it on a GPU,
    modes see one op. All others get a plain `torch.autograd.Function`, which costs the host a third of that.
    """

    def __init__(self, name: str, function):
        # Interpreted kernels cannot be traced: to a compiler they are opaque.
        register = torch.library.custom_op if INTERPRET else torch.library.triton_op
        self.library = register(f"umd::{name}", mutates_args=())(function)
        self.eager = function
        self.__doc__ = function.__doc__

    def register_fake(self, function):
        return self.library.register_fake(function)

    def register_autograd(self, backward, *, setup_context) -> None:
        self.library.register_autograd(backward, setup_context=setup_context)
        methods = dict(forward=self.eager, setup_context=setup_context, backward=backward)
        name = f"{self.eager.__name__}_function"
        function: Any = type(name, (torch.autograd.Function,), {k: staticmethod(f) for k, f in methods.items()})
        self.eager = function.apply

    def __call__(self, *args):
        return (self.library if sees_dispatch() else self.eager)(*args)


def triton_op(name: str):
    """Make an `Op` of a function that launches Triton kernels by `wrap_triton`."""
    return lambda function: Op(name, function)


def wrap_triton(kernel):
    """`wrap_triton(kernel)[grid](...)`: how an `Op` launches. By this name torch finds the source to hash."""
    return torch.library.wrap_triton(kernel) if sees_dispatch() and not INTERPRET else kernel
