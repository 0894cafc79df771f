"""sample_posterior in Triton: a program takes BLOCK Philox counters of one sample, with four values each."""

import math

import torch
from torch import Tensor

from ..backend import tl, triton
from .op import triton_op, wrap_triton
from .philox import randn4x

BLOCK = 256  # counters per program; each stands for four values


@triton.jit
def _sample_posterior_kernel(
    moments_ptr,  # [B, 2, SIZE]
    draws_ptr,  # int64 [B]
    out_ptr,  # fp32 [B, SIZE]
    seed,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    i = first * 4 + tl.arange(0, 4 * BLOCK)
    inside = i < SIZE
    mean = tl.load(moments_ptr + b * (2 * SIZE) + i, mask=inside, other=0.0).to(tl.float32)
    std = tl.load(moments_ptr + b * (2 * SIZE) + SIZE + i, mask=inside, other=0.0).to(tl.float32)
    counter = tl.load(draws_ptr + b) * ((SIZE + 3) // 4) + first + tl.arange(0, BLOCK)
    n0, n1, n2, n3 = randn4x(tl.full((), seed, tl.int64), counter)
    eps = tl.join(tl.join(n0, n2), tl.join(n1, n3)).reshape(4 * BLOCK)
    tl.store(out_ptr + b * SIZE + i, mean + std * eps, mask=inside)


@triton_op("sample_posterior")
def sample_posterior_fwd(moments: Tensor, seed: int, draws: Tensor) -> Tensor:
    B, _, C, h, w = moments.shape
    out = moments.new_empty(B, C, h, w, dtype=torch.float32)
    size = math.prod((C, h, w))
    if out.numel() > 0:
        grid = (B, triton.cdiv(size, 4 * BLOCK))
        wrap_triton(_sample_posterior_kernel)[grid](moments, draws, out, seed, SIZE=size, BLOCK=BLOCK)
    return out
