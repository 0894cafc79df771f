"""scatter_tokens in Triton. Programs work by place, forward and backward.

Each token is read once and each row written once. A program keeps positions, and in the backward pass their gradients,
in registers while it walks the samples.
"""

import torch
from torch import Tensor

from ..backend import tl, triton
from .column_sum import add_partials
from .op import triton_op, wrap_triton
from .tiles import store_row

SAMPLES = 64  # samples that a program walks; they give one row in the table of partial sums
PLACES = 4  # places that a program serves, one per warp
BLOCK_S = 8  # samples at a time
BLOCK_D = 256  # columns of a warp: 8 per thread, 128 bits of bf16
BLOCK_IDS = 512


@triton.jit
def _slots_kernel(
    ids_keep_ptr,  # int64 [N]
    slots_ptr,  # int32 [L, S], filled with -1
    N,
    S,
    L: tl.constexpr,
    NUM_CLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    id = tl.load(ids_keep_ptr + row, mask=row < N, other=-1)
    sample = id // L
    tl.store(slots_ptr + id % L * S + sample, row + (sample + 1) * NUM_CLS, mask=(id >= 0) & (sample < S))


@triton.jit
def _scatter_tokens_fwd_kernel(
    tokens_ptr,  # [N, D]
    slots_ptr,  # int32 [L, S], see token_slots
    cu_seqlens_ptr,  # int32 [S + 1]
    mask_token_ptr,  # [D]
    pos_embed_ptr,  # [L, D]
    out_ptr,  # [S, 1 + L, D]
    S,
    L,
    D: tl.constexpr,
    NUM_CLS: tl.constexpr,
    SAMPLES: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    place = tl.program_id(0) * PLACES + tl.arange(0, PLACES)[None, :]  # [1, PLACES]
    i = tl.arange(0, BLOCK_S)[:, None]
    d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, None, :]
    first = tl.program_id(2) * SAMPLES
    last = tl.minimum(first + SAMPLES, S)
    if tl.program_id(0) * PLACES < L:
        here = place[:, :, None]
        position = tl.load(pos_embed_ptr + here * D + d, mask=(here < L) & (d < D), other=0.0).to(tl.float32)
        # Load a tile of which only the first place is unmasked: a row alone would be loaded in narrower pieces.
        only = (here % PLACES == 0) & (d < D)
        mask_token = tl.load(mask_token_ptr + tl.broadcast_to(d, only.shape), mask=only, other=0.0).to(tl.float32)
        mask_token = tl.sum(mask_token, axis=1)[:, None, :]
        for start in range(first, last, BLOCK_S):
            s = start + i
            inside = (s < S) & (place < L)  # [BLOCK_S, PLACES]
            slot = tl.load(slots_ptr + place * S + s, mask=inside, other=-1)[:, :, None].to(tl.int64)
            token = tl.load(tokens_ptr + slot * D + d, mask=(slot >= 0) & (d < D), other=0.0).to(tl.float32)
            row = (s.to(tl.int64) * (L + 1) + 1 + place)[:, :, None]
            filled = tl.where(slot >= 0, token, mask_token)
            tl.store(out_ptr + row * D + d, filled + position, inside[:, :, None] & (d < D))
    else:
        for start in range(first, last, BLOCK_S * PLACES):
            s = start + i * PLACES + tl.arange(0, PLACES)[None, :]
            cls = tl.load(cu_seqlens_ptr + s, mask=s < last, other=0)[:, :, None].to(tl.int64)
            s = s[:, :, None].to(tl.int64)
            mask = (s < last) & (d < D)
            total = tl.zeros((BLOCK_S, PLACES, BLOCK_D), tl.float32)
            for token in tl.static_range(NUM_CLS):
                total += tl.load(tokens_ptr + (cls + token) * D + d, mask=mask, other=0.0).to(tl.float32)
            tl.store(out_ptr + s * (L + 1) * D + d, total / NUM_CLS, mask)


@triton.jit
def _scatter_tokens_bwd_kernel(
    dout_ptr,  # [S, 1 + L, D]
    slots_ptr,  # int32 [L, S]
    cu_seqlens_ptr,  # int32 [S + 1]
    dtokens_ptr,  # [N, D]
    dmask_ptr,  # fp32 [ceil(S / SAMPLES), ceil(L / PLACES), D], partial sums
    dpos_ptr,  # [ceil(S / SAMPLES), L, D], partial sums
    S,
    L,
    D: tl.constexpr,
    NUM_CLS: tl.constexpr,
    SAMPLES: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Row r of a tile belongs to warp r % PLACES, and so to one place: sums over samples are made in registers.
    # What warps get of a tile with three dimensions differs between versions of Triton.
    rows = tl.arange(0, BLOCK_S * PLACES)
    place = tl.program_id(0) * PLACES + rows % PLACES
    i = rows // PLACES
    d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    part = tl.program_id(2)
    first = part * SAMPLES
    last = tl.minimum(first + SAMPLES, S)
    if tl.program_id(0) * PLACES < L:
        dmask = tl.zeros((PLACES, BLOCK_D), tl.float32)
        dpos = tl.zeros((PLACES, BLOCK_D), tl.float32)
        for start in range(first, last, BLOCK_S):
            s = start + i
            inside = (s < S) & (place < L)  # [BLOCK_S · PLACES]
            slot = tl.load(slots_ptr + place * S + s, mask=inside, other=-1)[:, None].to(tl.int64)
            row = (s.to(tl.int64) * (L + 1) + 1 + place)[:, None]
            dout = tl.load(dout_ptr + row * D + d, mask=inside[:, None] & (d < D), other=0.0)
            tl.store(dtokens_ptr + slot * D + d, dout, (slot >= 0) & (d < D))
            dout = dout.to(tl.float32)
            dpos += tl.sum(dout.reshape(BLOCK_S, PLACES, BLOCK_D), 0)
            dmask += tl.sum(tl.where(slot < 0, dout, 0.0).reshape(BLOCK_S, PLACES, BLOCK_D), 0)
        here = tl.program_id(0) * PLACES + tl.arange(0, PLACES)[:, None]
        col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        at = (part * L + here).to(tl.int64) * D + col[None, :]
        tl.store(dpos_ptr + at, dpos, (here < L) & (col < D)[None, :])
        row = (part * tl.cdiv(L, PLACES) + tl.program_id(0)).to(tl.int64)
        store_row(dmask_ptr + row * D, tl.sum(dmask, axis=0), col, D, PLACES)
    else:
        for start in range(first, last, BLOCK_S * PLACES):
            s = start + rows
            cls = tl.load(cu_seqlens_ptr + s, mask=s < last, other=0)[:, None].to(tl.int64)
            s = s[:, None].to(tl.int64)
            mask = (s < last) & (d < D)
            dcls = tl.load(dout_ptr + s * (L + 1) * D + d, mask=mask, other=0.0).to(tl.float32) / NUM_CLS
            for token in tl.static_range(NUM_CLS):
                tl.store(dtokens_ptr + (cls + token) * D + d, dcls, mask)


@triton_op("token_slots")
def token_slots(ids_keep: Tensor, S: int, L: int, num_cls: int) -> Tensor:
    """int32 [L, S]: entry [l, s] is the row of `tokens` for place l of sample s; -1 if that patch is hidden."""
    slots = torch.full((L, S), -1, dtype=torch.int32, device=ids_keep.device)
    N = len(ids_keep)
    if N > 0:
        grid = (triton.cdiv(N, BLOCK_IDS),)
        wrap_triton(_slots_kernel)[grid](
            ids_keep.contiguous(), slots, N, S, L=L, NUM_CLS=num_cls, BLOCK=BLOCK_IDS, num_warps=4
        )
    return slots


def _grid(S: int, L: int, D: int) -> tuple[int, int, int]:
    return triton.cdiv(L, PLACES) + 1, triton.cdiv(D, BLOCK_D), triton.cdiv(S, SAMPLES)


BLOCKS = dict(SAMPLES=SAMPLES, PLACES=PLACES, BLOCK_S=BLOCK_S, BLOCK_D=BLOCK_D, num_warps=PLACES)


@triton_op("scatter_tokens_fwd")
def scatter_tokens_fwd(
    tokens: Tensor, slots: Tensor, cu_seqlens: Tensor, mask_token: Tensor, pos_embed: Tensor, num_cls: int
) -> Tensor:
    (L, S), D = slots.shape, tokens.shape[1]
    out = tokens.new_empty(S * (1 + L), D)
    wrap_triton(_scatter_tokens_fwd_kernel)[_grid(S, L, D)](
        tokens, slots, cu_seqlens, mask_token, pos_embed, out, S, L, D=D, NUM_CLS=num_cls, **BLOCKS
    )
    return out


@triton_op("scatter_tokens_bwd")
def scatter_tokens_bwd(
    dout: Tensor, slots: Tensor, cu_seqlens: Tensor, mask_token: Tensor, pos_embed: Tensor, N: int, num_cls: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(dtokens [N, D], dmask_token [D], dpos_embed [L, D])."""
    (L, S), D = slots.shape, dout.shape[1]
    grid = _grid(S, L, D)
    dtokens = dout.new_empty(N, D)
    dmask = dout.new_empty(grid[2] * (grid[0] - 1), D, dtype=torch.float32)
    direct = grid[2] == 1  # the kernel writes dpos_embed itself, without partial sums
    dpos = dout.new_empty(grid[2], L * D, dtype=pos_embed.dtype if direct else torch.float32)
    wrap_triton(_scatter_tokens_bwd_kernel)[grid](
        dout, slots, cu_seqlens, dtokens, dmask, dpos, S, L, D=D, NUM_CLS=num_cls, **BLOCKS
    )
    dpos_embed = dpos if direct else add_partials(dpos, pos_embed.dtype)
    return dtokens, add_partials(dmask, mask_token.dtype), dpos_embed.view(L, D)


def _setup_context(ctx, inputs, output):
    tokens, slots, cu_seqlens, mask_token, pos_embed, ctx.num_cls = inputs
    ctx.N = len(tokens)
    ctx.save_for_backward(slots, cu_seqlens, mask_token, pos_embed)


def _backward(ctx, dout):
    dtokens, dmask_token, dpos_embed = scatter_tokens_bwd(dout.contiguous(), *ctx.saved_tensors, ctx.N, ctx.num_cls)
    return dtokens, None, None, dmask_token, dpos_embed, None


scatter_tokens_fwd.register_autograd(_backward, setup_context=_setup_context)
