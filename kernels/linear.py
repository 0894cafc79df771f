"""linear: x·Wᵀ + b; gelu_linear: gelu(x)·Wᵀ + b.

On a GPU a training step casts its weights once (`cast`), and a layer's gradients leave the products in the parameters'
own type: no cast a layer and pass, as autocast has them (289 of 840 launches of UMD-B/4's forward and backward).

On the CPU, many rows, in bf16: autocast's version writes the bias over the whole result and reads it back to add the
product; oneDNN's fused op adds it where the product is made. The weight gradient dyᵀ·x has a transposed left operand,
which the matrix units get through at half speed: here the narrower of the two is transposed first, and the gradient is
turned and written in its type in one pass. That is the parameter's `grad_dtype`, for a parameter in fp32 fp32 unless it
is told bf16, the type of the product.

Few rows (the adaLN projection: nine conditions, a table of 75 thousand columns) take one read of the weight each way.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu
from .backend import is_fake, use_cpu_path, use_triton
from .column_sum import column_sum
from .gelu import gelu

# Whether this build of torch and this processor (AVX-512 or better) have oneDNN's bf16.
HAS_FUSED_LINEAR = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
TRANSPOSE_COLUMNS = 192  # few: a product with the identity takes as many operations for each number


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
        dweight = _product(dy.t(), x, weight_dtype) if ctx.needs_input_grad[1] else None
        dbias = column_sum(dy, bias_dtype) if ctx.needs_input_grad[2] else None
        return dx, dweight, dbias, None, None


class BiasGradientFunction(torch.autograd.Function):
    """x as it is; its gradient's column sum for a bias."""

    @staticmethod
    def forward(ctx, x, bias):
        ctx.dtype = bias.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        return dx, column_sum(dx.flatten(1), ctx.dtype)


def splits_bias(x: Tensor) -> bool:
    """Whether the bias gradient of a linear layer of x is better made by the op behind it."""
    return torch.is_grad_enabled() and use_triton(x)


def bias_gradient(x: Tensor, bias: Tensor | None) -> Tensor:
    """x [N, ...], which is a linear layer's output with its bias added; here the bias gets its gradient.

    An op that reads the gradient of x anyway does better: it takes the bias and adds up the columns on the way. To it
    the bias is a term x + (bias - bias.detach()): no change of x, and a gradient.

    bias: [F], F numbers a row of x; None: no gradient.
    """
    return x if bias is None else BiasGradientFunction.apply(x, bias)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a·b in `dtype`, as wide as it was added up."""
    if a.is_cuda or is_fake(a):
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)  # the CPU has no such product


@lru_cache(maxsize=8)
def _identity(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.bfloat16)


@lru_cache(maxsize=8)
def _ones(n: int) -> Tensor:
    return torch.ones(16, n, dtype=torch.bfloat16)  # rows: one tile of the matrix units


def forget() -> None:
    """Let go of what is kept from call to call: made on tensors without data, it is of no use on others."""
    _identity.cache_clear()
    _ones.cache_clear()


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """All bf16."""
    if HAS_FUSED_LINEAR:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _transposed(x: Tensor, out: Tensor | None = None) -> Tensor:
    """[N, n] to a contiguous [n, N]: compiled, or by the matrix units, in a third of the time that a copy takes."""
    out = x.new_empty(x.shape[1], len(x)) if out is None else out
    if cpu.use_compiled(x):
        return cpu.transpose(x, out)
    for columns, rows in zip(x.split(TRANSPOSE_COLUMNS, 1), out.split(TRANSPOSE_COLUMNS), strict=True):
        torch.mm(_identity(len(rows)), columns.t(), out=rows)
    return out


class BF16LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        x16, w16 = x.to(torch.bfloat16), weight.to(torch.bfloat16)
        ctx.save_for_backward(x16, w16)
        ctx.dtypes, ctx.spare = (x.dtype, _grad_dtype(weight), bias.dtype), w16 is not weight and w16.is_contiguous()
        return _linear(x16, w16, bias.to(torch.bfloat16))

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        dx = (dy @ weight).to(x_dtype) if ctx.needs_input_grad[0] else None
        spare = weight if ctx.spare else None
        return dx, _weight_gradient(x, dy, weight_dtype, spare), _bias_gradient(dy, bias_dtype)


def _grad_dtype(weight: Tensor) -> torch.dtype:
    return weight.grad_dtype or weight.dtype if weight.is_leaf else weight.dtype


def _weight_gradient(x: Tensor, dy: Tensor, dtype: torch.dtype, spare: Tensor | None) -> Tensor:
    """dyᵀ·x: [O, I] from bf16 x [N, I], dy [N, O]. In bf16 in the place of `spare`: a weight's copy, of no more use."""
    inputs, outputs = x.shape[1], dy.shape[1]
    out = spare if dtype == torch.bfloat16 else None
    if inputs < outputs:
        turned = _transposed(x) @ dy
        product = _transposed(turned, out) if dtype == torch.bfloat16 else turned.t()
    elif inputs > outputs:
        product = torch.mm(_transposed(dy), x, out=out)
    else:  # transposing would take longer than it saves
        product = torch.mm(dy.t(), x, out=out)
    return product if dtype == torch.bfloat16 else torch.empty(outputs, inputs, dtype=dtype).copy_(product)


def _bias_gradient(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """Column sums of dy [N, O], added up in fp32 by the matrix units."""
    return (_ones(len(dy)) @ dy)[0].to(dtype)


class GeluLinearFunction(torch.autograd.Function):
    """In bf16. gelu(x) is made again in the backward pass, beside its derivative: the wide stream is kept once."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        w16 = weight.to(torch.bfloat16)
        ctx.save_for_backward(x, w16)
        ctx.dtypes, ctx.spare = (_grad_dtype(weight), bias.dtype), w16 is not weight and w16.is_contiguous()
        return _linear(_gelu(x), w16, bias.to(torch.bfloat16))

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        activation, dx = _gelu_backward(x, dy @ weight)
        spare = weight if ctx.spare else None
        return dx, _weight_gradient(activation, dy, weight_dtype, spare), _bias_gradient(dy, bias_dtype)


def _gelu(x: Tensor) -> Tensor:
    return cpu.gelu(x) if cpu.use_compiled(x) else F.gelu(x, approximate="tanh")


def _gelu_backward(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """(gelu(x), dx). dy may be overwritten."""
    if cpu.use_compiled(x):
        return cpu.gelu_backward(x, dy)
    return F.gelu(x, approximate="tanh"), torch.ops.aten.gelu_backward(dy, x, approximate="tanh")


class FewRowsLinearFunction(torch.autograd.Function):
    """In fp32."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        x, weight = x.contiguous(), weight.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.grad_dtype = _grad_dtype(weight)
        return cpu.few_rows_linear(x, weight, bias.contiguous())

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx, dweight = cpu.few_rows_linear_backward(x, weight, dy.contiguous(), ctx.grad_dtype)
        return dx, dweight, dy.sum(0)


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
    x: Tensor, weight: Tensor, bias: Tensor, cast: Cast | None = None, x_bias: Tensor | None = None
) -> Tensor:
    """`linear` of gelu(x), GELU in its tanh form. x_bias: in x already, and given for its gradient (see `gelu`)."""
    if _by_hand(x) and x.dtype == torch.bfloat16:
        return GeluLinearFunction.apply(bias_gradient(x, x_bias), weight, bias)
    return linear(gelu(x, x_bias), weight, bias, cast)


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`linear` for an x [R, I] of far fewer rows than the weight [O, I] has, in x's type."""
    if weight.dtype == bias.dtype == torch.float32 and cpu.use_compiled(x, torch.float32):
        return FewRowsLinearFunction.apply(x, weight, bias)
    return F.linear(x, weight, bias)
