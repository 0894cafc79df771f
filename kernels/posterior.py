"""sample_posterior: latents drawn from a VAE's posteriors, mean + std·ε, with ε from Philox by (seed, draw).

The fused kernel reads each moment once, in its stored type, and writes each latent once; ε never exists in memory. In
PyTorch's ops Philox alone takes over a hundred passes.
"""

import math

import torch
from torch import Tensor

from .backend import use_triton
from .checks import check_devices, check_tensor
from .philox import philox_randn_rows
from .triton.posterior import sample_posterior_fwd


def sample_posterior_ref(moments: Tensor, seed: int, draws: Tensor) -> Tensor:
    """The definition of `sample_posterior`."""
    mean, std = moments.float().unbind(1)
    counters = math.ceil(math.prod(mean.shape[1:]) / 4)  # a counter gives four normal numbers
    return mean + std * philox_randn_rows(seed, draws * counters, tuple(mean.shape[1:]))


def sample_posterior(moments: Tensor, seed: int, draws: Tensor) -> Tensor:
    """Draw a latent from each sample's posterior: fp32 [B, C, h, w]. Not differentiable.

    Args:
        moments: [B, 2, C, h, w], means and standard deviations, any floating type; or [B, 1, C, h, w], the latents of a
            VQ model, which are returned as fp32.
        seed: seed of the run, 0 <= seed < 2**63.
        draws: int64 [B]; ε of a sample is a function of (seed, its draw). In training a draw is epoch · images + index.

    Raises:
        ValueError: an argument has another shape, type or device, or the seed is out of range.
    """
    given = 1 if moments.ndim == 5 and moments.shape[1] == 1 else 2
    check_tensor("moments", moments, ("B", given, "C", "h", "w"))
    check_tensor("draws", draws, moments.shape[:1], torch.int64)
    check_devices(moments=moments, draws=draws)
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected 0 <= seed < 2**63, got {seed}")
    if given == 1:
        return moments[:, 0].float()
    op = sample_posterior_fwd if use_triton(moments) else sample_posterior_ref
    return op(moments.contiguous(), seed, draws.contiguous())
