"""add_positions in Triton. Programs work by place: they read a position once for many samples.

The backward pass sums a position's gradient in registers.
"""

import torch
from torch import Tensor

from ..backend import tl, triton
from .op import triton_op, wrap_triton
from .tiles import store_row

# Forward: a program serves PLACES places, one per warp, and walks SAMPLES samples, BLOCK_S at a time. A warp has
# BLOCK_D columns: 8 per thread, 128 bits of bf16.
FORWARD = dict(SAMPLES=64, PLACES=4, BLOCK_S=8, BLOCK_D=256, num_warps=4)
# Backward: a program serves one place and walks all samples, BLOCK_S at a time in each of its WARPS.
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
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    s = tl.arange(0, BLOCK_S * WARPS)  # row r of a tile is of warp r % WARPS, which sums its samples in registers
    row = tl.load(slots_ptr + place * S + s, mask=s < S, other=-1)
    total = tl.zeros((WARPS, BLOCK_D), tl.float32)
    for _ in range(0, S, BLOCK_S * WARPS):
        here = row[:, None].to(tl.int64)
        dy = tl.load(dy_ptr + here * D + cols[None, :], mask=(here >= 0) & (cols < D)[None, :], other=0.0)
        s += BLOCK_S * WARPS
        row = tl.load(slots_ptr + place * S + s, mask=s < S, other=-1)  # for the next samples, while dy is in flight
        total += tl.sum(dy.to(tl.float32).reshape(BLOCK_S, WARPS, BLOCK_D), 0)
    store_row(dpos_ptr + place * D, tl.sum(total, 0), cols, D, WARPS)


@triton_op("add_positions_fwd")
def add_positions_fwd(x: Tensor, slots: Tensor, pos_embed: Tensor) -> Tensor:
    x, pos_embed = x.contiguous(), pos_embed.contiguous()
    (L, S), D = slots.shape, x.shape[1]
    y = torch.empty_like(x)
    if x.numel() > 0:
        grid = triton.cdiv(L, FORWARD["PLACES"]), triton.cdiv(D, FORWARD["BLOCK_D"]), triton.cdiv(S, FORWARD["SAMPLES"])
        wrap_triton(_add_positions_fwd_kernel)[grid](x, slots, pos_embed, y, S, L, D=D, **FORWARD)
    return y


@triton_op("add_positions_bwd")
def add_positions_bwd(dy: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of pos_embed, [L, D] in `dtype`."""
    dy = dy.contiguous()
    (L, S), D = slots.shape, dy.shape[1]
    dpos_embed = dy.new_empty(L, D, dtype=dtype)
    if dpos_embed.numel() > 0:
        grid = L, triton.cdiv(D, BACKWARD["BLOCK_D"])
        wrap_triton(_add_positions_bwd_kernel)[grid](dy, slots, dpos_embed, S, D=D, **BACKWARD)
    return dpos_embed


def _setup_context(ctx, inputs, output):
    _, slots, pos_embed = inputs
    ctx.dtype = pos_embed.dtype
    ctx.save_for_backward(slots)


def _backward(ctx, dy):
    return dy, None, add_positions_bwd(dy, *ctx.saved_tensors, ctx.dtype) if ctx.needs_input_grad[2] else None


add_positions_fwd.register_autograd(_backward, setup_context=_setup_context)
