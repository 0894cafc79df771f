"""varlen_attention on the CPU: samples of equal length are one batched product.

Written out by hand because torch's bf16 flash backward is several times slower there than matmul and softmax at these
lengths (64 to 257 tokens).
"""

import torch
from torch import Tensor


def scaled_bmm(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale·(a @ b), scaled where the product is made instead of in a pass of its own."""
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=scale)


class BatchedAttentionFunction(torch.autograd.Function):
    """One batched product per run of equal lengths; keeps the heads and the weights."""

    @staticmethod
    def forward(ctx, qkv, packing):
        _, _, H, d = qkv.shape
        out = qkv.new_empty(len(qkv), H, d)
        saved = []
        for part, samples, length in packing.token_runs():
            heads = qkv[part].view(samples, length, 3, H, d).permute(2, 0, 3, 1, 4)  # [3, S, H, L, d]
            heads = heads.clone(memory_format=torch.contiguous_format)
            q, k, v = heads.flatten(1, 2)  # 3 x [S·H, L, d]
            weights = torch.softmax(scaled_bmm(q, k.mT, d**-0.5), dim=-1)  # [S·H, L, L]
            out[part].view(samples, length, H, d).copy_(
                torch.bmm(weights, v).view(samples, H, length, d).transpose(1, 2)
            )
            saved += [heads, weights]
        ctx.save_for_backward(*saved)
        ctx.packing = packing
        return out

    @staticmethod
    def backward(ctx, dout):
        N, H, d = dout.shape
        dqkv = dout.new_empty(N, 3, H, d)
        saved = iter(ctx.saved_tensors)
        for part, samples, length in ctx.packing.token_runs():
            (q, k, v), weights = next(saved).flatten(1, 2), next(saved)
            do = dout[part].view(samples, length, H, d).transpose(1, 2).contiguous().flatten(0, 1)  # [S·H, L, d]
            dq, dk, dv = dqkv[part].view(samples, length, 3, H, d).permute(2, 0, 3, 1, 4)  # 3 x [S, H, L, d]
            dv.copy_(torch.bmm(weights.mT, do).view_as(dv))
            dscores = torch._softmax_backward_data(torch.bmm(do, v.mT), weights, -1, weights.dtype)
            dq.copy_(scaled_bmm(dscores, k, d**-0.5).view_as(dq))
            dk.copy_(scaled_bmm(dscores.mT, q, d**-0.5).view_as(dk))
        return dqkv, None
