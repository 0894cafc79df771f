"""Attention on the CPU: one batched product per run of samples of equal length.

It is written out by hand because PyTorch's bf16 flash backward on the CPU is several times slower than matmul and
softmax at these lengths (64 to 257 tokens).
"""

import torch
from torch import Tensor

from ..once import once_differentiable


def scaled_bmm(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale·(a @ b), with the scale applied inside the product instead of in a pass of its own."""
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=scale)


def _weights(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q·kᵀ/√d): [S·H, L, M]."""
    scores = scaled_bmm(q, k.mT, q.shape[-1] ** -0.5)
    return torch.softmax(scores, dim=-1, out=scores)


def _views(stream: Tensor, runs: list[tuple[int, int, int]], which: int) -> list[Tensor]:
    """Views of a stream [N, n, H, d], one [n, S, H, L, d] per run. which: 1 for queries, 2 for keys."""
    _, n, H, d = stream.shape
    parts = stream.split([run[0] * run[which] for run in runs])
    return [
        part.view(run[0], run[which], n, H, d).permute(2, 0, 3, 1, 4) for part, run in zip(parts, runs, strict=True)
    ]


class BatchedAttentionFunction(torch.autograd.Function):
    """Attention with one batched product per run of `paired_runs`.

    Takes one stream qkv [N, 3, H, d], or two: q [N, 1, H, d] and kv [M, 2, H, d]. It saves contiguous copies of q, k
    and v, and the attention weights if they are at most half as large. Otherwise the backward pass recomputes them.
    """

    @staticmethod
    def forward(ctx, runs, *streams):
        N, _, H, d = streams[0].shape
        out = streams[0].new_empty(N, H, d)
        saved, kept = [], []
        views = [_views(stream, runs, 1 + i) for i, stream in enumerate(streams)]
        for (mixed,), *parts in zip(_views(out.unsqueeze(1), runs, 1), *views, strict=True):
            heads = [part.clone(memory_format=torch.contiguous_format) for part in parts]
            q, k, v = (x for part in heads for x in part.flatten(1, 2))  # [S·H, L, d] and twice [S·H, M, d]
            weights = _weights(q, k)
            mixed.copy_(torch.bmm(weights, v).view_as(mixed))
            saved += heads
            if keep := 2 * weights.numel() <= sum(x.numel() for x in heads):
                saved.append(weights)
            kept.append(keep)
        ctx.save_for_backward(*saved)
        ctx.runs, ctx.kept, ctx.shapes = runs, kept, [stream.shape for stream in streams]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        d = dout.shape[-1]
        gradients = [dout.new_empty(shape) for shape in ctx.shapes]
        saved = iter(ctx.saved_tensors)
        views = [_views(gradient, ctx.runs, 1 + i) for i, gradient in enumerate(gradients)]
        for keep, (do,), *parts in zip(ctx.kept, _views(dout.unsqueeze(1), ctx.runs, 1), *views, strict=True):
            q, k, v = (x for _ in parts for x in next(saved).flatten(1, 2))
            weights = next(saved) if keep else _weights(q, k)
            dq, dk, dv = (x for part in parts for x in part)
            do = do.contiguous().flatten(0, 1)  # [S·H, L, d]
            dv.copy_(torch.bmm(weights.mT, do).view_as(dv))
            dweights = torch.bmm(do, v.mT)
            dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype, grad_input=dweights)
            dq.copy_(scaled_bmm(dscores, k, d**-0.5).view_as(dq))
            dk.copy_(scaled_bmm(dscores.mT, q, d**-0.5).view_as(dk))
        return None, *gradients
