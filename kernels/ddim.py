"""One DDIM step: guidance, the predicted image, clipping, the move to the next noise level and fresh noise.

Song et al. 2021, "Denoising diffusion implicit models", equation 12; α is its cumulative product:

    prediction = uncond + cfg_scale·(cond - uncond)                 of ε, or of x_start
    x_start    = (x_t - √(1-α_t)·ε) / √α_t                          or the prediction itself; then clipped
    ε          = (x_t - √α_t·x_start) / √(1-α_t)                    made again, from the clipped x_start
    x_next     = √α_next·x_start + √(1-α_next-σ²)·ε + σ·noise

Fused, each element of x_t and of the two predictions is read once, each of x_next and x_start written once;
the noise never exists in memory.
"""

import torch
from torch import Tensor

from .backend import tl, triton, triton_op, use_triton, wrap_triton
from .philox import philox_randn_rows, randn4x

BLOCK = 256  # counters, of four numbers each, that one program takes


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
    """The definition of `ddim_step`, in x_t's type."""
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


@triton.jit
def _load_image(ptr, b, i, inside, stride_b, stride_c, stride_h, stride_w, H: tl.constexpr, W: tl.constexpr):
    """Elements i of image b in fp32, numbered as if [C, H, W] were contiguous."""
    offset = i // (H * W) * stride_c + i // W % H * stride_h + i % W * stride_w
    return tl.load(ptr + b * stride_b + offset, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _ddim_step_kernel(
    x_t_ptr,  # [B, C, H, W]
    cond_ptr,  # [B, C, H, W], strided
    uncond_ptr,  # [B, C, H, W], strided; read if GUIDED
    coefficients_ptr,  # [5]
    noise_ptr,  # [B, C, H, W]; read if GIVEN
    seed_ptr,  # int64 []; read if PHILOX
    offsets_ptr,  # int64 [B]; read if PHILOX
    x_next_ptr,  # [B, C, H, W]
    x_start_ptr,  # [B, C, H, W]
    stride_cond_b,
    stride_cond_c,
    stride_cond_h,
    stride_cond_w,
    stride_uncond_b,
    stride_uncond_c,
    stride_uncond_h,
    stride_uncond_w,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    GUIDED: tl.constexpr,
    CFG_SCALE: tl.constexpr,
    FROM_XSTART: tl.constexpr,
    CLIP: tl.constexpr,
    GIVEN: tl.constexpr,
    PHILOX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    counter = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    i = counter[:, None] * 4 + tl.arange(0, 4)[None, :]  # [BLOCK, 4]: a counter makes four neighbours
    inside = i < C * H * W
    here = b * (C * H * W) + i
    sqrt_alpha = tl.load(coefficients_ptr)
    sqrt_one_minus_alpha = tl.load(coefficients_ptr + 1)

    x_t = tl.load(x_t_ptr + here, mask=inside, other=0.0)
    prediction = _load_image(cond_ptr, b, i, inside, stride_cond_b, stride_cond_c, stride_cond_h, stride_cond_w, H, W)
    if GUIDED:
        uncond = _load_image(
            uncond_ptr, b, i, inside, stride_uncond_b, stride_uncond_c, stride_uncond_h, stride_uncond_w, H, W
        )
        prediction = uncond + CFG_SCALE * (prediction - uncond)
    x_start = prediction if FROM_XSTART else tl.div_rn(x_t - sqrt_one_minus_alpha * prediction, sqrt_alpha)
    if CLIP:
        x_start = tl.clamp(x_start, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
    eps = tl.div_rn(x_t - sqrt_alpha * x_start, sqrt_one_minus_alpha)
    x_next = tl.load(coefficients_ptr + 2) * x_start + tl.load(coefficients_ptr + 3) * eps
    if GIVEN:
        x_next += tl.load(coefficients_ptr + 4) * tl.load(noise_ptr + here, mask=inside, other=0.0)
    elif PHILOX:
        n0, n1, n2, n3 = randn4x(tl.load(seed_ptr), tl.load(offsets_ptr + b) + counter)
        noise = tl.join(tl.join(n0, n2), tl.join(n1, n3)).reshape(BLOCK, 4)
        x_next += tl.load(coefficients_ptr + 4) * noise
    tl.store(x_next_ptr + here, x_next, mask=inside)
    tl.store(x_start_ptr + here, x_start, mask=inside)


@triton_op("ddim_step")
def _ddim_step(
    x_t: Tensor,
    pred_cond: Tensor,
    pred_uncond: Tensor | None,
    cfg_scale: float,
    coefficients: Tensor,
    from_xstart: bool,
    clip: bool,
    noise: Tensor | None,
    seed: Tensor | None,
    offsets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    B, C, H, W = x_t.shape
    x_next, x_start = torch.empty_like(x_t), torch.empty_like(x_t)
    if x_t.numel() == 0:
        return x_next, x_start
    guided, given, philox = pred_uncond is not None, noise is not None, noise is None and seed is not None
    uncond = pred_cond if pred_uncond is None else pred_uncond
    sources = (noise if given else x_t, *((seed, offsets) if philox else (x_t, x_t)))
    wrap_triton(_ddim_step_kernel)[(B, triton.cdiv(C * H * W, 4 * BLOCK))](
        x_t, pred_cond, uncond, coefficients, *sources, x_next, x_start, *pred_cond.stride(), *uncond.stride(),
        C=C, H=H, W=W, GUIDED=guided, CFG_SCALE=cfg_scale if guided else 1.0, FROM_XSTART=from_xstart, CLIP=clip,
        GIVEN=given, PHILOX=philox, BLOCK=BLOCK,
    )  # fmt: skip
    return x_next, x_start


@_ddim_step.register_fake
def _(x_t, pred_cond, pred_uncond, cfg_scale, coefficients, from_xstart, clip, noise, seed, offsets):
    return torch.empty_like(x_t), torch.empty_like(x_t)


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
    """One DDIM step of a batch from one noise level to the next. No gradient: this is sampling.

    Args:
        x_t: [B, C, H, W], float32 or float64; the step is computed in its type.
        pred_cond, pred_uncond: [B, C, H, W], any float type and strides; x_start if `from_xstart`, else ε.
            Without pred_uncond there is no guidance and cfg_scale is not used.
        coefficients: [5] in x_t's type: √α_t, √(1-α_t) (above 0), √α_next, √(1-α_next-σ²), σ.
        clip: hold x_start in [-1, 1].
        noise: [B, C, H, W] in x_t's type; or else seed, int64 [], and offsets, int64 [B], for
            `philox_randn_rows(seed, offsets, (C, H, W))`; or neither, for a step with σ = 0.

    Returns:
        (x_next, x_start), shaped and typed as x_t.

    Raises:
        ValueError: another shape, type or device than these; a seed without offsets.
    """
    _check(x_t, pred_cond, pred_uncond, coefficients, noise, seed, offsets)
    predictions = [p for p in (pred_cond, pred_uncond) if p is not None]
    if not all(use_triton(x) for x in (x_t, *predictions)):
        return ddim_step_ref(
            x_t, pred_cond, pred_uncond, cfg_scale, coefficients,
            from_xstart=from_xstart, clip=clip, noise=noise, seed=seed, offsets=offsets,
        )  # fmt: skip
    noise = None if noise is None else noise.contiguous()
    return _ddim_step(
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
    if x_t.ndim != 4 or x_t.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x_t: expected float32 or float64 [B, C, H, W], got {x_t.dtype} {tuple(x_t.shape)}")
    if seed is not None and noise is None and offsets is None:
        raise ValueError("offsets: expected int64 [B] beside a seed, got None")
    shape, integer = tuple(x_t.shape), torch.int64
    expected = {
        "pred_cond": (pred_cond, shape, None),
        "pred_uncond": (pred_uncond, shape, None),
        "coefficients": (coefficients, (5,), x_t.dtype),
        "noise": (noise, shape, x_t.dtype),
        "seed": (seed, (), integer),
        "offsets": (offsets, shape[:1], integer),
    }
    for name, (x, size, dtype) in expected.items():
        if x is None:
            continue
        if tuple(x.shape) != size or (not x.is_floating_point() if dtype is None else x.dtype != dtype):
            kind = "any floating type" if dtype is None else dtype
            raise ValueError(f"{name}: expected {kind} {size}, got {x.dtype} {tuple(x.shape)}")
        if x.device != x_t.device:
            raise ValueError(f"{name}: expected on {x_t.device} like x_t, got {x.device}")
