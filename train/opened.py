"""Open what commands on a finished run need, its network and VAE; and time a network call."""

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import Progress, TaskID
from torch import Tensor

from umd.checkpoint import checkpoint_path
from umd.conditions import denoiser
from umd.errors import UserError
from umd.feature_networks import default_features
from umd.machine.device import seconds_of, take_device
from umd.methods import AnyModel
from umd.metrics import FeatureStatistics, feature_statistics
from umd.model import UMD
from umd.tokenizer import Tokenizer, load_tokenizer
from umd.train.latents import tokenizer_of
from umd.train.run import RunConfig
from umd.train.shards import own_device
from umd.train.weights import load_model

M = TypeVar("M", bound=AnyModel)


def open_run(
    config: RunConfig, ema: bool = True, step: int | None = None
) -> tuple[AnyModel, torch.device, torch.dtype]:
    """Load the network of a run. Returns network, device and autocast dtype.

    ema: use the EMA weights if the run has them. step: step of the checkpoint; None: the newest.
    """
    device, dtype = take_device(own_device(config.device), config.precision)
    path = config.out if step is None else checkpoint_path(config.checkpoints, step)
    return load_model(path, ema, device, config.model.image_size), device, dtype


def open_run_of(
    kind: type[M], config: RunConfig, ema: bool = True, step: int | None = None
) -> tuple[M, torch.device, torch.dtype]:
    """`open_run` for a network known to be of class `kind`, which is asserted."""
    model, device, dtype = open_run(config, ema, step)
    assert isinstance(model, kind)
    return model, device, dtype


def open_tokenizer(config: RunConfig, vae: str, device: torch.device) -> Tokenizer | None:
    """Load the VAE that decodes a run's samples, from `vae` if given. None for a run on pixels.

    Raises UserError if the VAE is missing or not the run's.
    """
    if not vae or config.data.vae_hash:
        tokenizer = tokenizer_of(replace(config.data, vae=vae or config.data.vae), device)
        if tokenizer is None and config.model.channels not in (1, 3):
            raise UserError(
                f"{config.out} makes latents of {config.model.channels} channels, which a VAE turns into pictures; "
                "give it, e.g. --vae stabilityai/sd-vae-ft-ema"
            )
        return tokenizer
    on_pixels = UserError(f"{config.out} is a run on pixels; leave out --vae")
    if config.model.channels in (1, 3):
        raise on_pixels
    tokenizer = load_tokenizer(vae, device)  # imported weights do not record their VAE
    if tokenizer.vae.channels != config.model.channels:
        raise on_pixels
    return tokenizer


@contextmanager
def sampling_progress(console: Console | None, what: str) -> Iterator[Callable[[int, int, Tensor, Tensor], None]]:
    """Show a progress bar; yields the callback for the samplers."""
    with Progress(console=console, transient=True, disable=console is None or not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda i, n, x_t, x_start: bar.update(task, completed=i + 1, total=n)


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Median time of three calls, in seconds."""
    return statistics.median(seconds_of(call, device) for _ in range(3))


def seconds_a_call(model: UMD, batch: int, dtype: torch.dtype) -> float:
    """Measure one network call on `batch` images with labels, in seconds."""
    device = next(model.parameters()).device
    x = torch.zeros(batch, model.config.channels, *model.config.image_size, device=device)
    t = torch.ones(batch, dtype=torch.int64, device=device)
    labels = torch.zeros(batch, dtype=torch.int64, device=device)
    denoise = denoiser(model, dtype)
    with torch.no_grad():
        return timed(lambda: denoise(x, t, labels), x.device)


def show_done(bar: Progress, task: TaskID, done: int) -> None:
    bar.update(task, completed=done)


def frechet(samples: Tensor, reference: Tensor, console: Console | None = None) -> tuple[str, float]:
    """Fréchet distance between samples and reference images, both [N, C, H, W] in [-1, 1].

    Returns (name, distance). The name is FID only with InceptionV3.
    """
    network, name = default_features()
    statistics: list[FeatureStatistics] = []
    for what, images in (("samples", samples), ("reference", reference)):
        with Progress(console=console, transient=True, disable=console is None or not console.is_terminal) as bar:
            task = bar.add_task(f"{name} features of {what}", total=len(images))
            statistics.append(
                feature_statistics(
                    images, network, name, device=samples.device,
                    progress=partial(show_done, bar, task),
                )
            )  # fmt: skip
    return name, statistics[0].distance(statistics[1])
