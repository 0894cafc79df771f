"""Backward passes that cannot be differentiated again: a second derivative raises instead of being wrong."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


class _Last(torch.autograd.Function):
    """The gradients as they are; their own derivative raises."""

    @staticmethod
    def forward(ctx, name, *gradients):
        ctx.name = name
        return gradients

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(f"{ctx.name} has no second derivative")


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make a Function's backward refuse a second derivative.

    torch's decorator of this name notices only incoming gradients that need one: of f(x).sum() + x.square().sum() it
    would lose f's part in silence.
    """

    @wraps(backward)
    def checked(ctx, *gradients):
        # A backward pass records only under create_graph; torch.compile refuses that by itself.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return backward(ctx, *gradients)
        with torch.no_grad():
            found = backward(ctx, *gradients)
        found = found if isinstance(found, tuple) else (found,)
        return _Last.apply(type(ctx).__name__, *(None if x is None else x.detach().requires_grad_() for x in found))

    return checked
