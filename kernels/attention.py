"""Attention inside each sample of a packed stream: no token sees another sample, no token is padding.

On the CPU, samples of equal length are one batched product. Written out by hand because torch's bf16 flash backward
is several times slower there than matmul and softmax at these lengths (64 to 257 tokens).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .packing import Packing


def varlen_attention_ref(qkv: Tensor, packing: Packing) -> Tensor:
    """The definition of `varlen_attention`: softmax(q·kᵀ/√d)·v sample by sample, in fp32 or wider."""
    wide = qkv.to(torch.promote_types(qkv.dtype, torch.float32))
    out = []
    for sample in wide.split(packing.cu_seqlens.diff().tolist()):
        q, k, v = sample.permute(1, 2, 0, 3)  # 3 x [H, L, d]
        weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)
        out.append((weights @ v).transpose(0, 1))
    return torch.cat(out).to(qkv.dtype)


def _runs(packing: Packing):
    """(token slice, samples, length) of each run of equal lengths."""
    start = 0
    for samples, length in packing.runs:
        stop = start + samples * length
        if stop > start:
            yield slice(start, stop), samples, length
        start = stop


class BatchedAttentionFunction(torch.autograd.Function):
    """One batched product per run of equal lengths; keeps the heads and the weights."""

    @staticmethod
    def forward(ctx, qkv, packing):
        _, _, H, d = qkv.shape
        out = qkv.new_empty(len(qkv), H, d)
        saved = []
        for part, samples, length in _runs(packing):
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
        for part, samples, length in _runs(ctx.packing):
            (q, k, v), weights = next(saved), next(saved)
            do = dout[part].view(samples, length, H, d).transpose(1, 2).contiguous()
            dq, dk, dv = dqkv[part].view(samples, length, 3, H, d).permute(2, 0, 3, 1, 4)
            dv.copy_(torch.matmul(weights.mT, do))
            dscores = torch._softmax_backward_data(torch.matmul(do, v.mT), weights, -1, weights.dtype)
            dq.copy_(torch.matmul(dscores, k).mul_(d**-0.5))
            dk.copy_(torch.matmul(dscores.mT, q))
        return dqkv, None


def varlen_attention(qkv: Tensor, packing: Packing) -> Tensor:
    """Self-attention of each sample of a packed stream, scale 1/√d.

    Args:
        qkv: [N, 3, H, d], any floating type.
        packing: lengths of the samples.

    Returns:
        [N, H, d] in qkv's type.

    Raises:
        ValueError: qkv not [N, 3, H, d] with the packing's N.
    """
    if qkv.ndim != 4 or qkv.shape[1] != 3 or len(qkv) != packing.num_tokens:
        raise ValueError(f"qkv: expected [{packing.num_tokens}, 3, H, d], got {tuple(qkv.shape)}")
    if qkv.device.type == "cpu":
        return BatchedAttentionFunction.apply(qkv, packing)
    _, _, H, d = qkv.shape
    out = []
    for part, samples, length in _runs(packing):
        q, k, v = qkv[part].view(samples, length, 3, H, d).permute(2, 0, 3, 1, 4)
        out.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, H, d))
    return torch.cat(out)
