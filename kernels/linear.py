"""linear: x·Wᵀ + b; gelu_linear: gelu(x)·Wᵀ + b.

A training step casts its weights to bf16 once and passes them as `cast`. The products write gradients in the
parameters' own type. Autocast instead casts in every layer and pass: 289 of the 840 launches of UMD-B/4's forward and
backward. On the CPU, layers have their own forward and backward (cpu/linear.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import is_fake, use_cpu_path, use_triton
from .column_sum import column_sum
from .cpu.compiled import use_compiled
from .cpu.linear import BF16LinearFunction, FewRowsLinearFunction, GeluLinearFunction
from .gelu import check_gelu, gelu
from .once import once_differentiable
from .triton.gelu import gelu_bwd, gelu_fwd

Cast = tuple[Tensor, Tensor]  # weight and bias in the type of the products


class LinearFunction(torch.autograd.Function):
    """`linear` computed with casts of weight and bias; the gradients go to the parameters, in their own type."""

    @staticmethod
    def forward(ctx, x, weight, bias, weight_cast, bias_cast):
        ctx.save_for_backward(x, weight_cast)
        ctx.dtypes = weight.dtype, bias.dtype
        return F.linear(x, weight_cast, bias_cast)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        dweight = product(dy.t(), x, weight_dtype) if ctx.needs_input_grad[1] else None
        dbias = bias_sum(dy, bias_dtype) if ctx.needs_input_grad[2] else None
        return dx, dweight, dbias, None, None


class RecomputedGeluLinearFunction(torch.autograd.Function):
    """`gelu_linear` that saves x and not gelu(x): the pass that computes dx recomputes gelu(x), bit for bit."""

    @staticmethod
    def forward(ctx, x, x_bias, weight, bias, weight_cast, bias_cast):
        ctx.dtypes = (None if x_bias is None else x_bias.dtype), weight.dtype, bias.dtype
        weight, bias = (weight, bias) if weight_cast is None else (weight_cast, bias_cast)
        ctx.save_for_backward(x, weight)
        return F.linear(gelu_fwd(x, None).to(weight.dtype), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        x_bias_dtype, weight_dtype, bias_dtype = ctx.dtypes
        wanted = x_bias_dtype is not None and ctx.needs_input_grad[1]
        dx, dx_bias, a = gelu_bwd((dy @ weight).to(x.dtype), x, x_bias_dtype if wanted else None, True)
        dweight = product(dy.t(), a.to(dy.dtype), weight_dtype) if ctx.needs_input_grad[2] else None
        dbias = bias_sum(dy, bias_dtype) if ctx.needs_input_grad[3] else None
        return dx, dx_bias if wanted else None, dweight, dbias, None, None


class BiasGradientFunction(torch.autograd.Function):
    """Returns x unchanged; in the backward pass the bias gets the column sum of x's gradient."""

    @staticmethod
    def forward(ctx, x, bias, zeros):
        ctx.dtype, ctx.zeros = bias.dtype, zeros
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx):
        dbias = column_sum(dx.flatten(1), ctx.dtype, ctx.zeros) if ctx.needs_input_grad[1] else None
        return dx, dbias, None


def splits_bias(x: Tensor) -> bool:
    """Whether the op after a linear layer on x should compute the layer's bias gradient."""
    return torch.is_grad_enabled() and use_triton(x)


def bias_gradient(x: Tensor, bias: Tensor | None, zeros: tuple[int, int] = (0, 0)) -> Tensor:
    """Return x [N, ...], a linear layer's output with its bias already added; the bias gets its gradient here.

    This is x + (bias - bias.detach()): x does not change, and the gradient of the bias is the column sum of x's
    gradient. An op that reads x's gradient anyway should take the bias itself and sum the columns in its own pass.

    bias: [F], where F is the number of values in a row of x; None: no gradient. zeros: see `column_sum`.
    """
    return x if bias is None else BiasGradientFunction.apply(x, bias, zeros)


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix product a·b in `dtype`; on a GPU written from the accumulator without an intermediate rounding."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda or is_fake(a):
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)  # torch.mm has no out_dtype on the CPU


def bias_sum(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """The column sum of dy [N, F] in `dtype`; if that is dy's type, by PyTorch's sum, as autograd computes it."""
    return dy.sum(0) if dy.dtype == dtype else column_sum(dy, dtype)


def with_casts(
    x: Tensor, weight: Tensor, bias: Tensor, cast: Cast | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(weight, bias, weight cast, bias cast), the arguments of an autograd Function.

    Without `cast` the last two are None. Autocast, if it is on, has then cast weight and bias; otherwise they are the
    parameters themselves. They are never views: a view would keep memory that ZeRO 3 must free.
    """
    if cast is not None:
        return weight, bias, *cast
    device = x.device.type
    if torch.is_autocast_enabled(device):
        weight, bias = (p.to(torch.get_autocast_dtype(device)) for p in (weight, bias))
    return weight, bias, None, None


def _by_hand(x: Tensor) -> bool:
    """Whether a layer takes the CPU's own path. Not under torch.compile: Inductor cannot lower oneDNN's op."""
    return use_cpu_path(x) and not torch.compiler.is_compiling()


def linear(x: Tensor, weight: Tensor, bias: Tensor, cast: Cast | None = None) -> Tensor:
    """x·weightᵀ + bias: x [N, I], weight [O, I], bias [O] to [N, O].

    The result has the type of `cast`; without it autocast's type under autocast, else x's type.
    cast: current weight and bias in the type of the product; None: use the parameters.
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
    """`linear` of gelu(x), with GELU in its tanh form.

    x_bias: bias that x already includes; passed only to receive its gradient here (see `gelu`).
    recompute: save only x for the backward pass, and recompute gelu(x) in the pass over x that computes dx. This saves
        a tensor of x's size, moves that many bytes more, and gives the same bits. Without Triton's kernels it has no
        effect; the CPU's bf16 path always recomputes.
    """
    if _by_hand(x) and x.dtype == torch.bfloat16:
        return GeluLinearFunction.apply(bias_gradient(x, x_bias), weight, bias)
    if recompute and use_triton(x) and torch.is_grad_enabled():
        check_gelu(x, x_bias)
        return RecomputedGeluLinearFunction.apply(x, x_bias, *with_casts(x, weight, bias, cast))
    return linear(gelu(x, x_bias), weight, bias, cast)


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`linear` for x [R, I] with far fewer rows than the weight [O, I]: [R, O] in x's type."""
    if weight.dtype == bias.dtype == torch.float32 and use_compiled(x, torch.float32):
        return FewRowsLinearFunction.apply(x, weight, bias)
    return F.linear(x, weight, bias)
