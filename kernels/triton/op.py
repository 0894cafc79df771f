"""How a function that launches Triton kernels becomes an op: registration, autograd, fakes, launches told of."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backend import INTERPRET, sees_dispatch

OPS: dict[str, "Op"] = {}  # by the name that modes see: umd::layer_norm_fwd


class Op:
    """An op of Triton kernels, called in one of two ways.

    Who looks at the ops (`sees_dispatch`) gets `library`, registered as `umd::name`: Inductor sees through it on a GPU,
    modes see one op. All others get a plain `torch.autograd.Function`, which costs the host a third of that.

    Its fake is the function itself with the launches left out: it makes room for the same outputs. A function that
    launches none of ours, but another library's, is given a fake.
    """

    def __init__(self, name: str, function, fake=None):
        # Interpreted kernels, and what another library does, cannot be traced: to a compiler they are opaque.
        register = torch.library.custom_op if INTERPRET or fake is not None else torch.library.triton_op
        self.library = register(f"umd::{name}", mutates_args=())(function)
        self.library.register_fake(_telling(function, lambda *launch: None) if fake is None else fake)
        self.eager = self.launch = function
        self.__doc__ = function.__doc__
        if fake is None:
            OPS[f"umd::{name}"] = self

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


def opaque_op(name: str, fake: Callable):
    """Make an `Op` of a function that calls another library."""
    return lambda function: Op(name, function, fake)


Tell = Callable[[str, list[Tensor], tuple[int, ...]], None]
_tell: Tell | None = None


def launches(func, tell: Tell) -> Callable | None:
    """The function of the `Op` that modes see as `func`, to be called with the same arguments: it launches nothing, and
    `tell` gets the name of each kernel, the tensors that it was to get, and its grid. None: func is no such op."""
    op = OPS.get(func._schema.name)
    return None if op is None else _telling(op.launch, tell)


def _telling(function: Callable, tell: Tell) -> Callable:
    """The function with `tell` in the place of its launches."""

    def told(*args):
        global _tell
        before, _tell = _tell, tell
        try:
            return function(*args)
        finally:
            _tell = before

    return told


class _Told:
    """Stands for a kernel whose launch is told."""

    def __init__(self, name: str, tell: Tell):
        self.name, self.tell = name, tell

    def __getitem__(self, grid):
        return lambda *args, **_: self.tell(self.name, [x for x in args if isinstance(x, Tensor)], grid)


def wrap_triton(kernel):
    """`wrap_triton(kernel)[grid](...)`: how an `Op` launches. By this name torch finds the source to hash."""
    if _tell is not None:
        return _Told(kernel.fn.__name__.strip("_"), _tell)
    return torch.library.wrap_triton(kernel) if sees_dispatch() and not INTERPRET else kernel
