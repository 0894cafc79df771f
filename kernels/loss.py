"""masked_diffusion_loss: UMD's objective (Eqs. 4 to 6 of the paper) on the head's output.

    noised samples:      ½ [ mean over visible pixels (ε̂ - ε)²  +  mean over masked pixels (x̂0 - x0)² ]
                         without masked patches: both means run over all pixels
    noise-free samples:  mean over masked pixels (x̂0 - x0)²

Masked patches in `ids_ignored` count in no mean. They are the patches left out when only a random subset is predicted.

ε is recomputed from the seeds `noise` that `gather_patches` used. Forward and backward each read prediction and x_start
once, and only where the loss needs them: ε̂ of visible patches, x̂0 and x0 of masked patches. Neither pass stores ε, a
target or an error. The backward pass recomputes the errors: this moves fewer bytes than writing a gradient in the
forward pass and scaling it by the upstream gradient later.
"""

import torch
from torch import Tensor

from .backend import use_triton
from .checks import check_devices, check_tensor
from .patches import check_noise, check_patches, patchify, standard_noise
from .triton.loss import masked_diffusion_loss_fwd


def masked_diffusion_loss_ref(
    prediction: Tensor,
    x_start: Tensor,
    ids_keep: Tensor,
    num_visible_noised: int,
    num_noised: int,
    noise: Tensor,
    patch_size: int,
    ids_ignored: Tensor | None = None,
    num_ignored_noised: int = 0,
) -> tuple[Tensor, Tensor]:
    """The definition of `masked_diffusion_loss`, computed in fp32 or wider."""
    target_x0 = patchify(x_start, patch_size).to(torch.promote_types(prediction.dtype, torch.float32))
    B, L, D = target_x0.shape
    n = num_noised
    pred_x0, pred_eps = prediction.to(target_x0.dtype).view(B, L, 2, D).unbind(2)
    visible = torch.zeros(B * L, dtype=target_x0.dtype, device=prediction.device).index_fill(0, ids_keep, 1)
    masked = 1 - visible
    ignored = 0
    if ids_ignored is not None:
        masked, ignored = masked.index_fill(0, ids_ignored, 0), len(ids_ignored)
    visible, masked = visible.view(B, L), masked.view(B, L)
    zero = prediction.new_zeros((), dtype=target_x0.dtype)

    def mean(squared_error: Tensor, weight: Tensor, count: int) -> Tensor:
        return (squared_error.mean(-1) * weight).sum() / count

    loss_eps = loss_x0 = loss_clean = zero
    if n > 0:
        eps = patchify(standard_noise(noise, x_start[:n]), patch_size)
        all_visible = num_visible_noised == n * L
        on_eps, on_x0 = (torch.ones_like(masked[:n]),) * 2 if all_visible else (visible[:n], masked[:n])
        loss_eps = mean((pred_eps[:n] - eps) ** 2, on_eps, num_visible_noised)
        hidden = n * L - num_visible_noised - num_ignored_noised
        loss_x0 = mean((pred_x0[:n] - target_x0[:n]) ** 2, on_x0, n * L if all_visible else hidden)
    if n < B:
        hidden = (B - n) * L - (len(ids_keep) - num_visible_noised) - (ignored - num_ignored_noised)
        loss_clean = mean((pred_x0[n:] - target_x0[n:]) ** 2, masked[n:], hidden)
    clean_share = (B - n) / B
    total = (1 - clean_share) * 0.5 * (loss_eps + loss_x0) + clean_share * loss_clean
    return total, torch.stack([loss_eps, loss_x0, loss_clean]).detach()


def masked_diffusion_loss(
    prediction: Tensor,
    x_start: Tensor,
    ids_keep: Tensor,
    num_visible_noised: int,
    num_noised: int,
    noise: Tensor,
    patch_size: int,
    ids_ignored: Tensor | None = None,
    num_ignored_noised: int = 0,
) -> tuple[Tensor, Tensor]:
    """The loss of a batch whose first `num_noised` samples are noised; the other samples are noise-free.

    Args:
        prediction: [B·L, 2·C·P·P], x̂0 then ε̂, any floating type. The only argument with a gradient.
        x_start: [B, C, H, W], any floating type.
        ids_keep: int64, indices of the visible patches among the B·L patches, each at most once.
        num_visible_noised: how many of `ids_keep` are in the noised samples.
        num_noised: n, 0 <= n <= B.
        noise, patch_size: as in `gather_patches`.
        ids_ignored: int64, indices of hidden patches left out of the loss, each at most once; the prediction is not
            read there.
        num_ignored_noised: how many of `ids_ignored` are in the noised samples.

    Returns:
        (total, parts [3]), fp32, or fp64 for an fp64 prediction.
        total = (1 - f)·½(eps + x0) + f·clean with f = (B - n)/B. parts = (eps, x0, clean), detached; 0 for a group
        without samples.

    Raises:
        ValueError: an argument has another shape, type or device, or the counts leave a mean without patches.
    """
    check_patches(x_start, ids_keep, patch_size)
    B, C, H, W = x_start.shape
    L, n = (H // patch_size) * (W // patch_size), num_noised
    check_tensor("prediction", prediction, (B * L, 2 * C * patch_size**2))
    if not 0 <= n <= B:
        raise ValueError(f"num_noised: expected 0 to B = {B}, got {n}")
    if not min(n, 1) <= num_visible_noised <= min(n * L, len(ids_keep)):
        raise ValueError(
            f"num_visible_noised: expected {min(n, 1)} to {min(n * L, len(ids_keep))} of {len(ids_keep)} visible "
            f"patches in {n} noised samples, got {num_visible_noised}"
        )
    hidden_noised = n * L - num_visible_noised
    hidden_clean = (B - n) * L - (len(ids_keep) - num_visible_noised)
    if hidden_clean < min(B - n, 1):
        raise ValueError(
            f"ids_keep: expected a hidden patch among the {(B - n) * L} of the noise-free samples, "
            f"got {len(ids_keep) - num_visible_noised} visible ones"
        )
    ignored = 0
    if ids_ignored is not None:
        check_tensor("ids_ignored", ids_ignored, ("N",), torch.int64)
        ignored = len(ids_ignored)
    left = hidden_noised - num_ignored_noised, hidden_clean - (ignored - num_ignored_noised)
    if not 0 <= num_ignored_noised <= ignored or left[0] < min(hidden_noised, 1) or left[1] < min(B - n, 1):
        raise ValueError(
            f"ids_ignored: expected to leave some of the {hidden_noised} hidden patches of noised samples and of the "
            f"{hidden_clean} of noise-free ones, got {num_ignored_noised} and {ignored - num_ignored_noised} ignored"
        )
    check_noise(noise, (n, C, H, W))
    others = dict(prediction=prediction, ids_keep=ids_keep, noise=noise, ids_ignored=ids_ignored)
    check_devices(x_start=x_start, **others)
    if not (use_triton(prediction) and use_triton(x_start)):
        return masked_diffusion_loss_ref(
            prediction, x_start, ids_keep, num_visible_noised, n, noise, patch_size, ids_ignored, num_ignored_noised
        )
    roles = torch.zeros(B * L, dtype=torch.uint8, device=prediction.device).index_fill_(0, ids_keep, 1)
    if ids_ignored is not None:
        roles.index_fill_(0, ids_ignored, 2)
    losses = masked_diffusion_loss_fwd(
        prediction, x_start, roles, noise, patch_size, n, num_visible_noised, left[0] or n * L, left[1]
    )
    return losses[0], losses[1:].detach()
