"""add_positions: each token of a packed stream plus the embedding of its place in the image.

    y[n] = x[n] + pos_embed[ids_keep[n] % L]        dpos_embed[l] = Σ dy[n]   (over the n with ids_keep[n] % L = l)

Both passes go by places, with the table of rows that tokens.py makes: a position is read once for many samples, and its
gradient is summed in registers, in a fixed order.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import tl, triton, triton_op, use_triton, wrap_triton
from .tokens import token_slots

# A program of the forward pass serves PLACES places, each a warp's own, and walks SAMPLES samples, BLOCK_S at once.
# Columns of one warp: 8 a thread, 128 bits of bf16.
FORWARD = dict(SAMPLES=64, PLACES=4, BLOCK_S=8, BLOCK_D=256, num_warps=4)
# One of the backward pass serves one place and walks all samples: BLOCK_S at once in each of its WARPS.
BACKWARD = dict(WARPS=4, BLOCK_S=8, BLOCK_D=256, num_warps=4)


@triton.jit
def _add_positions_fwd_kernel(
    x_ptr,  # [N, D]
    slots_ptr,  # int32 [L, S], see token_slots
    pos_embed_ptr,  # [L, D]
    y_ptr,  # [N, D]
    S,
    L,
    D: tl.constexpr,
    SAMPLES: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    place = tl.program_id(0) * PLACES + tl.arange(0, PLACES)[None, :]  # [1, PLACES]
    d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, None, :]
    here = place[:, :, None]
    position = tl.load(pos_embed_ptr + here * D + d, mask=(here < L) & (d < D), other=0.0).to(tl.float32)
    first = tl.program_id(2) * SAMPLES
    for start in range(first, tl.minimum(first + SAMPLES, S), BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)[:, None]
        row = tl.load(slots_ptr + place * S + s, mask=(s < S) & (place < L), other=-1)[:, :, None].to(tl.int64)
        mask = (row >= 0) & (d < D)  # [BLOCK_S, PLACES, BLOCK_D]
        x = tl.load(x_ptr + row * D + d, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * D + d, x + position, mask)


@triton.jit
def _add_positions_bwd_kernel(
    dy_ptr,  # [N, D]
    slots_ptr,  # int32 [L, S]
    dpos_ptr,  # [L, D]
    S,
    D: tl.constexpr,
    WARPS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    place = tl.program_id(0)
    d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, None, :]
    s = tl.arange(0, BLOCK_S)[:, None] * WARPS + tl.arange(0, WARPS)[None, :]
    row = tl.load(slots_ptr + place * S + s, mask=s < S, other=-1)
    total = tl.zeros((WARPS, BLOCK_D), tl.float32)
    for _ in range(0, S, BLOCK_S * WARPS):
        here = row[:, :, None].to(tl.int64)
        dy = tl.load(dy_ptr + here * D + d, mask=(here >= 0) & (d < D), other=0.0).to(tl.float32)
        s += BLOCK_S * WARPS
        row = tl.load(slots_ptr + place * S + s, mask=s < S, other=-1)  # of the next samples, while dy is on its way
        total += tl.sum(dy, axis=0)
    # From a tile that is masked but for its first row: a row alone would go out in narrower pieces.
    first = tl.arange(0, WARPS)[:, None] == 0
    # And from columns made anew: of a reshaped d the compiler no longer knows that it is contiguous.
    col = tl.broadcast_to((tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :], total.shape)
    out = tl.broadcast_to(tl.sum(total, axis=0)[None, :], total.shape)
    tl.store(dpos_ptr + place * D + col, out, first & (col < D))


@triton_op("add_positions_fwd")
def add_positions_fwd(x: Tensor, slots: Tensor, pos_embed: Tensor) -> Tensor:
    x, pos_embed = x.contiguous(), pos_embed.contiguous()
    (L, S), D = slots.shape, x.shape[1]
    y = torch.empty_like(x)
    if x.numel() > 0:
        grid = triton.cdiv(L, FORWARD["PLACES"]), triton.cdiv(D, FORWARD["BLOCK_D"]), triton.cdiv(S, FORWARD["SAMPLES"])
        wrap_triton(_add_positions_fwd_kernel)[grid](x, slots, pos_embed, y, S, L, D=D, **FORWARD)
    return y


@add_positions_fwd.register_fake
def _(x, slots, pos_embed):
    return x.new_empty(x.shape)


@triton_op("add_positions_bwd")
def add_positions_bwd(dy: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """dpos_embed [L, D] in `dtype`."""
    dy = dy.contiguous()
    (L, S), D = slots.shape, dy.shape[1]
    dpos_embed = dy.new_empty(L, D, dtype=dtype)
    if dpos_embed.numel() > 0:
        grid = L, triton.cdiv(D, BACKWARD["BLOCK_D"])
        wrap_triton(_add_positions_bwd_kernel)[grid](dy, slots, dpos_embed, S, D=D, **BACKWARD)
    return dpos_embed


@add_positions_bwd.register_fake
def _(dy, slots, dtype):
    return dy.new_empty(slots.shape[0], dy.shape[1], dtype=dtype)


def _setup_context(ctx, inputs, output):
    _, slots, pos_embed = inputs
    ctx.dtype = pos_embed.dtype
    ctx.save_for_backward(slots)


def _backward(ctx, dy):
    return dy, None, add_positions_bwd(dy, *ctx.saved_tensors, ctx.dtype) if ctx.needs_input_grad[2] else None


add_positions_fwd.register_autograd(_backward, setup_context=_setup_context)


def add_positions_ref(x: Tensor, ids_keep: Tensor, pos_embed: Tensor) -> Tensor:
    """The definition of `add_positions`, summed in fp32 or wider."""
    wide = torch.promote_types(torch.promote_types(x.dtype, pos_embed.dtype), torch.float32)
    return (x + F.embedding(ids_keep % len(pos_embed), pos_embed.to(wide))).to(x.dtype)


def add_positions(x: Tensor, ids_keep: Tensor, pos_embed: Tensor, num_samples: int) -> Tensor:
    """x[n] + pos_embed[ids_keep[n] % L], summed in fp32 and rounded once.

    Args:
        x: [N, D], tokens of the visible patches, sample after sample; any floating type.
        ids_keep: int64 [N], their places among the S·L patches, sample after sample, each once.
        pos_embed: [L, D], any floating type.
        num_samples: S.

    Returns:
        [N, D] in x's type. Differentiable in x and pos_embed.

    Raises:
        ValueError: shapes that do not fit together, a type that is none of these, two devices.
    """
    _check(x, ids_keep, pos_embed, num_samples)
    if not (use_triton(x) and use_triton(pos_embed)):
        return add_positions_ref(x, ids_keep, pos_embed)
    return add_positions_fwd(x, token_slots(ids_keep, num_samples, len(pos_embed), 0), pos_embed)


def _check(x: Tensor, ids_keep: Tensor, pos_embed: Tensor, num_samples: int) -> None:
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"x: expected floating-point [N, D], got {x.dtype} {tuple(x.shape)}")
    N, D = x.shape
    if ids_keep.shape != (N,) or ids_keep.dtype != torch.int64:
        raise ValueError(f"ids_keep: expected int64 [{N}], got {ids_keep.dtype} {tuple(ids_keep.shape)}")
    if pos_embed.ndim != 2 or pos_embed.shape[1] != D or not pos_embed.is_floating_point():
        got = f"{pos_embed.dtype} {tuple(pos_embed.shape)}"
        raise ValueError(f"pos_embed: expected floating-point [L, {D}], the width of x, got {got}")
    if num_samples < 1 or num_samples * len(pos_embed) < N:
        least = max(1, -(-N // max(len(pos_embed), 1)))
        raise ValueError(f"num_samples: expected at least {least}, for {N} tokens, got {num_samples}")
    for name, tensor in dict(ids_keep=ids_keep, pos_embed=pos_embed).items():
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected on {x.device} like x, got {tensor.device}")
