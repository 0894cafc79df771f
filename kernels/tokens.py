"""Put tokens in front of packed samples, and turn the encoder's packed output into the decoder's dense input.

`scatter_tokens` writes two kinds of rows for each sample s:

    s·(1+L)       mean of the CLS tokens of sample s
    s·(1+L)+1+l   (the token at place l of sample s, or the mask token) + pos_embed[l]
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .backend import use_triton
from .checks import check_devices, check_tensor
from .packing import Packing
from .triton.tokens import scatter_tokens_fwd, token_slots


def prepend_tokens(front: Tensor, x: Tensor, packing: Packing) -> Tensor:
    """Put front [S, n, D] before each sample of x [N - S·n, D]: [N, D]. packing: of the result."""
    n, D = front.shape[1], x.shape[-1]
    fronts = _split(front.to(x.dtype), [samples for samples, _ in packing.runs])
    bodies = _split(x, [samples * (length - n) for samples, length in packing.runs])
    out = [
        torch.cat([first, body.view(samples, length - n, D)], dim=1).flatten(0, 1)
        for first, body, (samples, length) in zip(fronts, bodies, packing.runs, strict=True)
    ]
    return _cat(out)


def split_tokens(x: Tensor, n: int, packing: Packing) -> tuple[Tensor, Tensor]:
    """The inverse of `prepend_tokens`: x [N, D] to (front [S, n, D], the rest [N - S·n, D]). packing: of x."""
    front, rest = [], []
    parts = _split(x, [samples * length for samples, length in packing.runs])
    for part, (samples, length) in zip(parts, packing.runs, strict=True):
        first, body = part.view(samples, length, x.shape[-1]).split([n, length - n], dim=1)
        front.append(first)
        rest.append(body.flatten(0, 1))
    return _cat(front), _cat(rest)


def _split(x: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    """The parts of x. Not slices: the backward of each fills a tensor of x's size with zeros, that of split cats."""
    return [x] if len(sizes) == 1 else x.split(sizes)


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def scatter_tokens_ref(
    tokens: Tensor, packing: Packing, ids_keep: Tensor, num_cls: int, mask_token: Tensor, pos_embed: Tensor
) -> Tensor:
    """The definition of `scatter_tokens`."""
    S, (L, D) = packing.num_samples, pos_embed.shape
    cls, visible = split_tokens(tokens, num_cls, packing)
    x = mask_token.to(tokens.dtype).repeat(S * L, 1)  # not expand: Inductor would then write into its single row
    x = x.index_copy(0, ids_keep, visible)
    x = x.view(S, L, D) + pos_embed.to(tokens.dtype)
    return torch.cat([cls.mean(dim=1, keepdim=True), x], dim=1).flatten(0, 1)


def scatter_tokens(
    tokens: Tensor, packing: Packing, ids_keep: Tensor, num_cls: int, mask_token: Tensor, pos_embed: Tensor
) -> Tensor:
    """Build the decoder's input from the encoder's tokens.

    Visible tokens go back to their places, the mask token to all other places, and positions are added. The average of
    a sample's CLS tokens comes in front.

    Args:
        tokens: [N, D], for each sample its `num_cls` CLS tokens, then its visible patches; any floating type.
        packing: lengths of the samples in `tokens`.
        ids_keep: int64 [N - S·num_cls], indices of the visible patches among the S·L patches, sample after sample, each
            once.
        num_cls: CLS tokens per sample, 1 or more.
        mask_token: [D], any floating type.
        pos_embed: [L, D], any floating type.

    Returns:
        [S·(1 + L), D] in tokens' type. Differentiable in tokens, mask_token and pos_embed.

    Raises:
        ValueError: shapes do not fit together or the packing, ids_keep is not int64, or tensors are on two devices.
    """
    _check(tokens, packing, ids_keep, num_cls, mask_token, pos_embed)
    if not all(use_triton(x) for x in (tokens, mask_token, pos_embed)):
        return scatter_tokens_ref(tokens, packing, ids_keep, num_cls, mask_token, pos_embed)
    slots = token_slots(ids_keep, packing.num_samples, len(pos_embed), num_cls)
    return scatter_tokens_fwd(
        tokens.contiguous(), slots, packing.cu_seqlens, mask_token.contiguous(), pos_embed.contiguous(), num_cls
    )


def _check(
    tokens: Tensor, packing: Packing, ids_keep: Tensor, num_cls: int, mask_token: Tensor, pos_embed: Tensor
) -> None:
    check_tensor("tokens", tokens, (packing.num_tokens, "D"))
    shortest, longest = min(length for _, length in packing.runs), packing.max_seqlen
    if not 1 <= num_cls <= shortest:
        raise ValueError(f"num_cls: expected 1 to {shortest}, the tokens of the shortest sample, got {num_cls}")
    D = tokens.shape[1]
    check_tensor("mask_token", mask_token, (D,))
    check_tensor("pos_embed", pos_embed, ("L", D))
    if len(pos_embed) < longest - num_cls:
        raise ValueError(f"pos_embed: expected [L, {D}] with L >= {longest - num_cls}, got {tuple(pos_embed.shape)}")
    check_tensor("ids_keep", ids_keep, (len(tokens) - packing.num_samples * num_cls,), torch.int64)
    others = dict(packing=packing.cu_seqlens, ids_keep=ids_keep, mask_token=mask_token, pos_embed=pos_embed)
    check_devices(tokens=tokens, **others)
