"""Attention from one packed stream to another: each sample's queries see the keys of the same sample, no padding."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .packing import Packing


def varlen_cross_attention_ref(q: Tensor, kv: Tensor, packing: Packing, kv_packing: Packing) -> Tensor:
    """The definition of `varlen_cross_attention`: softmax(q·kᵀ/√d)·v sample by sample, in fp32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    out = []
    for queries, memory in zip(
        q.to(wide).split(packing.cu_seqlens.diff().tolist()),
        kv.to(wide).split(kv_packing.cu_seqlens.diff().tolist()),
        strict=True,
    ):
        k, v = memory.permute(1, 2, 0, 3)  # 2 x [H, M, d]
        queries = queries.transpose(0, 1)  # [H, L, d]
        weights = torch.softmax(queries @ k.mT / q.shape[-1] ** 0.5, dim=-1)
        out.append((weights @ v).transpose(0, 1))
    return torch.cat(out).to(q.dtype)


def paired_runs(packing: Packing, kv_packing: Packing) -> Iterator[tuple[slice, slice, int, int, int]]:
    """(query tokens, key tokens, samples, query length, key length) of consecutive samples equal in both lengths."""
    queries, keys = list(packing.runs), list(kv_packing.runs)
    q_start = k_start = i = j = 0
    while i < len(queries) and j < len(keys):
        (q_samples, q_length), (k_samples, k_length) = queries[i], keys[j]
        samples = min(q_samples, k_samples)
        q_stop, k_stop = q_start + samples * q_length, k_start + samples * k_length
        yield slice(q_start, q_stop), slice(k_start, k_stop), samples, q_length, k_length
        q_start, k_start = q_stop, k_stop
        queries[i], keys[j] = (q_samples - samples, q_length), (k_samples - samples, k_length)
        i, j = i + (q_samples == samples), j + (k_samples == samples)


def varlen_cross_attention(q: Tensor, kv: Tensor, packing: Packing, kv_packing: Packing) -> Tensor:
    """Attention of each sample's queries over its own keys and values, scale 1/√d.

    Args:
        q: [N, H, d], any floating type.
        kv: [M, 2, H, d] in q's type, first the keys, then the values.
        packing: lengths of the samples in q; a sample may have no queries.
        kv_packing: lengths of the samples in kv; a sample without keys gets zeros.

    Returns:
        [N, H, d] in q's type.

    Raises:
        ValueError: q or kv of another shape than the packings say, or packings of different numbers of samples.
    """
    if q.ndim != 3 or len(q) != packing.num_tokens:
        raise ValueError(f"q: expected [{packing.num_tokens}, H, d], got {tuple(q.shape)}")
    if kv.ndim != 4 or kv.shape != (kv_packing.num_tokens, 2, *q.shape[1:]):
        raise ValueError(f"kv: expected {(kv_packing.num_tokens, 2, *q.shape[1:])}, got {tuple(kv.shape)}")
    if packing.num_samples != kv_packing.num_samples:
        raise ValueError(
            f"kv_packing: expected {packing.num_samples} samples as in packing, got {kv_packing.num_samples}"
        )
    _, H, d = q.shape
    out = [q[:0]]
    for queries, keys, samples, q_length, k_length in paired_runs(packing, kv_packing):
        if q_length == 0:
            continue
        q_heads = q[queries].view(samples, q_length, H, d).transpose(1, 2)  # [S, H, L, d]
        k_heads, v_heads = kv[keys].view(samples, k_length, 2, H, d).permute(2, 0, 3, 1, 4)  # [S, H, M, d]
        if k_length == 0:
            mixed = torch.zeros_like(q_heads)
        elif q.device.type == "cpu":  # torch's flash backward is slow there in bf16, see attention_cpu.py
            weights = torch.softmax(torch.matmul(q_heads * d**-0.5, k_heads.mT), dim=-1)  # [S, H, L, M]
            mixed = torch.matmul(weights, v_heads)
        else:
            mixed = F.scaled_dot_product_attention(q_heads, k_heads, v_heads)
        out.append(mixed.transpose(1, 2).reshape(-1, H, d))
    return torch.cat(out)
