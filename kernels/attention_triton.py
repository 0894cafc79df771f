"""Self-attention of short samples in a packed stream, in Triton: one launch forward, one backward, for any lengths.

What it is for: samples of 60 to 600 tokens of a ViT, of several lengths in one stream. Attention made for thousands of
tokens pads such samples (65 tokens to 128, 257 to 384), zeroes and converts fp32 gradients of q that it adds up by
atomics, and leaves q's, k's and v's gradients to be copied together.

    tiles     a program has one head and one tile of a sample's queries (forward, dq) or keys (dk, dv). Ragged lengths
              need no padding: programs beyond a sample's end return
    token 0   is no part of the tiles but a vector that each program takes first, so that 1 + 64·n tokens, a CLS token
              and patches, fill their tiles
    backward  dk and dv by tiles of keys, dq by tiles of queries: the weights are made twice, and no sum needs atomics.
              Gradients go where they belong in [N, 3, H, d], and the same bits come each time
    bias      of the layer that made qkv: its gradient, the column sum of dqkv, is added up on the way

The softmax is of base 2: `lse` is log2 of the sum of 2^(q·k·scale), with log2(e) in `scale`.
"""

import math

import torch
from torch import Tensor

from .backend import tl, triton, triton_op, wrap_triton
from .column_sum import add_partials

FWD = dict(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2)
BWD = dict(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2)
LOG2E = math.log2(math.e)


@triton.jit
def _rows(ptr, first, stop, cols, stride, d: tl.constexpr, BLOCK: tl.constexpr):
    """Rows first : first + BLOCK of a head, zeros from `stop` on: [BLOCK, BLOCK_D]."""
    row = first + tl.arange(0, BLOCK)
    return tl.load(ptr + row[:, None] * stride + cols[None, :], (row < stop)[:, None] & (cols < d)[None, :], other=0.0)


@triton.jit
def _row(ptr, cols, d: tl.constexpr):
    """Row 0 of a head in fp32: [BLOCK_D]."""
    return tl.load(ptr + cols, cols < d, other=0.0).to(tl.float32)


@triton.jit
def _attention_fwd_kernel(
    qkv_ptr,  # [N, 3, H, d]
    cu_seqlens_ptr,  # int32 [S + 1]
    out_ptr,  # [N, H, d]
    lse_ptr,  # fp32 [H, N]
    N,
    scale: tl.constexpr,
    H: tl.constexpr,
    d: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tile, head = tl.program_id(0), tl.program_id(1)
    start = tl.load(cu_seqlens_ptr + tl.program_id(2)).to(tl.int64)
    L = (tl.load(cu_seqlens_ptr + tl.program_id(2) + 1) - start).to(tl.int32)
    cols = tl.arange(0, BLOCK_D)
    q_ptr = qkv_ptr + start * (3 * H * d) + head * d
    k_ptr, v_ptr = q_ptr + H * d, q_ptr + 2 * H * d
    out_ptr += start * (H * d) + head * d
    lse_ptr += head.to(tl.int64) * N + start
    i = 1 + (tile - 1) * BLOCK_M
    if tile == 0:
        if L > 0:
            q0 = _row(q_ptr, cols, d) * scale
            top = tl.sum(q0 * _row(k_ptr, cols, d), 0)
            total = 1.0
            out0 = _row(v_ptr, cols, d)
            for j in range(1, L, BLOCK_N):
                k = _rows(k_ptr, j, L, cols, 3 * H * d, d, BLOCK_N).to(tl.float32)
                v = _rows(v_ptr, j, L, cols, 3 * H * d, d, BLOCK_N).to(tl.float32)
                s = tl.where(j + tl.arange(0, BLOCK_N) < L, tl.sum(k * q0[None, :], 1), float("-inf"))
                higher = tl.maximum(top, tl.max(s, 0))
                p, shrink = tl.exp2(s - higher), tl.exp2(top - higher)
                total = total * shrink + tl.sum(p, 0)
                out0 = out0 * shrink + tl.sum(p[:, None] * v, 0)
                top = higher
            tl.store(out_ptr + cols, (out0 / total).to(out_ptr.dtype.element_ty), cols < d)
            tl.store(lse_ptr, top + tl.log2(total))
    elif i < L:
        rows = i + tl.arange(0, BLOCK_M)
        q = _rows(q_ptr, i, L, cols, 3 * H * d, d, BLOCK_M)  # [BLOCK_M, BLOCK_D]
        top = tl.sum(q.to(tl.float32) * _row(k_ptr, cols, d)[None, :], 1) * scale
        total = tl.full([BLOCK_M], 1.0, tl.float32)
        out = tl.broadcast_to(_row(v_ptr, cols, d)[None, :], [BLOCK_M, BLOCK_D])
        for j in range(1, L, BLOCK_N):
            k = _rows(k_ptr, j, L, cols, 3 * H * d, d, BLOCK_N)
            v = _rows(v_ptr, j, L, cols, 3 * H * d, d, BLOCK_N)
            s = tl.dot(q, tl.trans(k)) * scale  # [BLOCK_M, BLOCK_N]
            s = tl.where((j + tl.arange(0, BLOCK_N) < L)[None, :], s, float("-inf"))
            higher = tl.maximum(top, tl.max(s, 1))
            p, shrink = tl.exp2(s - higher[:, None]), tl.exp2(top - higher)
            total = total * shrink + tl.sum(p, 1)
            out = tl.dot(p.to(v.dtype), v, out * shrink[:, None])
            top = higher
        mask = (rows < L)[:, None] & (cols < d)[None, :]
        out = (out / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + rows[:, None] * (H * d) + cols[None, :], out, mask)
        tl.store(lse_ptr + rows, top + tl.log2(total), rows < L)


@triton.jit
def _store(
    dqkv_ptr, value, part_ptr, which: tl.constexpr, first, stop, cols, H: tl.constexpr, d: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Store rows first : stop of dq, dk or dv (0, 1, 2), and their sum in fp32."""
    row = first + tl.arange(0, BLOCK)
    mask = (row < stop)[:, None] & (cols < d)[None, :]
    ptr = dqkv_ptr + which * H * d + row[:, None] * (3 * H * d) + cols[None, :]
    tl.store(ptr, value.to(dqkv_ptr.dtype.element_ty), mask)
    if part_ptr is not None:
        tl.store(part_ptr + which * H * d + cols, tl.sum(tl.where(mask, value, 0.0), 0), cols < d)


@triton.jit
def _store_row(dqkv_ptr, value, part_ptr, which: tl.constexpr, cols, H: tl.constexpr, d: tl.constexpr):
    tl.store(dqkv_ptr + which * H * d + cols, value.to(dqkv_ptr.dtype.element_ty), cols < d)
    if part_ptr is not None:
        tl.store(part_ptr + which * H * d + cols, value, cols < d)


@triton.jit
def _attention_bwd_kernel(
    dout_ptr,  # [N, H, d]
    qkv_ptr,  # [N, 3, H, d]
    out_ptr,  # [N, H, d]
    lse_ptr,  # fp32 [H, N]
    cu_seqlens_ptr,  # int32 [S + 1]
    dqkv_ptr,  # [N, 3, H, d]
    part_ptr,  # fp32 [S, 1 + TILES, 3, H, d], sums over the rows of a tile; or None
    N,
    TILES,  # of the longest sample, without token 0
    scale: tl.constexpr,
    softmax_scale: tl.constexpr,
    H: tl.constexpr,
    d: tl.constexpr,
    BLOCK_M: tl.constexpr,  # of the tile that a program owns
    BLOCK_N: tl.constexpr,  # of those it walks
    BLOCK_D: tl.constexpr,
):
    pid, head, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(cu_seqlens_ptr + sample).to(tl.int64)
    L = (tl.load(cu_seqlens_ptr + sample + 1) - start).to(tl.int32)
    cols = tl.arange(0, BLOCK_D)
    qkv_ptr += start * (3 * H * d) + head * d
    dqkv_ptr += start * (3 * H * d) + head * d
    out_ptr += start * (H * d) + head * d
    dout_ptr += start * (H * d) + head * d
    lse_ptr += head.to(tl.int64) * N + start
    tile = tl.where(pid > TILES, pid - TILES, pid)
    if part_ptr is not None:
        part_ptr += (sample.to(tl.int64) * (1 + TILES) + tile) * (3 * H * d) + head * d
    own = tl.where(tile == 0, 0, 1 + (tile - 1) * BLOCK_M)
    if own < L:
        if pid == 0:
            _token0_bwd(
                dout_ptr, qkv_ptr, out_ptr, lse_ptr, dqkv_ptr, part_ptr, L, cols, scale, softmax_scale, H, d, BLOCK_N
            )
        elif pid <= TILES:
            _keys_bwd(
                dout_ptr, qkv_ptr, out_ptr, lse_ptr, dqkv_ptr, part_ptr, own, L, cols, scale, softmax_scale, H, d,
                BLOCK_M, BLOCK_N,
            )  # fmt: skip
        else:
            _queries_bwd(
                dout_ptr, qkv_ptr, out_ptr, lse_ptr, dqkv_ptr, part_ptr, own, L, cols, scale, softmax_scale, H, d,
                BLOCK_M, BLOCK_N,
            )  # fmt: skip
    elif part_ptr is not None:  # a tile that this sample has not
        nothing = tl.zeros([BLOCK_D], tl.float32)
        if pid == 0 or pid > TILES:
            tl.store(part_ptr + cols, nothing, cols < d)
        if pid <= TILES:
            tl.store(part_ptr + H * d + cols, nothing, cols < d)
            tl.store(part_ptr + 2 * H * d + cols, nothing, cols < d)


@triton.jit
def _token0_bwd(
    dout_ptr, qkv_ptr, out_ptr, lse_ptr, dqkv_ptr, part_ptr, L, cols, scale: tl.constexpr, softmax_scale: tl.constexpr,
    H: tl.constexpr, d: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq, dk and dv of token 0: with itself, then with all others."""
    q0, k0, v0 = _row(qkv_ptr, cols, d), _row(qkv_ptr + H * d, cols, d), _row(qkv_ptr + 2 * H * d, cols, d)
    dout0 = _row(dout_ptr, cols, d)
    delta0 = tl.sum(dout0 * _row(out_ptr, cols, d), 0)
    lse0 = tl.load(lse_ptr)
    p0 = tl.exp2(tl.sum(q0 * k0, 0) * scale - lse0)
    ds0 = p0 * (tl.sum(dout0 * v0, 0) - delta0)
    dq0, dk0, dv0 = ds0 * k0, ds0 * q0, p0 * dout0
    for j in range(1, L, BLOCK_N):
        inside = j + tl.arange(0, BLOCK_N) < L
        k = _rows(qkv_ptr + H * d, j, L, cols, 3 * H * d, d, BLOCK_N).to(tl.float32)
        v = _rows(qkv_ptr + 2 * H * d, j, L, cols, 3 * H * d, d, BLOCK_N).to(tl.float32)
        p = tl.where(inside, tl.exp2(tl.sum(k * q0[None, :], 1) * scale - lse0), 0.0)
        ds = p * (tl.sum(v * dout0[None, :], 1) - delta0)
        dq0 += tl.sum(ds[:, None] * k, 0)
        q = _rows(qkv_ptr, j, L, cols, 3 * H * d, d, BLOCK_N).to(tl.float32)
        dout = _rows(dout_ptr, j, L, cols, H * d, d, BLOCK_N).to(tl.float32)
        out = _rows(out_ptr, j, L, cols, H * d, d, BLOCK_N).to(tl.float32)
        lse = tl.load(lse_ptr + j + tl.arange(0, BLOCK_N), inside, other=float("inf"))  # beyond the end: p = 0
        p = tl.exp2(tl.sum(q * k0[None, :], 1) * scale - lse)
        ds = p * (tl.sum(dout * v0[None, :], 1) - tl.sum(dout * out, 1))
        dk0 += tl.sum(ds[:, None] * q, 0)
        dv0 += tl.sum(p[:, None] * dout, 0)
    _store_row(dqkv_ptr, dq0 * softmax_scale, part_ptr, 0, cols, H, d)
    _store_row(dqkv_ptr, dk0 * softmax_scale, part_ptr, 1, cols, H, d)
    _store_row(dqkv_ptr, dv0, part_ptr, 2, cols, H, d)


@triton.jit
def _keys_bwd(
    dout_ptr, qkv_ptr, out_ptr, lse_ptr, dqkv_ptr, part_ptr, own, L, cols, scale: tl.constexpr,
    softmax_scale: tl.constexpr, H: tl.constexpr, d: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys."""
    k = _rows(qkv_ptr + H * d, own, L, cols, 3 * H * d, d, BLOCK_M)  # [BLOCK_M, BLOCK_D]
    v = _rows(qkv_ptr + 2 * H * d, own, L, cols, 3 * H * d, d, BLOCK_M)
    q0, dout0 = _row(qkv_ptr, cols, d), _row(dout_ptr, cols, d)
    delta0 = tl.sum(dout0 * _row(out_ptr, cols, d), 0)
    p0 = tl.exp2(tl.sum(k.to(tl.float32) * q0[None, :], 1) * scale - tl.load(lse_ptr))
    ds0 = p0 * (tl.sum(v.to(tl.float32) * dout0[None, :], 1) - delta0)
    dk = ds0[:, None] * q0[None, :]
    dv = p0[:, None] * dout0[None, :]
    for i in range(1, L, BLOCK_N):
        inside = i + tl.arange(0, BLOCK_N) < L
        q = _rows(qkv_ptr, i, L, cols, 3 * H * d, d, BLOCK_N)
        dout = _rows(dout_ptr, i, L, cols, H * d, d, BLOCK_N)
        out = _rows(out_ptr, i, L, cols, H * d, d, BLOCK_N)
        lse = tl.load(lse_ptr + i + tl.arange(0, BLOCK_N), inside, other=float("inf"))  # beyond the end: p = 0
        delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
        p = tl.exp2(tl.dot(k, tl.trans(q)) * scale - lse[None, :])  # [BLOCK_M, BLOCK_N]
        dv = tl.dot(p.to(dout.dtype), dout, dv)
        ds = p * (tl.dot(v, tl.trans(dout)) - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk)
    _store(dqkv_ptr, dk * softmax_scale, part_ptr, 1, own, L, cols, H, d, BLOCK_M)
    _store(dqkv_ptr, dv, part_ptr, 2, own, L, cols, H, d, BLOCK_M)


@triton.jit
def _queries_bwd(
    dout_ptr, qkv_ptr, out_ptr, lse_ptr, dqkv_ptr, part_ptr, own, L, cols, scale: tl.constexpr,
    softmax_scale: tl.constexpr, H: tl.constexpr, d: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq of a tile of queries."""
    q = _rows(qkv_ptr, own, L, cols, 3 * H * d, d, BLOCK_M)  # [BLOCK_M, BLOCK_D]
    dout = _rows(dout_ptr, own, L, cols, H * d, d, BLOCK_M)
    out = _rows(out_ptr, own, L, cols, H * d, d, BLOCK_M)
    lse = tl.load(lse_ptr + own + tl.arange(0, BLOCK_M), own + tl.arange(0, BLOCK_M) < L, other=float("inf"))
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    k0, v0 = _row(qkv_ptr + H * d, cols, d), _row(qkv_ptr + 2 * H * d, cols, d)
    p0 = tl.exp2(tl.sum(q.to(tl.float32) * k0[None, :], 1) * scale - lse)
    ds0 = p0 * (tl.sum(dout.to(tl.float32) * v0[None, :], 1) - delta)
    dq = ds0[:, None] * k0[None, :]
    for j in range(1, L, BLOCK_N):
        k = _rows(qkv_ptr + H * d, j, L, cols, 3 * H * d, d, BLOCK_N)
        v = _rows(qkv_ptr + 2 * H * d, j, L, cols, 3 * H * d, d, BLOCK_N)
        p = tl.exp2(tl.dot(q, tl.trans(k)) * scale - lse[:, None])  # [BLOCK_M, BLOCK_N]
        p = tl.where((j + tl.arange(0, BLOCK_N) < L)[None, :], p, 0.0)
        ds = p * (tl.dot(dout, tl.trans(v)) - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq)
    _store(dqkv_ptr, dq * softmax_scale, part_ptr, 0, own, L, cols, H, d, BLOCK_M)


def _shape(qkv: Tensor) -> dict:
    _, _, H, d = qkv.shape
    return dict(H=H, d=d, BLOCK_D=max(16, triton.next_power_of_2(d)))


@triton_op("short_attention_fwd")
def short_attention_fwd(
    qkv: Tensor, bias: Tensor | None, cu_seqlens: Tensor, max_seqlen: int
) -> tuple[Tensor, Tensor]:
    """(out [N, H, d], lse fp32 [H, N])."""
    qkv = qkv.contiguous()
    N, _, H, d = qkv.shape
    out, lse = qkv.new_empty(N, H, d), qkv.new_empty(H, N, dtype=torch.float32)
    if qkv.numel() > 0:
        grid = (1 + triton.cdiv(max_seqlen - 1, FWD["BLOCK_M"]), H, len(cu_seqlens) - 1)
        wrap_triton(_attention_fwd_kernel)[grid](qkv, cu_seqlens, out, lse, N, scale=LOG2E * d**-0.5, **_shape(qkv), **FWD)
    return out, lse


@short_attention_fwd.register_fake
def _(qkv, bias, cu_seqlens, max_seqlen):
    N, _, H, d = qkv.shape
    return qkv.new_empty(N, H, d), qkv.new_empty(H, N, dtype=torch.float32)


@triton_op("short_attention_bwd")
def short_attention_bwd(
    dout: Tensor, qkv: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> tuple[Tensor, Tensor]:
    """(dqkv [N, 3, H, d], dbias [3·H·d], or empty without bias)."""
    dout, qkv = dout.contiguous(), qkv.contiguous()
    N, _, H, d = qkv.shape
    S, tiles = len(cu_seqlens) - 1, triton.cdiv(max(max_seqlen - 1, 0), BWD["BLOCK_M"])
    dqkv = torch.empty_like(qkv)
    part = None if bias is None else qkv.new_empty(S * (1 + tiles), 3 * H * d, dtype=torch.float32)
    if qkv.numel() > 0:
        wrap_triton(_attention_bwd_kernel)[(1 + 2 * tiles, H, S)](
            dout, qkv, out, lse, cu_seqlens, dqkv, part, N, tiles,
            scale=LOG2E * d**-0.5, softmax_scale=d**-0.5, **_shape(qkv), **BWD,
        )  # fmt: skip
    elif part is not None:
        part.zero_()
    return dqkv, qkv.new_empty(0) if part is None or bias is None else add_partials(part, bias.dtype)


@short_attention_bwd.register_fake
def _(dout, qkv, bias, out, lse, cu_seqlens, max_seqlen):
    return torch.empty_like(qkv), qkv.new_empty(0) if bias is None else torch.empty_like(bias)


def _setup_context(ctx, inputs, output):
    qkv, bias, cu_seqlens, ctx.max_seqlen = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, bias, out, lse, cu_seqlens)


def _backward(ctx, dout, _):
    qkv, bias, *rest = ctx.saved_tensors
    dqkv, dbias = short_attention_bwd(dout, qkv, bias, *rest, ctx.max_seqlen)
    return dqkv, None if bias is None else dbias, None, None


short_attention_fwd.register_autograd(_backward, setup_context=_setup_context)
