"""varlen_attention on the CPU: samples of equal length are one batched product.

Written out by hand because torch's bf16 flash backward is several times slower there than matmul and softmax at these
lengths (64 to 257 tokens).
"""

import torch


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
            heads[0].mul_(d**-0.5)
            q, k, v = heads
            weights = torch.softmax(torch.matmul(q, k.mT), dim=-1)  # [S, H, L, L]
            out[part].view(samples, length, H, d).copy_(torch.matmul(weights, v).transpose(1, 2))
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
            (q, k, v), weights = next(saved), next(saved)
            do = dout[part].view(samples, length, H, d).transpose(1, 2).contiguous()
            dq, dk, dv = dqkv[part].view(samples, length, 3, H, d).permute(2, 0, 3, 1, 4)
            dv.copy_(torch.matmul(weights.mT, do))
            dscores = torch._softmax_backward_data(torch.matmul(do, v.mT), weights, -1, weights.dtype)
            dq.copy_(torch.matmul(dscores, k).mul_(d**-0.5))
            dk.copy_(torch.matmul(dscores.mT, q))
        return dqkv, None
