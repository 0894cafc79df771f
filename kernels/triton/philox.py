"""Philox in Triton: random words and normal numbers in registers, the same as those of kernels/philox.py."""

from torch import Tensor

from ..backend import tl, triton
from .op import triton_op, wrap_triton


@triton.jit
def _turn(u):
    """cos and sin of 2π·u for u in [0, 1]: reduced to an eighth of a turn, where a short series is accurate to 1e-7."""
    quarter = tl.floor(4 * u + 0.5)
    x = 6.283185307179586 * (u - 0.25 * quarter)
    x2 = x * x
    sin = x + x * x2 * (-1 / 6 + x2 * (1 / 120 + x2 * (-1 / 5040 + x2 * (1 / 362880))))
    cos = 1 + x2 * (-1 / 2 + x2 * (1 / 24 + x2 * (-1 / 720 + x2 * (1 / 40320))))
    quarter = quarter.to(tl.int32)
    odd = (quarter & 1) == 1
    cos, sin = tl.where(odd, -sin, cos), tl.where(odd, cos, sin)
    return tl.where((quarter & 2) == 2, -cos, cos), tl.where((quarter & 2) == 2, -sin, sin)


@triton.jit
def normal_pair(u0, u1):
    """`tl.pair_uniform_to_normal` without CUDA's sin and cos, whose range reduction uses fp64 and a stack."""
    radius = tl.sqrt(-2.0 * tl.log(tl.maximum(u0, 1e-7)))
    cos, sin = _turn(u1)
    return radius * cos, radius * sin


@triton.jit
def randn4x(seed, counter):
    """`tl.randn4x` with `normal_pair`: four normal numbers for each counter."""
    u0, u1, u2, u3 = tl.rand4x(seed, counter)
    n0, n1 = normal_pair(u0, u1)
    n2, n3 = normal_pair(u2, u3)
    return n0, n1, n2, n3


@triton.jit
def _random_words_kernel(
    step_ptr,  # int64 []
    samples_ptr,  # int64 [S]
    out_ptr,  # int64 [S, count]
    seed,
    count,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    c0 = j.to(tl.uint32)
    zero = c0 * 0
    c2 = zero + tl.load(samples_ptr + row).to(tl.uint32)
    c3 = zero + tl.load(step_ptr).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.full((), seed, tl.int64), c0, zero, c2, c3)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(4 * BLOCK)
    at = tl.program_id(1) * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    tl.store(out_ptr + row * count + at, words.to(tl.int64), at < count)


@triton_op("random_words")
def random_words_fwd(seed: int, step: Tensor, samples: Tensor, count: int) -> Tensor:
    out = samples.new_empty(len(samples), count)
    grid = (len(samples), triton.cdiv(count, 4 * 64))
    if out.numel() > 0:
        wrap_triton(_random_words_kernel)[grid](step, samples, out, seed, count, BLOCK=64, num_warps=1)
    return out
