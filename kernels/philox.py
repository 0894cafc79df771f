"""Philox4x32-10 in plain PyTorch: noise as a pure function of (seed, counter), recomputed instead of stored.

Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". Random words become normal numbers as in Triton's
`tl.randn4x`. In a kernel, `randn4x(seed, counter)` of triton/philox.py gives the same noise in registers, up to the
rounding of log, sin and cos.

All random numbers of a training step come from `random_words`, a pure function of (seed, step, sample). They do not
depend on which rank draws them.

Every function works on any device and traces under `torch.compile(fullgraph=True)`.
"""

import math

import torch
from torch import Tensor

from .backend import use_triton
from .checks import check_devices, check_tensor
from .triton.philox import random_words_fwd

_LOW32 = 0xFFFFFFFF
# The multipliers of a round, minus 2**32: the product with a word then fits int64, and its lower half is unchanged.
_MULTIPLIER_0 = 0xD2511F53 - 2**32
_MULTIPLIER_1 = 0xCD9E8D57 - 2**32
_KEY_STEP_0 = 0x9E3779B9
_KEY_STEP_1 = 0xBB67AE85
_ROUNDS = 10


def philox_uint32x4(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four random words for each counter.

    counter: four int64 tensors of one shape. key: two int64 tensors that broadcast to it. All words, input and output,
    lie in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        # The product lacks 2**32 times the word, so the upper half lacks the word: add it.
        high0, high1 = (product0 >> 32).add_(c0), (product1 >> 32).add_(c2)
        c0, c2 = high1.bitwise_xor_(c1).bitwise_xor_(k0), high0.bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = product1.bitwise_and_(_LOW32), product0.bitwise_and_(_LOW32)
        k0, k1 = (k0 + _KEY_STEP_0) & _LOW32, (k1 + _KEY_STEP_1) & _LOW32
    return c0, c1, c2, c3


def _uniform(word: Tensor) -> Tensor:
    """Map words to float32 in [0, 1) as Triton does: fold a word, read as int32, onto [0, 2**31) and scale it."""
    return torch.minimum(word, _LOW32 - word).float() * 4.6566127342e-10


def random_words_ref(seed: int, step: Tensor, samples: Tensor, count: int) -> Tensor:
    """The definition of `random_words`."""
    c0 = torch.arange((count + 3) // 4, device=samples.device).expand(len(samples), -1)  # [S, ceil(count / 4)]
    c2, c3 = (samples & _LOW32)[:, None].expand_as(c0), (step & _LOW32).expand_as(c0)
    key = (torch.full_like(c0, seed & _LOW32), torch.full_like(c0, seed >> 32))
    return torch.stack(philox_uint32x4((c0, torch.zeros_like(c0), c2, c3), key), dim=-1).flatten(1)[:, :count]


def random_words(seed: int, step: Tensor, samples: Tensor, count: int) -> Tensor:
    """Random words for each sample of a training step: int64 [S, count], in [0, 2**32).

    Word j of sample s is word j % 4 of Philox counter (j // 4, 0, samples[s], step) under the key `seed`. It does not
    depend on the batch in which the sample is drawn.

    Args:
        seed: seed of the run, 0 <= seed < 2**63.
        step: int64 [], step number, on the device of `samples`; taken modulo 2**32.
        samples: int64 [S], indices of the samples in the step's batch; taken modulo 2**32.
        count: words per sample.

    Raises:
        ValueError: step or samples has another shape or type, they are on two devices, or the seed is out of range.
    """
    check_tensor("step", step, (), torch.int64)
    check_tensor("samples", samples, ("S",), torch.int64)
    check_devices(samples=samples, step=step)
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected 0 <= seed < 2**63, got {seed}")
    # use_triton asks for a floating type that kernels take; the words themselves are integers
    op = random_words_fwd if use_triton(step.new_empty(0, dtype=torch.float32)) else random_words_ref
    return op(seed, step, samples.contiguous(), count)


# Opaque to torch.compile: a round uses each word twice, Inductor would inline both, and ten rounds make 2**10 copies.
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
    """Four standard normal numbers for each 64-bit counter, as `tl.randn4x(seed, counter)` gives: float32 [..., 4].

    None is beyond ±5.68, because the uniform number under the logarithm is at least 1e-7.
    seed: an int that fits int64, or an int64 tensor that broadcasts to the counter. counter: int64 [...].
    """
    return _randn4x(seed if isinstance(seed, Tensor) else torch.full((), seed, dtype=torch.int64), counter)


def philox_randn(
    seed: int | Tensor,
    shape: tuple[int, ...],
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    offset: int | Tensor = 0,
) -> Tensor:
    """Standard normal noise of this shape, drawn in float32 and cast to `dtype`.

    Element i of the flattened result is number i % 4 of counter `offset + i // 4`.
    seed: int64 [], or an int that fits int64. offset: the first counter, int or int64 [].
    """
    size = math.prod(shape)
    counter = torch.arange((size + 3) // 4, device=device) + offset
    return philox_randn4x(seed, counter).flatten()[:size].view(shape).to(dtype)


def philox_randn_samples(seeds: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal noise [B, *shape]: sample b is `philox_randn(seeds[b], shape)`. seeds: int64 [B]."""
    size = math.prod(shape)
    counter = torch.arange((size + 3) // 4, device=seeds.device).expand(len(seeds), -1)  # [B, ceil(size / 4)]
    return philox_randn4x(seeds[:, None], counter).flatten(1)[:, :size].reshape(len(seeds), *shape).to(dtype)


def philox_randn_rows(
    seed: int | Tensor, offsets: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normal noise [B, *shape]: row b is `philox_randn(seed, shape, offset=offsets[b])`.

    A row depends on its own offset only, so a batch may be split anywhere.
    seed: int64 [], or an int that fits int64. offsets: int64 [B]; the result is on their device.
    """
    size = math.prod(shape)
    counter = offsets[:, None] + torch.arange((size + 3) // 4, device=offsets.device)  # [B, ceil(size / 4)]
    return philox_randn4x(seed, counter).flatten(1)[:, :size].reshape(len(offsets), *shape).to(dtype)
