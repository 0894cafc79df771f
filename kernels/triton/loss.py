"""masked_diffusion_loss in Triton: forward and backward, a program takes one tile of patches and columns."""

import torch
from torch import Tensor

from ..backend import tl, triton
from .op import triton_op, wrap_triton
from .patches import patch_corner, patch_noise, patch_pixel, patch_tiles


@triton.jit
def _tile(num_patches, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """A program's (rows [BLOCK_M], columns [BLOCK_D], mask, offsets into the prediction's x̂0 half)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    return row, col, (row < num_patches)[:, None] & (col < D)[None, :], row[:, None] * (2 * D) + col[None, :]


@triton.jit
def _errors(
    prediction_ptr,
    x_ptr,
    roles_ptr,
    noise_ptr,
    num_patches,
    num_noised,
    num_eps,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FROM_SEED: tl.constexpr,
):
    """For a program's tile [BLOCK_M, BLOCK_D]: (x̂0 - x0, ε̂ - ε, noised rows).

    Errors are 0 where they are not scored.
    """
    D: tl.constexpr = C * P * P
    row, col, mask, at = _tile(num_patches, D, BLOCK_M, BLOCK_D)
    role = tl.load(roles_ptr + row, row < num_patches, other=2)
    visible = role == 1
    noised = row < num_noised
    score_eps = mask & (visible & noised)[:, None]
    # num_eps == num_noised: noised samples hide nothing, so x̂0 is scored on all their patches.
    score_x0 = mask & ((role == 0) | (noised & (num_eps == num_noised)))[:, None]

    corner, sample = patch_corner(row, C, H, W, P)
    pixel = corner[:, None] + patch_pixel(col, H, W, P)[None, :]
    error_x0 = tl.load(prediction_ptr + at, score_x0, other=0).to(tl.float32)
    error_x0 -= tl.load(x_ptr + pixel, score_x0, other=0).to(tl.float32)
    error_eps = tl.load(prediction_ptr + at + D, score_eps, other=0).to(tl.float32)
    L: tl.constexpr = (H // P) * (W // P)
    first_col = tl.program_id(1) * BLOCK_D
    error_eps -= patch_noise(
        noise_ptr, corner, sample, score_eps, num_noised // L, first_col, C, H, W, P, BLOCK_D, FROM_SEED
    )
    return error_x0, tl.where(score_eps, error_eps, 0.0), noised


@triton.jit
def _masked_diffusion_loss_fwd_kernel(
    prediction_ptr,  # [B·L, 2·C·P·P]
    x_ptr,  # [B, C, H, W]
    roles_ptr,  # uint8 [B·L]: 0 hidden, 1 visible, 2 ignored
    noise_ptr,  # int64 [n], or [n, C, H, W]
    partials_ptr,  # fp32 [4, programs]: each program's share of total, eps, x0, clean
    num_patches,  # B·L
    num_noised,  # n·L
    num_eps,  # patches in each of the three means
    num_x0,
    num_clean,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FROM_SEED: tl.constexpr,
):
    error_x0, error_eps, noised = _errors(
        prediction_ptr, x_ptr, roles_ptr, noise_ptr, num_patches, num_noised, num_eps,
        C, H, W, P, BLOCK_M, BLOCK_D, FROM_SEED,
    )  # fmt: skip
    D: tl.constexpr = C * P * P
    squares_x0 = tl.sum(error_x0 * error_x0, 1)  # [BLOCK_M]
    eps = tl.sum(error_eps * error_eps) / D / tl.maximum(num_eps, 1)
    x0 = tl.sum(tl.where(noised, squares_x0, 0.0)) / D / tl.maximum(num_x0, 1)
    clean = tl.sum(tl.where(noised, 0.0, squares_x0)) / D / tl.maximum(num_clean, 1)
    clean_share = (num_patches - num_noised) / num_patches
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    programs = tl.num_programs(0) * tl.num_programs(1)
    tl.store(partials_ptr + program, 0.5 * (1 - clean_share) * (eps + x0) + clean_share * clean)
    tl.store(partials_ptr + programs + program, eps)
    tl.store(partials_ptr + 2 * programs + program, x0)
    tl.store(partials_ptr + 3 * programs + program, clean)


@triton.jit
def _masked_diffusion_loss_bwd_kernel(
    dlosses_ptr,  # fp32 [4]: the upstream gradients of total, eps, x0, clean
    prediction_ptr,  # [B·L, 2·C·P·P]
    x_ptr,  # [B, C, H, W]
    roles_ptr,  # uint8 [B·L]: 0 hidden, 1 visible, 2 ignored
    noise_ptr,  # int64 [n], or [n, C, H, W]
    dprediction_ptr,  # [B·L, 2·C·P·P]
    num_patches,
    num_noised,
    num_eps,
    num_x0,
    num_clean,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FROM_SEED: tl.constexpr,
):
    error_x0, error_eps, noised = _errors(
        prediction_ptr, x_ptr, roles_ptr, noise_ptr, num_patches, num_noised, num_eps,
        C, H, W, P, BLOCK_M, BLOCK_D, FROM_SEED,
    )  # fmt: skip
    D: tl.constexpr = C * P * P
    dtotal = tl.load(dlosses_ptr)
    clean_share = (num_patches - num_noised) / num_patches
    half = 0.5 * (1 - clean_share) * dtotal
    deps = (tl.load(dlosses_ptr + 1) + half) * (2.0 / D) / tl.maximum(num_eps, 1)
    dx0 = (tl.load(dlosses_ptr + 2) + half) * (2.0 / D) / tl.maximum(num_x0, 1)
    dclean = (tl.load(dlosses_ptr + 3) + clean_share * dtotal) * (2.0 / D) / tl.maximum(num_clean, 1)
    # Not from `_errors`: torch.compile would take all of its pointers for written to, and copy them.
    _, _, mask, at = _tile(num_patches, D, BLOCK_M, BLOCK_D)
    tl.store(dprediction_ptr + at, error_x0 * tl.where(noised, dx0, dclean)[:, None], mask)
    tl.store(dprediction_ptr + at + D, error_eps * deps, mask)


def _arguments(
    prediction: Tensor, x_start: Tensor, roles: Tensor, noise: Tensor, patch_size: int, num_noised: int, *counts: int
) -> tuple[tuple[int, int], tuple[Tensor, ...], tuple[int, ...], dict]:
    """(grid, tensors, numbers, constants) of both kernels."""
    _, C, H, W = x_start.shape
    grid, block_m, block_d = patch_tiles(len(prediction), C * patch_size**2)
    tensors = prediction.contiguous(), x_start.contiguous(), roles, noise.contiguous()
    numbers = len(prediction), num_noised * (H // patch_size) * (W // patch_size), *counts
    constants = dict(C=C, H=H, W=W, P=patch_size, BLOCK_M=block_m, BLOCK_D=block_d, FROM_SEED=noise.ndim == 1)
    return grid, tensors, numbers, constants


@triton_op("masked_diffusion_loss")
def masked_diffusion_loss_fwd(
    prediction: Tensor,
    x_start: Tensor,
    roles: Tensor,
    noise: Tensor,
    patch_size: int,
    num_noised: int,
    num_eps: int,
    num_x0: int,
    num_clean: int,
) -> Tensor:
    """The losses (total, eps, x0, clean): fp32 [4].

    roles: uint8 [B·L], 0 hidden, 1 visible, 2 ignored. num_eps, num_x0, num_clean: patches in each of the three means.
    """
    counts = num_noised, num_eps, num_x0, num_clean
    grid, tensors, numbers, constants = _arguments(prediction, x_start, roles, noise, patch_size, *counts)
    partials = prediction.new_empty(4, grid[0] * grid[1], dtype=torch.float32)
    wrap_triton(_masked_diffusion_loss_fwd_kernel)[grid](*tensors, partials, *numbers, **constants)
    return partials.sum(1)


@triton_op("masked_diffusion_loss_backward")
def masked_diffusion_loss_bwd(
    dlosses: Tensor,
    prediction: Tensor,
    x_start: Tensor,
    roles: Tensor,
    noise: Tensor,
    patch_size: int,
    num_noised: int,
    num_eps: int,
    num_x0: int,
    num_clean: int,
) -> Tensor:
    """The gradient of the prediction, from dlosses, fp32 [4]."""
    counts = num_noised, num_eps, num_x0, num_clean
    grid, tensors, numbers, constants = _arguments(prediction, x_start, roles, noise, patch_size, *counts)
    dprediction = prediction.new_empty(prediction.shape)
    wrap_triton(_masked_diffusion_loss_bwd_kernel)[grid](
        dlosses.contiguous(), *tensors, dprediction, *numbers, **constants
    )
    return dprediction


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.numbers = inputs[4:]


def _backward(ctx, dlosses):
    return masked_diffusion_loss_bwd(dlosses, *ctx.saved_tensors, *ctx.numbers), *(None,) * 8


masked_diffusion_loss_fwd.register_autograd(_backward, setup_context=_setup_context)
