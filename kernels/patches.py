"""gather_patches: corrupt, cut into patches and keep the visible ones, in one op.

    x_t = √ᾱ·x_start + √(1-ᾱ)·ε,   ε of each sample from Philox (philox.py), made from the sample's seed, never stored

A patch is a row of C·P·P values, channel slowest, as the head predicts it. The kernel reads the kept patches of x_start
once and writes them once; ε is made in registers.
"""

import torch
from torch import Tensor

from .backend import tl, triton, triton_op, use_triton, wrap_triton
from .philox import normal_pair, philox_randn_samples, randn4x


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
    """ε in the shape of `like` [n, C, H, W], fp32 or as wide as `like`, from Philox seeds (int64 [n]) or as given."""
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
    """The definition of `gather_patches`, in fp32 or wider."""
    n = len(sqrt_alpha)
    x_t = x_start
    if n > 0:
        eps = standard_noise(noise, x_start[:n])
        a, b = (c.to(eps.dtype).view(-1, 1, 1, 1) for c in (sqrt_alpha, sqrt_one_minus_alpha))
        x_t = torch.cat([(a * x_start[:n] + b * eps).to(x_start.dtype), x_start[n:]])
    return patchify(x_t, patch_size).flatten(0, 1).index_select(0, ids_keep)


@triton.jit
def patch_corner(patch, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, P: tl.constexpr):
    """Where patches, numbered through the batch, begin in [B, C, H, W], and the samples that they are of."""
    across: tl.constexpr = W // P
    patches: tl.constexpr = (H // P) * across
    sample, place = patch // patches, patch % patches
    return sample * (C * H * W) + (place // across) * (P * W) + (place % across) * P, sample


@triton.jit
def patch_pixel(col, H: tl.constexpr, W: tl.constexpr, P: tl.constexpr):
    """Columns of a patch's row, c·P·P + i·P + j, as steps from its corner in [C, H, W]."""
    # col // P % P, not col % (P * P) // P: only here Triton sees that P columns are neighbours, and reads them at once
    return (col // (P * P)) * (H * W) + (col // P % P) * W + col % P


@triton.jit
def patch_noise(
    noise_ptr,  # int64 [n], or [n, C, H, W]
    corner,  # [BLOCK_M]
    sample,  # [BLOCK_M]
    mask,  # [BLOCK_M, BLOCK_D]
    num_noised,  # n
    first_col,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FROM_SEED: tl.constexpr,
):
    """ε of columns first_col : first_col + BLOCK_D of the patches at the corners: fp32 [BLOCK_M, BLOCK_D].

    Element i of a sample's ε is number i % 4 of counter i // 4 under the sample's seed. Neighbours in a patch's row
    share a counter: all four where 4 divides P; else a pair of them, or one, is picked, and before the costly steps.
    """
    # else, and one return: Triton compiles what stands behind a static if, even one that has returned
    if FROM_SEED:
        SHARED: tl.constexpr = 4 if P % 4 == 0 else (2 if P % 2 == 0 else 1)
        col = first_col + tl.arange(0, BLOCK_D // SHARED) * SHARED
        first = (corner - sample * (C * H * W)).to(tl.int32)  # of the patch within its sample
        i = first[:, None] + patch_pixel(col, H, W, P)[None, :]  # [BLOCK_M, BLOCK_D / SHARED]
        seed = tl.load(noise_ptr + sample, sample < num_noised, other=0)[:, None]
        if SHARED == 4:
            n0, n1, n2, n3 = randn4x(seed, i // 4)
            eps = tl.join(tl.join(n0, n2), tl.join(n1, n3))
        else:
            u0, u1, u2, u3 = tl.rand4x(seed, i // 4)
            second = i % 4 >= 2
            n0, n1 = normal_pair(tl.where(second, u2, u0), tl.where(second, u3, u1))
            eps = tl.join(n0, n1) if SHARED == 2 else tl.where(i % 2 == 0, n0, n1)
        eps = eps.reshape(corner.shape[0], BLOCK_D)
    else:
        col = first_col + tl.arange(0, BLOCK_D)
        eps = tl.load(noise_ptr + corner[:, None] + patch_pixel(col, H, W, P)[None, :], mask, other=0).to(tl.float32)
    return eps


@triton.jit
def _gather_patches_kernel(
    x_ptr,  # [B, C, H, W]
    ids_ptr,  # int64 [N]
    sqrt_alpha_ptr,  # [n]
    sqrt_one_minus_alpha_ptr,  # [n]
    noise_ptr,  # int64 [n], or [n, C, H, W]
    out_ptr,  # [N, C·P·P]
    N,
    num_noised,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FROM_SEED: tl.constexpr,
):
    D: tl.constexpr = C * P * P
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_col = tl.program_id(1) * BLOCK_D
    col = first_col + tl.arange(0, BLOCK_D)
    mask = (row < N)[:, None] & (col < D)[None, :]
    corner, sample = patch_corner(tl.load(ids_ptr + row, row < N, other=0), C, H, W, P)
    noised = (row < N) & (sample < num_noised)
    x = tl.load(x_ptr + corner[:, None] + patch_pixel(col, H, W, P)[None, :], mask, other=0).to(tl.float32)
    a = tl.where(noised, tl.load(sqrt_alpha_ptr + sample, noised, other=0).to(tl.float32), 1.0)
    b = tl.load(sqrt_one_minus_alpha_ptr + sample, noised, other=0).to(tl.float32)
    wanted = mask & noised[:, None]
    eps = patch_noise(noise_ptr, corner, sample, wanted, num_noised, first_col, C, H, W, P, BLOCK_D, FROM_SEED)
    x_t = a[:, None] * x + b[:, None] * eps
    tl.store(out_ptr + row[:, None] * D + col[None, :], x_t, mask)


def patch_tiles(num_patches: int, width: int) -> tuple[tuple[int, int], int, int]:
    """(grid, BLOCK_M, BLOCK_D) to cover [num_patches, width] with tiles of about 1024 numbers, 8 a thread."""
    block_d = min(256, 1 << (width - 1).bit_length())
    block_m = max(1, 1024 // block_d)
    return (-(-num_patches // block_m), -(-width // block_d)), block_m, block_d


@triton_op("gather_patches")
def gather_patches_fwd(
    x_start: Tensor,
    ids_keep: Tensor,
    sqrt_alpha: Tensor,
    sqrt_one_minus_alpha: Tensor,
    noise: Tensor,
    patch_size: int,
) -> Tensor:
    _, C, H, W = x_start.shape
    N, D = len(ids_keep), C * patch_size**2
    out = x_start.new_empty(N, D)
    if N == 0:
        return out
    grid, block_m, block_d = patch_tiles(N, D)
    wrap_triton(_gather_patches_kernel)[grid](
        x_start.contiguous(), ids_keep.contiguous(), sqrt_alpha.contiguous(), sqrt_one_minus_alpha.contiguous(),
        noise.contiguous(), out, N, len(sqrt_alpha), C, H, W, patch_size,
        BLOCK_M=block_m, BLOCK_D=block_d, FROM_SEED=noise.ndim == 1,
    )  # fmt: skip
    return out


@gather_patches_fwd.register_fake
def _(x_start, ids_keep, sqrt_alpha, sqrt_one_minus_alpha, noise, patch_size):
    return x_start.new_empty(len(ids_keep), x_start.shape[1] * patch_size**2)


def gather_patches(
    x_start: Tensor,
    ids_keep: Tensor,
    sqrt_alpha: Tensor,
    sqrt_one_minus_alpha: Tensor,
    noise: Tensor,
    patch_size: int,
) -> Tensor:
    """The visible patches of x_t. No gradient: this is data.

    Args:
        x_start: [B, C, H, W], values in [-1, 1] or scaled latents, any floating type.
        ids_keep: int64 [N], visible patches as indices into the B·L patches of the batch, sample after sample; each in
            0..B·L - 1, which the kernel does not look for.
        sqrt_alpha, sqrt_one_minus_alpha: [n], the coefficients of the first n <= B samples; the others get no noise.
        noise: int64 [n], the Philox seed of each sample's ε; or ε itself, [n, C, H, W].
        patch_size: P, divides H and W.

    Returns:
        [N, C·P·P] in x_start's type, computed in fp32 or wider.

    Raises:
        ValueError: an argument of another shape, type or device.
    """
    check_patches(x_start, ids_keep, patch_size)
    n = len(sqrt_alpha) if sqrt_alpha.ndim == 1 else -1
    if not 0 <= n <= len(x_start) or not sqrt_alpha.is_floating_point():
        expected = f"floating [n] with n <= B = {len(x_start)}"
        raise ValueError(f"sqrt_alpha: expected {expected}, got {tuple(sqrt_alpha.shape)} {sqrt_alpha.dtype}")
    if sqrt_one_minus_alpha.shape != sqrt_alpha.shape or sqrt_one_minus_alpha.dtype != sqrt_alpha.dtype:
        raise ValueError(
            f"sqrt_one_minus_alpha: expected {tuple(sqrt_alpha.shape)} {sqrt_alpha.dtype} like sqrt_alpha, "
            f"got {tuple(sqrt_one_minus_alpha.shape)} {sqrt_one_minus_alpha.dtype}"
        )
    check_noise(noise, (n, *x_start.shape[1:]))
    tensors = dict(ids_keep=ids_keep, sqrt_alpha=sqrt_alpha, sqrt_one_minus_alpha=sqrt_one_minus_alpha, noise=noise)
    check_devices(x_start, **tensors)
    op = gather_patches_fwd if use_triton(x_start) else gather_patches_ref
    return op(x_start, ids_keep, sqrt_alpha, sqrt_one_minus_alpha, noise, patch_size)


def check_patches(x_start: Tensor, ids_keep: Tensor, patch_size: int) -> None:
    if x_start.ndim != 4 or x_start.numel() == 0 or not x_start.is_floating_point():
        raise ValueError(f"x_start: expected floating [B, C, H, W], got {tuple(x_start.shape)} {x_start.dtype}")
    H, W = x_start.shape[2:]
    if patch_size < 1 or H % patch_size or W % patch_size:
        raise ValueError(f"patch_size: expected a divisor of H = {H} and W = {W}, got {patch_size}")
    if ids_keep.ndim != 1 or ids_keep.dtype != torch.int64:
        raise ValueError(f"ids_keep: expected int64 [N], got {tuple(ids_keep.shape)} {ids_keep.dtype}")


def check_noise(noise: Tensor, shape: tuple[int, ...]) -> None:
    seeds = tuple(noise.shape) == shape[:1] and noise.dtype == torch.int64
    if not seeds and (tuple(noise.shape) != tuple(shape) or not noise.is_floating_point()):
        expected = f"a seed for each sample, int64 {shape[:1]}, or floating {tuple(shape)}"
        raise ValueError(f"noise: expected {expected}, got {tuple(noise.shape)} {noise.dtype}")


def check_devices(x_start: Tensor, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.device != x_start.device:
            raise ValueError(f"{name}: expected on {x_start.device} like x_start, got {tensor.device}")
