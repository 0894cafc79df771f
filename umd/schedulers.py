"""Samplers by name: our DDIM and DDPM, and diffusers' fast solvers of the same process.

A solver gets a predicted image at each time and computes the next x_t. It adds no noise, so a sample depends on its
first noise alone. Its state lives on the host, so its steps are not recorded as CUDA graphs.
"""

from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from umd.config import Capture, Prediction, SamplerName
from umd.errors import UserError
from umd.guidance import Denoise, Estimator, Guidance, check_labels
from umd.noise import Noise
from umd.ops import ddim_step
from umd.sampler import DDIM, Callback, ddpm_times, first_noise, model_times
from umd.schedule import NoiseSchedule

FULL_NAMES: dict[SamplerName, str] = {
    "ddim": "DDIM", "ddpm": "DDPM", "dpm++": "DPM-Solver++ (2M)", "heun": "Heun", "unipc": "UniPC (2)"
}  # fmt: skip
SCHEDULERS = {
    "dpm++": "DPMSolverMultistepScheduler", "heun": "HeunDiscreteScheduler", "unipc": "UniPCMultistepScheduler"
}  # fmt: skip
# Smallest log(√ᾱ/√(1-ᾱ)) at which solvers begin, as DPM-Solver's authors do: below it ε says nothing about the image.
LEAST_LOG_SNR = -5.1


def check_name(name: str) -> None:
    """Raise UserError for an unknown sampler."""
    if name not in get_args(SamplerName):
        raise UserError(f"unknown sampler {name!r}; expected one of {', '.join(get_args(SamplerName))}")


def sampler_times(name: SamplerName, num_steps: int, schedule: NoiseSchedule) -> list[int]:
    """Model times of a sampler's calls, the noisiest first. Heun calls twice at each time except the first.

    Raises UserError for an unknown sampler, and for a number of steps that it does not allow.
    """
    check_name(name)
    if name == "ddim":
        return model_times(num_steps, schedule.num_steps)
    if name == "ddpm":
        return ddpm_times(num_steps, schedule.num_steps)
    most = _num_times(schedule) - 1
    if not 1 <= num_steps <= most:
        raise UserError(f"{name} cannot sample in {num_steps} steps; with this noise schedule it takes 1 to {most}")
    times = [int(index) + 1 for index in np.linspace(0, most, num_steps + 1).round()[:0:-1]]
    return times if name != "heun" else [times[0], *np.repeat(times[1:], 2).tolist()]


def check_settings(name: SamplerName, eta: float, capture: Capture) -> None:
    """Raise UserError for an unknown sampler, and for settings that it does not have."""
    check_name(name)
    if name != "ddim" and eta != 1:
        raise UserError(f"eta is {eta:g}, and it is DDIM's alone; leave it out with {name}")
    if name not in ("ddim", "ddpm") and capture == "on":
        raise UserError(f"--capture on is for ddim and ddpm; a step of {name} is decided on the host: leave it at auto")


def open_sampler(
    name: SamplerName, denoise: Denoise, shape: tuple[int, int, int, int], schedule: NoiseSchedule, *, num_steps: int,
    eta: float, capture: Capture, **arguments: Any,
) -> "DDIM | Solver":  # fmt: skip
    """Make the named sampler for batches of one shape. arguments: the arguments that `DDIM` and `Solver` share.

    Raises UserError for an unknown sampler, and for settings that it does not have: eta other than 1 except with ddim,
    capture "on" except with ddim and ddpm, steps out of range.
    """
    check_settings(name, eta, capture)
    if name in ("ddim", "ddpm"):
        ancestral = name == "ddpm"
        return DDIM(
            denoise, shape, schedule, num_steps=num_steps, eta=eta, capture=capture, ancestral=ancestral, **arguments
        )
    return Solver(name, denoise, shape, schedule, num_steps=num_steps, **arguments)


class Solver:
    """A second-order solver for many batches of one shape. The result is the image that the last call predicts.

    DPM-Solver++ (Lu et al. 2022), Heun's method (Karras et al. 2022) or UniPC (Zhao et al. 2023).
    """

    def __init__(
        self, name: SamplerName, denoise: Denoise, shape: tuple[int, int, int, int], schedule: NoiseSchedule, *,
        num_steps: int, clip: bool, predict: Prediction = "eps", labelled: bool, null_label: int | None,
        cfg_scale: float, seed: int, device: torch.device | str, guidance: Guidance | None = None,
        head_weights: Tensor | None = None,
    ):  # fmt: skip
        """Arguments as in `DDIM`. Raises UserError if diffusers is not installed."""
        self.name, self.shape, self.null_label, self.num_steps = name, shape, null_label, num_steps
        self.cfg_scale, self.clip = cfg_scale, clip
        self.times = sampler_times(name, num_steps, schedule)
        self.labels = torch.zeros(shape[0], dtype=torch.int64, device=device) if labelled else None
        self.noise = Noise(seed, 0, shape, device)
        self.estimate = Estimator(
            denoise, self.times, schedule, predict=predict, labels=self.labels, null_label=null_label,
            cfg_scale=cfg_scale, channels=shape[1], guidance=guidance, head_weights=head_weights,
        )  # fmt: skip
        self.tables = [table.to(device) for table in self.estimate.tables]
        alphas = schedule.alphas_cumprod[self.times]
        zeros = torch.zeros_like(alphas)  # only the predicted image of `ddim_step` is used, not x_next
        self.coefficients = torch.stack([alphas.sqrt(), (1 - alphas).sqrt(), zeros, zeros, zeros], 1).to(device)
        self.scheduler = _scheduler(name, schedule)

    @torch.no_grad()
    def __call__(
        self, labels: Tensor | None = None, *, first_sample: int = 0, x_T: Tensor | None = None,
        callback: Callback | None = None,
    ) -> Tensor:  # fmt: skip
        """Draw a batch [B, C, H, W]: images first_sample .. first_sample + B - 1 of the seed."""
        check_labels(labels, self.shape[0], self.null_label)
        if (labels is None) != (self.labels is None):
            raise ValueError(f"labels: expected {'None' if self.labels is None else 'int64 [B]'}, as `labelled` said")
        if self.labels is not None and labels is not None:
            self.labels.copy_(labels)
        self.noise.start_at(first_sample)
        scheduler = self.scheduler
        if self.name == "heun":
            # diffusers' default times for Heun would lie between our integer times
            scheduler.set_timesteps(timesteps=[time - 1 for time in dict.fromkeys(self.times)])
        else:
            scheduler.set_timesteps(self.num_steps)
        scheduler.set_begin_index(0)
        x = first_noise(self.noise, x_T, self.shape) * scheduler.init_noise_sigma
        x_start = x
        for i, timestep in enumerate(scheduler.timesteps):
            x_t = scheduler.scale_model_input(x, timestep)
            x_start = self.x_start(x_t, i)
            x = scheduler.step(x_start, timestep, x).prev_sample
            if callback is not None:
                callback(i, len(self.times), x_t, x_start)
        return x_start

    def x_start(self, x_t: Tensor, i: int) -> Tensor:
        """The image [B, C, H, W] that call i predicts, guided and clipped."""
        time, numbers = (table[i] for table in self.tables)
        found = self.estimate(self.estimate.guided[i], x_t, time, numbers)
        _, x_start = ddim_step(
            x_t, found.cond, found.uncond, self.cfg_scale, self.coefficients[i].to(x_t), from_xstart=found.from_xstart,
            clip=self.clip,
        )  # fmt: skip
        return x_start


def _num_times(schedule: NoiseSchedule) -> int:
    """The number of model times from 1 on whose log SNR is at least `LEAST_LOG_SNR`."""
    alphas = schedule.alphas_cumprod[1:]
    return int(((alphas / (1 - alphas)).log() / 2 >= LEAST_LOG_SNR).sum())


def _scheduler(name: SamplerName, schedule: NoiseSchedule) -> Any:
    """diffusers' scheduler, restricted to the times that are used, and fed with predicted images."""
    try:
        import diffusers
    except ImportError as error:
        raise UserError(f"the sampler {name} is diffusers': pip install diffusers") from error
    T = _num_times(schedule)
    betas = schedule.betas[:T].numpy()
    return getattr(diffusers, SCHEDULERS[name])(num_train_timesteps=T, trained_betas=betas, prediction_type="sample")
