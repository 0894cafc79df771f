"""masked_diffusion_loss: the objective of UMD (its Eqs. 4 to 6) on the head's output.

    noised samples:      ½ [ mean over visible pixels (ε̂ - ε)²  +  mean over masked pixels (x̂0 - x0)² ]
                         fully visible samples (no mask): both means run over all pixels
    noise-free samples:  mean over masked pixels (x̂0 - x0)²

ε is made again from the seed `noise` that `gather_patches` used.
"""

import torch
from torch import Tensor

from .patches import patchify, standard_noise


def masked_diffusion_loss_ref(
    prediction: Tensor,
    x_start: Tensor,
    ids_keep: Tensor,
    num_visible_noised: int,
    num_noised: int,
    noise: Tensor,
    patch_size: int,
) -> tuple[Tensor, Tensor]:
    """The loss of a batch whose first `num_noised` samples are noised and whose others are noise-free.

    Args:
        prediction: [B·L, 2·C·P·P], first x̂0, then ε̂, any floating type.
        x_start: [B, C, H, W].
        ids_keep: int64, visible patches as indices into the B·L patches.
        num_visible_noised: how many of `ids_keep` belong to the noised samples.
        num_noised: n, 0 <= n <= B.
        noise, patch_size: as in `gather_patches`.

    Returns:
        (total, parts [3]): total = (1 - f)·½(eps + x0) + f·clean with f = (B - n)/B; parts = eps, x0, clean, detached;
        a part of an absent group is 0. In fp32, or fp64 for an fp64 prediction.
    """
    target_x0 = patchify(x_start, patch_size).to(torch.promote_types(prediction.dtype, torch.float32))
    B, L, D = target_x0.shape
    n = num_noised
    pred_x0, pred_eps = prediction.to(target_x0.dtype).view(B, L, 2, D).unbind(2)
    masked = torch.ones(B * L, dtype=target_x0.dtype, device=prediction.device)
    masked = masked.index_fill(0, ids_keep, 0).view(B, L)
    zero = prediction.new_zeros((), dtype=target_x0.dtype)

    def mean(squared_error: Tensor, weight: Tensor, count: int) -> Tensor:
        return (squared_error.mean(-1) * weight).sum() / count

    loss_eps = loss_x0 = loss_clean = zero
    if n > 0:
        eps = patchify(standard_noise(noise, x_start[:n]), patch_size)
        all_visible = num_visible_noised == n * L
        on_eps, on_x0 = (torch.ones_like(masked[:n]),) * 2 if all_visible else (1 - masked[:n], masked[:n])
        loss_eps = mean((pred_eps[:n] - eps) ** 2, on_eps, num_visible_noised)
        loss_x0 = mean((pred_x0[:n] - target_x0[:n]) ** 2, on_x0, n * L if all_visible else n * L - num_visible_noised)
    if n < B:
        hidden = (B - n) * L - (len(ids_keep) - num_visible_noised)
        loss_clean = mean((pred_x0[n:] - target_x0[n:]) ** 2, masked[n:], hidden)
    clean_share = (B - n) / B
    total = (1 - clean_share) * 0.5 * (loss_eps + loss_x0) + clean_share * loss_clean
    return total, torch.stack([loss_eps, loss_x0, loss_clean]).detach()
