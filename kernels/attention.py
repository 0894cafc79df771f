"""Attention inside each sample of a packed stream: no token sees another sample, no token is padding."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_cpu import BatchedAttentionFunction
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
    for part, samples, length in packing.token_runs():
        q, k, v = qkv[part].view(samples, length, 3, H, d).permute(2, 0, 3, 1, 4)
        out.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, H, d))
    return torch.cat(out)
