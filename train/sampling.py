"""Resolve the sampling options that several commands share, and record everything that an image depends on."""

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from rich.console import Console

from umd.config import ModelConfig, Prediction
from umd.errors import UserError
from umd.guidance import Guidance
from umd.model import UMD
from umd.schedule import schedule_of
from umd.schedulers import FULL_NAMES, SCHEDULERS, check_settings, sampler_times
from umd.tokenizer import Tokenizer
from umd.train.heads import Heads, heads_file, heads_of, read_heads
from umd.train.options import Sampling
from umd.train.run import RunConfig

GROUP = 32  # images per network call
FAST_STEPS = 25  # default steps of the solvers of diffusers


def steps_of(options: Sampling, config: RunConfig) -> int:
    if options.steps is not None:
        return options.steps
    if options.sampler not in ("ddim", "ddpm"):
        return FAST_STEPS
    return 125 if config.model.channels in (1, 3) else 250


def chosen_guidance(options: Sampling) -> Guidance:
    return Guidance(options.cfg_interval, options.cfg_schedule, options.cfg_channels)


def check_sampling(options: Sampling, config: RunConfig) -> None:
    """Raise UserError, before the network is loaded, for steps, guidance or an output that this run cannot have."""
    schedule = schedule_of(config.schedule)
    check_settings(options.sampler, options.eta, options.capture)
    times = sampler_times(options.sampler, steps_of(options, config), schedule)
    guidance = chosen_guidance(options)
    guidance.scales(1.0, times, schedule.num_steps)
    guidance.check(config.model.channels)
    assert isinstance(config.model, ModelConfig)
    if options.predict in ("eps", "x_start") and options.predict not in config.model.predictions:
        raise UserError(f"this network predicts no {options.predict}; leave out --predict {options.predict}")


def prediction_of(
    options: Sampling, config: RunConfig, weights: dict[str, Any], model: UMD, dtype: torch.dtype, console: Console
) -> tuple[Prediction, Heads | None]:
    """Resolve --predict for a run's weights. Returns the prediction and, for `both`, the heads' weights.

    For an explicit `both`, the heads are measured if they have not been.
    """
    if options.predict == "auto":
        heads = read_heads(heads_file(config.out, weights))
        return ("eps" if heads is None else "both"), heads
    if options.predict == "both":
        return "both", heads_of(config, weights, model, dtype, console)
    return options.predict, None


def clips(config: RunConfig, tokenizer: Tokenizer | None) -> bool:
    """Whether to clip predicted images to [-1, 1]: pixels yes, latents no."""
    return tokenizer is None and config.model.channels in (1, 3)


def draw_recipe(
    config: RunConfig, weights: dict[str, Any], device: torch.device, dtype: torch.dtype,
    tokenizer: Tokenizer | None, count: int, options: Sampling, *, classes: Sequence[int], order: str,
    cfg_scale: float, seed: int, predict: Prediction, heads: Heads | None,
) -> dict[str, Any]:  # fmt: skip
    """Record everything that an image, or a score of many images, depends on."""
    schedule, steps = schedule_of(config.schedule), steps_of(options, config)
    times = sampler_times(options.sampler, steps, schedule)
    guided = cfg_scale != 1
    recipe = {
        "weights": weights,
        "count": count,
        "classes": "none" if not classes else list(classes),
        "labels": order,
        "cfg_scale": cfg_scale,
        "times": schedule.num_steps,
        "cfg_interval": list(options.cfg_interval or (1, schedule.num_steps)) if guided else None,  # timesteps
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
    return recipe | ({"diffusers": version("diffusers")} if options.sampler in SCHEDULERS else {})
