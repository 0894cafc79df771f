"""gather_patches in Triton, and helpers for the places of patches in an image, which the loss uses too."""

from torch import Tensor

from ..backend import tl, triton
from .op import triton_op, wrap_triton
from .philox import normal_pair, randn4x


@triton.jit
def patch_corner(patch, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, P: tl.constexpr):
    """For patches numbered through the batch: (offset of their first pixel in [B, C, H, W], their sample)."""
    across: tl.constexpr = W // P
    patches: tl.constexpr = (H // P) * across
    sample, place = patch // patches, patch % patches
    return sample * (C * H * W) + (place // across) * (P * W) + (place % across) * P, sample


@triton.jit
def patch_pixel(col, H: tl.constexpr, W: tl.constexpr, P: tl.constexpr):
    """Offsets from a patch's corner in [C, H, W] of the columns c·P·P + i·P + j of its row."""
    # col // P % P, not col % (P * P) // P: only then Triton sees that P columns are contiguous and loads them at once
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
    """ε of columns first_col : first_col + BLOCK_D of the patches at these corners: fp32 [BLOCK_M, BLOCK_D].

    Element i of a sample's ε is number i % 4 of counter i // 4 under the sample's seed. If 4 divides P, four neighbours
    in a patch's row use the four numbers of one counter. Otherwise a pair or a single number of a counter is used, and
    it is picked before the costly steps.
    """
    # An else and one return: Triton also compiles code after a static `if` that returns.
    if FROM_SEED:
        SHARED: tl.constexpr = 4 if P % 4 == 0 else (2 if P % 2 == 0 else 1)
        col = first_col + tl.arange(0, BLOCK_D // SHARED) * SHARED
        first = (corner - sample * (C * H * W)).to(tl.int32)  # the patch's corner within its sample
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
    """(grid, BLOCK_M, BLOCK_D) that cover [num_patches, width] with tiles of about 1024 values, 8 per thread."""
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
