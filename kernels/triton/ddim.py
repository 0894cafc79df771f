"""ddim_step in Triton: a program takes BLOCK Philox counters of one image, with four values each."""

import torch
from torch import Tensor

from ..backend import tl, triton
from .op import triton_op, wrap_triton
from .philox import randn4x

BLOCK = 256  # counters per program; each stands for four values


@triton.jit
def _load_image(ptr, b, i, inside, stride_b, stride_c, stride_h, stride_w, H: tl.constexpr, W: tl.constexpr):
    """Load elements i of image b in fp32; i counts as if [C, H, W] were contiguous."""
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
    i = counter[:, None] * 4 + tl.arange(0, 4)[None, :]  # [BLOCK, 4]: a counter's noise is for four neighbours
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
def ddim_step_fwd(
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
