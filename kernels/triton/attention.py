"""Self-attention of short samples in a packed stream, in Triton: one launch forward, two backward, for any lengths.

It is made for a ViT's samples of 60 to 500 tokens, with several lengths in one stream. Attention made for thousands of
tokens is wasteful there: it pads samples (65 tokens to 128, 257 to 384), zeroes and converts fp32 gradients of q that
it sums by atomics, and leaves the gradients of q, k and v to be copied together.

    tiles     A program has one head and one tile of a sample's queries (forward, dq) or keys (dk, dv). Ragged lengths
              need no padding: programs beyond a sample's end return.
    token 0   With 1 + 64·n tokens (a CLS token and patches), one token would need a tile of its own among the queries,
              and one more among the keys of each. Token 0 of such a sample stands alone: it has a program of its own,
              which works on 16 columns, and the others handle it first, as a vector.
    backward  dq is computed by tiles of queries, dk and dv by tiles of keys. The weights are computed twice, and no sum
              needs atomics: the bits are the same each time. Gradients are written in place in [N, 3, H, d].

The softmax uses base 2: `lse` is log2 of the sum of 2^(q·k·scale), and `scale` includes log2(e).
"""

import math

import torch
from torch import Tensor

from ..backend import tl, triton
from .op import triton_op, wrap_triton

# Measured on an H200 (docs/performance-gpu.md). Tiles of 128 rows are slower, as fewer programs share a multiprocessor.
FWD = dict(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=3)
BWD_Q = dict(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2)
BWD_KV = dict(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=1)
LOG2E = math.log2(math.e)


@triton.jit
def _rows(ptr, first, stop, cols, stride, d: tl.constexpr, BLOCK: tl.constexpr):
    """Load rows first : first + BLOCK of a head, zeros from row `stop` on: [BLOCK, BLOCK_D]."""
    row = first + tl.arange(0, BLOCK)
    return tl.load(ptr + row[:, None] * stride + cols[None, :], (row < stop)[:, None] & (cols < d)[None, :], other=0.0)


@triton.jit
def _row(ptr, cols, d: tl.constexpr):
    """Load row 0 of a head in fp32: [BLOCK_D]."""
    return tl.load(ptr + cols, cols < d, other=0.0).to(tl.float32)


@triton.jit
def _row_if(wanted, ptr, cols, d: tl.constexpr):
    """Load row 0 of a head, or zeros: [BLOCK_D]. It is loaded before the tiles, so that it arrives with them.

    Accumulators begin with it. Had they two origins in an `if`, ptxas would wait after each of Hopper's products.
    """
    return tl.load(ptr + cols, (cols < d) & wanted, other=0.0)


@triton.jit
def _as_column(row, dtype: tl.constexpr):
    """[BLOCK_D] as column 0 of [BLOCK_D, 16], the narrowest tile of tensor cores. The other columns are 0."""
    return tl.where(tl.arange(0, 16)[None, :] == 0, row[:, None], 0.0).to(dtype)


@triton.jit
def _column(tile):
    """Column 0 of [M, 16]: [M]."""
    return tl.sum(tl.where(tl.arange(0, 16)[None, :] == 0, tile, 0.0), 1)


@triton.jit
def _first_row(tile, L, BLOCK: tl.constexpr):
    """(whether token 0 stands alone, the first row of the program's tile)."""
    alone = (L - 1) % BLOCK == 0
    return alone, tl.where(alone, 1 + (tile - 1) * BLOCK, tile * BLOCK)


@triton.jit(do_not_specialize=["N"])
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
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    alone, i = _first_row(tile, L, BLOCK_M)
    if i < 1 and alone:
        k0, v0, q0 = _row(k_ptr, cols, d), _row(v_ptr, cols, d), _row(q_ptr, cols, d)
        top = tl.full([16], 0.0, tl.float32) + tl.sum(q0 * k0, 0) * scale
        total = tl.full([16], 1.0, tl.float32)
        out0 = tl.broadcast_to(v0[:, None], [BLOCK_D, 16])
        q0 = _as_column(q0, dtype)
        for j in range(1, L, BLOCK_N):
            k = _rows(k_ptr, j, L, cols, 3 * H * d, d, BLOCK_N)
            v = _rows(v_ptr, j, L, cols, 3 * H * d, d, BLOCK_N)
            s = tl.dot(k, q0) * scale  # [BLOCK_N, 16]
            s = tl.where((j + tl.arange(0, BLOCK_N) < L)[:, None], s, float("-inf"))
            higher = tl.maximum(top, tl.max(s, 0))
            p, shrink = tl.exp2(s - higher[None, :]), tl.exp2(top - higher)
            total = total * shrink + tl.sum(p, 0)
            out0 = tl.dot(tl.trans(v), p.to(dtype), out0 * shrink[None, :])
            top = higher
        tl.store(out_ptr + cols, _column(out0 / total[None, :]).to(dtype), cols < d)
        tl.store(lse_ptr + tl.arange(0, 16), top + tl.log2(total), tl.arange(0, 16) == 0)
    elif i < L:
        rows = i + tl.arange(0, BLOCK_M)
        k0, v0 = _row_if(alone, k_ptr, cols, d), _row_if(alone, v_ptr, cols, d)
        q = _rows(q_ptr, i, L, cols, 3 * H * d, d, BLOCK_M)  # [BLOCK_M, BLOCK_D]
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        if alone:
            top = tl.sum(q.to(tl.float32) * k0[None, :].to(tl.float32), 1) * scale
            total += 1.0
        out = tl.broadcast_to(v0[None, :].to(tl.float32), [BLOCK_M, BLOCK_D])
        for j in range(tl.where(alone, 1, 0), L, BLOCK_N):
            k = _rows(k_ptr, j, L, cols, 3 * H * d, d, BLOCK_N)
            v = _rows(v_ptr, j, L, cols, 3 * H * d, d, BLOCK_N)
            s = tl.dot(q, tl.trans(k))  # [BLOCK_M, BLOCK_N]
            if j + BLOCK_N > L:
                s = tl.where((j + tl.arange(0, BLOCK_N) < L)[None, :], s, float("-inf"))
            higher = tl.maximum(top, tl.max(s, 1) * scale)
            p, shrink = tl.exp2(s * scale - higher[:, None]), tl.exp2(top - higher)
            total = total * shrink + tl.sum(p, 1)
            out = tl.dot(p.to(v.dtype), v, out * shrink[:, None])
            top = higher
        mask = (rows < L)[:, None] & (cols < d)[None, :]
        out = (out * (1 / total)[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + rows[:, None] * (H * d) + cols[None, :], out, mask)
        tl.store(lse_ptr + rows, top + tl.log2(total), rows < L)


@triton.jit
def _store(ptr, value, first, stop, cols, stride, d: tl.constexpr, BLOCK: tl.constexpr):
    """Store [BLOCK, BLOCK_D] as rows first : stop of a head."""
    row = first + tl.arange(0, BLOCK)
    mask = (row < stop)[:, None] & (cols < d)[None, :]
    tl.store(ptr + row[:, None] * stride + cols[None, :], value.to(ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["N"])
def _attention_bwd_q_kernel(
    dout_ptr,  # [N, H, d]
    qkv_ptr,  # [N, 3, H, d]
    out_ptr,  # [N, H, d]
    lse_ptr,  # fp32 [H, N]
    cu_seqlens_ptr,  # int32 [S + 1]
    dqkv_ptr,  # [N, 3, H, d]: dq is written
    delta_ptr,  # fp32 [H, N]: dout·out is written, for the kernel of the keys
    N,
    scale: tl.constexpr,
    softmax_scale: tl.constexpr,
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
    dq_ptr = dqkv_ptr + start * (3 * H * d) + head * d
    out_ptr += start * (H * d) + head * d
    dout_ptr += start * (H * d) + head * d
    lse_ptr += head.to(tl.int64) * N + start
    delta_ptr += head.to(tl.int64) * N + start
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    alone, i = _first_row(tile, L, BLOCK_M)
    if i < 1 and alone:
        q0, dout0 = _row(q_ptr, cols, d), _row(dout_ptr, cols, d)
        k0, v0 = _row(k_ptr, cols, d), _row(v_ptr, cols, d)
        lse0, delta0 = tl.load(lse_ptr), tl.sum(dout0 * _row(out_ptr, cols, d), 0)
        tl.store(delta_ptr, delta0)
        ds0 = tl.exp2(tl.sum(q0 * k0, 0) * scale - lse0) * (tl.sum(dout0 * v0, 0) - delta0)
        dq0 = tl.broadcast_to((k0 * ds0)[:, None], [BLOCK_D, 16])
        q0, dout0 = _as_column(q0, dtype), _as_column(dout0, dtype)
        for j in range(1, L, BLOCK_N):
            k = _rows(k_ptr, j, L, cols, 3 * H * d, d, BLOCK_N)
            v = _rows(v_ptr, j, L, cols, 3 * H * d, d, BLOCK_N)
            weights = tl.exp2(tl.dot(k, q0) * scale - lse0)  # [BLOCK_N, 16]
            weights = tl.where((j + tl.arange(0, BLOCK_N) < L)[:, None], weights, 0.0)
            dq0 = tl.dot(tl.trans(k), (weights * (tl.dot(v, dout0) - delta0)).to(dtype), dq0)
        tl.store(dq_ptr + cols, (_column(dq0) * softmax_scale).to(dtype), cols < d)
    elif i < L:
        rows = i + tl.arange(0, BLOCK_M)
        k0, v0 = _row_if(alone, k_ptr, cols, d), _row_if(alone, v_ptr, cols, d)
        q = _rows(q_ptr, i, L, cols, 3 * H * d, d, BLOCK_M)  # [BLOCK_M, BLOCK_D]
        dout = _rows(dout_ptr, i, L, cols, H * d, d, BLOCK_M)
        out = _rows(out_ptr, i, L, cols, H * d, d, BLOCK_M)
        lse = tl.load(lse_ptr + rows, rows < L, other=float("inf"))
        delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
        tl.store(delta_ptr + rows, delta, rows < L)
        ds0 = tl.zeros([BLOCK_M], tl.float32)
        if alone:
            p = tl.exp2(tl.sum(q.to(tl.float32) * k0[None, :].to(tl.float32), 1) * scale - lse)
            ds0 = p * (tl.sum(dout.to(tl.float32) * v0[None, :].to(tl.float32), 1) - delta)
        dq = ds0[:, None] * k0[None, :].to(tl.float32)
        for j in range(tl.where(alone, 1, 0), L, BLOCK_N):
            k = _rows(k_ptr, j, L, cols, 3 * H * d, d, BLOCK_N)
            v = _rows(v_ptr, j, L, cols, 3 * H * d, d, BLOCK_N)
            weights = tl.exp2(tl.dot(q, tl.trans(k)) * scale - lse[:, None])  # [BLOCK_M, BLOCK_N]
            weights = tl.where((j + tl.arange(0, BLOCK_N) < L)[None, :], weights, 0.0)
            ds = weights * (tl.dot(dout, tl.trans(v)) - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq)
        _store(dq_ptr, dq * softmax_scale, i, L, cols, 3 * H * d, d, BLOCK_M)


@triton.jit(do_not_specialize=["N"])
def _attention_bwd_kv_kernel(
    dout_ptr,  # [N, H, d]
    qkv_ptr,  # [N, 3, H, d]
    lse_ptr,  # fp32 [H, N]
    delta_ptr,  # fp32 [H, N]
    cu_seqlens_ptr,  # int32 [S + 1]
    dqkv_ptr,  # [N, 3, H, d]: dk and dv are written
    N,
    scale: tl.constexpr,
    softmax_scale: tl.constexpr,
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
    dk_ptr = dqkv_ptr + start * (3 * H * d) + head * d + H * d
    dv_ptr = dk_ptr + H * d
    dout_ptr += start * (H * d) + head * d
    lse_ptr += head.to(tl.int64) * N + start
    delta_ptr += head.to(tl.int64) * N + start
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    alone, j = _first_row(tile, L, BLOCK_M)
    if j < 1 and alone:
        q0, dout0 = _row(q_ptr, cols, d), _row(dout_ptr, cols, d)
        k0, v0 = _row(k_ptr, cols, d), _row(v_ptr, cols, d)
        p0 = tl.exp2(tl.sum(q0 * k0, 0) * scale - tl.load(lse_ptr))
        ds0 = p0 * (tl.sum(dout0 * v0, 0) - tl.load(delta_ptr))
        dk0 = tl.broadcast_to((q0 * ds0)[:, None], [BLOCK_D, 16])
        dv0 = tl.broadcast_to((dout0 * p0)[:, None], [BLOCK_D, 16])
        k0, v0 = _as_column(k0, dtype), _as_column(v0, dtype)
        for i in range(1, L, BLOCK_N):
            rows = i + tl.arange(0, BLOCK_N)
            q = _rows(q_ptr, i, L, cols, 3 * H * d, d, BLOCK_N)
            dout = _rows(dout_ptr, i, L, cols, H * d, d, BLOCK_N)
            lse = tl.load(lse_ptr + rows, rows < L, other=float("inf"))  # beyond the end: weights of 0
            delta = tl.load(delta_ptr + rows, rows < L, other=0.0)
            weights = tl.exp2(tl.dot(q, k0) * scale - lse[:, None])  # [BLOCK_N, 16]
            dv0 = tl.dot(tl.trans(dout), weights.to(dtype), dv0)
            ds = weights * (tl.dot(dout, v0) - delta[:, None])
            dk0 = tl.dot(tl.trans(q), ds.to(dtype), dk0)
        tl.store(dk_ptr + cols, (_column(dk0) * softmax_scale).to(dtype), cols < d)
        tl.store(dv_ptr + cols, _column(dv0).to(dtype), cols < d)
    elif j < L:
        q0, dout0 = _row_if(alone, q_ptr, cols, d), _row_if(alone, dout_ptr, cols, d)
        lse0, delta0 = tl.load(lse_ptr), tl.load(delta_ptr)
        k = _rows(k_ptr, j, L, cols, 3 * H * d, d, BLOCK_M)  # [BLOCK_M, BLOCK_D]
        v = _rows(v_ptr, j, L, cols, 3 * H * d, d, BLOCK_M)
        p0 = tl.zeros([BLOCK_M], tl.float32)
        ds0 = tl.zeros([BLOCK_M], tl.float32)
        if alone:
            p0 = tl.exp2(tl.sum(k.to(tl.float32) * q0[None, :].to(tl.float32), 1) * scale - lse0)
            ds0 = p0 * (tl.sum(v.to(tl.float32) * dout0[None, :].to(tl.float32), 1) - delta0)
        dk = ds0[:, None] * q0[None, :].to(tl.float32)
        dv = p0[:, None] * dout0[None, :].to(tl.float32)
        for i in range(tl.where(alone, 1, 0), L, BLOCK_N):
            rows = i + tl.arange(0, BLOCK_N)
            q = _rows(q_ptr, i, L, cols, 3 * H * d, d, BLOCK_N)
            dout = _rows(dout_ptr, i, L, cols, H * d, d, BLOCK_N)
            lse = tl.load(lse_ptr + rows, rows < L, other=float("inf"))  # beyond the end: weights of 0
            delta = tl.load(delta_ptr + rows, rows < L, other=0.0)
            weights = tl.exp2(tl.dot(k, tl.trans(q)) * scale - lse[None, :])  # [BLOCK_M, BLOCK_N]
            dv = tl.dot(weights.to(dout.dtype), dout, dv)
            ds = weights * (tl.dot(v, tl.trans(dout)) - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk)
        _store(dk_ptr, dk * softmax_scale, j, L, cols, 3 * H * d, d, BLOCK_M)
        _store(dv_ptr, dv, j, L, cols, 3 * H * d, d, BLOCK_M)


def _shape(qkv: Tensor) -> dict:
    _, _, H, d = qkv.shape
    return dict(scale=LOG2E * d**-0.5, H=H, d=d, BLOCK_D=max(16, triton.next_power_of_2(d)))


def _grid(launch: dict, H: int, cu_seqlens: Tensor, max_seqlen: int) -> tuple[int, int, int]:
    return triton.cdiv(max_seqlen, launch["BLOCK_M"]), H, len(cu_seqlens) - 1


@triton_op("short_attention_fwd")
def short_attention_fwd(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    """(out [N, H, d], lse fp32 [H, N]) of qkv [N, 3, H, d]."""
    qkv = qkv.contiguous()
    N, _, H, d = qkv.shape
    out, lse = qkv.new_empty(N, H, d), qkv.new_empty(H, N, dtype=torch.float32)
    if qkv.numel() > 0:
        grid = _grid(FWD, H, cu_seqlens, max_seqlen)
        wrap_triton(_attention_fwd_kernel)[grid](qkv, cu_seqlens, out, lse, N, **_shape(qkv), **FWD)
    return out, lse


@triton_op("short_attention_bwd")
def short_attention_bwd(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> Tensor:
    """dqkv [N, 3, H, d]."""
    dout, qkv = dout.contiguous(), qkv.contiguous()
    N, _, H, d = qkv.shape
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    if qkv.numel() > 0:
        shape = _shape(qkv) | dict(softmax_scale=d**-0.5)
        grids = [_grid(launch, H, cu_seqlens, max_seqlen) for launch in (BWD_Q, BWD_KV)]
        wrap_triton(_attention_bwd_q_kernel)[grids[0]](
            dout, qkv, out, lse, cu_seqlens, dqkv, delta, N, **shape, **BWD_Q
        )
        wrap_triton(_attention_bwd_kv_kernel)[grids[1]](dout, qkv, lse, delta, cu_seqlens, dqkv, N, **shape, **BWD_KV)
    return dqkv


def _setup_context(ctx, inputs, output):
    qkv, cu_seqlens, ctx.max_seqlen = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)  # lse has no gradient: do not fill one with zeros
    ctx.save_for_backward(qkv, out, lse, cu_seqlens)


def _backward(ctx, dout, _):
    dqkv = None if dout is None else short_attention_bwd(dout, *ctx.saved_tensors, ctx.max_seqlen)
    return dqkv, None, None


short_attention_fwd.register_autograd(_backward, setup_context=_setup_context)
