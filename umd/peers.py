"""DiT, MAE and MaskDiT as published: their settings of the UMD network, and the losses they were trained with.

The paper instead compares with these methods on UMD's own network: see `OBJECTIVES` in `umd/config.py`.

    DiT      Peebles and Xie 2023, facebookresearch/DiT        encoder only; predicts ε and the variance of a step
    MAE      He et al. 2022, facebookresearch/mae              no time; a narrow decoder predicts hidden patches
    MaskDiT  Zheng et al. 2024, Anima-Lab/MaskDiT              hides half the patches; a decoder; EDM's preconditioning
"""

import math
from typing import Any

import torch
from torch import Tensor

from umd import ops
from umd.config import ModelConfig, ObjectiveConfig
from umd.errors import UserError
from umd.model import SIGMA_DATA, edm_denoised
from umd.objective import WORD, Corruption, Objective
from umd.pixel_stats import normalized, standardize, unstandardize
from umd.schedule import NoiseSchedule

DIT: dict[str, Any] = dict(
    num_cls=0, norm_affine=False, positions="sincos", outputs="eps_sigma", decoder_depth=0,
)  # fmt: skip
MAE: dict[str, Any] = dict(
    num_cls=1, embedding="none", adaLN=False, gelu="exact", positions="sincos", outputs="x_start",
    decoder_depth=8, decoder_hidden_size=512, decoder_num_heads=16,
)  # fmt: skip
MASKDIT: dict[str, Any] = dict(
    num_cls=0, norm_affine=False, positions="sincos", outputs="edm",
    decoder_depth=8, decoder_hidden_size=512, decoder_num_heads=16,
)  # fmt: skip

MASKDIT_MAE_WEIGHT = 0.1


class PeerObjective(Objective):
    """Corruption and loss of the published DiT, MAE and MaskDiT, whose outputs differ from UMD's (x̂0, ε̂).

    Arguments as in `Objective`.

    Raises:
        UserError: as `Objective`; or no_noise_prob or the noise schedule does not fit the network's output.
    """

    def __init__(self, model: ModelConfig, config: ObjectiveConfig, schedule: NoiseSchedule):
        super().__init__(model, config, schedule)
        noise_free = model.outputs == "x_start"
        if config.no_noise_prob != noise_free:
            raise UserError(
                f"no_noise_prob is {config.no_noise_prob}, but a network whose output is {model.outputs} is trained "
                f"{'without noise: use 1' if noise_free else 'with noise alone: use 0'}"
            )
        if (schedule.name == "edm") != (model.outputs == "edm"):
            raise UserError(f"the output is {model.outputs}, the noise schedule {schedule.name}; edm goes with edm")
        self.tables = bound_tables(schedule)

    def part_names(self) -> tuple[str | None, ...]:
        return {
            "x_start": (None, None, "loss_clean"),
            "eps": ("loss_eps", None, None),
            "eps_sigma": ("loss_eps", "loss_vb", None),
            "edm": ("loss_dsm", "loss_mae" if self.config.mask_ratio else None, None),
        }[self.model.outputs]

    def times(self, words: Tensor) -> Tensor:
        """Map random words [n] to times. EDM: fp32 ln(σ)/4 with ln σ ~ N(-1.2, 1.2²). Others: model times, as UMD."""
        if self.model.outputs != "edm":
            return super().times(words)
        normal = torch.special.ndtri((words.double() + 0.5) / WORD)
        return ((1.2 * normal - 1.2) / 4).float()

    def coefficients(self, c: Corruption, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Coefficients of image and noise in the network's input for the noised samples, [n] each.

        EDM: c_in and c_in·σ. Others: (√ᾱ, √(1-ᾱ)).
        """
        if self.model.outputs != "edm":
            return super().coefficients(c, dtype)
        sigma = edm_sigma_of(c)
        scale = (sigma**2 + SIGMA_DATA**2).rsqrt()
        return scale.to(dtype), (scale * sigma).to(dtype)

    def loss(self, prediction: Tensor, x_start: Tensor, c: Corruption) -> tuple[Tensor, Tensor]:
        """Loss of a prediction [B·L, O·P·P] for images x_start [B, C, H, W]: (total, parts [3] as in `part_names`)."""
        P, L = self.model.patch_size, self.model.num_patches
        wide = torch.promote_types(prediction.dtype, torch.float32)
        x0 = ops.patchify(x_start.to(wide), P)  # [B, L, C·P·P]
        out = prediction.to(wide).view(*x0.shape[:2], -1, x0.shape[2]).unbind(2)  # O / C of [B, L, C·P·P]
        visible = torch.zeros(len(x0) * L, dtype=wide, device=x0.device).index_fill(0, c.ids_keep, 1).view(len(x0), L)
        hidden, zero = 1 - visible, x0.new_zeros(())
        if self.model.outputs == "x_start":
            loss = masked_mean(hidden, (out[0] - mae_target(x0, self.model, self.config)) ** 2)
            return loss, torch.stack([zero, zero, loss]).detach()
        eps = ops.patchify(ops.standard_noise(c.noise, x_start.to(wide)), P)
        if self.model.outputs == "edm":
            dsm, mae = self.edm_losses(out[0], x0, eps, edm_sigma_of(c).to(wide), visible)
            return dsm + MASKDIT_MAE_WEIGHT * mae, torch.stack([dsm, mae, zero]).detach()
        mse, vb = masked_mean(visible, (out[0] - eps) ** 2), zero
        if self.model.outputs == "eps_sigma":
            if self.tables.device != x0.device:  # copied once: a captured step must not copy from the host
                self.tables = self.tables.to(x0.device)
            vb = masked_mean(visible, variational_bound(self.tables, x0, eps, c.timesteps, *out))
        return mse + vb, torch.stack([mse, vb, zero]).detach()

    def edm_losses(self, F_x: Tensor, x0: Tensor, eps: Tensor, sigma: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        """MaskDiT's two losses, from F_x, x0, eps [B, L, C·P·P] and sigma [B]:

        - dsm: EDM's weighted denoising error over visible patches;
        - mae: over hidden patches, the error of the denoised image against the *noisy* image, whose patches are each
          normalised. 0 without a mask.
        """
        s = sigma.view(-1, 1, 1)
        x = x0 + s * eps
        denoised = edm_denoised(x, F_x, s)
        weight = (s**2 + SIGMA_DATA**2) / (s * SIGMA_DATA) ** 2
        dsm = masked_mean(visible, weight * (denoised - x0) ** 2)
        if not self.config.mask_ratio:
            return dsm, dsm.new_zeros(())
        return dsm, masked_mean(1 - visible, (denoised - normalized(x)) ** 2)


def edm_sigma_of(c: Corruption) -> Tensor:
    """σ of the noised samples, fp64 [n], from their times ln(σ)/4."""
    return (4 * c.timesteps[: c.num_noised].double()).exp()


def masked_mean(weight: Tensor, error: Tensor) -> Tensor:
    """Mean of an error [B, L, values] over the patches whose weight [B, L] is 1."""
    return (error.mean(-1) * weight).sum() / weight.sum()


def mae_target(patches: Tensor, model: ModelConfig, config: ObjectiveConfig) -> Tensor:
    """What an MAE predicts of true patches [..., C·P·P] in -1..1: with its pixel statistics, normalised by norm_pix."""
    patches = standardize(patches) if model.pixel_stats == "imagenet" else patches
    return normalized(patches) if config.norm_pix else patches


def mae_pixels(predicted: Tensor, patches: Tensor | None, model: ModelConfig, config: ObjectiveConfig) -> Tensor:
    """The inverse of `mae_target`: predicted patches [..., C·P·P] as pixels in -1..1.

    patches: the true patches, whose mean and deviation norm_pix needs; else they may be None.
    """
    imagenet = model.pixel_stats == "imagenet"
    if config.norm_pix:
        assert patches is not None
        variance, mean = torch.var_mean(standardize(patches) if imagenet else patches, dim=-1, keepdim=True)
        predicted = predicted * (variance + 1e-6).sqrt() + mean
    return unstandardize(predicted) if imagenet else predicted


def bound_tables(schedule: NoiseSchedule) -> Tensor:
    """The schedule's numbers for `variational_bound`, float64 [6, T], column t - 1 for model time t.

    Rows: √ᾱ, √(1-ᾱ), the factors of x0 and of x_t in the mean of the true step, and the logarithms of the smallest and
    largest variance.
    """
    betas, alphas = schedule.betas, schedule.alphas_cumprod
    before, after = alphas[:-1], alphas[1:]
    variance = betas * (1 - before) / (1 - after)  # of the true step
    least = torch.cat([variance[1:2], variance[1:]]).log()  # the first variance is 0: the second replaces it
    of_x0, of_x_t = betas * before.sqrt() / (1 - after), (1 - before) * (1 - betas).sqrt() / (1 - after)
    return torch.stack([after.sqrt(), (1 - after).sqrt(), of_x0, of_x_t, least, betas.log()])


def variational_bound(
    tables: Tensor, x0: Tensor, eps: Tensor, timesteps: Tensor, eps_hat: Tensor, v: Tensor
) -> Tensor:  # fmt: skip
    """Terms of the variational bound on -log2 p(x0), one for each value, in bits (Nichol and Dhariwal 2021).

    The bound trains v alone: ε̂ gets no gradient.

    - Time 1: the negative log-likelihood of x0, discretised in steps of 1/127.5.
    - Later times: KL(true Gaussian of the step ‖ learned Gaussian).

    Args:
        tables: of `bound_tables`.
        x0, eps, eps_hat, v: [B, L, values].
        timesteps: int64 [B], model times.
    """
    numbers = tables[:, timesteps - 1].to(x0.dtype)  # [6, B]
    a, b, of_x0, of_x_t, least, largest = numbers.view(6, -1, 1, 1)
    x_t = a * x0 + b * eps
    mean = of_x0 * (x_t - b * eps_hat.detach()) / a + of_x_t * x_t
    true_mean = of_x0 * x0 + of_x_t * x_t
    share = (v + 1) / 2
    log_var = share * largest + (1 - share) * least
    divergence = 0.5 * (log_var - least - 1 + (least - log_var).exp() + (true_mean - mean) ** 2 * (-log_var).exp())
    likelihood = discretized_log_likelihood(x0, mean, 0.5 * log_var)
    return torch.where(timesteps.view(-1, 1, 1) == 1, -likelihood, divergence) / math.log(2)


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log of a Gaussian's mass in x ± 1/255, with an open interval at x = -1 and 1.

    The normal distribution function is approximated as in DiT's code.
    """

    def below(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    inverse = (-log_scale).exp()
    upper, lower = below(inverse * (x - mean + 1 / 255)), below(inverse * (x - mean - 1 / 255))
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return mass.clamp(min=1e-12).log()
