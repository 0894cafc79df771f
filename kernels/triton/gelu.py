"""gelu in Triton. Forward reads h and writes y; backward reads dy and h and writes dh, and gelu(h) again if asked to.

Each value is read or written once.

    u = √(2/π)·(h + 0.044715·h³)    e = exp(-2u)    s = (1 + tanh u)/2 = 1/(1 + e), so that 1 - s = e·s

Column sums as in column_sum.py.
"""

import math

import torch
from torch import Tensor

from ..backend import tl, triton
from .column_sum import add_partials, share_rows
from .op import triton_op, wrap_triton

FORWARD = dict(BLOCK=2048, num_warps=4)
# Tile of rows and columns and tiles loaded ahead, as in column_sum.py.
BACKWARD = dict(BLOCK_M=2, BLOCK_F=1024, STAGES=3, num_warps=4)
BACKWARD_PROGRAMS = 4  # per multiprocessor
BACKWARD_ROWS = 16  # least rows per program: its partial sums move 8 bytes per column, a bf16 row 6
_LINEAR = 2 * math.sqrt(2 / math.pi)  # 2u = _LINEAR·h + _CUBIC·h³
_CUBIC = 0.044715 * _LINEAR


@triton.jit
def _exp_minus_2u(h, LINEAR: tl.constexpr, CUBIC: tl.constexpr):
    """e = exp(-2u) for fp32 h; below 2^126 for h >= -10."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    return tl.exp2(h * (h * h * (-LOG2_E * CUBIC) - LOG2_E * LINEAR))


@triton.jit
def _gelu_fwd_kernel(
    h_ptr,  # [n]
    y_ptr,  # [n]
    n,
    LINEAR: tl.constexpr,
    CUBIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    mask = start + i < n
    h = tl.load(h_ptr + start + i, mask, other=0.0).to(tl.float32)
    y = h / (1.0 + _exp_minus_2u(h, LINEAR, CUBIC))
    tl.store(y_ptr + start + i, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["N", "rows"])
def _gelu_bwd_kernel(
    dy_ptr,  # [N, F]
    h_ptr,  # [N, F]
    dh_ptr,  # [N, F]
    y_ptr,  # [N, F] or None: gelu(h) is written, bit for bit the forward's output
    part_ptr,  # fp32 [P, F] or None: the sums of dh over the program's rows
    N,
    rows,
    LINEAR: tl.constexpr,
    CUBIC: tl.constexpr,
    F: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    STAGES: tl.constexpr,
):
    first = tl.program_id(1) * rows
    count = tl.minimum(rows, N - first)
    cols = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    tile_rows = tl.arange(0, BLOCK_M)
    tile = tile_rows[:, None] * F + cols[None, :]
    total = tl.zeros([BLOCK_F], tl.float32)
    for row in tl.range(0, count, BLOCK_M, num_stages=STAGES):
        offset = (first + row).to(tl.int64) * F
        mask = (row + tile_rows < count)[:, None] & (cols < F)[None, :]
        dy = tl.load(dy_ptr + offset + tile, mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_F], 0 where masked
        h = tl.load(h_ptr + offset + tile, mask, other=0.0).to(tl.float32)
        e = _exp_minus_2u(h, LINEAR, CUBIC)
        if y_ptr is not None:
            tl.store(y_ptr + offset + tile, (h / (1.0 + e)).to(y_ptr.dtype.element_ty), mask)
        h = tl.maximum(h, -10.0, propagate_nan=tl.PropagateNan.ALL)  # below -10 the derivative is practically 0
        e = tl.minimum(e, 8.5e37)  # larger than e at h = -10, but not infinite
        s = 1.0 / (1.0 + e)
        dh = dy * (s * (1.0 + h * (e * s) * (3.0 * CUBIC * h * h + LINEAR)))
        tl.store(dh_ptr + offset + tile, dh.to(dh_ptr.dtype.element_ty), mask)
        if part_ptr is not None:
            total += tl.sum(dh, 0)
    if part_ptr is not None:
        tl.store(part_ptr + tl.program_id(1).to(tl.int64) * F + cols, total, cols < F)


@triton_op("gelu_fwd")
def gelu_fwd(h: Tensor, bias: Tensor | None) -> Tensor:
    h = h.contiguous()
    y, n = h.new_empty(h.shape), h.numel()
    if n > 0:
        grid = (triton.cdiv(n, FORWARD["BLOCK"]),)
        wrap_triton(_gelu_fwd_kernel)[grid](h, y, n, LINEAR=_LINEAR, CUBIC=_CUBIC, **FORWARD)
    return y


@triton_op("gelu_bwd")
def gelu_bwd(dy: Tensor, h: Tensor, bias_dtype: torch.dtype | None, again: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(dh, dbias, gelu(h)). dbias, in bias_dtype, is empty if that is None; gelu(h) is empty unless `again`."""
    dy, h = dy.contiguous(), h.contiguous()
    N, F = h.shape
    grid, rows = share_rows(h, BACKWARD["BLOCK_M"], BACKWARD["BLOCK_F"], BACKWARD_PROGRAMS, BACKWARD_ROWS)
    dh, y = h.new_empty(h.shape), h.new_empty(h.shape) if again else None
    part = None if bias_dtype is None else h.new_empty(grid[1], F, dtype=torch.float32)
    if h.numel() > 0:
        wrap_triton(_gelu_bwd_kernel)[grid](dy, h, dh, y, part, N, rows, LINEAR=_LINEAR, CUBIC=_CUBIC, F=F, **BACKWARD)
    dbias = None if part is None or bias_dtype is None else add_partials(part, bias_dtype)
    return dh, h.new_empty(0) if dbias is None else dbias, h.new_empty(0) if y is None else y


def _setup_context(ctx, inputs, output):
    h, bias = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(h)


def _backward(ctx, dy):
    (h,) = ctx.saved_tensors
    wanted = ctx.bias_dtype is not None and ctx.needs_input_grad[1]
    dh, dbias, _ = gelu_bwd(dy, h, ctx.bias_dtype if wanted else None, False)
    return dh, dbias if wanted else None


gelu_fwd.register_autograd(_backward, setup_context=_setup_context)
