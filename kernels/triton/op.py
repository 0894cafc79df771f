"""How a function that launches Triton kernels becomes an op: registration, autograd, fakes, launches told of."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backend import INTERPRET, sees_dispatch, untraced

OPS: dict[str, "Op"] = {}  # by the name that modes see: umd::layer_norm_fwd


class Op:
    """An op of Triton kernels, called in one of two ways.

    Who looks at the ops (`sees_dispatch`) gets `library`, registered as `umd::name`: Inductor sees through it on a GPU,
    modes see one op. All others get a plain `torch.autograd.Function`, which costs the host a third of that.

    Its fake is the function itself with the launches left out: it makes room for the same outputs. A function that
    launches none of ours, but another library's, is given a fake.
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
        """As torch.library has it, registered when first asked for."""
        register(self.name)
        return self.registered

    def register_autograd(self, backward, *, setup_context) -> None:
        methods = dict(forward=self.eager, setup_context=setup_context, backward=backward)
        self.autograd = backward, dict(setup_context=setup_context)
        name = f"{self.eager.__name__}_function"
        function: Any = type(name, (torch.autograd.Function,), {k: staticmethod(f) for k, f in methods.items()})
        self.eager = function.apply

    def __call__(self, *args):
        if not sees_dispatch():
            return self.eager(*args)
        register(self.name)
        return self.registered(*args)


@untraced
def register(name: str) -> bool:
    """Register an `Op` with torch.library, once. Not at import: `triton_op` brings in Inductor, seconds of a start."""
    op = OPS[name]
    if op.registered is None:
        # Interpreted kernels, and what another library does, cannot be traced: to a compiler they are opaque.
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
_tell: Tell | None = None


def launches(func, tell: Tell) -> Callable | None:
    """The function of the `Op` that modes see as `func`, to be called with the same arguments: it launches nothing, and
    `tell` gets the name of each kernel, the tensors that it was to get, and its grid. None: func is no such op."""
    op = OPS.get(func._schema.name)
    return None if op is None or op.fake is not None else _telling(op.launch, tell)


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
