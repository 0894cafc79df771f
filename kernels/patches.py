"""gather_patches: noise images, cut them into patches and keep the visible patches, in one op.

    x_t = √ᾱ·x_start + √(1-ᾱ)·ε,   ε of each sample from Philox (philox.py) with the sample's seed, never stored

A patch is a row of C·P·P values, the channel varying slowest, in the order of the head's prediction. The kernel reads
the kept patches of x_start once, computes ε in registers, and writes the result once.
"""

import torch
from torch import Tensor

from .backend import use_triton
from .checks import check_devices, check_tensor
from .philox import philox_randn_samples
from .triton.patches import gather_patches_fwd


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """Cut images into patches in reading order: [B, C, H, W] to [B, L, C·P·P]."""
    B, C, H, W = x.shape
    P = patch_size
    x = x.reshape(B, C, H // P, P, W // P, P).permute(0, 2, 4, 1, 3, 5)  # [B, h, w, C, P, P]
    return x.reshape(B, (H // P) * (W // P), C * P * P)


def unpatchify(patches: Tensor, image_size: tuple[int, int], patch_size: int) -> Tensor:
    """Join patches into images, the inverse of `patchify`: [B, L, C·P·P] to [B, C, H, W]."""
    B, P = len(patches), patch_size
    h, w = image_size[0] // P, image_size[1] // P
    x = patches.reshape(B, h, w, -1, P, P).permute(0, 3, 1, 4, 2, 5)  # [B, C, h, P, w, P]
    return x.reshape(B, -1, h * P, w * P)


def standard_noise(noise: Tensor, like: Tensor) -> Tensor:
    """ε in the shape of `like` [n, C, H, W], in fp32 or in the type of `like` if that is wider.

    noise: Philox seeds int64 [n], or ε itself, which is only cast.
    """
    wide = torch.promote_types(like.dtype, torch.float32)
    return noise.to(wide) if noise.ndim > 1 else philox_randn_samples(noise, like.shape[1:], wide)


def gather_patches_ref(
    x_start: Tensor,
    ids_keep: Tensor,
    sqrt_alpha: Tensor,
    sqrt_one_minus_alpha: Tensor,
    noise: Tensor,
    patch_size: int,
) -> Tensor:
    """The definition of `gather_patches`, computed in fp32 or wider."""
    n = len(sqrt_alpha)
    x_t = x_start
    if n > 0:
        eps = standard_noise(noise, x_start[:n])
        a, b = (c.to(eps.dtype).view(-1, 1, 1, 1) for c in (sqrt_alpha, sqrt_one_minus_alpha))
        x_t = torch.cat([(a * x_start[:n] + b * eps).to(x_start.dtype), x_start[n:]])
    return patchify(x_t, patch_size).flatten(0, 1).index_select(0, ids_keep)


def gather_patches(
    x_start: Tensor,
    ids_keep: Tensor,
    sqrt_alpha: Tensor,
    sqrt_one_minus_alpha: Tensor,
    noise: Tensor,
    patch_size: int,
) -> Tensor:
    """The visible patches of x_t. Not differentiable.

    Args:
        x_start: [B, C, H, W], any floating type; pixels in [-1, 1] or scaled latents.
        ids_keep: int64 [N], indices of the visible patches among the B·L patches of the batch, sample after sample,
            each in 0..B·L - 1. The kernel does not check the range.
        sqrt_alpha, sqrt_one_minus_alpha: [n], √ᾱ and √(1-ᾱ) of the first n <= B samples. Other samples get no noise.
        noise: int64 [n], the Philox seed of each sample's ε; or ε itself, [n, C, H, W].
        patch_size: P; must divide H and W.

    Returns:
        [N, C·P·P] in x_start's type, computed in fp32 or wider.

    Raises:
        ValueError: an argument has another shape, type or device.
    """
    check_patches(x_start, ids_keep, patch_size)
    n = len(sqrt_alpha) if sqrt_alpha.ndim == 1 else -1
    if not 0 <= n <= len(x_start) or not sqrt_alpha.is_floating_point():
        expected = f"floating [n] with n <= B = {len(x_start)}"
        raise ValueError(f"sqrt_alpha: expected {expected}, got {tuple(sqrt_alpha.shape)} {sqrt_alpha.dtype}")
    check_tensor("sqrt_one_minus_alpha", sqrt_one_minus_alpha, sqrt_alpha.shape, sqrt_alpha.dtype)
    check_noise(noise, (n, *x_start.shape[1:]))
    tensors = dict(ids_keep=ids_keep, sqrt_alpha=sqrt_alpha, sqrt_one_minus_alpha=sqrt_one_minus_alpha, noise=noise)
    check_devices(x_start=x_start, **tensors)
    op = gather_patches_fwd if use_triton(x_start) else gather_patches_ref
    return op(x_start, ids_keep, sqrt_alpha, sqrt_one_minus_alpha, noise, patch_size)


def check_patches(x_start: Tensor, ids_keep: Tensor, patch_size: int) -> None:
    """Raise ValueError unless x_start is [B, C, H, W] with patch_size dividing H and W, and ids_keep int64 [N].

    Also where x_start requires a gradient, which kernels do not compute.
    """
    if x_start.ndim != 4 or x_start.numel() == 0 or not x_start.is_floating_point():
        raise ValueError(f"x_start: expected floating [B, C, H, W], got {tuple(x_start.shape)} {x_start.dtype}")
    H, W = x_start.shape[2:]
    if patch_size < 1 or H % patch_size or W % patch_size:
        raise ValueError(f"patch_size: expected a divisor of H = {H} and W = {W}, got {patch_size}")
    check_tensor("ids_keep", ids_keep, ("N",), torch.int64)
    if torch.is_grad_enabled() and x_start.requires_grad:
        raise ValueError("x_start: expected a tensor that requires no gradient, as none is computed; detach it")


def check_noise(noise: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless noise is seeds, int64 [n], or ε of this shape [n, C, H, W]."""
    seeds = tuple(noise.shape) == shape[:1] and noise.dtype == torch.int64
    if not seeds and (tuple(noise.shape) != tuple(shape) or not noise.is_floating_point()):
        expected = f"a seed for each sample, int64 {shape[:1]}, or floating {tuple(shape)}"
        raise ValueError(f"noise: expected {expected}, got {tuple(noise.shape)} {noise.dtype}")
