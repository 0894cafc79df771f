"""What a trained network is good at: representations and their probe, samples, inpainting, Fréchet distance."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress, TaskID
from torch import Tensor

from umd.conditions import make_conditions
from umd.config import ScheduleConfig
from umd.device import autocast, take_device
from umd.errors import UserError
from umd.methods import AnyModel, build_model, kind_of
from umd.metrics import FeatureStatistics, default_features, feature_statistics
from umd.model import UMD
from umd.ops import philox_randn
from umd.probe import ProbeResult, fewshot_accuracy, raw_pixel_features
from umd.sampler import inpaint
from umd.schedule import NoiseSchedule
from umd.tokenizer import Tokenizer, load_tokenizer
from umd.train.data import center_view, open_dataset
from umd.train.latents import tokenizer_of
from umd.train.run import RunConfig, load_model
from umd.train.shards import own_device


@dataclass(frozen=True)
class Probe:
    """Few-shot probe on the held-out split, beside raw pixels and an untrained network."""

    shots: int = 100
    """Labelled training images a class."""
    allow_fewer: bool = False
    """Let a class with fewer images give all it has."""
    l2: tuple[float, ...] = (1024.0,)
    """Ridge penalty; of several, one is chosen on a part of the shots."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Draws of the shots."""
    ema: bool = False
    """Averaged weights, where the run has them."""

    def __post_init__(self) -> None:
        if not self.seeds or min(self.seeds) < 0:
            raise UserError(f"seeds must be one or more numbers from 0, got {list(self.seeds)}")
        if not self.l2 or min(self.l2) <= 0:
            raise UserError(f"l2 must be one or more numbers above 0, got {list(self.l2)}")


NOISED_PROBE_INDEX = 50  # schedule index at which networks that never saw a noise-free image are read
M = TypeVar("M", bound=AnyModel)
Denoise = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]


def schedule_of(config: ScheduleConfig) -> NoiseSchedule:
    return NoiseSchedule(config.name, config.num_steps, config.rho)


def open_run(config: RunConfig, ema: bool = True) -> tuple[AnyModel, torch.device, torch.dtype]:
    """The network of a run on this machine's device, and the autocast type."""
    device, dtype = take_device(own_device(config.device), config.precision)
    return load_model(config.out, ema, device), device, dtype


def open_run_of(kind: type[M], config: RunConfig, ema: bool = True) -> tuple[M, torch.device, torch.dtype]:
    """`open_run` of a run whose network is known to be of this kind."""
    model, device, dtype = open_run(config, ema)
    assert isinstance(model, kind)
    return model, device, dtype


def open_tokenizer(config: RunConfig, vae: str, device: torch.device) -> Tokenizer | None:
    """The VAE that turns a run's samples into pictures, found at `vae` if given; None for a run on pixels.

    Raises UserError if it is not to be had, or not of the run.
    """
    if not vae or config.data.vae_hash:
        return tokenizer_of(replace(config.data, vae=vae or config.data.vae), device)
    tokenizer = load_tokenizer(vae, device)  # imported weights do not say which VAE they were trained behind
    if tokenizer.vae.channels != config.model.channels or config.model.channels in (1, 3):
        raise UserError(f"{config.out} is a run on pixels; leave out --vae")
    return tokenizer


def denoiser(model: UMD, dtype: torch.dtype, times: Sequence[int] = (), labels: Tensor | None = None) -> Denoise:
    """`model.denoise` under autocast, for the samplers. times, labels: all that it will be asked for, if known."""
    conditions = make_conditions(model, times, labels) if times else None

    def denoise(x_t: Tensor, timesteps: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        with autocast(x_t.device, dtype):
            return model.denoise(x_t, timesteps, labels, conditions)

    return denoise


@torch.no_grad()
def represent(
    model: AnyModel, x: Tensor, dtype: torch.dtype, schedule: NoiseSchedule | None = None, batch: int = 128
) -> Tensor:
    """Representations [N, D] of images [N, C, H, W] at t = 0; given a schedule, noised at its index 50 (for r0 = 0)."""
    device = next(model.parameters()).device
    features = []
    for i, images in enumerate(x.split(batch)):
        images = images.to(device)
        timesteps = None
        if schedule is not None:
            timesteps = torch.full((1,), NOISED_PROBE_INDEX + 1, device=device)
            eps = philox_randn(i, images.shape, device, images.dtype)
            images = schedule.q_sample(images, timesteps.expand(len(images)), eps)
        with autocast(device, dtype):
            features.append(model.represent(images, timesteps))
    return torch.cat(features)


def open_gates(model: AnyModel) -> AnyModel:
    """Set every gate of an untrained adaLN-zero network to 1: as made, its blocks do nothing and CLS sees no image."""
    if isinstance(model, UMD) and model.adaLN_modulation is not None:
        with torch.no_grad():
            for offsets in model.adaLN_modulation.offsets[:-1]:
                offsets.view(6, -1)[[2, 5]] = 1
    return model


def probe(
    config: RunConfig,
    model: AnyModel,
    shots: int,
    seeds: tuple[int, ...] = (0, 1, 2),
    l2: tuple[float, ...] = (1024.0,),
    allow_fewer: bool = False,
    dtype: torch.dtype = torch.float32,
    max_images: int | None = None,
) -> dict[str, ProbeResult]:
    """Few-shot probe on the held-out split: of the network, and of its floors, raw pixels and an untrained network.

    max_images: about how many the networks may read; the shots then come from a pool of twice as many a class, and the
    held-out images beyond the bound are left out, in a fixed random order.
    """
    train, test = open_dataset(config.data, "train"), open_dataset(config.data, "test")
    if len(test) == 0:
        raise UserError("a probe needs held-out images and data.holdout is 0; train with a share held out, e.g. 0.2")
    if train.labels is None or test.labels is None:
        raise UserError(f"a probe needs labels, and {train.name} has none; use one subfolder a class")
    train_ids, test_ids = np.arange(len(train)), np.arange(len(test))
    if max_images is not None:
        train_ids = first_of_each(train.labels, 2 * shots)  # more than the shots, so that their draws differ
        test_ids = first_of_each(test.labels, len(test))[: max(max_images - len(train_ids), 400)]
    train_x, test_x = center_view(train, train_ids, config.data), center_view(test, test_ids, config.data)
    train_y, test_y = torch.from_numpy(train.labels[train_ids]), torch.from_numpy(test.labels[test_ids])
    schedule = schedule_of(config.schedule) if getattr(config.objective, "no_noise_prob", 1) == 0 else None
    torch.manual_seed(config.seed)
    untrained = open_gates(build_model(model.config)).to(next(model.parameters()).device).eval()
    features = {
        kind_of(model.config): lambda x: represent(model, x, dtype, schedule),
        "raw pixels": raw_pixel_features,
        "untrained network, gates opened": lambda x: represent(untrained, x, dtype, schedule),
    }
    return {
        name: fewshot_accuracy(
            extract(train_x), train_y, extract(test_x), test_y, shots, len(train.class_names), seeds, l2,
            allow_fewer, train.class_names,
        )
        for name, extract in features.items()
    }  # fmt: skip


def first_of_each(labels: np.ndarray, count: int) -> np.ndarray:
    """Indices of up to `count` images of each class, the whole in random but fixed order."""
    order = np.random.default_rng(0).permutation(len(labels))
    chosen = np.concatenate([order[labels[order] == c][:count] for c in np.unique(labels)])
    return order[np.isin(order, chosen)]


@contextmanager
def sampling_progress(console: Console | None, what: str) -> Iterator[Callable[[int, int, Tensor, Tensor], None]]:
    """A progress bar as the samplers' callback."""
    with Progress(console=console, transient=True, disable=console is None or not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda i, n, x_t, x_start: bar.update(task, completed=i + 1, total=n)


def timed(call: Callable[[], object], repeats: int = 3) -> float:
    """Median seconds of a call, on a GPU too."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[repeats // 2]


def seconds_a_call(model: UMD, batch: int, dtype: torch.dtype, labelled: bool) -> float:
    """Measured seconds of one network call on `batch` images."""
    device = next(model.parameters()).device
    x = torch.zeros(batch, model.config.channels, *model.config.image_size, device=device)
    t = torch.ones(batch, dtype=torch.int64, device=device)
    labels = torch.zeros(batch, dtype=torch.int64, device=device) if labelled else None
    with torch.no_grad():
        return timed(lambda: denoiser(model, dtype)(x, t, labels))


def show_done(bar: Progress, task: TaskID, done: int) -> None:
    bar.update(task, completed=done)


def frechet(samples: Tensor, reference: Tensor, console: Console | None = None) -> tuple[str, float]:
    """(name, distance) of samples to images, both [N, C, H, W] in [-1, 1]; the name is FID only with InceptionV3."""
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


__all__ = ["denoiser", "frechet", "inpaint", "open_gates", "open_run", "probe", "represent", "schedule_of"]
