"""How images are drawn: the options of all commands that draw, and the record of all that an image depends on."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

import torch
from rich.console import Console

from umd.errors import UserError
from umd.guidance import Guidance, GuidanceSchedule, Prediction
from umd.model import UMD
from umd.ranges import Count, CountOrZero, Share, check_ranges
from umd.sampler import Capture
from umd.schedulers import CLASSES, FULL_NAMES, SamplerName, sampler_times
from umd.tokenizer import Tokenizer
from umd.train.evaluate import schedule_of
from umd.train.heads import Heads, heads_file, heads_of, read_heads
from umd.train.run import RunConfig

GROUP = 32  # images of every call of the network
FAST_STEPS = 25  # of the solvers of diffusers


@dataclass(frozen=True)
class Sampling:
    """How images are drawn."""

    sampler: SamplerName = "ddim"
    """ddim, ddpm, or a solver of diffusers, for few steps and without noise: dpm++, heun (two calls a step), unipc."""
    steps: Count | None = None
    """Steps; default of ddim and ddpm the paper's, 125 for pixels and 250 for latents; of the others 25."""
    eta: Share = 1.0
    """Noise of DDIM: 1 as in the paper, 0 deterministic."""
    predict: Literal["auto", "eps", "x_start", "both"] = "auto"
    """Which of the network's predictions leads: the noise, the image, or both, weighted at each time as held-out
    pictures tell; auto: both where that was measured when the run ended, else eps."""
    cfg_interval: tuple[Count, Count] | None = None
    """Guidance at these model times alone, from and to (1: least noise, 1000: most); default: at all."""
    cfg_schedule: GuidanceSchedule = "constant"
    """Guidance over time: constant, or growing towards the picture (linear, cosine) with the same mean."""
    cfg_channels: CountOrZero = 0
    """Guide only so many channels, the first ones; 0: all. DiT's code guides 3 of its latents' 4."""
    capture: Capture = "auto"
    """Replay a denoising step as one CUDA graph; auto: on a GPU, of more than a few steps."""

    def __post_init__(self) -> None:
        check_ranges(self)

    @property
    def guidance(self) -> Guidance:
        return Guidance(self.cfg_interval, self.cfg_schedule, self.cfg_channels)

    def steps_of(self, config: RunConfig) -> int:
        if self.steps is not None:
            return self.steps
        if self.sampler not in ("ddim", "ddpm"):
            return FAST_STEPS
        return 125 if config.model.channels in (1, 3) else 250

    def prediction(
        self, config: RunConfig, weights: dict[str, Any], model: UMD, dtype: torch.dtype, console: Console
    ) -> tuple[Prediction, Heads | None]:
        """What leads in samples of a run's weights, with the heads for both, which are measured if they were not."""
        if self.predict == "auto":
            heads = read_heads(heads_file(config.out, weights))
            return ("eps" if heads is None else "both"), heads
        if self.predict == "both":
            return "both", heads_of(config, weights, model, dtype, console)
        if self.predict not in model.config.heads:
            raise UserError(f"this network predicts no {self.predict}; leave out --predict {self.predict}")
        return self.predict, None


def clips(config: RunConfig, tokenizer: Tokenizer | None) -> bool:
    """Whether predicted images are held in [-1, 1]: pixels are, latents not."""
    return tokenizer is None and config.model.channels in (1, 3)


def draw_recipe(
    config: RunConfig, weights: dict[str, Any], device: torch.device, dtype: torch.dtype,
    tokenizer: Tokenizer | None, count: int, options: Sampling, *, classes: Sequence[int], order: str,
    cfg_scale: float, seed: int, predict: Prediction, heads: Heads | None,
) -> dict[str, Any]:  # fmt: skip
    """Everything that an image depends on, and that moves a score of many of them.

    Raises UserError for steps and guidance that cannot be had.
    """
    schedule, steps = schedule_of(config.schedule), options.steps_of(config)
    times = sampler_times(options.sampler, steps, schedule)
    guided = cfg_scale != 1
    options.guidance.scales(cfg_scale, times, schedule.num_steps)
    recipe = {
        "weights": weights,
        "count": count,
        "classes": "none" if not classes else list(classes),
        "labels": order,
        "cfg_scale": cfg_scale,
        "times": schedule.num_steps,
        "cfg_interval": list(options.cfg_interval or (1, schedule.num_steps)) if guided else None,  # model times
        "cfg_schedule": options.cfg_schedule if guided else None,
        "cfg_channels": options.cfg_channels if guided else None,  # 0: all
        "sampler": FULL_NAMES[options.sampler],
        "steps": steps,
        "calls": len(times),
        "eta": options.eta if options.sampler == "ddim" else None,
        "predict": predict,
        "heads": None if heads is None else {"times": heads.times, "x_start": heads.weights},
        "clip": clips(config, tokenizer),
        "seed": seed,
        "precision": "bf16" if dtype == torch.bfloat16 else "fp32",
        "device": device.type,
        "group": min(GROUP, count),
        "vae": None if tokenizer is None else tokenizer.vae.sha256,
        "rounding": "127.5 (x + 1) to the nearest of 0..255",
    }
    return recipe | ({"diffusers": version("diffusers")} if options.sampler in CLASSES else {})
