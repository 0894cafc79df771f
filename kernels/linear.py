"""linear: x·Wᵀ + b. On the CPU in bf16 with its own backward.

Autocast's version casts W, and its weight gradient dyᵀ·x has a transposed left operand, which the CPU's bf16 matrix
units get through at half speed. Here the narrower of the two operands is transposed first, and the gradient is written
in the parameter's type in the same pass.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class BF16LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        x16, w16 = x.to(torch.bfloat16), weight.to(torch.bfloat16)
        ctx.save_for_backward(x16, w16)
        ctx.dtypes = x.dtype, weight.dtype, bias.dtype
        return F.linear(x16, w16, bias.to(torch.bfloat16))

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        dx = (dy @ weight).to(x_dtype) if ctx.needs_input_grad[0] else None
        outputs, inputs = weight.shape
        product = (x.t().contiguous() @ dy).t() if inputs <= outputs else dy.t().contiguous() @ x
        dweight = torch.empty(weight.shape, dtype=weight_dtype).copy_(product)
        return dx, dweight, dy.sum(0).to(bias_dtype)  # summed in fp32; asked for in fp32, torch would copy dy first


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [N, I], weight [O, I], bias [O] → [N, O]; in bf16 under autocast or for bf16 x, else in x's type."""
    if x.device.type == "cpu" and (torch.is_autocast_enabled("cpu") or x.dtype == torch.bfloat16):
        return BF16LinearFunction.apply(x, weight, bias)
    return F.linear(x, weight, bias)
