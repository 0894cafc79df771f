"""linear: x·Wᵀ + b; gelu_linear: gelu(x)·Wᵀ + b. On the CPU with backward passes of their own.

Many rows, in bf16: autocast's version writes the bias over the whole result and reads it back to add the product;
oneDNN's fused op adds it where the product is made. The weight gradient dyᵀ·x has a transposed left operand, which the
matrix units get through at half speed: here the narrower of the two is transposed first, by a product with the
identity, and the gradient is turned and written in the parameter's type in one pass.

GELU (its tanh form) runs over slices that stay in cache, in fp32, and is made again in the backward pass together with
its derivative: torch's bf16 kernel takes longer than that, and the wide activations are kept once instead of twice.

Few rows (the adaLN projection: nine conditions, a table of 75 thousand columns): the product has the weight on the
left, where it is read at twice the speed, and the weight gradient is an outer product written in slices, because the
library behind `mm` would set aside a second copy of it.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import use_cpu_path

FEW_ROWS_SLICE = 4096  # columns
TRANSPOSE_COLUMNS = 192  # few: a product with the identity takes as many operations for each number
GELU_SLICE = 98_304  # elements for each thread: with the buffers they fill a core's second-level cache
_GELU_1, _GELU_3 = 2 * math.sqrt(2 / math.pi), 2 * math.sqrt(2 / math.pi) * 0.044715


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


@lru_cache(maxsize=1)
def _has_fused_linear() -> bool:
    """Whether this build of torch and this processor (AVX-512 or better) have oneDNN's bf16."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """All bf16."""
    if _has_fused_linear():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _transposed(x: Tensor) -> Tensor:
    """[N, n] to a contiguous [n, N]: exact, and in a third of the time that a copy takes."""
    out = x.new_empty(x.shape[1], len(x))
    for columns, rows in zip(x.split(TRANSPOSE_COLUMNS, 1), out.split(TRANSPOSE_COLUMNS), strict=True):
        torch.mm(_identity(len(rows)), columns.t(), out=rows)
    return out


class BF16LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        x16, w16 = x.to(torch.bfloat16), weight.to(torch.bfloat16)
        ctx.save_for_backward(x16, w16)
        ctx.dtypes = x.dtype, weight.dtype, bias.dtype
        return _linear(x16, w16, bias.to(torch.bfloat16))

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        dx = (dy @ weight).to(x_dtype) if ctx.needs_input_grad[0] else None
        return dx, _weight_gradient(x, dy, weight_dtype), _bias_gradient(dy, bias_dtype)


def _weight_gradient(x: Tensor, dy: Tensor, dtype: torch.dtype) -> Tensor:
    """dyᵀ·x: [O, I] from bf16 x [N, I], dy [N, O]."""
    inputs, outputs = x.shape[1], dy.shape[1]
    if inputs < outputs:
        product = (_transposed(x) @ dy).t()
    elif inputs > outputs:
        product = _transposed(dy) @ x
    else:  # transposing would take longer than it saves
        product = dy.t() @ x
    return torch.empty(outputs, inputs, dtype=dtype).copy_(product)


def _bias_gradient(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """Column sums of dy [N, O], added up in fp32 by the matrix units."""
    return (_ones(len(dy)) @ dy)[0].to(dtype)


def _gelu_slices(x: Tensor, *others: Tensor):
    """Rows of x and the others in slices, with three fp32 buffers of that shape."""
    rows = max(1, GELU_SLICE * torch.get_num_threads() // x.shape[1])
    buffers = [torch.empty(min(rows, len(x)), x.shape[1]) for _ in range(3)]
    for parts in zip(*(t.split(rows) for t in (x, *others)), strict=True):
        yield *parts, *(buffer[: len(parts[0])] for buffer in buffers)


class GeluLinearFunction(torch.autograd.Function):
    """In bf16. With v = 2·√(2/π)·(x + 0.044715·x³) and σ = 1/(1 + e⁻ᵛ): gelu(x) = x/2·(1 + tanh(v/2)) = x·σ."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        w16, activation, linear_term = weight.to(torch.bfloat16), torch.empty_like(x), torch.full(x.shape[1:], _GELU_1)
        for x_part, out, f, s, _ in _gelu_slices(x, activation):
            f.copy_(x_part)
            torch.addcmul(linear_term, f, f, value=_GELU_3, out=s).mul_(f).sigmoid_()
            out.copy_(f.mul_(s))
        ctx.save_for_backward(x, w16)
        ctx.dtypes = weight.dtype, bias.dtype
        return _linear(activation, w16, bias.to(torch.bfloat16))

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        dx = dy @ weight
        activation, linear_term = torch.empty_like(x), torch.full(x.shape[1:], _GELU_1)
        for x_part, out, dx_part, f, s, dv in _gelu_slices(x, activation, dx):
            f.copy_(x_part)
            torch.addcmul(linear_term, f, f, value=_GELU_3, out=s).mul_(f).sigmoid_()
            torch.addcmul(linear_term, f, f, value=3 * _GELU_3, out=dv)
            out.copy_(f.mul_(s))
            f.addcmul_(f, s, value=-1)  # x·σ·(1 - σ)
            s.addcmul_(f, dv)
            dx_part.copy_(s.mul_(dv.copy_(dx_part)))
        return dx, _weight_gradient(activation, dy, weight_dtype), _bias_gradient(dy, bias_dtype)


class FewRowsLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return torch.addmm(bias[:, None], weight, x.t()).t().contiguous()

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dweight = torch.empty_like(weight)
        for dy_slice, out in zip(dy.split(FEW_ROWS_SLICE, 1), dweight.split(FEW_ROWS_SLICE), strict=True):
            torch.mm(dy_slice.t(), x, out=out)
        return dy @ weight, dweight, dy.sum(0)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [N, I], weight [O, I], bias [O] → [N, O]; in bf16 under autocast or for bf16 x, else in x's type."""
    if use_cpu_path(x) and (torch.is_autocast_enabled("cpu") or x.dtype == torch.bfloat16):
        return BF16LinearFunction.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`linear` of gelu(x), GELU in its tanh form."""
    if use_cpu_path(x) and x.dtype == torch.bfloat16:
        return GeluLinearFunction.apply(x, weight, bias)
    return linear(F.gelu(x, approximate="tanh"), weight, bias)


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`linear` for an x [R, I] of far fewer rows than the weight [O, I] has, in x's type."""
    if use_cpu_path(x):
        return FewRowsLinearFunction.apply(x, weight, bias)
    return F.linear(x, weight, bias)
