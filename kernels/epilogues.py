"""GELU inside the matrix products of an MLP, in place of `gelu`: cuBLASLt epilogues called through Transformer Engine.

    h = x·W1ᵀ + b1, a = gelu(h)     one product, writes both (GELU_AUX_BIAS)
    dh = (dy·W2)·gelu'(h)           one product, reads h (DGELU)
    dW1 = dhᵀ·x, db1 = Σ dh         one product, sums the dh that it reads (BGRADB)

GELU is in its tanh form, as in `gelu`. Why Transformer Engine and not apex's `fused_dense`:

- Each product belongs to one layer. apex runs both layers in one call, but ZeRO 3 holds one layer at a time.
- Weight gradients may be fp32 with bf16 operands. apex gives them in the operands' type, and they must be cast.

DGELU_BGRAD would sum db1 one product earlier, but Transformer Engine allocates as many values as dy has columns, not as
many as dh has.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import stands_for_gpu, untraced
from .linear import Cast, bias_sum, product, with_casts
from .once import once_differentiable
from .packages import package_refusal
from .triton.op import opaque_op

Gelu = Literal["ours", "transformer_engine"]
VERSIONS = (2, 10), (2, 20)  # first and last version whose `general_gemm` is known to have this signature
MODULE = "transformer_engine.pytorch.cpp_extensions"
SIGNATURES = {
    "general_gemm": "A, B, out_dtype, quantization_params, gelu, gelu_in, alpha, beta, accumulate, layout, out, bias, "
    "use_split_accumulator, grad, ub, ub_type, extra_output, bulk_overlap"
}
_choice: Gelu = "ours"


@contextmanager
def gelu_by(choice: Gelu) -> Iterator[None]:
    """Choose what computes GELU in a with block: `ours` (the kernels of `gelu`) or `transformer_engine` (epilogues).

    Raises:
        ValueError: an unknown name. Whether the epilogues can run is checked when they are called.
    """
    global _choice
    if choice not in get_args(Gelu):
        raise ValueError(f"gelu: expected one of {', '.join(get_args(Gelu))}, got {choice!r}")
    before, _choice = _choice, choice
    try:
        yield
    finally:
        _choice = before


def gelu_in_products() -> bool:
    """Whether an MLP uses `linear_gelu` and `activated_linear` instead of `linear` and `gelu_linear`."""
    return _choice != "ours"


def epilogues_refusal(device: torch.device, dtype: torch.dtype, *widths: int) -> str:
    """Why products of this type, between layers of these widths, cannot use epilogues; "" if they can."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"takes bf16 and fp16, not {str(dtype).removeprefix('torch.')}"
    if any(width % 8 for width in widths):
        return f"takes widths that are multiples of 8, not {' and '.join(map(str, widths))}"
    if stands_for_gpu():
        return ""
    return _missing(device)


# A fact about the machine: torch.compile calls this once and keeps the answer.
@untraced
def _missing(device: torch.device) -> str:
    return _package_refusal() or ("" if device.type == "cuda" else f"needs a CUDA GPU, not {device.type}")


@cache
def _package_refusal() -> str:
    return package_refusal("transformer_engine", MODULE, *VERSIONS, SIGNATURES)


def _general_gemm() -> Callable:
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    return general_gemm


# general_gemm is column-major like cuBLAS: "T" transposes, and its A is the second factor of our row-major product.


def _rooms(dtype: torch.dtype, like: Tensor, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Empty tensors of these shapes on the device of `like`."""
    return tuple(like.new_empty(shape, dtype=dtype) for shape in shapes)


@opaque_op("linear_gelu", lambda x, weight, *_: _rooms(x.dtype, x, *[(len(x), len(weight))] * 2))
def _linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, weight_cast: Tensor | None, bias_cast: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(h, a) with h = x·weightᵀ + bias and a = gelu(h)."""
    w, b = (weight, bias) if weight_cast is None else (weight_cast, bias_cast)
    a, _, h, _ = _general_gemm()(w, x.contiguous(), out_dtype=x.dtype, layout="TN", bias=b, gelu=True)
    return h, a


@opaque_op("gelu_gradient", lambda dy, w, h: torch.empty_like(h))
def _gelu_gradient(dy: Tensor, w: Tensor, h: Tensor) -> Tensor:
    """dh = (dy·w)·gelu'(h)."""
    gemm = _general_gemm()
    return gemm(w, dy.contiguous(), out_dtype=h.dtype, layout="NN", gelu=True, gelu_in=h, grad=True)[0]


@opaque_op("weight_and_bias_gradient", lambda dh, x, b, t: _rooms(t, x, (dh.shape[1], x.shape[1]), (dh.shape[1],)))
def _weight_and_bias_gradient(dh: Tensor, x: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(dweight, dbias) in `dtype`. The bias b is not read; passing it requests dbias."""
    gemm = _general_gemm()
    dweight, dbias, *_ = gemm(x.contiguous(), dh.contiguous(), out_dtype=dtype, layout="NT", bias=b, grad=True)
    return dweight, dbias


def _setup_context(ctx, inputs, output):
    x, weight, bias, weight_cast, _ = inputs
    ctx.save_for_backward(x, weight if weight_cast is None else weight_cast, bias)
    ctx.dtypes = weight.dtype, bias.dtype
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # a has no gradient: do not fill one with zeros


def _backward(ctx, dh, _):
    x, weight, bias = ctx.saved_tensors
    weight_dtype, bias_dtype = ctx.dtypes
    dweight, dbias = _weight_and_bias_gradient(dh, x, bias, weight_dtype)
    return (dh @ weight if ctx.needs_input_grad[0] else None), dweight, dbias.to(bias_dtype), None, None


_linear_gelu.register_autograd(_backward, setup_context=_setup_context)


class ActivatedLinearFunction(torch.autograd.Function):
    """a·weightᵀ + bias with a = gelu(h). The gradient goes to h, by the DGELU epilogue."""

    @staticmethod
    def forward(ctx, h, a, weight, bias, weight_cast, bias_cast):
        ctx.dtypes = weight.dtype, bias.dtype
        weight, bias = (weight, bias) if weight_cast is None else (weight_cast, bias_cast)
        ctx.save_for_backward(h, a, weight)
        return F.linear(a, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        h, a, weight = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        dh = _gelu_gradient(dy, weight, h)
        dweight = product(dy.t(), a, weight_dtype) if ctx.needs_input_grad[2] else None
        dbias = bias_sum(dy, bias_dtype) if ctx.needs_input_grad[3] else None
        return dh, None, dweight, dbias, None, None


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, cast: Cast | None = None) -> tuple[Tensor, Tensor]:
    """Compute h = `linear(x, weight, bias, cast)` and a = gelu(h) in one product: (h, a).

    No gradient flows through a: `activated_linear` gives h its gradient.

    Raises:
        ValueError: the epilogues cannot run with this type, these widths or this device, or without Transformer Engine.
    """
    weight, bias, *casts = with_casts(x, weight, bias, cast)
    dtype = weight.dtype if cast is None else cast[0].dtype
    if reason := epilogues_refusal(x.device, dtype, *weight.shape):
        raise ValueError(f"gelu: transformer_engine {reason}; 'ours' runs anywhere")
    return _linear_gelu(x.to(dtype), weight, bias, *casts)


def activated_linear(h: Tensor, a: Tensor, weight: Tensor, bias: Tensor, cast: Cast | None = None) -> Tensor:
    """`gelu_linear(h, weight, bias, cast)` with a = gelu(h) already computed; h and a come from `linear_gelu`."""
    return ActivatedLinearFunction.apply(h, a, *with_casts(h, weight, bias, cast))
