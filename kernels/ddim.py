"""One DDIM step: guidance, predicted image, clipping, move to the next noise level, fresh noise.

Song et al. 2021, "Denoising diffusion implicit models", equation 12. α is the cumulative product, as in that paper:

    prediction = uncond + cfg_scale·(cond - uncond)                 of ε, or of x_start
    x_start    = (x_t - √(1-α_t)·ε) / √α_t                          or the prediction itself; then clipped
    ε          = (x_t - √α_t·x_start) / √(1-α_t)                    recomputed from the clipped x_start
    x_next     = √α_next·x_start + √(1-α_next-σ²)·ε + σ·noise

The fused kernel reads each element of x_t and of both predictions once, and writes x_next and x_start once. Noise drawn
from a seed never exists in memory.
"""

import torch
from torch import Tensor

from .backend import use_triton
from .checks import check_devices, check_tensor
from .philox import philox_randn_rows
from .triton.ddim import ddim_step_fwd


def ddim_step_ref(
    x_t: Tensor,
    pred_cond: Tensor,
    pred_uncond: Tensor | None,
    cfg_scale: float,
    coefficients: Tensor,
    *,
    from_xstart: bool,
    clip: bool,
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition of `ddim_step`, computed in x_t's type."""
    sqrt_alpha, sqrt_one_minus_alpha, sqrt_alpha_next, eps_scale, sigma = coefficients
    prediction = pred_cond.to(x_t.dtype)
    if pred_uncond is not None:
        uncond = pred_uncond.to(x_t.dtype)
        prediction = uncond + cfg_scale * (prediction - uncond)
    x_start = prediction if from_xstart else (x_t - sqrt_one_minus_alpha * prediction) / sqrt_alpha
    if clip:
        x_start = x_start.clamp(-1, 1)
    eps = (x_t - sqrt_alpha * x_start) / sqrt_one_minus_alpha
    x_next = sqrt_alpha_next * x_start + eps_scale * eps
    if noise is None and seed is not None and offsets is not None:
        noise = philox_randn_rows(seed, offsets, x_t.shape[1:], x_t.dtype)
    if noise is not None:
        x_next = x_next + sigma * noise
    return x_next, x_start


def ddim_step(
    x_t: Tensor,
    pred_cond: Tensor,
    pred_uncond: Tensor | None,
    cfg_scale: float,
    coefficients: Tensor,
    *,
    from_xstart: bool,
    clip: bool,
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Move a batch from one noise level to the next by one DDIM step. Not differentiable.

    Args:
        x_t: [B, C, H, W], float32 or float64; the step is computed in this type.
        pred_cond, pred_uncond: [B, C, H, W], any floating type and strides. If pred_uncond is None, there is no
            guidance and cfg_scale is ignored.
        cfg_scale: guidance scale.
        coefficients: [5] in x_t's type: √α_t, √(1-α_t) (above 0), √α_next, √(1-α_next-σ²), σ.
        from_xstart: whether the predictions are x_start; else they are ε.
        clip: clamp x_start to [-1, 1].
        noise: [B, C, H, W] in x_t's type. None: drawn by `philox_randn_rows(seed, offsets, (C, H, W))`, or no noise
            if there is no seed either (σ = 0).
        seed: int64 []. offsets: int64 [B].

    Returns:
        (x_next, x_start), both in x_t's shape and type.

    Raises:
        ValueError: an argument has another shape, type or device, or there is a seed without offsets.
    """
    _check(x_t, pred_cond, pred_uncond, coefficients, noise, seed, offsets)
    predictions = [p for p in (pred_cond, pred_uncond) if p is not None]
    if not all(use_triton(x) for x in (x_t, *predictions)):
        return ddim_step_ref(
            x_t, pred_cond, pred_uncond, cfg_scale, coefficients,
            from_xstart=from_xstart, clip=clip, noise=noise, seed=seed, offsets=offsets,
        )  # fmt: skip
    noise = None if noise is None else noise.contiguous()
    return ddim_step_fwd(
        x_t.contiguous(), pred_cond, pred_uncond, float(cfg_scale), coefficients.contiguous(), from_xstart, clip,
        noise, seed, offsets if offsets is None else offsets.contiguous(),
    )  # fmt: skip


def _check(
    x_t: Tensor,
    pred_cond: Tensor,
    pred_uncond: Tensor | None,
    coefficients: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    offsets: Tensor | None,
) -> None:
    check_tensor("x_t", x_t, ("B", "C", "H", "W"), torch.float32, torch.float64)
    if seed is not None and noise is None and offsets is None:
        raise ValueError("offsets: expected int64 [B] beside a seed, got None")
    check_tensor("pred_cond", pred_cond, x_t.shape)
    check_tensor("coefficients", coefficients, (5,), x_t.dtype)
    if pred_uncond is not None:
        check_tensor("pred_uncond", pred_uncond, x_t.shape)
    if noise is not None:
        check_tensor("noise", noise, x_t.shape, x_t.dtype)
    if seed is not None:
        check_tensor("seed", seed, (), torch.int64)
    if offsets is not None:
        check_tensor("offsets", offsets, x_t.shape[:1], torch.int64)
    predictions = dict(pred_cond=pred_cond, pred_uncond=pred_uncond)
    check_devices(x_t=x_t, **predictions, coefficients=coefficients, noise=noise, seed=seed, offsets=offsets)
