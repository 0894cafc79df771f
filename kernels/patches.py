"""gather_patches: corrupt, cut into patches and keep the visible ones, in one op.

    x_t = √ᾱ·x_start + √(1-ᾱ)·ε,   ε from Philox (see philox.py), a pure function of the seed: it is never stored

A patch is a row of C·P·P values, channel slowest, as the head predicts it.
"""

import torch
from torch import Tensor

from .philox import philox_randn


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """[B, C, H, W] to [B, L, C·P·P], patches in reading order."""
    B, C, H, W = x.shape
    P = patch_size
    x = x.reshape(B, C, H // P, P, W // P, P).permute(0, 2, 4, 1, 3, 5)  # [B, h, w, C, P, P]
    return x.reshape(B, (H // P) * (W // P), C * P * P)


def unpatchify(patches: Tensor, image_size: tuple[int, int], patch_size: int) -> Tensor:
    """[B, L, C·P·P] to [B, C, H, W], the inverse of `patchify`."""
    B, P = len(patches), patch_size
    h, w = image_size[0] // P, image_size[1] // P
    x = patches.reshape(B, h, w, -1, P, P).permute(0, 3, 1, 4, 2, 5)  # [B, C, h, P, w, P]
    return x.reshape(B, -1, h * P, w * P)


def standard_noise(noise: Tensor, like: Tensor) -> Tensor:
    """ε in the shape and type of `like`, from its Philox seed (int64 []) or as given."""
    if noise.ndim > 0:
        return noise
    return philox_randn(noise, like.shape, like.device, like.dtype)


def gather_patches_ref(
    x_start: Tensor,
    ids_keep: Tensor,
    sqrt_alpha: Tensor,
    sqrt_one_minus_alpha: Tensor,
    noise: Tensor,
    patch_size: int,
) -> Tensor:
    """The visible patches of x_t. No gradient: this is data.

    Args:
        x_start: [B, C, H, W], values in [-1, 1] or scaled latents.
        ids_keep: int64 [N], visible patches as indices into the B·L patches of the batch, sample after sample.
        sqrt_alpha, sqrt_one_minus_alpha: [n], the coefficients of the first n <= B samples; the others get no noise.
        noise: int64 [], the Philox seed of ε; or ε itself, [n, C, H, W].
        patch_size: P, divides H and W.

    Returns:
        [N, C·P·P] in x_start's type.
    """
    n = len(sqrt_alpha)
    x_t = x_start
    if n > 0:
        eps = standard_noise(noise, x_start[:n])
        noised = sqrt_alpha.view(-1, 1, 1, 1) * x_start[:n] + sqrt_one_minus_alpha.view(-1, 1, 1, 1) * eps
        x_t = torch.cat([noised.to(x_start.dtype), x_start[n:]])
    return patchify(x_t, patch_size).flatten(0, 1).index_select(0, ids_keep)
