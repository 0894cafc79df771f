"""Linear layers on the CPU, forward and backward.

Many rows, in bf16:

- Bias: autocast's version writes the bias over the whole result and reads it back to add the product. oneDNN's fused op
  adds it inside the product.
- Weight gradient dyᵀ·x: its left operand is transposed, which the matrix units process at half speed. Here the narrower
  of the two operands is transposed first, and the gradient is transposed and written in its type in one pass. Its type
  is the parameter's `grad_dtype`: fp32 for an fp32 parameter, unless set to bf16, the type of the product.

Few rows (the adaLN projection has nine conditions and a table of 75 thousand columns): the weight is read once forward
and once backward.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..once import once_differentiable
from . import compiled

# Whether this build of PyTorch and this processor (AVX-512 or better) support oneDNN's bf16.
HAS_FUSED_LINEAR = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
TRANSPOSE_COLUMNS = 192  # few, because a product with the identity takes this many operations per value


@lru_cache(maxsize=8)
def _identity(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.bfloat16)


@lru_cache(maxsize=8)
def _ones(n: int) -> Tensor:
    return torch.ones(16, n, dtype=torch.bfloat16)  # 16 rows: one tile of the matrix units


def forget() -> None:
    """Drop the cached matrices. Those made under a mode whose tensors have no data are useless afterwards."""
    _identity.cache_clear()
    _ones.cache_clear()


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x·weightᵀ + bias, all bf16."""
    if HAS_FUSED_LINEAR:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _transposed(x: Tensor, out: Tensor | None = None) -> Tensor:
    """Transpose [N, n] to a contiguous [n, N]: compiled, or on the matrix units in a third of the time of a copy."""
    out = x.new_empty(x.shape[1], len(x)) if out is None else out
    if compiled.use_compiled(x):
        return compiled.transpose(x, out)
    for columns, rows in zip(x.split(TRANSPOSE_COLUMNS, 1), out.split(TRANSPOSE_COLUMNS), strict=True):
        torch.mm(_identity(len(rows)), columns.t(), out=rows)
    return out


class BF16LinearFunction(torch.autograd.Function):
    """x·weightᵀ + bias in bf16; the gradients have the types of x and of the parameters."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        x16, w16 = x.to(torch.bfloat16), weight.to(torch.bfloat16)
        ctx.save_for_backward(x16, w16)
        ctx.dtypes, ctx.spare = (x.dtype, _grad_dtype(weight), bias.dtype), w16 is not weight and w16.is_contiguous()
        return _linear(x16, w16, bias.to(torch.bfloat16))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        dx = (dy @ weight).to(x_dtype) if ctx.needs_input_grad[0] else None
        spare = weight if ctx.spare else None
        return dx, _weight_gradient(x, dy, weight_dtype, spare), _bias_gradient(dy, bias_dtype)


def _grad_dtype(weight: Tensor) -> torch.dtype:
    return weight.grad_dtype or weight.dtype if weight.is_leaf else weight.dtype


def _weight_gradient(x: Tensor, dy: Tensor, dtype: torch.dtype, spare: Tensor | None) -> Tensor:
    """dyᵀ·x: [O, I] in `dtype`, from bf16 x [N, I] and dy [N, O].

    spare: a bf16 copy of the weight that is no longer needed; a bf16 result overwrites it.
    """
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
    """Column sums of dy [N, O], accumulated in fp32 on the matrix units."""
    return (_ones(len(dy)) @ dy)[0].to(dtype)


class GeluLinearFunction(torch.autograd.Function):
    """gelu(x)·weightᵀ + bias in bf16. The backward pass recomputes gelu(x), so only x of the wide stream is saved."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        w16 = weight.to(torch.bfloat16)
        ctx.save_for_backward(x, w16)
        ctx.dtypes, ctx.spare = (_grad_dtype(weight), bias.dtype), w16 is not weight and w16.is_contiguous()
        return _linear(_gelu(x), w16, bias.to(torch.bfloat16))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        activation, dx = _gelu_backward(x, dy @ weight)
        spare = weight if ctx.spare else None
        return dx, _weight_gradient(activation, dy, weight_dtype, spare), _bias_gradient(dy, bias_dtype)


def _gelu(x: Tensor) -> Tensor:
    return compiled.gelu(x) if compiled.use_compiled(x) else F.gelu(x, approximate="tanh")


def _gelu_backward(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """(gelu(x), dx). dy may be overwritten."""
    if compiled.use_compiled(x):
        return compiled.gelu_backward(x, dy)
    return F.gelu(x, approximate="tanh"), torch.ops.aten.gelu_backward(dy, x, approximate="tanh")


class FewRowsLinearFunction(torch.autograd.Function):
    """`few_rows_linear` of compiled.py, in fp32."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        x, weight = x.contiguous(), weight.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.grad_dtype = _grad_dtype(weight)
        return compiled.few_rows_linear(x, weight, bias.contiguous())

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx, dweight = compiled.few_rows_linear_backward(x, weight, dy.contiguous(), ctx.grad_dtype)
        return dx, dweight, dy.sum(0)
