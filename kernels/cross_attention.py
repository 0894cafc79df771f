"""Attention from one packed stream to another: the queries of a sample see the keys of the same sample only.

There is no padding. Backends, and the choice between them, are those of attention.py, without triton.
"""

import torch
from torch import Tensor

from .attention import Attention, attention_backend, dense_attention
from .checks import check_devices, check_tensor
from .cpu.attention import BatchedAttentionFunction
from .packing import Packing, paired_runs


def varlen_cross_attention_ref(q: Tensor, kv: Tensor, packing: Packing, kv_packing: Packing) -> Tensor:
    """The definition of `varlen_cross_attention`: softmax(q·kᵀ/√d)·v, sample by sample, in fp32 or wider."""
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


def varlen_cross_attention(
    q: Tensor, kv: Tensor, packing: Packing, kv_packing: Packing, backend: Attention | None = None
) -> Tensor:
    """Attention of each sample's queries over its own keys and values, with scale 1/√d.

    Args:
        q: [N, H, d], any floating type.
        kv: [M, 2, H, d] in q's type, first the keys, then the values.
        packing: lengths of the samples in q; a sample may have no queries.
        kv_packing: lengths of the samples in kv; a sample without keys gets zeros.
        backend: overrides the choice of `set_attention`; see `attention_backend`.

    Returns:
        [N, H, d] in q's type.

    Raises:
        ValueError: the shape of q or kv does not fit its packing, types or devices differ, the packings have different
            numbers of samples, or the backend is unknown or cannot take q.
    """
    check_tensor("q", q, (packing.num_tokens, "H", "d"))
    check_tensor("kv", kv, (kv_packing.num_tokens, 2, *q.shape[1:]), q.dtype)
    if packing.num_samples != kv_packing.num_samples:
        raise ValueError(
            f"kv_packing: expected {packing.num_samples} samples as in packing, got {kv_packing.num_samples}"
        )
    check_devices(q=q, kv=kv, packing=packing.cu_seqlens, kv_packing=kv_packing.cu_seqlens)
    name, _ = attention_backend(q.device, q.dtype, q.shape[-1], packing, backend, kv_packing)
    runs = paired_runs(packing, kv_packing)
    # With empty q or kv this path too gives zeros, also as gradients.
    if name == "matmul" or q.numel() == 0 or kv.numel() == 0:
        return BatchedAttentionFunction.apply(runs, q.unsqueeze(1), kv)
    work = packing.cu_seqlens, kv_packing.cu_seqlens, packing.max_seqlen, kv_packing.max_seqlen
    if name == "flash_attn":
        from flash_attn import flash_attn_varlen_kvpacked_func

        return flash_attn_varlen_kvpacked_func(q, kv, *work, deterministic=True)
    k, v = kv.unbind(1)
    if name == "varlen_attn":
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(q, k, v, *work)  # type: ignore[return-value]
    return dense_attention(q, k, v, runs)
