"""The norms of adaln.py on the CPU.

- bf16: one compiled pass forward and one backward (cpu.cpp).
- Other types: one call of PyTorch's LayerNorm per segment of equal modulation, with the segment's row of the folded
  table as its affine.

Statistics and sums are in fp32 or wider, in a fixed order.
"""

import torch
from torch import Tensor

from ..once import once_differentiable
from ..packing import Packing, unit_columns
from . import compiled


class CompiledLayerNormFunction(torch.autograd.Function):
    """(r, y) of bf16 x and h [N, D], with fp32 tables. Without h and gate, only the norm: r is None."""

    @staticmethod
    def forward(ctx, x, h, gate, alpha, beta, packing, eps):
        x, h = x.contiguous(), None if h is None else h.contiguous()
        gate, alpha, beta = map(unit_columns, (gate, alpha, beta))
        r, y, mean, rstd = compiled.layer_norm(x, h, gate, alpha, beta, packing, eps)
        ctx.save_for_backward(r, h, gate, alpha, mean, rstd)
        ctx.packing = packing
        return r if h is not None else None, y

    @staticmethod
    @once_differentiable
    def backward(ctx, dr, dy):
        r, h, gate, alpha, mean, rstd = ctx.saved_tensors
        dr, dy = None if h is None else dr.contiguous(), dy.contiguous()
        dx, dh, (dalpha, dbeta, dgate) = compiled.layer_norm_backward(
            dr, dy, r, h, gate, alpha, mean, rstd, ctx.packing
        )
        return dx, dh, None if h is None else dgate, dalpha, dbeta, None, None


def _segments(packing: Packing, rows: int) -> tuple[list[int], list[int]]:
    """Token count and table row of each segment of equal modulation; a single segment if the tables have one row."""
    if rows == 1 or packing.num_tokens == 0:
        return [packing.num_tokens], [0]
    return [stop - start for start, stop, _ in packing.segments], [row for _, _, row in packing.segments]


def _sum_rows(parts: list[Tensor], rows: list[int], like: Tensor) -> Tensor:
    """Gradient of a table [R, D] from row gradients, one per segment, added in stream order."""
    index = torch.tensor(rows, device=like.device)
    return torch.zeros_like(like).index_add_(0, index, torch.stack(parts).to(like.dtype))


class ModulatedLayerNormFunction(torch.autograd.Function):
    """y = x̂·alpha + beta of x [N, D], with tables alpha and beta [R, D]."""

    @staticmethod
    def forward(ctx, x, alpha, beta, packing, eps):
        lengths, rows = _segments(packing, len(alpha))
        alphas, betas = alpha.unbind(), beta.unbind()
        parts = [
            torch.native_layer_norm(part, x.shape[-1:], alphas[row], betas[row], eps)
            for part, row in zip(x.split(lengths), rows, strict=True)
        ]
        y, mean, rstd = (torch.cat(column) for column in zip(*parts, strict=True))
        ctx.save_for_backward(x, alpha, beta, mean, rstd)
        ctx.lengths, ctx.rows = lengths, rows
        return y

    @staticmethod
    def backward(ctx, dy):
        x, alpha, beta, mean, rstd = ctx.saved_tensors
        dx, dalpha, dbeta = _layer_norm_backward(dy, x, alpha, beta, mean, rstd, ctx.lengths, ctx.rows)
        rows = ctx.rows
        return torch.cat(dx), _sum_rows(dalpha, rows, alpha), _sum_rows(dbeta, rows, alpha), None, None


def _layer_norm_backward(
    dy: Tensor, x: Tensor, alpha: Tensor, beta: Tensor, mean: Tensor, rstd: Tensor, lengths: list[int], rows: list[int]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """dx, dalpha and dbeta of each segment."""
    alphas, betas, D = alpha.unbind(), beta.unbind(), x.shape[-1:]
    columns = zip(*(t.split(lengths) for t in (dy, x, mean, rstd)), rows, strict=True)
    parts = [
        torch.ops.aten.native_layer_norm_backward(g, part, D, m, r, alphas[row], betas[row], [True, True, True])
        for g, part, m, r, row in columns
    ]
    dx, dalpha, dbeta = (list(column) for column in zip(*parts, strict=True))
    return dx, dalpha, dbeta


class GatedResidualLayerNormFunction(torch.autograd.Function):
    """(r, y) with r = x + gate·h. The three tables gate, alpha, beta have the same number of rows."""

    @staticmethod
    def forward(ctx, x, h, gate, alpha, beta, packing, eps):
        lengths, rows = _segments(packing, len(alpha))
        alphas, betas, gates = alpha.unbind(), beta.unbind(), gate.unbind()
        r, parts = torch.empty_like(x), []
        for x_part, h_part, r_part, row in zip(x.split(lengths), h.split(lengths), r.split(lengths), rows, strict=True):
            torch.addcmul(x_part, h_part, gates[row], out=r_part)
            parts.append(torch.native_layer_norm(r_part, x.shape[-1:], alphas[row], betas[row], eps))
        y, mean, rstd = (torch.cat(column) for column in zip(*parts, strict=True))
        ctx.save_for_backward(r, h, gate, alpha, beta, mean, rstd)
        ctx.lengths, ctx.rows = lengths, rows
        return r, y

    @staticmethod
    @once_differentiable
    def backward(ctx, dr, dy):
        r, h, gate, alpha, beta, mean, rstd = ctx.saved_tensors
        lengths, rows, gates = ctx.lengths, ctx.rows, gate.unbind()
        dnorm, dalpha, dbeta = _layer_norm_backward(dy, r, alpha, beta, mean, rstd, lengths, rows)
        dx, dh, dgate = torch.empty_like(r), torch.empty_like(r), []
        columns = (t.split(lengths) for t in (dr, h, dx, dh))
        for dr_part, h_part, dx_part, dh_part, d, row in zip(*columns, dnorm, rows, strict=True):
            torch.add(d, dr_part, out=dx_part)
            torch.mul(dx_part, gates[row], out=dh_part)
            dgate.append(torch.mul(dx_part, h_part, out=d).sum(0))  # sum() accumulates in fp32 in any type
        return (
            dx, dh, _sum_rows(dgate, rows, alpha).to(gate.dtype),
            _sum_rows(dalpha, rows, alpha), _sum_rows(dbeta, rows, alpha), None, None,
        )  # fmt: skip
