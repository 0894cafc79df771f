"""The norms of adaln.py in Triton: one launch forward, two backward, for both ops, with LayerNorm or RMSNorm.

A program walks a chunk of the stream whose tokens share a modulation row (`Packing.chunks`), with the row in registers.

    forward    reads x, h; writes r, y [N, D] and the statistics [N]
    backward   reads dy, dr, r, h; writes dx, dh [N, D] and the chunk's sums for tables and biases, fp32 [C, D]
    sum        adds the sums of each row's chunks in a fixed order: no atomics, the same bits every time

Each pass moves the stream once. Tables and partial sums of a chunk cost as many bytes as three or four tokens.
Without a mean pointer the kernels compute RMSNorm.
"""

import torch
from torch import Tensor

from ..backend import tl, triton
from ..packing import unit_columns
from .op import triton_op, wrap_triton
from .tiles import load_row, store_row


@triton.jit
def _affine(shift_ptr, scale_ptr, weight_ptr, bias_ptr, row, stride_shift, stride_scale, cols, mask):
    """alpha = weight·(1 + scale), beta = bias·(1 + scale) + shift: fp32, the shape of cols."""
    alpha = tl.full(cols.shape, 1.0, tl.float32)
    beta = tl.full(cols.shape, 0.0, tl.float32)
    if scale_ptr is not None:
        alpha += tl.load(scale_ptr + row * stride_scale + cols, mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        beta = alpha * tl.load(bias_ptr + cols, mask, other=0.0).to(tl.float32)
    if shift_ptr is not None:
        beta += tl.load(shift_ptr + row * stride_shift + cols, mask, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        alpha *= tl.load(weight_ptr + cols, mask, other=0.0).to(tl.float32)
    return alpha, beta


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr,  # [N, D]
    h_ptr,  # [N, D] or None; the tables below may be None too
    gate_ptr,  # [R, D]
    shift_ptr,  # [R, D]
    scale_ptr,  # [R, D]
    weight_ptr,  # [D]
    bias_ptr,  # [D]
    chunks_ptr,  # int32 [C, 3]: start, stop, row
    r_ptr,  # [N, D], None without h
    y_ptr,  # [N, D]
    mean_ptr,  # fp32 [N], None for RMSNorm
    rstd_ptr,  # fp32 [N]
    stride_gate,
    stride_shift,
    stride_scale,
    eps: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,  # programs per chunk, which take its tiles in turn
    STAGES: tl.constexpr,
):
    chunk = chunks_ptr + 3 * tl.program_id(0)
    start, stop, row = tl.load(chunk), tl.load(chunk + 1), tl.load(chunk + 2).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    tile_rows = tl.arange(0, BLOCK_M)
    tile = tile_rows[:, None] * D + cols[None, :]
    alpha, beta = _affine(
        shift_ptr, scale_ptr, weight_ptr, bias_ptr, row, stride_shift, stride_scale, cols, cols < D
    )  # [BLOCK_D]
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + row * stride_gate + cols, cols < D, other=0.0).to(tl.float32)

    for first in tl.range(tl.program_id(1) * BLOCK_M, stop - start, SPLIT * BLOCK_M, num_stages=STAGES):
        offset = start.to(tl.int64) * D + first * D
        row_mask = first + tile_rows < stop - start
        mask = row_mask[:, None] & (cols < D)[None, :]
        x = tl.load(x_ptr + offset + tile, mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_D]
        if h_ptr is not None:
            h = tl.load(h_ptr + offset + tile, mask, other=0.0).to(tl.float32)
            if gate_ptr is not None:
                h *= gate[None, :]
            r = (x + h).to(r_ptr.dtype.element_ty)
            tl.store(r_ptr + offset + tile, r, mask)
            x = r.to(tl.float32)  # normalise the stored, rounded r: the backward pass reads the same values
        if mean_ptr is not None:
            mean = tl.sum(x, 1) / D
            x = tl.where(mask, x - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
        y = x * rstd[:, None] * alpha[None, :] + beta[None, :]
        tl.store(y_ptr + offset + tile, y.to(y_ptr.dtype.element_ty), mask)
        if mean_ptr is not None:
            tl.store(mean_ptr + start + first + tile_rows, mean, row_mask)
        tl.store(rstd_ptr + start + first + tile_rows, rstd, row_mask)


@triton.jit
def _layer_norm_bwd_kernel(
    dy_ptr,  # [N, D]
    dr_ptr,  # [N, D] or None
    r_ptr,  # [N, D], what was normalised
    h_ptr,  # [N, D], None if dgate is not wanted
    gate_ptr,  # [R, D] or None
    scale_ptr,  # [R, D] or None
    weight_ptr,  # [D] or None
    mean_ptr,  # fp32 [N], None for RMSNorm
    rstd_ptr,  # fp32 [N]
    chunks_ptr,  # int32 [C, 3]: start, stop, row
    dx_ptr,  # [N, D]
    dh_ptr,  # [N, D], None if it equals dx
    dgate_ptr,  # fp32 [C, D], the chunk's sums of dx·h; None without h
    dbeta_ptr,  # fp32 [C, D] or None, sums of dy
    dalpha_ptr,  # fp32 [C, D] or None, sums of dy·x̂
    dh_bias_ptr,  # fp32 [C, D] or None, sums of dh
    stride_gate,
    stride_scale,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    pid = tl.program_id(0)
    chunk = chunks_ptr + 3 * pid
    start, stop, row = tl.load(chunk), tl.load(chunk + 1), tl.load(chunk + 2).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    tile_rows = tl.arange(0, BLOCK_M)
    tile = tile_rows[:, None] * D + cols[None, :]
    alpha, _ = _affine(None, scale_ptr, weight_ptr, None, row, 0, stride_scale, cols, cols < D)
    dgate = tl.zeros([BLOCK_D], tl.float32)
    dbeta = tl.zeros([BLOCK_D], tl.float32)
    dalpha = tl.zeros([BLOCK_D], tl.float32)
    dh_bias = tl.zeros([BLOCK_D], tl.float32)
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + row * stride_gate + cols, cols < D, other=0.0).to(tl.float32)

    for first in tl.range(0, stop - start, BLOCK_M, num_stages=STAGES):
        offset = start.to(tl.int64) * D + first * D
        row_mask = first + tile_rows < stop - start
        mask = row_mask[:, None] & (cols < D)[None, :]
        # All loads come first: after a sum over columns, where warps wait for each other, they would start late.
        dy = tl.load(dy_ptr + offset + tile, mask, other=0.0)  # [BLOCK_M, BLOCK_D], 0 where masked
        r = tl.load(r_ptr + offset + tile, mask, other=0.0)
        if mean_ptr is not None:
            mean = tl.load(mean_ptr + start + first + tile_rows, row_mask, other=0.0)
        rstd = tl.load(rstd_ptr + start + first + tile_rows, row_mask, other=0.0)
        if dr_ptr is not None:
            dr = tl.load(dr_ptr + offset + tile, mask, other=0.0)
        if h_ptr is not None:
            h = tl.load(h_ptr + offset + tile, mask, other=0.0)
        dy = dy.to(tl.float32)
        x_hat = r.to(tl.float32)
        if mean_ptr is not None:
            x_hat -= mean[:, None]
        x_hat *= rstd[:, None]
        if dbeta_ptr is not None:
            dbeta += tl.sum(dy, 0)
        if dalpha_ptr is not None:
            dalpha += tl.sum(dy * x_hat, 0)
        g = dy * alpha[None, :]
        if mean_ptr is not None:
            along_one = tl.sum(g, 1) / D
        along_x_hat = tl.sum(g * x_hat, 1) / D
        if mean_ptr is not None:
            g -= along_one[:, None]
        dx = (g - x_hat * along_x_hat[:, None]) * rstd[:, None]
        if dr_ptr is not None:
            dx += dr.to(tl.float32)
        if h_ptr is not None:
            dgate += tl.sum(dx * h.to(tl.float32), 0)
        if gate_ptr is not None:
            tl.store(dh_ptr + offset + tile, (dx * gate[None, :]).to(dh_ptr.dtype.element_ty), mask)
        elif dh_ptr is not None:
            tl.store(dh_ptr + offset + tile, dx.to(dh_ptr.dtype.element_ty), mask)
        if dh_bias_ptr is not None:
            dh_bias += tl.sum(dx, 0)
        tl.store(dx_ptr + offset + tile, dx.to(dx_ptr.dtype.element_ty), mask)  # last: earlier it costs registers

    partial = pid.to(tl.int64) * D + cols
    if dgate_ptr is not None:
        tl.store(dgate_ptr + partial, dgate, cols < D)
    if dbeta_ptr is not None:
        tl.store(dbeta_ptr + partial, dbeta, cols < D)
    if dalpha_ptr is not None:
        tl.store(dalpha_ptr + partial, dalpha, cols < D)
    if dh_bias_ptr is not None:
        if gate_ptr is not None:
            dh_bias *= gate  # all tokens of the chunk share one gate row
        tl.store(dh_bias_ptr + partial, dh_bias, cols < D)


@triton.jit
def _partials(partial_ptr, chunk, stop, cols, D: tl.constexpr):
    """Load the partial sums [C, D] of these chunks, 0 from chunk `stop` on: [BLOCK_C, BLOCK_D]."""
    mask = (chunk < stop)[:, None] & (cols < D)[None, :]
    return tl.load(partial_ptr + chunk.to(tl.int64)[:, None] * D + cols[None, :], mask, other=0.0)


@triton.jit
def _layer_norm_bwd_sum_kernel(
    dgate_part_ptr,  # fp32 [C, D] or None, each chunk's sums
    dbeta_part_ptr,  # fp32 [C, D] or None
    dalpha_part_ptr,  # fp32 [C, D] or None
    dh_bias_part_ptr,  # fp32 [C, D] or None
    scale_ptr,  # [R, D] or None
    weight_ptr,  # [D] or None
    bias_ptr,  # [D] or None
    chunks_ptr,  # int32 [C, 3]: start, stop, row
    row_chunks_ptr,  # int32 [num_rows + 1], the chunks of each row
    dgate_ptr,  # [R, D] or None
    dshift_ptr,  # [R, D] or None
    dscale_ptr,  # [R, D] or None
    dweight_ptr,  # [D] or None
    dbias_ptr,  # [D] or None
    dh_bias_ptr,  # [D] or None
    stride_scale,
    C,
    num_rows,
    FOR_ALL: tl.constexpr,  # 1: program 0 makes the gradients [D]; 0: there are none. Other programs: a table row each
    D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    if tl.program_id(0) >= FOR_ALL:
        row = tl.program_id(0) - FOR_ALL
        start = tl.load(row_chunks_ptr + row, row < num_rows, other=0)  # a row that no sample uses has no chunk
        stop = tl.load(row_chunks_ptr + row + 1, row < num_rows, other=0)
        dgates = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
        dbetas = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
        dalphas = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
        for first in range(start, stop, BLOCK_C):
            chunk = first + tl.arange(0, BLOCK_C)
            if dgate_ptr is not None:
                dgates += _partials(dgate_part_ptr, chunk, stop, cols, D)
            if dbeta_part_ptr is not None:
                dbetas += _partials(dbeta_part_ptr, chunk, stop, cols, D)
            if dscale_ptr is not None:
                dalphas += _partials(dalpha_part_ptr, chunk, stop, cols, D)
        out = row.to(tl.int64) * D
        if dgate_ptr is not None:
            store_row(dgate_ptr + out, tl.sum(dgates, 0), cols, D, BLOCK_C)
        if dshift_ptr is not None:
            store_row(dshift_ptr + out, tl.sum(dbetas, 0), cols, D, BLOCK_C)
        if dscale_ptr is not None:
            dscale = tl.sum(dalphas, 0)
            if weight_ptr is not None:
                dscale *= load_row(weight_ptr, cols, D, BLOCK_C)
            if bias_ptr is not None:
                dscale += tl.sum(dbetas, 0) * load_row(bias_ptr, cols, D, BLOCK_C)
            store_row(dscale_ptr + out, dscale, cols, D, BLOCK_C)
    else:  # sum over all chunks; for weight and bias each chunk is multiplied by 1 + scale of its row
        dweight = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
        dbias = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
        dh_bias = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
        # Hundreds of chunks in a row: tiles are loaded ahead, or each would wait for memory.
        for first in tl.range(0, C, BLOCK_C, num_stages=STAGES):
            chunk = first + tl.arange(0, BLOCK_C)
            if dh_bias_ptr is not None:
                dh_bias += _partials(dh_bias_part_ptr, chunk, C, cols, D)
            scale = tl.full([BLOCK_C, BLOCK_D], 1.0, tl.float32)
            if (dweight_ptr is not None or dbias_ptr is not None) and scale_ptr is not None:
                row = tl.load(chunks_ptr + 3 * chunk + 2, chunk < C, other=0).to(tl.int64)
                mask = (chunk < C)[:, None] & (cols < D)[None, :]
                scale += tl.load(scale_ptr + row[:, None] * stride_scale + cols[None, :], mask, other=0.0)
            if dweight_ptr is not None:
                dweight += _partials(dalpha_part_ptr, chunk, C, cols, D) * scale
            if dbias_ptr is not None:
                dbias += _partials(dbeta_part_ptr, chunk, C, cols, D) * scale
        if dweight_ptr is not None:
            store_row(dweight_ptr, tl.sum(dweight, 0), cols, D, BLOCK_C)
        if dbias_ptr is not None:
            store_row(dbias_ptr, tl.sum(dbias, 0), cols, D, BLOCK_C)
        if dh_bias_ptr is not None:
            store_row(dh_bias_ptr, tl.sum(dh_bias, 0), cols, D, BLOCK_C)


def _blocks(D: int) -> dict[str, int]:
    """A thread holds 16 bytes of each bf16 row: all warps share a row, and column sums stay in registers."""
    BLOCK_D = max(16, triton.next_power_of_2(D))
    return {"D": D, "BLOCK_D": BLOCK_D, "num_warps": min(max(BLOCK_D // 256, 1), 16)}


# The bytes that a multiprocessor has in flight decide the speed: programs that fit its registers, times rows of a tile,
# times tiles loaded ahead (STAGES - 1).
def _fwd_launch(D: int) -> dict[str, int]:
    return _blocks(D) | {"BLOCK_M": 4 if D <= 1024 else 2, "SPLIT": 2, "STAGES": 1}


def _bwd_launch(D: int) -> dict[str, int]:
    """Tiles loaded ahead lie in shared memory: 64 KiB for fp32 at D = 1024, 1152 and 2048."""
    return _blocks(D) | {"BLOCK_M": 2 if D <= 1024 else 1, "STAGES": 3 if D <= 2048 else 1}


def _sum_launch(D: int, affine: bool) -> dict[str, int]:
    """Tiles loaded ahead lie in shared memory, also in the programs of table rows: with affine four of 4 KiB each."""
    return {"D": D, "BLOCK_C": 32, "BLOCK_D": 32, "STAGES": 2 if affine else 6, "num_warps": 4}


def _stride(table: Tensor | None) -> int:
    return 0 if table is None else table.stride(0)


def _empty(like: Tensor | None, x: Tensor) -> Tensor:
    """An empty tensor in the shape and type of `like`; of 0 elements if `like` is None."""
    return x.new_empty(0) if like is None else like.new_empty(like.shape)


@triton_op("layer_norm_fwd")
def layer_norm_fwd(
    x: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    h_bias: Tensor | None,
    chunks: Tensor,
    row_chunks: Tensor,
    eps: float,
    rms: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both norms: (r, y, mean, rstd). r is empty without h, mean is empty for RMSNorm.

    h_bias: already included in h; passed only to receive its gradient. dtype: type of y, and of h if given.
    """
    x, h = x.contiguous(), None if h is None else h.contiguous()
    gate, shift, scale, weight, bias = map(unit_columns, (gate, shift, scale, weight, bias))
    N, D = x.shape
    C = chunks.shape[0]
    r, y = x.new_empty(0 if h is None else x.shape), x.new_empty(x.shape, dtype=dtype)
    mean, rstd = x.new_empty(0 if rms else N, dtype=torch.float32), x.new_empty(N, dtype=torch.float32)
    if C > 0:
        launch = _fwd_launch(D)
        wrap_triton(_layer_norm_fwd_kernel)[(C, launch["SPLIT"])](
            x, h, gate, shift, scale, weight, bias, chunks, None if h is None else r, y, None if rms else mean, rstd,
            _stride(gate), _stride(shift), _stride(scale), eps=eps, **launch,
        )  # fmt: skip
    return r, y, mean, rstd


@triton_op("layer_norm_bwd")
def layer_norm_bwd(
    dy: Tensor,
    dr: Tensor | None,
    r: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    h_bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    chunks: Tensor,
    row_chunks: Tensor,
    has_h: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dh, dgate, dshift, dscale, dweight, dbias, dh_bias), each empty if there is no such argument.

    h is passed only for dgate, which is empty without it. dh has dy's type; without gate it equals dx, and is made only
    if x has another type.
    """
    dy, r = dy.contiguous(), r.contiguous()
    dr, h = (None if t is None else t.contiguous() for t in (dr, h))
    gate, scale, weight, bias = map(unit_columns, (gate, scale, weight, bias))
    D, C = r.shape[1], chunks.shape[0]
    like_h = dy if has_h and (gate is not None or dy.dtype != r.dtype) else None
    inputs = r, like_h, None if h is None else gate, shift, scale, weight, bias, h_bias
    gradients = tuple(_empty(like, r) for like in inputs)
    dx, dh, *dtables = (None if like is None else d for like, d in zip(inputs, gradients, strict=True))

    def partial(needed: bool) -> Tensor | None:
        return r.new_empty(C, D, dtype=torch.float32) if needed else None

    parts = (
        partial(h is not None),
        partial(shift is not None or bias is not None),
        partial(scale is not None or weight is not None),
        partial(h_bias is not None),
    )
    if C > 0:
        wrap_triton(_layer_norm_bwd_kernel)[(C,)](
            dy, dr, r, h, gate, scale, weight, mean, rstd, chunks, dx, dh, *parts,
            _stride(gate), _stride(scale), **_bwd_launch(D),
        )  # fmt: skip
    R = max(0 if d is None else d.shape[0] for d in dtables[:3])
    for_all = int(any(t is not None for t in (weight, bias, h_bias)))
    if for_all + R > 0:
        launch = _sum_launch(D, affine=weight is not None or bias is not None)
        wrap_triton(_layer_norm_bwd_sum_kernel)[(for_all + R, triton.cdiv(D, launch["BLOCK_D"]))](
            *parts, scale, weight, bias, chunks, row_chunks, *dtables,
            _stride(scale), C, row_chunks.shape[0] - 1, FOR_ALL=for_all, **launch,
        )  # fmt: skip
    dx, dh, dgate, dshift, dscale, dweight, dbias, dh_bias = gradients
    return dx, dh, dgate, dshift, dscale, dweight, dbias, dh_bias


def _setup_context(ctx, inputs, output):
    x, h, gate, *tables, chunks, row_chunks, _, rms, ctx.dtype = inputs
    r, _, mean, rstd = output
    ctx.has_h = h is not None
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    statistics = (None if rms else mean), rstd
    kept = h if gate is not None and gate.requires_grad else None  # h is read for dgate alone
    ctx.save_for_backward(r if ctx.has_h else x, kept, gate, *tables, *statistics, chunks, row_chunks)


def _backward(ctx, dr, dy, *_):
    r, h, gate, *tables_and_rest = ctx.saved_tensors
    tables = (gate if h is not None else None), *tables_and_rest[:5]
    dy = torch.zeros_like(r, dtype=ctx.dtype) if dy is None else dy
    dx, dh, *dtables = layer_norm_bwd(dy, dr if ctx.has_h else None, r, h, gate, *tables_and_rest, ctx.has_h)
    if not ctx.has_h:
        dh = None
    elif gate is None and dy.dtype == r.dtype:
        dh = dx
    return dx, dh, *(None if t is None else d for t, d in zip(tables, dtables, strict=True)), *(None,) * 5


layer_norm_fwd.register_autograd(_backward, setup_context=_setup_context)
