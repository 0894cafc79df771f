"""column_sum in Triton, and helpers for other kernels that sum columns.

    sum    a program takes a block of columns and a share of the rows, and sums in registers: fp32 [P, F]
    add    adds the P partial sums of each column in a fixed order: no atomics, the same bits every time

The number of multiprocessors decides how many programs share the rows.
"""

import torch
from torch import Tensor

from ..backend import multiprocessors, tl, triton
from .op import triton_op, wrap_triton
from .tiles import store_row

# A thread holds 16 bytes of each bf16 row and all warps share the row, so that column sums stay in registers.
SUM = dict(BLOCK_M=4, BLOCK_F=512, STAGES=3, num_warps=2)  # tile of rows and columns, tiles loaded ahead
SUM_PROGRAMS = 8  # per multiprocessor
SUM_ROWS = 48  # least rows per program: its partial sums move 8 bytes per column, a bf16 row 2


@triton.jit(do_not_specialize=["N", "rows"])
def _column_sum_kernel(
    x_ptr,  # [N, F]
    part_ptr,  # fp32 [P, F]
    N,
    rows,
    F: tl.constexpr,
    ZERO_START: tl.constexpr,  # columns that are not read
    ZERO_STOP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    STAGES: tl.constexpr,
):
    first = tl.program_id(1) * rows
    count = tl.minimum(rows, N - first)
    start = tl.program_id(0) * BLOCK_F
    if (start >= ZERO_START) & (start + BLOCK_F <= ZERO_STOP):
        count = 0
    cols = start + tl.arange(0, BLOCK_F)
    tile_rows = tl.arange(0, BLOCK_M)
    tile = tile_rows[:, None] * F + cols[None, :]
    total = tl.zeros([BLOCK_F], tl.float32)
    wanted = (cols < F) & ((cols < ZERO_START) | (cols >= ZERO_STOP))
    for row in tl.range(0, count, BLOCK_M, num_stages=STAGES):
        offset = (first + row).to(tl.int64) * F
        mask = (row + tile_rows < count)[:, None] & wanted[None, :]
        total += tl.sum(tl.load(x_ptr + offset + tile, mask, other=0.0).to(tl.float32), 0)
    tl.store(part_ptr + tl.program_id(1).to(tl.int64) * F + cols, total, wanted)


@triton.jit(do_not_specialize=["P"])
def _add_partials_kernel(
    part_ptr,  # fp32 [P, F]
    out_ptr,  # [F]
    P,
    F: tl.constexpr,
    ZERO_START: tl.constexpr,
    ZERO_STOP: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    wanted = (cols < F) & ((cols < ZERO_START) | (cols >= ZERO_STOP))
    total = tl.zeros([BLOCK_P, BLOCK_F], tl.float32)
    for first in range(0, P, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        mask = (part < P)[:, None] & wanted[None, :]
        total += tl.load(part_ptr + part.to(tl.int64)[:, None] * F + cols[None, :], mask, other=0.0)
    store_row(out_ptr, tl.sum(total, 0), cols, F, BLOCK_P)


def share_rows(x: Tensor, block_m: int, block_f: int, programs: int, least: int) -> tuple[tuple[int, int], int]:
    """How programs share the rows of x [N, F]: ((column blocks, shares), the launch grid; rows per share).

    block_m, block_f: rows and columns of a tile. programs: wanted per multiprocessor. least: rows per share if x has
    that many.
    """
    N, F = x.shape
    blocks = triton.cdiv(F, block_f)
    shares = max(1, min(N // least, multiprocessors(x.device) * programs // max(blocks, 1)))
    rows = triton.cdiv(triton.cdiv(N, shares), block_m) * block_m
    return (blocks, triton.cdiv(N, rows) if N else 0), rows


def add_partials(part: Tensor, dtype: torch.dtype, zero_start: int = 0, zero_stop: int = 0) -> Tensor:
    """Sum partial sums, fp32 [P, F], over P in a fixed order: [F] in `dtype`.

    Columns zero_start : zero_stop are 0; all columns are 0 if P is 0.
    """
    P, F = part.shape
    out = part.new_empty(F, dtype=dtype)
    if F > 0:
        block_p = min(64, max(4, triton.next_power_of_2(P)))  # at least as many as there are warps
        grid = (triton.cdiv(F, 2048 // block_p),)
        wrap_triton(_add_partials_kernel)[grid](
            part,
            out,
            P,
            F=F,
            ZERO_START=zero_start,
            ZERO_STOP=zero_stop,
            BLOCK_P=block_p,
            BLOCK_F=2048 // block_p,
            num_warps=4,
        )
    return out


@triton_op("column_sum")
def column_sum_fwd(x: Tensor, dtype: torch.dtype, zero_start: int, zero_stop: int) -> Tensor:
    x = x.contiguous()
    N, F = x.shape
    grid, rows = share_rows(x, SUM["BLOCK_M"], SUM["BLOCK_F"], SUM_PROGRAMS, SUM_ROWS)
    part = x.new_empty(grid[1], F, dtype=torch.float32)
    if part.numel() > 0:
        wrap_triton(_column_sum_kernel)[grid](x, part, N, rows, F=F, ZERO_START=zero_start, ZERO_STOP=zero_stop, **SUM)
    return add_partials(part, dtype, zero_start, zero_stop)
