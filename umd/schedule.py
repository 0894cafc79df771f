"""Noise schedules: how much of the image is left at each time, and conversions between x_start and ε."""

import math
from typing import get_args

import torch
from torch import Tensor

from umd.config import ScheduleConfig, ScheduleName
from umd.errors import UserError

EDM_STEPS = 1000
EDM_SIGMAS = 0.002, 80.0  # smallest and largest σ


def edm_sigma(timesteps: Tensor) -> Tensor:
    """σ of EDM's process x_start + σ·ε at model times 0..1000: float64, in the shape of `timesteps`.

    Karras et al. 2022, Eq. 5 with ρ = 7: n equally spaced times give the noise levels of their n-step sampler.
    σ(0) = σ(1).
    """
    low, high = (sigma ** (1 / 7) for sigma in EDM_SIGMAS)
    share = (timesteps.double() - 1).clamp(min=0) / (EDM_STEPS - 1)
    return (low + share * (high - low)) ** 7


class NoiseSchedule:
    """The forward process x_t = √ᾱ(t)·x_start + √(1-ᾱ(t))·ε at model times t = 0..T.

    t = 0 is the noise-free image with ᾱ(0) = 1. t >= 1 is step t - 1 of the usual numbering.

    - `cosine` (Nichol and Dhariwal 2021): for pixels.
    - `linear` (Ho et al. 2020): for latents.
    - `linear_rho` (DiffMAE, Wei et al. 2023): linear, with each β raised to the power `rho`; noisier for rho < 1.
    - `edm` (Karras et al. 2022, MaskDiT): the noise levels of `edm_sigma`, with x_t divided by √(1 + σ²).

    Attributes: betas, float64 [T]; alphas_cumprod, float64 [T + 1], indexed by model time. Both are on the CPU.

    In all methods `timesteps` are integer model times, [B] for images [B, ...]. A time outside 0..T is not checked for.
    Images in float64 are computed in float64, all others in float32.

    Raises:
        UserError: an unknown name, a num_steps or rho out of range, or a schedule whose β would reach 1.
    """

    def __init__(self, name: ScheduleName = "cosine", num_steps: int = 1000, rho: float = 0.8):
        if name not in get_args(ScheduleName):
            raise UserError(f"unknown noise schedule {name!r}; expected one of {', '.join(get_args(ScheduleName))}")
        if num_steps < 1:
            raise UserError(f"a noise schedule has at least one step; num_steps is {num_steps}")
        if rho <= 0:
            raise UserError(f"rho is {rho}; the exponent of linear_rho must be above 0")
        self.name, self.num_steps = name, num_steps
        if name == "cosine":
            u = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
            f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
            self.betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
        elif name == "edm":
            if num_steps != EDM_STEPS:
                raise UserError(f"the edm schedule has {EDM_STEPS} steps; num_steps is {num_steps}")
            alphas_cumprod = 1 / (1 + edm_sigma(torch.arange(1, num_steps + 1)) ** 2)
            self.betas = 1 - alphas_cumprod / torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
        else:
            scale = 1000 / num_steps
            self.betas = torch.linspace(1e-4 * scale, 0.02 * scale, num_steps, dtype=torch.float64)
            if name == "linear_rho":
                self.betas = self.betas**rho
            if self.betas.max() >= 1:
                raise UserError(
                    f"the {name} schedule cannot have {num_steps} steps, for β would reach 1; use 21 or more"
                )
        self.alphas_cumprod = torch.cat([torch.ones_like(self.betas[:1]), torch.cumprod(1 - self.betas, 0)])
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def coefficients(self, timesteps: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """(√ᾱ(t), √(1-ᾱ(t))), each in the shape and on the device of `timesteps`; computed in float64, then cast.

        The first call for a device and dtype makes a table, which is kept: call once before capturing a CUDA graph.
        """
        key = (timesteps.device, dtype)
        if key not in self._tables:
            table = torch.stack([self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()])
            self._tables[key] = table.to(device=timesteps.device, dtype=dtype)
        sqrt_alpha, sqrt_one_minus_alpha = self._tables[key]
        return sqrt_alpha[timesteps], sqrt_one_minus_alpha[timesteps]

    def q_sample(self, x_start: Tensor, timesteps: Tensor, eps: Tensor) -> Tensor:
        """x_t from x_start and ε, all [B, ...]."""
        a, b = self._coefficients_like(x_start, timesteps)
        return a * x_start + b * eps

    def xstart_from_eps(self, x_t: Tensor, timesteps: Tensor, eps: Tensor) -> Tensor:
        """x_start from x_t and ε; x_t itself at t = 0."""
        a, b = self._coefficients_like(x_t, timesteps)
        return (x_t - b * eps) / a

    def eps_from_xstart(self, x_t: Tensor, timesteps: Tensor, x_start: Tensor) -> Tensor:
        """ε from x_t and x_start; 0 at t = 0, where no noise was added."""
        a, b = self._coefficients_like(x_t, timesteps)
        return (x_t - a * x_start) / b.masked_fill(b == 0, math.inf)

    def _coefficients_like(self, x: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """The two coefficients at times [B], shaped [B, 1, ...] so that they multiply x [B, ...]."""
        if timesteps.shape != x.shape[:1]:
            raise ValueError(f"timesteps are {list(timesteps.shape)}; expected [{len(x)}], one for each image")
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        a, b = self.coefficients(timesteps, dtype)
        shape = (-1,) + (1,) * (x.ndim - 1)
        return a.view(shape), b.view(shape)


def schedule_of(config: ScheduleConfig) -> NoiseSchedule:
    """The noise schedule of a configuration."""
    return NoiseSchedule(config.name, config.num_steps, config.rho)
