"""add_positions: adds to each token of a packed stream the embedding of its place in the image.

y[n] = x[n] + pos_embed[ids_keep[n] % L]        dpos_embed[l] = Σ dy[n]   (over the n with ids_keep[n] % L = l)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import use_triton
from .checks import check_devices, check_tensor
from .triton.positions import add_positions_fwd
from .triton.tokens import token_slots


def add_positions_ref(x: Tensor, ids_keep: Tensor, pos_embed: Tensor) -> Tensor:
    """The definition of `add_positions`, added in fp32 or wider."""
    wide = torch.promote_types(torch.promote_types(x.dtype, pos_embed.dtype), torch.float32)
    return (x + F.embedding(ids_keep % len(pos_embed), pos_embed.to(wide))).to(x.dtype)


def add_positions(x: Tensor, ids_keep: Tensor, pos_embed: Tensor, num_samples: int) -> Tensor:
    """Compute x[n] + pos_embed[ids_keep[n] % L], added in fp32 and rounded once.

    Args:
        x: [N, D], tokens of the visible patches, sample after sample; any floating type.
        ids_keep: int64 [N], indices of these patches among the S·L patches, sample after sample, each once.
        pos_embed: [L, D], any floating type.
        num_samples: number of samples S.

    Returns:
        [N, D] in x's type. Differentiable in x and pos_embed.

    Raises:
        ValueError: shapes do not fit together, an argument has another type, or tensors are on two devices.
    """
    _check(x, ids_keep, pos_embed, num_samples)
    if not (use_triton(x) and use_triton(pos_embed)):
        return add_positions_ref(x, ids_keep, pos_embed)
    return add_positions_fwd(x, token_slots(ids_keep, num_samples, len(pos_embed), 0), pos_embed)


def _check(x: Tensor, ids_keep: Tensor, pos_embed: Tensor, num_samples: int) -> None:
    check_tensor("x", x, ("N", "D"))
    N, D = x.shape
    check_tensor("ids_keep", ids_keep, (N,), torch.int64)
    check_tensor("pos_embed", pos_embed, ("L", D))
    if num_samples < 1 or num_samples * len(pos_embed) < N:
        least = max(1, -(-N // max(len(pos_embed), 1)))
        raise ValueError(f"num_samples: expected at least {least}, for {N} tokens, got {num_samples}")
    check_devices(x=x, ids_keep=ids_keep, pos_embed=pos_embed)
