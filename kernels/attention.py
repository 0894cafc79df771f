"""Attention inside each sample of a packed stream: no token sees another sample, and there is no padding.

There are five backends. `attention_backend` tells which one runs and why. `varlen_cross_attention` has all but triton.

    triton       our own kernel for short samples (triton/attention.py): all lengths in one launch, deterministic
    flash_attn   flash-attn 2: writes gradients packed as [N, 3, H, d], deterministic
    varlen_attn  torch.nn.attention.varlen: the same algorithm, part of PyTorch
    sdpa         scaled_dot_product_attention, one call per run (consecutive samples of equal length)
    matmul       matmul, softmax, matmul, once per run (cpu/attention.py)
"""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import runs_triton, stands_for_gpu, untraced
from .checks import check_devices, check_tensor
from .cpu.attention import BatchedAttentionFunction
from .linear import bias_gradient
from .packages import package_refusal
from .packing import Packing, paired_runs
from .triton.attention import short_attention_fwd

Attention = Literal["auto", "triton", "flash_attn", "varlen_attn", "sdpa", "matmul"]
NAMES = get_args(Attention)
FLASH_ATTN_VERSIONS = (2, 7), (2, 8)  # first and last version whose functions are known to have these signatures
_OPTIONS = "dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs"
FLASH_ATTN_SIGNATURES = {
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {_OPTIONS}",
    "flash_attn_varlen_kvpacked_func": (f"q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, {_OPTIONS}"),
}
SHORT = 512  # `auto` takes our own kernel if no sample has more tokens
# On a CPU, matmul is faster than sdpa up to so many tokens per sample; with gradients, at every length.
FEW_TOKENS = 128

_choice: Attention = "auto"


class AttentionBackend(NamedTuple):
    """A backend and the reason for it: a sentence whose subject is the backend, e.g. "runs anywhere"."""

    name: str
    reason: str


def set_attention(choice: Attention) -> None:
    """Set the backend for all calls of this process that do not name one. `auto`: the rule of `attention_backend`.

    Raises:
        ValueError: an unknown name. Whether the backend can run is checked when it is called.
    """
    global _choice
    _check_known(choice)
    _choice = choice


@contextmanager
def attention(choice: Attention) -> Iterator[None]:
    """`set_attention` within a with block; afterwards the earlier choice is back."""
    before = _choice
    set_attention(choice)
    try:
        yield
    finally:
        set_attention(before)


def attention_backend(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    packing: Packing | None = None,
    backend: Attention | None = None,
    kv_packing: Packing | None = None,
) -> AttentionBackend:
    """The backend that `varlen_attention` uses for such a tensor, and why.

    `auto` takes the first that fits:

        CPU, no gradients, a sample of more than 128 tokens               sdpa
        CPU otherwise                                                     matmul
        self-attention, no sample of more than 512 tokens, and our
        kernel takes the tensor                                           triton
        flash-attn 2 is installed and takes the tensor                    flash_attn
        all samples have one length (one run)                             sdpa
        varlen_attn takes the tensor                                      varlen_attn
        otherwise                                                         sdpa

    Copies with several runs, in rows of width D per token: sdpa 14 (it splits q, k and v, and joins outputs and
    gradients), varlen_attn 6 (it joins gradients), triton and flash_attn 0.

    Args:
        device, dtype, head_dim: of q, k and v.
        packing: of the stream; None: a ragged stream of short samples.
        backend: overrides the choice of `set_attention`.
        kv_packing: packing of the keys in `varlen_cross_attention`; a run there is equal in both lengths.

    Raises:
        ValueError: the backend is unknown or cannot take such a tensor.
    """
    runs, max_seqlen, cross = None, 0, kv_packing is not None
    if packing is not None:
        kv_packing = packing if kv_packing is None else kv_packing
        runs = sum(1 for _, queries, keys in paired_runs(packing, kv_packing) if queries and keys)
        max_seqlen = max(packing.max_seqlen, kv_packing.max_seqlen)
    choice = _choice if backend is None else backend
    return AttentionBackend(*_select(device, dtype, head_dim, runs, max_seqlen, cross, choice))


def varlen_attention_ref(qkv: Tensor, packing: Packing) -> Tensor:
    """The definition of `varlen_attention`: softmax(q·kᵀ/√d)·v, sample by sample, in fp32 or wider."""
    wide = qkv.to(torch.promote_types(qkv.dtype, torch.float32))
    out = []
    for sample in wide.split(packing.cu_seqlens.diff().tolist()):
        q, k, v = sample.permute(1, 2, 0, 3)  # 3 x [H, L, d]
        weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)
        out.append((weights @ v).transpose(0, 1))
    return torch.cat(out).to(qkv.dtype)


def varlen_attention(
    qkv: Tensor, packing: Packing, backend: Attention | None = None, bias: Tensor | None = None
) -> Tensor:
    """Self-attention within each sample of a packed stream, with scale 1/√d.

    Args:
        qkv: [N, 3, H, d], any floating type.
        packing: lengths of the samples.
        backend: overrides the choice of `set_attention`; see `attention_backend`.
        bias: [3·H·d] or None, the bias of the layer that made qkv. qkv already includes it; it only receives its
            gradient here (see `bias_gradient`). The gradient of the keys' third is 0: a bias on all keys shifts all
            scores of a query equally, which softmax ignores.

    Returns:
        [N, H, d] in qkv's type.

    Raises:
        ValueError: qkv is not [N, 3, H, d] with the packing's N or is on another device; the backend is unknown or
            cannot take qkv.
    """
    check_tensor("qkv", qkv, (packing.num_tokens, 3, "H", "d"))
    check_devices(qkv=qkv, packing=packing.cu_seqlens)
    name, _ = attention_backend(qkv.device, qkv.dtype, qkv.shape[-1], packing, backend)
    width = qkv.shape[2] * qkv.shape[3]
    if bias is not None:
        check_tensor("bias", bias, (3 * width,))
    qkv = bias_gradient(qkv, bias, zeros=(width, 2 * width))
    if name == "triton":
        return short_attention_fwd(qkv, packing.cu_seqlens, packing.max_seqlen)[0]
    if qkv.numel() == 0:
        return qkv[:, 0]
    if name == "matmul":
        return BatchedAttentionFunction.apply(paired_runs(packing, packing), qkv)
    if name == "flash_attn":
        from flash_attn import flash_attn_varlen_qkvpacked_func

        return flash_attn_varlen_qkvpacked_func(qkv, packing.cu_seqlens, packing.max_seqlen, deterministic=True)
    q, k, v = qkv.unbind(1)
    if name == "varlen_attn":
        from torch.nn.attention.varlen import varlen_attn

        cu_seqlens, longest = packing.cu_seqlens, packing.max_seqlen
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest)  # type: ignore[return-value]
    return dense_attention(q, k, v, paired_runs(packing, packing))


def dense_attention(q: Tensor, k: Tensor, v: Tensor, runs: list[tuple[int, int, int]]) -> Tensor:
    """SDPA of q [N, H, d] over k, v [M, H, d]: [N, H, d]. One call per run of `paired_runs`, on views.

    With several runs, the outputs (and in the backward pass the gradients) are copied into one tensor. A sample without
    keys gets zeros.
    """
    _, H, d = q.shape

    def heads(x: Tensor, which: int) -> list[Tensor]:  # one [S, H, L, d] per run
        parts = [x] if len(runs) == 1 else x.split([run[0] * run[which] for run in runs])
        return [part.view(run[0], run[which], H, d).transpose(1, 2) for part, run in zip(parts, runs, strict=True)]

    out = []
    for q_, k_, v_ in zip(heads(q, 1), heads(k, 2), heads(v, 2), strict=True):
        if q_.shape[2] > 0:
            mixed = F.scaled_dot_product_attention(q_, k_, v_) if k_.shape[2] > 0 else torch.zeros_like(q_)
            out.append(mixed.transpose(1, 2).reshape(-1, H, d))
    return out[0] if len(out) == 1 else torch.cat(out)


def _select(
    device: torch.device, dtype: torch.dtype, head_dim: int, runs: int | None, max_seqlen: int, cross: bool, choice: str
) -> tuple[str, str]:
    _check_known(choice)
    if choice != "auto":
        reason = _refusal(choice, device, dtype, head_dim, cross)
        if reason:
            raise ValueError(f"backend: {choice} {reason}; 'auto' takes one that can run")
        return choice, "was asked for"
    if device.type == "cpu" and not stands_for_gpu():
        if max_seqlen > FEW_TOKENS and not torch.is_grad_enabled():
            return "sdpa", f"is the fastest on a CPU above {FEW_TOKENS} tokens a sample where no gradient is asked for"
        return "matmul", "is the fastest on a CPU at these lengths, forward and backward"
    refused = {name: _refusal(name, device, dtype, head_dim, cross) for name in ("triton", "flash_attn", "varlen_attn")}
    return _automatic(refused, runs, max_seqlen)


def _automatic(refused: dict[str, str], runs: int | None, max_seqlen: int) -> tuple[str, str]:
    """The rule of `auto` on other devices than the CPU: (backend, reason).

    refused: for triton, flash_attn and varlen_attn, why each cannot run, or "".
    """
    if max_seqlen <= SHORT and not refused["triton"]:
        return "triton", "is made for short samples, takes ragged streams and gives the same gradient bits each time"
    if not refused["flash_attn"]:
        return "flash_attn", "takes ragged streams and gives the same gradient bits each time"
    why = f"flash_attn {refused['flash_attn']}"
    if runs is not None and runs <= 1:
        return "sdpa", f"has one dense batch; {why}"
    if not refused["varlen_attn"]:
        return "varlen_attn", f"takes ragged streams in one call; {why}"
    return "sdpa", f"runs anywhere; {why}; varlen_attn {refused['varlen_attn']}"


def _check_known(choice: str) -> None:
    if choice not in NAMES:
        near = difflib.get_close_matches(str(choice), NAMES, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {choice!r}{hint}")


def _refusal(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, cross: bool = False) -> str:
    """Why a backend cannot take such a tensor; "" if it can."""
    if name in ("sdpa", "matmul"):
        return ""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"takes bf16 and fp16, not {str(dtype).removeprefix('torch.')}"
    if head_dim % 8 or head_dim > 256:
        return f"takes head dimensions up to 256 that are multiples of 8, not {head_dim}"
    if name == "triton":
        if cross:
            return "takes self-attention alone"
        if head_dim not in (16, 32, 64):
            return f"takes head dimensions 16, 32 and 64, not {head_dim}"
        return "" if runs_triton(device) else "needs Triton and a CUDA GPU"
    return _flash_attn_missing(device) if name == "flash_attn" else _varlen_attn_missing(device)


# Facts about the machine: torch.compile calls these once and keeps the answer. Slow queries are cached as well.
@untraced
def _flash_attn_missing(device: torch.device) -> str:
    return _flash_attn_refusal() or _device_refusal("flash_attn::_flash_attn_varlen_forward", device)


@untraced
def _varlen_attn_missing(device: torch.device) -> str:
    return _varlen_attn_refusal() or _device_refusal("torch_attn::_varlen_attn", device)


def _device_refusal(op: str, device: torch.device) -> str:
    if stands_for_gpu():
        return ""
    if device.type != "cuda":
        there = torch._C._dispatch_has_kernel_for_dispatch_key(op, device.type.upper())
        return "" if there else f"has no kernel for {device.type}"
    return _gpu_refusal(device)


@cache
def _gpu_refusal(device: torch.device) -> str:
    """Why neither flash_attn nor varlen_attn runs on this GPU; "" if they do."""
    if not torch.cuda.is_available():
        return "needs a CUDA GPU"
    major, minor = torch.cuda.get_device_capability(device)
    return "" if major >= 8 else f"needs compute capability 8.0, this GPU has {major}.{minor}"


@cache
def _flash_attn_refusal() -> str:
    return package_refusal("flash-attn", "flash_attn", *FLASH_ATTN_VERSIONS, FLASH_ATTN_SIGNATURES)


@cache
def _varlen_attn_refusal() -> str:
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401
    except ImportError:
        return f"is not in torch {torch.__version__}"
    if torch.cuda.is_available() and not torch.backends.cuda.is_flash_attention_available():
        return "needs a torch built with flash attention"
    return ""
