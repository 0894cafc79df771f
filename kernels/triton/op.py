"""How a function that launches Triton kernels becomes an op: registration, autograd, fakes, and reports of launches."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ..backend import INTERPRET, sees_dispatch, untraced
from ..once import once_differentiable

OPS: dict[str, "Op"] = {}  # by the name that dispatch modes see, e.g. umd::layer_norm_fwd


class Op:
    """An op that launches Triton kernels. There are two ways of calling it:

    - Under torch.compile or a dispatch mode (`sees_dispatch`), the torch.library op `umd::name` is called. On a GPU
      Inductor sees the kernels inside; a mode sees one op.
    - Otherwise a plain `torch.autograd.Function` is called, at a third of the host time.

    The fake implementation is the function itself without its launches: it allocates the same outputs. A function that
    calls another library's kernels needs an explicit `fake`.
    """

    def __init__(self, name: str, function, fake=None):
        self.name, self.fake = f"umd::{name}", fake
        self.eager = self.launch = function
        self.autograd: tuple[Any, dict[str, Any]] | None = None
        self.registered: Any = None
        self.__doc__ = function.__doc__
        OPS[self.name] = self

    @property
    def library(self):
        """The torch.library op, registered on first access."""
        register(self.name)
        return self.registered

    def register_autograd(self, backward, *, setup_context) -> None:
        backward = once_differentiable(backward)
        methods = dict(forward=self.eager, setup_context=setup_context, backward=backward)
        self.autograd = backward, dict(setup_context=setup_context)
        name = f"{self.eager.__name__}_function"
        function: Any = type(name, (torch.autograd.Function,), {k: staticmethod(f) for k, f in methods.items()})
        self.eager = function.apply

    def __call__(self, *args):
        if not sees_dispatch():
            device = next(x for x in args if isinstance(x, Tensor)).device
            if device.type == "cuda" and device.index != torch.cuda.current_device():
                with torch.cuda.device(device):  # Triton launches on the current device
                    return self.eager(*args)
            return self.eager(*args)
        register(self.name)
        return self.registered(*args)


@untraced
def register(name: str) -> bool:
    """Register an `Op` with torch.library, once. Not at import: `triton_op` imports Inductor, which takes seconds."""
    op = OPS[name]
    if op.registered is None:
        # Interpreted kernels and other libraries' functions cannot be traced: they stay opaque to a compiler.
        kind = torch.library.custom_op if INTERPRET or op.fake is not None else torch.library.triton_op
        op.registered = kind(name, mutates_args=())(op.launch)
        op.registered.register_fake(_telling(op.launch, lambda *launch: None) if op.fake is None else op.fake)
        if op.autograd is not None:
            op.registered.register_autograd(op.autograd[0], **op.autograd[1])
    return True


def triton_op(name: str):
    """Make an `Op` of a function that launches Triton kernels by `wrap_triton`."""
    return lambda function: Op(name, function)


def opaque_op(name: str, fake: Callable):
    """Make an `Op` of a function that calls another library."""
    return lambda function: Op(name, function, fake)


Tell = Callable[[str, list[Tensor], tuple[int, ...]], None]
_tell: ContextVar[Tell | None] = ContextVar("tell", default=None)  # other threads go on launching


def launches(func, tell: Tell) -> Callable | None:
    """A function that reports what the `Op` with the torch.library name of `func` would launch, and launches nothing.

    Call it with the arguments of the op. For each launch, `tell` gets the kernel's name, its tensor arguments and its
    grid. None if func is not such an op.
    """
    op = OPS.get(func._schema.name)
    return None if op is None or op.fake is not None else _telling(op.launch, tell)


def _telling(function: Callable, tell: Tell) -> Callable:
    """The function with its launches replaced by calls of `tell`."""

    def told(*args):
        before = _tell.set(tell)
        try:
            return function(*args)
        finally:
            _tell.reset(before)

    return told


class _Told:
    """Stands for a kernel: instead of launching, it calls `tell`."""

    def __init__(self, name: str, tell: Tell):
        self.name, self.tell = name, tell

    def __getitem__(self, grid):
        return lambda *args, **_: self.tell(self.name, [x for x in args if isinstance(x, Tensor)], grid)


def wrap_triton(kernel):
    """Launch a kernel within an `Op`: `wrap_triton(kernel)[grid](...)`. torch finds the source to hash by this name."""
    if tell := _tell.get():
        return _Told(kernel.fn.__name__.strip("_"), tell)
    return torch.library.wrap_triton(kernel) if sees_dispatch() and not INTERPRET else kernel
