"""Philox4x32-10 in plain PyTorch: noise as a pure function of (seed, counter), made again instead of kept.

Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". Words become normal numbers as in Triton's
`tl.randn4x`; a Triton kernel calls `randn4x(seed, counter)` for the same noise in registers, up to the rounding of its
log, sin and cos.

Every other function works on any device and traces under `torch.compile(fullgraph=True)`.
"""

import math

import torch
from torch import Tensor

from .backend import tl, triton

_LOW32 = 0xFFFFFFFF
# A round's multipliers less 2**32: their product with a word stays inside int64 and keeps its lower half.
_MULTIPLIER_0 = 0xD2511F53 - 2**32
_MULTIPLIER_1 = 0xCD9E8D57 - 2**32
_KEY_STEP_0 = 0x9E3779B9
_KEY_STEP_1 = 0xBB67AE85
_ROUNDS = 10


def philox_uint32x4(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four words for each counter.

    counter: four int64 tensors of one shape; key: two int64 tensors that broadcast to it. The words, in and
    out, lie in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        # 2**32 times the word is missing from its product, so the word is missing from the upper half.
        high0, high1 = (product0 >> 32).add_(c0), (product1 >> 32).add_(c2)
        c0, c2 = high1.bitwise_xor_(c1).bitwise_xor_(k0), high0.bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = product1.bitwise_and_(_LOW32), product0.bitwise_and_(_LOW32)
        k0, k1 = (k0 + _KEY_STEP_0) & _LOW32, (k1 + _KEY_STEP_1) & _LOW32
    return c0, c1, c2, c3


def _uniform(word: Tensor) -> Tensor:
    """Words to float32 in [0, 1): Triton folds a word, read as int32, onto [0, 2**31) and scales it."""
    return torch.minimum(word, _LOW32 - word).float() * 4.6566127342e-10


@triton.jit
def _turn(u):
    """cos and sin of 2π·u, u in [0, 1]: within an eighth of a turn a few terms of their series give them to 1e-7."""
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
    """`tl.pair_uniform_to_normal` with an angle already reduced: CUDA's sin and cos reduce any, in fp64 and a stack."""
    radius = tl.sqrt(-2.0 * tl.log(tl.maximum(u0, 1e-7)))
    cos, sin = _turn(u1)
    return radius * cos, radius * sin


@triton.jit
def randn4x(seed, counter):
    """`tl.randn4x` by `normal_pair`."""
    u0, u1, u2, u3 = tl.rand4x(seed, counter)
    n0, n1 = normal_pair(u0, u1)
    n2, n3 = normal_pair(u2, u3)
    return n0, n1, n2, n3


# Opaque to torch.compile: a round uses a word twice, Inductor inlines both, and ten rounds make 2**10 copies.
@torch.library.custom_op("umd::philox_randn4x", mutates_args=())
def _randn4x(seed: Tensor, counter: Tensor) -> Tensor:
    zero = torch.zeros_like(counter)
    key = (seed & _LOW32, (seed >> 32) & _LOW32)
    words = philox_uint32x4((counter & _LOW32, (counter >> 32) & _LOW32, zero, zero), key)
    noise = counter.new_empty((*counter.shape, 4), dtype=torch.float32)
    for lane in (0, 2):
        radius = _uniform(words[lane]).clamp_(min=1e-7).log_().mul_(-2.0).sqrt_()
        angle = _uniform(words[lane + 1]).mul_(2 * math.pi)
        torch.mul(radius, angle.cos(), out=noise[..., lane])
        torch.mul(radius, angle.sin(), out=noise[..., lane + 1])
    return noise


@_randn4x.register_fake
def _(seed: Tensor, counter: Tensor) -> Tensor:
    return counter.new_empty((*counter.shape, 4), dtype=torch.float32)


def philox_randn4x(seed: int | Tensor, counter: Tensor) -> Tensor:
    """Four standard normal numbers for each 64-bit counter, those of `tl.randn4x(seed, counter)`.

    seed: int64 [] or an int that fits one. counter: int64 [...]. Returns float32 [..., 4], none beyond ±5.68,
    for the uniform number under the logarithm is held above 1e-7.
    """
    return _randn4x(seed if isinstance(seed, Tensor) else torch.full((), seed, dtype=torch.int64), counter)


def philox_randn(
    seed: int | Tensor,
    shape: tuple[int, ...],
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    offset: int | Tensor = 0,
) -> Tensor:
    """Standard normal noise: element i of the flattened result is number i % 4 of counter `offset + i // 4`.

    seed: int64 [] or an int that fits one. offset: the first counter, int or int64 []. Drawn in float32, then
    cast to `dtype`.
    """
    size = math.prod(shape)
    counter = torch.arange((size + 3) // 4, device=device) + offset
    return philox_randn4x(seed, counter).flatten()[:size].view(shape).to(dtype)


def philox_randn_rows(
    seed: int | Tensor, offsets: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normal noise [B, *shape]: row b is `philox_randn(seed, shape, offset=offsets[b])`.

    A row depends on its own offset only, so a batch may be split anywhere.
    seed: int64 [] or an int that fits one. offsets: int64 [B]; the result is on their device.
    """
    size = math.prod(shape)
    counter = offsets[:, None] + torch.arange((size + 3) // 4, device=offsets.device)  # [B, ceil(size / 4)]
    return philox_randn4x(seed, counter).flatten(1)[:, :size].reshape(len(offsets), *shape).to(dtype)
