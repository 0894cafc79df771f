"""linear: x·Wᵀ + b; gelu_linear: gelu(x)·Wᵀ + b.

A training step casts its weights once (`cast`), and a layer's gradients leave the products in the parameters' own type:
no cast a layer and pass, as autocast has them (289 of 840 launches of UMD-B/4's forward and backward). On the CPU
layers have passes of their own (cpu/linear.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import is_fake, use_cpu_path, use_triton
from .column_sum import column_sum
from .cpu.compiled import use_compiled
from .cpu.linear import BF16LinearFunction, FewRowsLinearFunction, GeluLinearFunction
from .gelu import check_gelu, gelu
from .triton.gelu import gelu_bwd, gelu_fwd

Cast = tuple[Tensor, Tensor]  # weight and bias in the type of the products


class LinearFunction(torch.autograd.Function):
    """`linear` from casts of weight and bias, whose gradients are those of the parameters themselves."""

    @staticmethod
    def forward(ctx, x, weight, bias, weight_cast, bias_cast):
        ctx.save_for_backward(x, weight_cast)
        ctx.dtypes = weight.dtype, bias.dtype
        return F.linear(x, weight_cast, bias_cast)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        dweight = product(dy.t(), x, weight_dtype) if ctx.needs_input_grad[1] else None
        dbias = column_sum(dy, bias_dtype) if ctx.needs_input_grad[2] else None
        return dx, dweight, dbias, None, None


class RecomputedGeluLinearFunction(torch.autograd.Function):
    """`gelu_linear` that keeps x and not gelu(x): the pass that makes dx makes it again, to the bit."""

    @staticmethod
    def forward(ctx, x, x_bias, weight, bias, weight_cast, bias_cast):
        ctx.dtypes = None if x_bias is None else x_bias.dtype, weight.dtype, bias.dtype
        weight, bias = (weight, bias) if weight_cast is None else (weight_cast, bias_cast)
        ctx.save_for_backward(x, weight)
        return F.linear(gelu_fwd(x, None).to(weight.dtype), weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        x_bias_dtype, weight_dtype, bias_dtype = ctx.dtypes
        wanted = x_bias_dtype is not None and ctx.needs_input_grad[1]
        dx, dx_bias, a = gelu_bwd((dy @ weight).to(x.dtype), x, x_bias_dtype if wanted else None, True)
        dweight = product(dy.t(), a.to(dy.dtype), weight_dtype) if ctx.needs_input_grad[2] else None
        dbias = bias_sum(dy, bias_dtype) if ctx.needs_input_grad[3] else None
        return dx, dx_bias if wanted else None, dweight, dbias, None, None


class BiasGradientFunction(torch.autograd.Function):
    """x as it is; its gradient's column sum for a bias."""

    @staticmethod
    def forward(ctx, x, bias, zeros):
        ctx.dtype, ctx.zeros = bias.dtype, zeros
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        dbias = column_sum(dx.flatten(1), ctx.dtype, ctx.zeros) if ctx.needs_input_grad[1] else None
        return dx, dbias, None


def splits_bias(x: Tensor) -> bool:
    """Whether the bias gradient of a linear layer of x is better made by the op behind it."""
    return torch.is_grad_enabled() and use_triton(x)


def bias_gradient(x: Tensor, bias: Tensor | None, zeros: tuple[int, int] = (0, 0)) -> Tensor:
    """x [N, ...], which is a linear layer's output with its bias added; here the bias gets its gradient.

    An op that reads the gradient of x anyway does better: it takes the bias and adds up the columns on the way. To it
    the bias is a term x + (bias - bias.detach()): no change of x, and a gradient.

    bias: [F], F numbers a row of x; None: no gradient. zeros: see `column_sum`.
    """
    return x if bias is None else BiasGradientFunction.apply(x, bias, zeros)


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a·b in `dtype`, as wide as it was added up."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda or is_fake(a):
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)  # the CPU has no such product


def bias_sum(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """The column sum of dy; in its own type as autograd takes it."""
    return dy.sum(0) if dy.dtype == dtype else column_sum(dy, dtype)


def with_casts(
    x: Tensor, weight: Tensor, bias: Tensor, cast: Cast | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(weight, bias, and both casts), for a function of its own backward pass. Without casts weight and bias are
    autocast's, or the parameters themselves: under ZeRO 3 a view would hold memory that is to be let go of."""
    if cast is not None:
        return weight, bias, *cast
    device = x.device.type
    if torch.is_autocast_enabled(device):
        weight, bias = (p.to(torch.get_autocast_dtype(device)) for p in (weight, bias))
    return weight, bias, None, None


def _by_hand(x: Tensor) -> bool:
    """Whether a layer takes the path below; Inductor cannot lower oneDNN's op, and has its own."""
    return use_cpu_path(x) and not torch.compiler.is_compiling()


def linear(x: Tensor, weight: Tensor, bias: Tensor, cast: Cast | None = None) -> Tensor:
    """x [N, I], weight [O, I], bias [O] → [N, O]; in bf16 under autocast or for bf16 x, else in x's type.

    cast: weight and bias as they are now, in another type: that of the product and of the result.
    """
    if cast is not None:
        return LinearFunction.apply(x.to(cast[0].dtype), weight, bias, *cast)
    if _by_hand(x) and (torch.is_autocast_enabled("cpu") or x.dtype == torch.bfloat16):
        return BF16LinearFunction.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def gelu_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    cast: Cast | None = None,
    x_bias: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """`linear` of gelu(x), GELU in its tanh form.

    x_bias: in x already, and given for its gradient (see `gelu`).
    recompute: keep x alone for the backward pass and make gelu(x) again there, in the pass over x that makes dx. It
        saves a tensor of x's size and moves as many bytes more, for the same bits. Without Triton's kernels it does
        nothing; the CPU's bf16 path does so anyway.
    """
    if _by_hand(x) and x.dtype == torch.bfloat16:
        return GeluLinearFunction.apply(bias_gradient(x, x_bias), weight, bias)
    if recompute and use_triton(x) and torch.is_grad_enabled():
        check_gelu(x, x_bias)
        return RecomputedGeluLinearFunction.apply(x, x_bias, *with_casts(x, weight, bias, cast))
    return linear(gelu(x, x_bias), weight, bias, cast)


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`linear` for an x [R, I] of far fewer rows than the weight [O, I] has, in x's type."""
    if weight.dtype == bias.dtype == torch.float32 and use_compiled(x, torch.float32):
        return FewRowsLinearFunction.apply(x, weight, bias)
    return F.linear(x, weight, bias)
