"""Tokens in front of the packed samples, and from the encoder's packed output to the decoder's dense input."""

import torch
from torch import Tensor

from .packing import Packing


def prepend_tokens(front: Tensor, x: Tensor, packing: Packing) -> Tensor:
    """Put front [S, n, D] before each sample of x; packing describes the result."""
    n, out, start, sample = front.shape[1], [], 0, 0
    for samples, length in packing.runs:
        stop = start + samples * (length - n)
        body = x[start:stop].view(samples, length - n, x.shape[-1])
        out.append(torch.cat([front[sample : sample + samples].to(x.dtype), body], dim=1).flatten(0, 1))
        start, sample = stop, sample + samples
    return torch.cat(out)


def split_tokens(x: Tensor, n: int, packing: Packing) -> tuple[Tensor, Tensor]:
    """The inverse: (front [S, n, D], the rest [N - S·n, D]); packing describes x."""
    front, rest, start = [], [], 0
    for samples, length in packing.runs:
        stop = start + samples * length
        sample = x[start:stop].view(samples, length, x.shape[-1])
        front.append(sample[:, :n])
        rest.append(sample[:, n:].flatten(0, 1))
        start = stop
    return torch.cat(front), torch.cat(rest)


def scatter_tokens_ref(
    tokens: Tensor, packing: Packing, ids_keep: Tensor, num_cls: int, mask_token: Tensor, pos_embed: Tensor
) -> Tensor:
    """Decoder input: visible tokens back in place, the mask token elsewhere, positions added, averaged CLS in front.

    Args:
        tokens: [N, D], each sample its `num_cls` CLS tokens and then its visible patches.
        packing: of `tokens`.
        ids_keep: int64, places of the visible patches among the S·L patches, sample after sample.
        mask_token: [D].
        pos_embed: [L, D].

    Returns:
        [S·(1 + L), D] in tokens' type.
    """
    S, (L, D) = packing.num_samples, pos_embed.shape
    cls, visible = split_tokens(tokens, num_cls, packing)
    x = mask_token.to(tokens.dtype).expand(S * L, D).index_copy(0, ids_keep, visible)
    x = x.view(S, L, D) + pos_embed.to(tokens.dtype)
    return torch.cat([cls.mean(dim=1, keepdim=True), x], dim=1).flatten(0, 1)
