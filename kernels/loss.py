"""masked_diffusion_loss: the objective of UMD (its Eqs. 4 to 6) on the head's output.

    noised samples:      ½ [ mean over visible pixels (ε̂ - ε)²  +  mean over masked pixels (x̂0 - x0)² ]
                         fully visible samples (no mask): both means run over all pixels
    noise-free samples:  mean over masked pixels (x̂0 - x0)²

Masked patches named in `ids_ignored` count in no mean: where only a random subset of them is predicted, the rest.

ε is made again from the seeds `noise` that `gather_patches` used. Forward and backward each read the prediction and
x_start once, and only where they are scored: ε̂ of visible patches, x̂0 and x0 of masked ones. Neither stores ε, a target
or an error; the backward makes the errors again, which moves fewer bytes than to write a gradient in the forward and
to scale it by the upstream gradient later.
"""

import torch
from torch import Tensor

from .backend import tl, triton, triton_op, use_triton, wrap_triton
from .patches import (
    check_devices,
    check_noise,
    check_patches,
    patch_corner,
    patch_noise,
    patch_pixel,
    patch_tiles,
    patchify,
    standard_noise,
)


def masked_diffusion_loss_ref(
    prediction: Tensor,
    x_start: Tensor,
    ids_keep: Tensor,
    num_visible_noised: int,
    num_noised: int,
    noise: Tensor,
    patch_size: int,
    ids_ignored: Tensor | None = None,
    num_ignored_noised: int = 0,
) -> tuple[Tensor, Tensor]:
    """The definition of `masked_diffusion_loss`, in fp32 or wider."""
    target_x0 = patchify(x_start, patch_size).to(torch.promote_types(prediction.dtype, torch.float32))
    B, L, D = target_x0.shape
    n = num_noised
    pred_x0, pred_eps = prediction.to(target_x0.dtype).view(B, L, 2, D).unbind(2)
    visible = torch.zeros(B * L, dtype=target_x0.dtype, device=prediction.device).index_fill(0, ids_keep, 1)
    masked = 1 - visible
    ignored = 0
    if ids_ignored is not None:
        masked, ignored = masked.index_fill(0, ids_ignored, 0), len(ids_ignored)
    visible, masked = visible.view(B, L), masked.view(B, L)
    zero = prediction.new_zeros((), dtype=target_x0.dtype)

    def mean(squared_error: Tensor, weight: Tensor, count: int) -> Tensor:
        return (squared_error.mean(-1) * weight).sum() / count

    loss_eps = loss_x0 = loss_clean = zero
    if n > 0:
        eps = patchify(standard_noise(noise, x_start[:n]), patch_size)
        all_visible = num_visible_noised == n * L
        on_eps, on_x0 = (torch.ones_like(masked[:n]),) * 2 if all_visible else (visible[:n], masked[:n])
        loss_eps = mean((pred_eps[:n] - eps) ** 2, on_eps, num_visible_noised)
        hidden = n * L - num_visible_noised - num_ignored_noised
        loss_x0 = mean((pred_x0[:n] - target_x0[:n]) ** 2, on_x0, n * L if all_visible else hidden)
    if n < B:
        hidden = (B - n) * L - (len(ids_keep) - num_visible_noised) - (ignored - num_ignored_noised)
        loss_clean = mean((pred_x0[n:] - target_x0[n:]) ** 2, masked[n:], hidden)
    clean_share = (B - n) / B
    total = (1 - clean_share) * 0.5 * (loss_eps + loss_x0) + clean_share * loss_clean
    return total, torch.stack([loss_eps, loss_x0, loss_clean]).detach()


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
    """Of a program's tile [BLOCK_M, BLOCK_D]: x̂0 - x0 and ε̂ - ε, 0 where they are not scored; which rows are noised;
    offsets into the prediction's x̂0 half, and their mask."""
    D: tl.constexpr = C * P * P
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_col = tl.program_id(1) * BLOCK_D
    col = first_col + tl.arange(0, BLOCK_D)
    mask = (row < num_patches)[:, None] & (col < D)[None, :]
    role = tl.load(roles_ptr + row, row < num_patches, other=2)
    visible = role == 1
    noised = row < num_noised
    score_eps = mask & (visible & noised)[:, None]
    score_x0 = mask & ((role == 0) | (noised & (num_eps == num_noised)))[:, None]  # nothing hidden: both halves

    at = row[:, None] * (2 * D) + col[None, :]
    corner, sample = patch_corner(row, C, H, W, P)
    pixel = corner[:, None] + patch_pixel(col, H, W, P)[None, :]
    error_x0 = tl.load(prediction_ptr + at, score_x0, other=0).to(tl.float32)
    error_x0 -= tl.load(x_ptr + pixel, score_x0, other=0).to(tl.float32)
    error_eps = tl.load(prediction_ptr + at + D, score_eps, other=0).to(tl.float32)
    L: tl.constexpr = (H // P) * (W // P)
    error_eps -= patch_noise(
        noise_ptr, corner, sample, score_eps, num_noised // L, first_col, C, H, W, P, BLOCK_D, FROM_SEED
    )
    return error_x0, tl.where(score_eps, error_eps, 0.0), noised, at, mask


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
    error_x0, error_eps, noised, _, _ = _errors(
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
    error_x0, error_eps, noised, at, mask = _errors(
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
    """(total, eps, x0, clean), fp32 [4].

    roles: uint8 [B·L], 0 hidden, 1 visible, 2 ignored; num_eps, num_x0, num_clean: patches in each mean.
    """
    counts = num_noised, num_eps, num_x0, num_clean
    grid, tensors, numbers, constants = _arguments(prediction, x_start, roles, noise, patch_size, *counts)
    partials = prediction.new_empty(4, grid[0] * grid[1], dtype=torch.float32)
    wrap_triton(_masked_diffusion_loss_fwd_kernel)[grid](*tensors, partials, *numbers, **constants)
    return partials.sum(1)


@masked_diffusion_loss_fwd.register_fake
def _(prediction, x_start, roles, noise, patch_size, num_noised, num_eps, num_x0, num_clean):
    return prediction.new_empty(4, dtype=torch.float32)


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
    """dprediction, from dlosses, fp32 [4]."""
    counts = num_noised, num_eps, num_x0, num_clean
    grid, tensors, numbers, constants = _arguments(prediction, x_start, roles, noise, patch_size, *counts)
    dprediction = prediction.new_empty(prediction.shape)
    wrap_triton(_masked_diffusion_loss_bwd_kernel)[grid](
        dlosses.contiguous(), *tensors, dprediction, *numbers, **constants
    )
    return dprediction


@masked_diffusion_loss_bwd.register_fake
def _(dlosses, prediction, x_start, roles, noise, patch_size, num_noised, num_eps, num_x0, num_clean):
    return prediction.new_empty(prediction.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.numbers = inputs[4:]


def _backward(ctx, dlosses):
    return masked_diffusion_loss_bwd(dlosses, *ctx.saved_tensors, *ctx.numbers), *(None,) * 8


masked_diffusion_loss_fwd.register_autograd(_backward, setup_context=_setup_context)


def masked_diffusion_loss(
    prediction: Tensor,
    x_start: Tensor,
    ids_keep: Tensor,
    num_visible_noised: int,
    num_noised: int,
    noise: Tensor,
    patch_size: int,
    ids_ignored: Tensor | None = None,
    num_ignored_noised: int = 0,
) -> tuple[Tensor, Tensor]:
    """The loss of a batch whose first `num_noised` samples are noised and whose others are noise-free.

    Args:
        prediction: [B·L, 2·C·P·P], first x̂0, then ε̂, any floating type. The only argument with a gradient.
        x_start: [B, C, H, W], any floating type.
        ids_keep: int64, visible patches as indices into the B·L patches, each at most once.
        num_visible_noised: how many of `ids_keep` belong to the noised samples.
        num_noised: n, 0 <= n <= B.
        noise, patch_size: as in `gather_patches`.
        ids_ignored: int64, hidden patches that are not scored, each at most once; the prediction is not read there.
        num_ignored_noised: how many of `ids_ignored` belong to the noised samples.

    Returns:
        (total, parts [3]): total = (1 - f)·½(eps + x0) + f·clean with f = (B - n)/B; parts = eps, x0, clean, detached;
        a part of an absent group is 0. In fp32, or fp64 for an fp64 prediction.

    Raises:
        ValueError: an argument of another shape, type or device; counts that leave a mean without patches.
    """
    check_patches(x_start, ids_keep, patch_size)
    B, C, H, W = x_start.shape
    L, n = (H // patch_size) * (W // patch_size), num_noised
    shape = (B * L, 2 * C * patch_size**2)
    if tuple(prediction.shape) != shape or not prediction.is_floating_point():
        raise ValueError(
            f"prediction: expected floating {shape} for x_start {tuple(x_start.shape)} and patch size {patch_size}, "
            f"got {tuple(prediction.shape)} {prediction.dtype}"
        )
    if not 0 <= n <= B:
        raise ValueError(f"num_noised: expected 0 to B = {B}, got {n}")
    if not min(n, 1) <= num_visible_noised <= min(n * L, len(ids_keep)):
        raise ValueError(
            f"num_visible_noised: expected {min(n, 1)} to {min(n * L, len(ids_keep))} of {len(ids_keep)} visible "
            f"patches in {n} noised samples, got {num_visible_noised}"
        )
    hidden_noised = n * L - num_visible_noised
    hidden_clean = (B - n) * L - (len(ids_keep) - num_visible_noised)
    if hidden_clean < min(B - n, 1):
        raise ValueError(
            f"ids_keep: expected a hidden patch among the {(B - n) * L} of the noise-free samples, "
            f"got {len(ids_keep) - num_visible_noised} visible ones"
        )
    ignored = 0
    if ids_ignored is not None:
        check_devices(x_start, ids_ignored=ids_ignored)
        if ids_ignored.ndim != 1 or ids_ignored.dtype != torch.int64:
            raise ValueError(f"ids_ignored: expected int64 [N], got {tuple(ids_ignored.shape)} {ids_ignored.dtype}")
        ignored = len(ids_ignored)
    left = hidden_noised - num_ignored_noised, hidden_clean - (ignored - num_ignored_noised)
    if not 0 <= num_ignored_noised <= ignored or left[0] < min(hidden_noised, 1) or left[1] < min(B - n, 1):
        raise ValueError(
            f"ids_ignored: expected to leave some of the {hidden_noised} hidden patches of noised samples and of the "
            f"{hidden_clean} of noise-free ones, got {num_ignored_noised} and {ignored - num_ignored_noised} ignored"
        )
    check_noise(noise, (n, C, H, W))
    check_devices(x_start, prediction=prediction, ids_keep=ids_keep, noise=noise)
    if not (use_triton(prediction) and use_triton(x_start)):
        return masked_diffusion_loss_ref(
            prediction, x_start, ids_keep, num_visible_noised, n, noise, patch_size, ids_ignored, num_ignored_noised
        )
    roles = torch.zeros(B * L, dtype=torch.uint8, device=prediction.device).index_fill_(0, ids_keep, 1)
    if ids_ignored is not None:
        roles.index_fill_(0, ids_ignored, 2)
    losses = masked_diffusion_loss_fwd(
        prediction, x_start, roles, noise, patch_size, n, num_visible_noised, left[0] or n * L, left[1]
    )
    return losses[0], losses[1:].detach()
